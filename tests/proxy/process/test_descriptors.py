"""Clients that need more descriptors than the process has are refused, and nothing else fails."""

from __future__ import annotations

import contextlib
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy.process import descriptors
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import make_certificates
from tests.waiting import until

CLIENTS = 300


@pytest.mark.parametrize(
    ("limit", "wanted", "endpoints", "opened", "clients"),
    [
        (65_536, 20_000, 3, 20, 20_000),
        (20_000, 20_000, 3, 20, 20_000 - 20 - 32 - 32 - 48),
        (1024, 20_000, 1, 20, 1024 - 20 - 32 - 32 - 16),
        (1024, 100, 1, 20, 100),
        # The bundled store counts as an endpoint.
        (256, 20_000, 0, 20, 256 - 20 - 32 - 32 - 16),
        # At most half of a small limit is reserved.
        (128, 20_000, 5, 20, 64),
        (1, 20_000, 1, 20, 1),
    ],
)
def test_clients_get_the_descriptors_that_are_not_reserved(
    limit: int, wanted: int, endpoints: int, opened: int, clients: int
) -> None:
    assert descriptors.share(limit, wanted, endpoints, opened).connections_max == clients


@contextlib.contextmanager
def limited(etcd: EtcdServer, soft: int, hard: int, *flags: str) -> Iterator[ProxyProcess]:
    """A proxy with these limits of open files."""
    proxy = ProxyProcess(etcd.endpoint, flags)
    # A child inherits the limits of its parent; only the soft one can be raised again here.
    proxy.prefix = ["prlimit", f"--nofile={soft}:{hard}"]
    with proxy:
        yield proxy


def live(proxy: ProxyProcess) -> str:
    with urllib.request.urlopen(f"http://{HOST}:{proxy.metrics_port}/livez", timeout=10) as answer:
        return str(answer.read().decode())


@contextlib.contextmanager
def idle_clients(port: int) -> Iterator[list[socket.socket]]:
    """Clients that connect, send the HTTP/2 preface and stay idle."""
    with contextlib.ExitStack() as stack:
        clients = []
        for _ in range(CLIENTS):
            client = stack.enter_context(socket.create_connection((HOST, port), 10))
            with contextlib.suppress(OSError):
                client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
            clients.append(client)
        yield clients


def test_the_soft_limit_is_raised_to_the_hard_one(etcd: EtcdServer) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with limited(etcd, 64, hard, "--connections-max=100") as proxy:
        assert proxy.process is not None
        assert resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
        assert "connections_max is lowered" not in proxy.log()


def test_clients_do_not_take_what_etcd_and_probes_need() -> None:
    """256 descriptors and 300 idle clients: etcd restarts, the watch goes on, and the probes are answered."""
    with EtcdServer() as etcd, limited(etcd, 256, 256) as proxy:
        assert "connections_max is lowered" in proxy.log()
        command = [str(etcd.binary.etcdctl), f"--endpoints={proxy.endpoint}", "watch", "key"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            until(lambda: proxy.metric("watchmux_watches") == 1, "the watch")
            with idle_clients(proxy.port):
                until(lambda: proxy.metric('watchmux_limit_refusals_total{limit="connections_max"}') > 0, "refusals")
                assert "too many client connections; refusing new ones" in proxy.log()
                etcd.kill()
                until(lambda: proxy.metric("watchmux_upstream_reachable") == 0, "the loss to be detected")
                assert live(proxy) == "ok\n"
                etcd.start()
                until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "etcd to be found again")
                etcd.ctl("put", "key", "value")
                assert [watching.stdout.readline() for _ in range(3)] == ["PUT\n", "key\n", "value\n"]
                assert live(proxy) == "ok\n"
            watching.send_signal(signal.SIGTERM)
        # Their descriptors are free again.
        until(lambda: proxy.metric("watchmux_connections") < 10, "the clients to be gone")


def test_tls_clients_do_not_take_reserved_descriptors(tmp_path: Path) -> None:
    """TLS handshakes count as connections; the proxy recovers from a lack of descriptors."""
    files = make_certificates(tmp_path)
    flags = (f"--cert-file={files.server_cert}", f"--key-file={files.server_key}")
    with EtcdServer() as etcd, limited(etcd, 128, 128, *flags) as proxy:
        with idle_clients(proxy.port):
            until(lambda: proxy.metric('watchmux_limit_refusals_total{limit="connections_max"}') > 0, "refusals")
            etcd.kill()
            etcd.start()
            until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "etcd to be found again")
            assert live(proxy) == "ok\n"
        until(lambda: proxy.metric("watchmux_connections") == 0, "the clients to be gone")


@pytest.mark.parametrize("secure", [False, True])
def test_the_proxy_survives_running_out_of_descriptors(etcd: EtcdServer, tmp_path: Path, secure: bool) -> None:
    """The limit of a running proxy is lowered, so that accept fails: the proxy does not spin, and recovers."""
    files = make_certificates(tmp_path)
    flags = (f"--cert-file={files.server_cert}", f"--key-file={files.server_key}") if secure else ()
    with ProxyProcess(etcd.endpoint, flags) as proxy:
        assert proxy.process is not None
        until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "etcd to be found")
        pid = proxy.process.pid
        limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
        # The open descriptors, and a few for probes.
        few = len(list(Path(f"/proc/{pid}/fd").iterdir())) + 8
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, limit[1]))
        began, cpu = time.monotonic(), proxy.cpu_s()
        with idle_clients(proxy.port):
            until(lambda: time.monotonic() - began > 2, "some time to pass")
            assert proxy.cpu_s() - cpu < 1.5
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limit)
        until(lambda: proxy.metric("watchmux_connections") == 0, "the clients to be gone")
        assert live(proxy) == "ok\n"
