"""What is measured: etcd itself, its own grpc-proxy, and watchmux; each a process whose CPU and memory are read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.etcd.server import HOST, EtcdServer, free_port
from tests.proxy_process import ProxyProcess
from tests.waiting import until


@dataclass(frozen=True)
class Target:
    """A running server: where it listens and which process does the work."""

    name: str
    port: int
    pid: int

    def cpu_s(self) -> float:
        """Return the user and system CPU seconds the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Return the resident memory in MiB."""
        pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


@contextmanager
def direct(etcd: EtcdServer) -> Iterator[Target]:
    """Yield etcd itself."""
    assert etcd.process is not None
    yield Target("etcd", etcd.client_port, etcd.process.pid)


@contextmanager
def peer(etcd: EtcdServer) -> Iterator[Target]:
    """Yield etcd's own grpc-proxy, in front of `etcd`."""
    port = free_port()
    command = [
        *(str(etcd.binary.etcd), "grpc-proxy", "start"),
        f"--endpoints={etcd.endpoint}",
        f"--listen-addr={HOST}:{port}",
        f"--advertise-client-url={HOST}:{port}",  # it dials this to serve its metrics, and ends when it cannot
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: _listens(port), "etcd grpc-proxy to listen", 20)
        yield Target("grpc-proxy", port, process.pid)
    finally:
        process.kill()
        process.wait()


@contextmanager
def ours(etcd: EtcdServer) -> Iterator[Target]:
    """Yield watchmux, in front of `etcd`."""
    with ProxyProcess(etcd.endpoint) as proxy:
        assert proxy.process is not None
        yield Target("watchmux", proxy.port, proxy.process.pid)


TARGETS = {"etcd": direct, "grpc-proxy": peer, "watchmux": ours}
PYTHON = sys.executable
