"""The cost of the bundled store, compared with a real etcd in the same run: start-up and memory, and rates.

Every target gets the same keys, is killed, restarted on them (as after a crash) and measured with the load of the other
cases. There are two fair pairs: both survive a power cut, or both do not wait for the disk. Only the store has batched
commits: answers wait up to 5 ms for further writes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import wrap
from typing import Any, NamedTuple

import grpc

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.cases import CASES
from tests.bench.measure import Figures, measure
from tests.bench.report import machine_of
from tests.bench.targets import Target
from tests.etcd.binaries import EtcdBinary
from tests.etcd.server import EtcdServer
from tests.store.process import StoreProcess
from tests.upstream.certificates import Certificates

NAME = "store"
KEYS = 100_000
VALUE_BYTES = 100
BATCH_INTERVAL_S = 0.005
CALLS = ("put-1", "put-64", "range-1", "range-64")
FANOUT = "paced"
TXN_OPERATIONS = 128
"""etcd's limit of operations in one transaction."""

_START, _END = b"many/", b"many0"
READS = {
    "count_ms": rpc_pb2.RangeRequest(key=_START, range_end=_END, count_only=True),
    "page_ms": rpc_pb2.RangeRequest(key=_START, range_end=_END, limit=500),
    "all_ms": rpc_pb2.RangeRequest(key=_START, range_end=_END),
}

Served = EtcdServer | StoreProcess
Results = dict[str, Figures]


class Kind(NamedTuple):
    """A server to measure: its constructor (on a directory), and whether its keys survive a restart."""

    make: Callable[[EtcdBinary, Path], Served]
    durable: bool = True
    fanout: bool = False
    """Whether watches are measured too; the kind of commit does not affect them."""


KINDS = {
    # In Go the last flag of a name counts: tests run etcd without fsync.
    "etcd": Kind(lambda binary, path: EtcdServer(binary, ["--unsafe-no-fsync=false"], path)),
    "store": Kind(lambda _, path: StoreProcess(path)),
    "store, batched": Kind(lambda _, path: StoreProcess(path, BATCH_INTERVAL_S)),
    "etcd, no fsync": Kind(lambda binary, path: EtcdServer(binary, (), path), fanout=True),
    "store, in memory": Kind(lambda *_: StoreProcess(None), durable=False, fanout=True),
}

COLUMNS = (
    ("start_s", "start s", 2),
    ("memory_mib", "memory MiB", 0),
    ("peak_mib", "peak MiB", 0),
    ("count_ms", "count ms", 1),
    ("page_ms", "500 keys ms", 1),
    ("all_ms", "all keys ms", 0),
)
CALL_COLUMNS = (("events_s", "calls/s", 0), ("p99_ms", "p99 ms", 1), ("cpu_us", "CPU us", 0))


def target_of(name: str, server: Served) -> Target:
    """Return the cases to measure of a server."""
    process = server.process
    assert process is not None
    return Target(name, int(server.endpoint.rpartition(":")[2]), process.pid)


@contextmanager
def kv_of(server: Served) -> Iterator[rpc_pb2_grpc.KVStub]:
    """Yield a client."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(server.endpoint, options=options) as channel:
        yield rpc_pb2_grpc.KVStub(channel)


def fill(server: Served, keys: int) -> None:
    """Put the keys."""
    with kv_of(server) as kv:
        for first in range(0, keys, TXN_OPERATIONS):
            txn = rpc_pb2.TxnRequest()
            for at in range(first, min(first + TXN_OPERATIONS, keys)):
                put = txn.success.add().request_put
                put.key, put.value = b"many/%08d" % at, b"x" * VALUE_BYTES
            kv.Txn(txn)


def read(server: Served, keys: int) -> Figures:
    """Time reads of many keys. Raises AssertionError when some are missing."""
    figures: Figures = {}
    with kv_of(server) as kv:
        for name, request in READS.items():
            started = time.monotonic()
            count = kv.Range(request).count
            figures[name] = 1000 * (time.monotonic() - started)
            assert count == keys, f"{count} keys of {keys}"
    return figures


@contextmanager
def filled(kind: Kind, binary: EtcdBinary, keys: int, figures: Figures) -> Iterator[Served]:
    """Yield a server with so many keys, started on them if it is durable; the time goes to `figures`."""
    with tempfile.TemporaryDirectory() as directory:
        with kind.make(binary, Path(directory)) as server:
            fill(server, keys)
            if not kind.durable:
                yield server
                return
        started = time.monotonic()
        with kind.make(binary, Path(directory)) as server, kv_of(server) as kv:
            kv.Range(READS["count_ms"], wait_for_ready=True)
            figures["start_s"] = time.monotonic() - started
            yield server


def measure_kind(name: str, binary: EtcdBinary, files: Certificates, keys: int) -> Figures:
    """Measure one server."""
    figures: Figures = {}
    kind = KINDS[name]
    with filled(kind, binary, keys, figures) as server:
        target = target_of(name, server)
        figures["memory_mib"] = target.memory_mib()
        figures |= read(server, keys)
        for case in (*CALLS, *((FANOUT,) if kind.fanout else ())):
            for figure, value in measure(CASES[case], target, server.endpoint, files).items():
                figures[f"{case} {figure}"] = value
        figures["peak_mib"] = target.peak_mib()
    return figures


def _cell(figures: Figures, name: str, digits: int) -> str:
    return f"{figures[name]:,.{digits}f}" if name in figures else "-"


def markdown_of(results: Results, keys: int) -> str:
    """Format the figures for the docs."""
    headings = " | ".join(heading for _, heading, _ in COLUMNS)
    lines = [f"| {keys:,} keys | {headings} |", "|---|" + "---:|" * len(COLUMNS)]
    for name, figures in results.items():
        lines.append(
            f"| {name} | " + " | ".join(_cell(figures, column, digits) for column, _, digits in COLUMNS) + " |"
        )
    headings = " | ".join(heading for _, heading, _ in CALL_COLUMNS)
    lines += [
        "",
        f"| call, in flight | target | {headings} | failed |",
        "|---|---|" + "---:|" * (len(CALL_COLUMNS) + 1),
    ]
    for case in CALLS:
        for place, (name, figures) in enumerate(results.items()):
            cells = [_cell(figures, f"{case} {column}", digits) for column, _, digits in CALL_COLUMNS]
            cells.append(_cell(figures, f"{case} lost", 0))
            lines.append(f"| {f'**{case}**' if place == 0 else ''} | {name} | " + " | ".join(cells) + " |")
    lines += ["", "| watches | CPU us/event | p99 ms | lost |", "|---|---:|---:|---:|"]
    for name, figures in results.items():
        if f"{FANOUT} cpu_us" in figures:
            cells = [_cell(figures, f"{FANOUT} {column}", digits) for column, digits in (("cpu_us", 1), ("p99_ms", 1))]
            lines.append(f"| {name} | {' | '.join(cells)} | {_cell(figures, f'{FANOUT} lost', 0)} |")
    return "\n".join(lines) + "\n"


def page_of(results: Results, about: dict[str, Any], keys: int) -> str:
    """Return the docs' text on a run."""
    what = f"One round; watches: {CASES[FANOUT].what}. etcd {about['etcd']}, {machine_of(about)}"
    return "\n".join([*wrap(what, 120), "", markdown_of(results, keys)])
