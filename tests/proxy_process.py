"""A watchmux proxy as a separate process, started by its command line as a user would."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

from proxy.config.knobs import Settings
from proxy.process import running
from tests.e2e.running import TIERS
from tests.etcd.server import HOST, free_port
from tests.waiting import until

WORKERS: Final = int(os.environ.get("WORKERS", "1"))
"""WORKERS=N: each proxy process of the tests has --workers=N."""

HUB: Final = "--workers=1"
"""The hub itself has neither workers nor a hub."""

HUB_FLAGS: Final = ("--cacert", "--cert=", "--key=", "--user", "--password", "--insecure", "--probe-interval")
"""With TIERS=2 each proxy process takes its watches from another one; these of its flags concern both."""


class ProxyProcess:
    """`watchmux serve` in front of `endpoints` (HOST:PORT[,...]; "": its bundled store). Use as a context manager."""

    def __init__(
        self,
        endpoints: str,
        extra: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        """`directory`: the checkout to run it from; None = this one."""
        self.endpoints = endpoints
        self.extra = list(extra)
        self.prefix: list[str] = []
        """Prefix of the command line, such as another program that starts the proxy."""
        self._directory = directory
        self._environment = {**os.environ, **(environment or {})}
        self.port = free_port()
        self.metrics_port = free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.hub: ProxyProcess | None = None
        alone = not endpoints or any(flag.startswith(("--workers", "--watch-endpoints")) for flag in extra)
        if WORKERS > 1 and not alone:
            self.extra.append(f"--workers={WORKERS}")
        if TIERS > 1 and not alone:
            hub = [*(flag for flag in extra if flag.startswith(HUB_FLAGS)), HUB]
            self.hub = ProxyProcess(endpoints, hub, environment, directory)
            self.extra.append(f"--watch-endpoints=http://{self.hub.endpoint}")
        self._log = Path(tempfile.mkstemp(prefix="watchmux-proxy-", suffix=".log")[1])

    @property
    def endpoint(self) -> str:
        """Where clients connect, as HOST:PORT."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        if self.hub is not None:
            self.hub.start()
        self.start()
        return self

    def __exit__(self, error: object, *_rest: object) -> None:
        self.kill()
        if self.hub is not None:
            self.hub.__exit__(error)
        if error is not None:
            sys.stderr.write(self.log()[-4000:])
        self._log.unlink(missing_ok=True)

    def start(self) -> None:
        """Start it (again) on the same port and wait until it accepts connections."""
        assert self.process is None, "already running"
        command = [
            *self.prefix,
            *(sys.executable, "-m", "proxy.cli", "serve"),
            *([f"--endpoints={self.endpoints}"] if self.endpoints else []),
            f"--listen-addr={self.endpoint}",
            f"--metrics-addr={HOST}:{self.metrics_port}",
            *self.extra,
        ]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=self._environment, cwd=self._directory)
        until(self._accepts, f"the proxy to listen at {self.endpoint}", 60)

    def _accepts(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the proxy ended with {self.process.returncode}:\n{self.log()[-2000:]}")
        for port in (self.port, self.metrics_port):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) != 0:
                    return False
        return True

    def is_gone(self) -> bool:
        """Whether nothing listens on its ports."""
        for port in (self.port, self.metrics_port):
            with socket.socket() as probe:
                if probe.connect_ex((HOST, port)) == 0:
                    return False
        return True

    def log(self) -> str:
        """Return what it has logged so far."""
        return self._log.read_text(errors="replace")

    def stop(self, how: signal.Signals = signal.SIGTERM, limit_s: float = 20) -> int:
        """Stop it gracefully; return its exit status."""
        assert self.process is not None
        self.process.send_signal(how)
        status = self.process.wait(limit_s)
        self.process = None
        return status

    def kill(self) -> None:
        """Kill it, as a crash would."""
        if self.process is not None:
            self.stop(signal.SIGKILL)

    def metric(self, name: str) -> float:
        """Return a metric without labels."""
        with urllib.request.urlopen(f"http://{HOST}:{self.metrics_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))

    def overview(self) -> dict[str, Any]:
        """Return the data of the status page. Raises OSError."""
        with urllib.request.urlopen(f"http://{HOST}:{self.metrics_port}/v1/overview", timeout=10) as answer:
            found: dict[str, Any] = json.load(answer)
            return found

    def processes(self) -> dict[str, int]:
        """Return the ids of the processes of --workers by name, without the parent; none while it is not known."""
        try:
            return {each["name"]: each["pid"] for each in self.overview()["processes"]}
        except (urllib.error.URLError, OSError):
            return {}

    def cpu_s(self, pid: int = 0) -> float:
        """Return the user and system CPU seconds it has used; `pid`: of one of its processes."""
        assert self.process is not None
        fields = Path(f"/proc/{pid or self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_bytes(self, pid: int = 0) -> int:
        """Return its resident memory; `pid`: of one of its processes."""
        assert self.process is not None
        return int(Path(f"/proc/{pid or self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def serve_here(settings: Settings, notes: list[str], parent_fd: int | None) -> int:
    """Run the proxy in this process; for `proxy.cli.group.run`."""
    return running.run(settings, notes, parent_fd, lambda: (settings, notes))
