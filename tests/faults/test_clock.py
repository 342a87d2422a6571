"""The wall clock may jump, by hours and both ways: no decision of the proxy depends on it.

Two proofs. Only the modules that display the wall clock read it; deadlines, backoffs, ages and leases use the monotonic
clock. And a proxy whose wall clock jumps at every read serves as usual.

The clock of etcd is out of scope: its leases and tokens use monotonic time as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.raw_client import RawClient
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.proxy_process import ProxyProcess

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("proto", "coalesce", "upstream", "proxy")
WALL = {"time", "time_ns", "localtime", "gmtime", "ctime", "asctime", "strftime", "clock_gettime", "clock_gettime_ns"}
SHOWN = {
    "proxy/admin/monitor.py": "when the status page was made, and the points of its charts",
    "proxy/listening/handshake.py": "whether the log names an expired certificate as the cause",
    "proxy/measuring/report.py": "when the report was made",
    "proxy/measuring/status.py": "how long a certificate is still valid",
    "upstream/store/server.py": "what a durable store adds to its raft index at each start: any large number does",
}
"""The modules that may read it, and why: to display it, or as an arbitrary number."""

JUMPING = """
import pathlib, random, time
pathlib.Path(__file__).with_name("jumps").touch()
_true = time.time
time.time = lambda: _true() + random.choice((-1, 1)) * random.uniform(0, 1e6)
time.time_ns = lambda: int(time.time() * 1e9)
"""


def wall_clock(source: str) -> Iterator[int]:
    """Yield the lines on which a module's source reads the wall clock."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "time":
            if node.attr in WALL:
                yield node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            if {name.name for name in node.names} & WALL:
                yield node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            if any(name.partition(".")[0] == "datetime" for name in names):
                yield node.lineno


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("import time\ntime.monotonic()", []),
        ("import time\ntime.time()", [2]),
        ("from time import monotonic", []),
        ("def f():\n    from time import time_ns", [2]),
        ("import datetime", [1]),
        ("from datetime import datetime", [1]),
    ],
)
def test_a_reader_of_the_wall_clock_is_found(source: str, lines: list[int]) -> None:
    assert list(wall_clock(source)) == lines


def test_no_decision_depends_on_the_wall_clock() -> None:
    readers = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")) and any(wall_clock(path.read_text())):
                readers.add(path.relative_to(ROOT).as_posix())
    assert readers == set(SHOWN)


def test_a_proxy_whose_clock_jumps(etcd: EtcdServer, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING)

    async def scenario(proxy: ProxyProcess) -> None:
        writer = Writer(etcd.endpoint)
        await writer.more(5)
        async with await RawClient.connect(proxy.port) as client:
            streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
            await writer.more(20)
            etcd.kill()
            etcd.start()
            await writer.more(20)
            await all_kept(streams, etcd.endpoint, await writer.stop())

    with ProxyProcess(etcd.endpoint, ["--linger=0.1s"], {"PYTHONPATH": str(tmp_path)}) as proxy:
        run(scenario(proxy))
    assert (tmp_path / "jumps").exists(), "the proxy had a clock like any other"
