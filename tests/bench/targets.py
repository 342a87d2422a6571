"""The targets: the floor, etcd itself, its own grpc-proxy, and watchmux; each a separate process."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from coalesce.limits import CoreLimits
from tests.bench.cases import OLD_PEER, OURS, PEER, Case
from tests.etcd.binaries import etcds
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.upstream.certificates import Certificates
from tests.waiting import until

PYTHON = sys.executable


@dataclass(frozen=True)
class Target:
    """A running server: its address and its process."""

    name: str
    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the user and system CPU seconds the process has used, by the nanosecond.

        Reads its CPU clock; Linux derives the clock's id from the process id (clock_getcpuclockid(3)).
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def memory_mib(self) -> float:
        """Return the resident memory in MiB."""
        return self._status("VmRSS")

    def peak_mib(self) -> float:
        """Return the most resident memory it ever had, in MiB."""
        return self._status("VmHWM")

    def _status(self, name: str) -> float:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name + ":")) / 1024


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
    port = free_port()
    command = [PYTHON, "-m", "tests.bench.floor", case.name, HOST, str(etcd.client_port), str(port)]
    with _started("floor", command, port) as target:
        yield target


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
def ours(case: Case, etcd: EtcdServer, files: Certificates) -> Iterator[Target]:
    """Yield watchmux, in front of `etcd`, started as the README says."""
    port = free_port()
    command = [
        *(PYTHON, "-m", "proxy.cli", "serve"),
        f"--endpoints={etcd.endpoint}",
        f"--listen-addr={HOST}:{port}",
        f"--metrics-addr={HOST}:{free_port()}",
        *_tls(case, files),
    ]
    if case.watch_count >= CoreLimits().watches_max:
        command.append(f"--watches-max={case.watch_count + 1000}")
    with _started(OURS, command, port) as target:
        yield target


TARGETS: dict[str, Callable[[Case, EtcdServer, Certificates], AbstractContextManager[Target]]] = {
    "floor": floor,
    "etcd": direct,
    PEER: peer,
    OLD_PEER: old_peer,
    OURS: ours,
}
