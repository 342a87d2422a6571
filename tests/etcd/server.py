"""A real etcd as a separate process, for tests: started, stopped, killed, restarted on the same port and data.

It listens on loopback only. `--unsafe-no-fsync` is safe here: kill -9 loses nothing that reached the page cache.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Self

from tests.etcd.binaries import EtcdBinary, current
from tests.waiting import until

HOST = "127.0.0.1"
BLOCK = 64
"""Ports are claimed in blocks of this size."""

_claims: list[socket.socket] = []


def _never_assigned() -> range:
    """Return the ports that Linux does not assign for port 0, below its range or, if there are few, above."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    candidates = range(10_000, low), range(high + 1, 65_536), range(10_000, 32_768)
    return next(ports for ports in candidates if len(ports) >= 10 * BLOCK)


def _is_claimed(block: int) -> bool:
    """Claim a block of ports until this process ends; return whether it is this process's now."""
    claim = socket.socket(socket.AF_UNIX)
    try:
        claim.bind(f"\0watchmux-test-ports-{block}")
    except OSError:
        claim.close()
        return False
    _claims.append(claim)
    return True


def _ports() -> Iterator[int]:
    """Yield ports in random blocks, none twice before all were used, and none of another process that runs tests."""
    ports = _never_assigned()
    blocks = range(ports.start, ports.stop - BLOCK + 1, BLOCK)
    for first in random.sample(blocks, len(blocks)):
        if _is_claimed(first):
            yield from range(first, first + BLOCK)
    while True:
        yield from random.sample(ports, len(ports))


_NEXT_PORT = _ports()


def free_port() -> int:
    """Return a loopback port that is free now and that no bind to port 0 gets before it is used."""
    while True:
        port = next(_NEXT_PORT)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((HOST, port))
            return port


def _loopback() -> list[str]:
    """Return the loopback addresses of this machine; a container may have no IPv6."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return [HOST, "::1"]
    return [HOST]


LOOPBACK = _loopback()


class EtcdServer:
    """One single-member etcd. Use as a context manager, which removes all its files."""

    def __init__(
        self, binary: EtcdBinary | None = None, extra: Sequence[str] = (), directory: Path | None = None
    ) -> None:
        self.binary = binary or current()
        self.extra = list(extra)
        self._own_directory = directory is None
        self.directory = directory or Path(tempfile.mkdtemp(prefix="watchmux-etcd-"))
        self.client_port = free_port()
        self.peer_port = free_port()
        self.tls: ssl.SSLContext | None = None
        """The TLS context for connections to it, if it uses TLS."""
        self.ctl_options: list[str] = []
        """Further options of etcdctl, such as --cacert."""
        self.process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Where clients connect, as HOST:PORT."""
        return f"{HOST}:{self.client_port}"

    @property
    def url(self) -> str:
        """Where clients connect, as a URL."""
        return f"http://{self.endpoint}"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        self.kill()
        if self._log is not None:
            self._log.close()
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    def arguments(self) -> list[str]:
        """The command line."""
        peer = f"http://{HOST}:{self.peer_port}"
        return [
            str(self.binary.etcd),
            "--name=m0",
            f"--data-dir={self.directory}/data",
            f"--listen-client-urls={self.url}",
            f"--advertise-client-urls={self.url}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=m0={peer}",
            # etcd's shortest election timeout, after which a single member elects itself; bcrypt's lowest cost.
            "--heartbeat-interval=20",
            "--election-timeout=100",
            "--bcrypt-cost=4",
            *(["--unsafe-no-fsync"] if self.binary.version >= (3, 5, 0) else []),
            *self.extra,
        ]

    def start(self) -> None:
        """Start it (again) on the same ports and data and wait until it serves."""
        assert self.process is None, "already running"
        if self._log is None:
            self._log = (self.directory / "etcd.log").open("ab")
        self.process = subprocess.Popen(self.arguments(), stdout=self._log, stderr=self._log)
        until(self._healthy, f"etcd {self.binary.name} at {self.endpoint} to serve")

    def _healthy(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"etcd ended with {self.process.returncode}:\n{self.log()[-2000:]}")
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=2, context=self.tls) as answer:
                return b"true" in answer.read()
        except (urllib.error.URLError, OSError):
            return False

    def log(self) -> str:
        """What it has logged so far."""
        return (self.directory / "etcd.log").read_text(errors="replace")

    def _end(self, how: signal.Signals) -> None:
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(20)
            self.process = None

    def stop(self) -> None:
        """Stop it gracefully."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it, as a crash would (kill -9)."""
        self._end(signal.SIGKILL)

    def restore(self, snapshot: Path) -> None:
        """Replace its data with a snapshot's; it must be stopped."""
        data = self.directory / "data"
        shutil.rmtree(data)
        peer = f"http://{HOST}:{self.peer_port}"
        options = ["--name=m0", f"--initial-cluster=m0={peer}", f"--initial-advertise-peer-urls={peer}"]
        self.ctl("snapshot", "restore", str(snapshot), f"--data-dir={data}", *options)

    def metrics(self) -> dict[str, float]:
        """Read /metrics: sample names with their labels, as exposed, and their values."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10, context=self.tls) as answer:
            lines = answer.read().decode().splitlines()
        samples = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in samples}

    def watchers(self) -> int:
        """Return the number of watchers that etcd itself counts."""
        return int(self.metrics()["etcd_debugging_mvcc_watcher_total"])

    def ctl(
        self, *arguments: str, endpoint: str | None = None, check: bool = True, stdin: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run this release's etcdctl against `endpoint` (default: this etcd) and return what it printed."""
        done = subprocess.run(
            [self.binary.etcdctl, f"--endpoints={endpoint or self.endpoint}", *self.ctl_options, *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env={**os.environ, "ETCDCTL_API": "3"},
            input=stdin,
        )
        if check and done.returncode:
            what = f"etcdctl {' '.join(arguments)} ended with {done.returncode}"
            raise AssertionError(f"{what}: {done.stderr or done.stdout}")
        return done
