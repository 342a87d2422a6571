"""A real client's watch while the store is restored from a snapshot: does its application restart the watch?"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from tests.clients.libraries import LIBRARIES
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import LIMIT_S, until

_BY_NAME = {library.name: library for library in LIBRARIES}
PROGRAMS = {
    "python-etcd3": "python_etcd3_again.py",
    "python-aetcd": "python_aetcd_again.py",
    "node-etcd3": "node_etcd3_again.mjs",
}
"""Programs that watch w/ and restart on each error, by library."""


class Watching:
    """A running program that prints what it watches."""

    def __init__(self, process: subprocess.Popen[bytes], output: Path) -> None:
        self.process = process
        self._output = output

    def lines(self) -> list[str]:
        """Return what it has printed."""
        return self._output.read_text().splitlines()

    def has(self, line: str, times: int = 1) -> bool:
        """Return whether it has printed a line that often."""
        assert self.process.poll() is None, f"the client ended: {self.lines()}"
        return self.lines().count(line) >= times


@contextmanager
def watching(command: Sequence[str]) -> Iterator[Watching]:
    """Run a program that watches; kill it at the end."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "output"
        with output.open("wb") as to:
            process = subprocess.Popen(command, stdout=to, stderr=to)
        try:
            yield Watching(process, output)
        finally:
            process.kill()
            process.wait()


def starts_again(
    library: str, front: Callable[[str], AbstractContextManager[str]], limit_s: float = LIMIT_S
) -> tuple[bool, list[str]]:
    """
    Restore a store under a client's watch; return whether the client sees a put after that, and what it printed.

    `front` yields where the client connects for an etcd at an endpoint.
    """
    _BY_NAME[library].install()
    with EtcdServer() as etcd, front(etcd.endpoint) as address, tempfile.TemporaryDirectory() as directory:
        host, _, port = address.rpartition(":")
        command = _BY_NAME[library].command(host or HOST, int(port), program=PROGRAMS[library])
        with watching(command) as client:
            until(lambda: client.has("watching"), "the client's watch")
            snapshot = Path(directory) / "snapshot"
            etcd.ctl("put", "w/a", "kept")
            etcd.ctl("snapshot", "save", str(snapshot))
            for number in range(5):
                etcd.ctl("put", "w/a", f"lost {number}")
            until(lambda: client.has("lost 4"), "the last put before the restore")
            etcd.stop()
            etcd.restore(snapshot)
            etcd.start()
            try:
                until(lambda: client.has("watching", 2), "the client to start again", limit_s)
                etcd.ctl("put", "w/a", "new")
                until(lambda: client.has("new"), "the first put after the restore", limit_s)
            except AssertionError:
                return False, client.lines()
            return True, client.lines()
