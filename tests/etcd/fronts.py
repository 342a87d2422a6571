"""Real nginx and HAProxy in front of an etcd, with their default limits of connections.

Both come from the machine's own Debian, unpacked below `.clients/fronts/` without being installed. nginx gracefully
closes a connection after 1,000 requests and allows 128 streams on it; HAProxy allows 100.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Final, Self

from tests import debian
from tests.clients.libraries import ROOT as CLIENTS
from tests.etcd.server import HOST, free_port
from tests.waiting import until

ROOT: Final = CLIENTS / "fronts"
# The libraries that Debian 12's programs need and that a minimal machine lacks.
_PACKAGES: Final = (
    "nginx",
    "haproxy",
    "liblua5.3-0",
    "libopentracing-c-wrapper0",
    "libopentracing1",
    "libpcre2-8-0",
    "libssl3",
    "libcrypt1",
    "libsystemd0",
    "zlib1g",
)

NGINX: Final = """\
daemon off;
master_process off;
pid {directory}/nginx.pid;
error_log {directory}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream etcd {{ server {etcd}; keepalive 64; }}
    server {{
        listen {host}:{port} http2;
        {more}
        location / {{ grpc_pass grpc://etcd; grpc_read_timeout 1h; grpc_send_timeout 1h; client_body_timeout 1h; }}
    }}
}}
"""
"""nginx with its default connection limits; the three timeouts are those that a watch needs."""

HAPROXY: Final = """\
global
    maxconn 4096
    {more}
defaults
    mode http
    timeout connect 5s
    timeout client 1h
    timeout server 1h
frontend clients
    bind {host}:{port} proto h2
    default_backend etcd
backend etcd
    server etcd {etcd} proto h2
"""


class FrontMissing(RuntimeError):
    """nginx or HAProxy is not available; the text says why."""


@functools.cache
def unpacked() -> Path:
    """Return the directory of both, after fetching them if missing. Raises FrontMissing."""
    target = ROOT / "debian"
    with debian.alone(ROOT):
        if not (ROOT / "complete").exists():
            shutil.rmtree(target, ignore_errors=True)
            try:
                _, release = debian.archive()
                with debian.suite(release) as view:
                    view.unpack(_PACKAGES, target)
            except (debian.DebianMissing, subprocess.SubprocessError, OSError) as error:
                raise FrontMissing(f"nginx and HAProxy cannot be had: {error}") from None
            (ROOT / "complete").touch()
    return target


class Front:
    """nginx or HAProxy in front of an etcd. Use as a context manager; `more`: further lines of its configuration."""

    def __init__(self, kind: str, etcd: str, more: str = "") -> None:
        self.kind = kind
        self.port = free_port()
        self.directory = Path(tempfile.mkdtemp(prefix=f"watchmux-{kind}-"))
        template = NGINX if kind == "nginx" else HAPROXY
        self._config = template.format(directory=self.directory, host=HOST, port=self.port, etcd=etcd, more=more)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log: IO[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """Its address, as HOST:PORT."""
        return f"{HOST}:{self.port}"

    def __enter__(self) -> Self:
        (self.directory / "config").write_text(self._config)
        self._log = (self.directory / "log").open("wb")
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        root = unpacked()
        program, config = str(root / "usr/sbin" / self.kind), str(self.directory / "config")
        nginx = [program, "-c", config, "-p", str(self.directory)]
        command = nginx if self.kind == "nginx" else [program, "-db", "-f", config]
        libraries = [*root.glob("usr/lib/*-linux-gnu"), *root.glob("lib/*-linux-gnu")]
        paths = [*map(str, libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH", "")])]
        environment = {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}
        process = subprocess.Popen(command, env=environment, stdout=self._log, stderr=self._log)
        self._processes.append(process)
        until(self._listens, f"{self.kind} to listen")

    def _listeners(self) -> int:
        """Return the number of sockets that listen on its port: each process has its own."""
        local = f":{self.port:04X} "
        lines = Path("/proc/net/tcp").read_text().splitlines()
        return sum(local in line and " 0A " in line for line in lines)

    def reload(self) -> None:
        """
        Start a new HAProxy on the same port and stop the old one gracefully, as its master does at a reload: the old
        one closes its connections gracefully (SIGUSR1, management.txt, "Stopping and restarting").
        """
        assert self.kind == "haproxy"
        before = self._listeners()
        self._start()
        until(lambda: self._listeners() > before, "the new process to listen")
        self._processes[-2].send_signal(signal.SIGUSR1)

    def _listens(self) -> bool:
        if self._processes[-1].poll() is not None:
            raise AssertionError(f"{self.kind} ended: {(self.directory / 'log').read_text()[-2000:]}")
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def __exit__(self, *_error: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait(20)
        if self._log is not None:
            self._log.close()
        shutil.rmtree(self.directory, ignore_errors=True)


if __name__ == "__main__":
    try:
        sys.stdout.write(f"nginx and HAProxy: {unpacked()}\n")
    except FrontMissing as problem:
        sys.exit(f"error: {problem}")
