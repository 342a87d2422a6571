"""The targets: the floor, etcd itself, its own grpc-proxy, and watchmux; each in processes of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from coalesce.limits import CoreLimits
from tests.bench.cases import FLOOR, FLOOR_WORKERS, LEVELS, OLD_PEER, OURS, PEER, TWICE, WORKERS, Case
from tests.etcd.binaries import etcds
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.upstream.certificates import Certificates
from tests.waiting import until

PYTHON = sys.executable


@dataclass(frozen=True)
class Target:
    """A running server: its address and its processes."""

    name: str
    port: int
    pid: int
    others: tuple[int, ...] = ()
    """Further processes: with --workers the hub and the workers, in this order; in two levels the hub."""
    more_ports: tuple[int, ...] = ()
    """Further addresses: each gets as many clients as `port`."""

    @property
    def pids(self) -> tuple[int, ...]:
        """All of its processes."""
        return (self.pid, *self.others)

    def cpu_each_s(self) -> list[float]:
        """Return the user and system CPU seconds that each process has used, by the nanosecond.

        Reads their CPU clocks; Linux derives the clock's id from the process id (clock_getcpuclockid(3)).
        """
        return [time.clock_gettime(~pid << 3 | 2) for pid in self.pids]

    def cpu_s(self) -> float:
        """Return the CPU seconds of all processes."""
        return sum(self.cpu_each_s())

    def memory_mib(self) -> float:
        """Return the memory in MiB: resident of one process, proportional of several, which share pages."""
        return self.pss_mib() if self.others else self._sum("status", "VmRSS:")

    def pss_mib(self) -> float:
        """Return the sum of the proportional set sizes (proc(5)) in MiB: a page counts once for all that share it."""
        return self._sum("smaps_rollup", "Pss:")

    def peak_mib(self) -> float:
        """Return the most resident memory that its processes ever had, in MiB."""
        return self._sum("status", "VmHWM:")

    def _sum(self, file: str, name: str) -> float:
        texts = (Path(f"/proc/{pid}/{file}").read_text() for pid in self.pids)
        lines = (next(line for line in text.splitlines() if line.startswith(name)) for text in texts)
        return sum(int(line.split()[1]) for line in lines) / 1024


def children(pid: int) -> tuple[int, ...]:
    """Return the child processes of a process: of watchmux --workers the hub and the workers, in this order."""
    return tuple(sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())))


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def _started(name: str, command: Sequence[str], port: int) -> Iterator[Target]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port), f"{name} to listen", 20)
        yield Target(name, port, process.pid)
    finally:
        process.kill()
        process.wait()


def _tls(case: Case, files: Certificates) -> list[str]:
    """Return the flags of both proxies. With a certificate alone grpc-proxy does not trust itself, and exits."""
    if not case.tls:
        return []
    return [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", f"--trusted-ca-file={files.ca}"]


@contextmanager
def direct(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield etcd itself."""
    del case, files
    assert etcd.process is not None
    yield Target("etcd", etcd.client_port, etcd.process.pid)


@contextmanager
def floor(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield the minimal loop, in front of `etcd`."""
    del files
    with _floor(case, etcd.client_port) as target:
        yield target


@contextmanager
def _floor(case: Case, upstream_port: int) -> Iterator[Target]:
    port = free_port()
    command = [PYTHON, "-m", "tests.bench.floor", case.name, HOST, str(upstream_port), str(port)]
    with _started(FLOOR, command, port) as target:
        yield target


@contextmanager
def floor_workers(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield two minimal loops in front of a third one, in front of `etcd`."""
    del files
    with _floor(case, etcd.client_port) as hub, _floor(case, hub.port) as one, _floor(case, hub.port) as other:
        yield Target(FLOOR_WORKERS, one.port, one.pid, (hub.pid, other.pid), (other.port,))


@contextmanager
def peer(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield etcd's own grpc-proxy, in front of `etcd`."""
    with _grpc_proxy(PEER, etcd.binary.etcd, case, etcd, files) as target:
        yield target


@contextmanager
def old_peer(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield the grpc-proxy of etcd 3.4, in front of the same `etcd`."""
    binary = next(binary for binary in etcds() if binary.version[:2] == (3, 4))
    with _grpc_proxy(OLD_PEER, binary.etcd, case, etcd, files) as target:
        yield target


@contextmanager
def _grpc_proxy(name: str, binary: Path, case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    port = free_port()
    command = [
        *(str(binary), "grpc-proxy", "start"),
        f"--endpoints={etcd.endpoint}",
        f"--listen-addr={HOST}:{port}",
        # It dials this to serve its metrics, and exits when it cannot.
        f"--advertise-client-url={HOST}:{port}",
        f"--metrics-addr=http://{HOST}:{free_port()}",
        *_tls(case, files),
    ]
    with _started(name, command, port) as target:
        yield target


@contextmanager
def ours(case: Case, etcd: EtcdServer, files: Certificates, *flags: str, name: str = OURS) -> Iterator[Target]:
    """Yield watchmux, in front of `etcd`, started as the README says."""
    port = free_port()
    command = [
        *(PYTHON, "-m", "proxy.cli", "serve"),
        f"--endpoints={etcd.endpoint}",
        f"--listen-addr={HOST}:{port}",
        f"--metrics-addr={HOST}:{free_port()}",
        *_tls(case, files),
        *flags,
    ]
    if case.watch_count >= CoreLimits().watches_max:
        command.append(f"--watches-max={case.watch_count + 1000}")
    with _started(name, command, port) as target:
        yield target


@contextmanager
def with_workers(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield watchmux with two workers: a parent, a hub, and the workers."""
    with ours(case, etcd, files, "--workers=2", name=WORKERS) as target:
        until(lambda: len(children(target.pid)) == 3, "the hub and the workers", 20)
        yield replace(target, others=children(target.pid))


@contextmanager
def twice(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield two watchmux processes, each in front of `etcd`."""
    with ours(case, etcd, files) as one, ours(case, etcd, files) as other:
        yield Target(TWICE, one.port, one.pid, (other.pid,), (other.port,))


@contextmanager
def two_levels(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield a leaf, which takes its watches from a hub in front of `etcd`."""
    with (
        ours(case, etcd, files, name="hub") as hub,
        ours(case, etcd, files, f"--watch-endpoints={HOST}:{hub.port}", name=LEVELS) as leaf,
    ):
        yield replace(leaf, others=(hub.pid,))


TARGETS: dict[str, Callable[[Case, EtcdServer, Certificates], AbstractContextManager[Target]]] = {
    FLOOR: floor,
    "etcd": direct,
    PEER: peer,
    OLD_PEER: old_peer,
    OURS: ours,
    WORKERS: with_workers,
    LEVELS: two_levels,
    TWICE: twice,
    FLOOR_WORKERS: floor_workers,
}
