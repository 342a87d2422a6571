"""Listen addresses and endpoints other than IPv4: unix sockets, IPv6, names with several addresses."""

from __future__ import annotations

import asyncio
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import grpc.aio
import pytest
import uvloop

from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.cli.group import run as watchmux
from proxy.config.values import Address, BadValue, parse_listen_address
from proxy.listening.listener import Listener
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.secure import SecureEtcdServer, secure_options
from tests.etcd.server import LOOPBACK, EtcdServer, free_port
from tests.proxy.cli.test_cli_serve import Served
from tests.proxy_process import serve_here
from tests.upstream.certificates import make_certificates
from tests.upstream.scripted import scripted
from tests.waiting import until_async
from upstream.connecting import connect
from upstream.dial import Dialer
from upstream.endpoints import parse_endpoint, parse_endpoints
from upstream.errors import NullLogger
from upstream.problems import EndpointProblems
from upstream.settings import UpstreamSettings
from upstream.tls import client_context, server_context


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("unix:///run/watchmux.sock", Address("", 0, "/run/watchmux.sock"), "unix:///run/watchmux.sock"),
        ("unix:/run/watchmux.sock", Address("", 0, "/run/watchmux.sock"), "unix:///run/watchmux.sock"),
        ("unix://localhost:m0", Address("", 0, "localhost:m0"), "unix:localhost:m0"),
        ("unix:watchmux.sock", Address("", 0, "watchmux.sock"), "unix:watchmux.sock"),
        ("unixs:///run/watchmux.sock", Address("", 0, "/run/watchmux.sock"), "unix:///run/watchmux.sock"),
        (":23790", Address("", 23790), ":23790"),
        ("[::1]:23790", Address("::1", 23790), "[::1]:23790"),
        ("127.0.0.1:0", Address("127.0.0.1", 0), "127.0.0.1:0"),
    ],
)
def test_listen_addresses_are_parsed_as_in_etcd(text: str, address: Address, shown: str) -> None:
    assert parse_listen_address(text) == address
    assert str(address) == shown


@pytest.mark.parametrize("text", ["unix:", "unix://", "unix:///", "unix:///run/", "http://x:1"])
def test_invalid_listen_address_is_refused(text: str) -> None:
    with pytest.raises(BadValue):
        parse_listen_address(text)


@contextmanager
def serving(tmp_path: Path, listen: str, endpoints: str, *extra: str) -> Iterator[Served]:
    """Yield a `watchmux serve` that listens at `listen`."""
    proxy = Served(tmp_path / "serve.log", f"--endpoints={endpoints}", f"--listen-addr={listen}", *extra)
    try:
        proxy.serving()
        yield proxy
    finally:
        proxy.process.kill()
        proxy.process.wait()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that `watchmux serve` prints when it refuses to start."""
    assert watchmux(["serve", "--endpoints=127.0.0.1:1", "--log-level=fatal", *arguments], serve_here)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def unix_etcd(path: Path) -> EtcdServer:
    """Create an etcd that also listens on a unix socket."""
    etcd = EtcdServer()
    etcd.extra = [f"--listen-client-urls={etcd.url},unix://{path}"]
    return etcd


@pytest.mark.parametrize(
    "client",
    [pytest.param(client, marks=() if client.version < (3, 5, 0) else pytest.mark.long) for client in etcds()],
    ids=lambda client: client.name,
)
def test_etcdctl_over_unix_sockets_on_both_sides(client: EtcdBinary, tmp_path: Path) -> None:
    behind, before = tmp_path / "etcd.sock", tmp_path / "watchmux.sock"
    with unix_etcd(behind) as etcd:
        etcd.binary = client
        with serving(tmp_path, f"unix://{before}", f"unix://{behind}") as proxy:
            endpoint = f"unix://{before}"
            assert proxy.serving()["address"] == endpoint
            assert stat.S_ISSOCK(before.stat().st_mode)
            command = [str(client.etcdctl), f"--endpoints={endpoint}", "watch", "a", "--rev=2"]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"ETCDCTL_API": "3"}) as watching:
                assert watching.stdout is not None
                assert etcd.ctl("put", "a", "1", endpoint=endpoint).stdout == "OK\n"
                assert [watching.stdout.readline() for _ in range(3)] == ["PUT\n", "a\n", "1\n"]
                watching.terminate()
            assert etcd.ctl("get", "a", endpoint=endpoint).stdout == "a\n1\n"
            assert proxy.end() == 0
        assert not before.exists()


@pytest.mark.parametrize("write", ["unix://{}", "unix:{}"])
async def test_grpc_python_over_a_unix_socket(write: str, etcd: EtcdServer, tmp_path: Path) -> None:
    path = tmp_path / "watchmux.sock"
    async with proxy_for(etcd, path=str(path)), grpc.aio.insecure_channel(write.format(path)) as channel:
        revision = (await rpc_pb2_grpc.KVStub(channel).Put(rpc_pb2.PutRequest(key=b"a", value=b"1"))).header.revision
        watch = rpc_pb2_grpc.WatchStub(channel).Watch()
        create = rpc_pb2.WatchCreateRequest(key=b"a", start_revision=revision)
        await watch.write(rpc_pb2.WatchRequest(create_request=create))
        answers = [cast(rpc_pb2.WatchResponse, await watch.read()) for _ in range(2)]
        assert answers[0].created
        assert [event.kv.value for event in answers[1].events] == [b"1"]
        watch.cancel()
    assert not path.exists()


def test_tls_over_unix_sockets_on_both_sides(tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    # etcd's clients verify the last part of the path as the name.
    behind, before = tmp_path / "etcd.sock", tmp_path / "localhost"
    etcd = SecureEtcdServer(files)
    etcd.extra.append(f"--listen-client-urls={etcd.url},unixs://{behind}")
    listening = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", f"--trusted-ca-file={files.ca}"]
    with etcd, serving(tmp_path, f"unixs://{before}", f"unixs://{behind}", *listening, *secure_options(files)):
        assert etcd.ctl("put", "a", "1", endpoint=f"unixs://{before}").stdout == "OK\n"
        assert etcd.ctl("get", "a", endpoint=f"unix://{before}").stdout == "a\n1\n"


def test_http1_over_a_unix_socket(tmp_path: Path) -> None:
    behind, before = tmp_path / "etcd.sock", tmp_path / "watchmux.sock"
    with unix_etcd(behind), serving(tmp_path, f"unix://{before}", f"unix://{behind}"), socket.socket(1) as client:
        client.connect(str(before))
        client.sendall(b"GET /version HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert b"etcdserver" in client.makefile("rb").read()


async def test_stale_socket_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "watchmux.sock"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    async with proxy_for("127.0.0.1:1", path=str(path)):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_socket_in_use_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "watchmux.sock"
    with socket.socket(socket.AF_UNIX) as used:
        used.bind(str(path))
        used.listen()
        line = refusal(capsys, f"--listen-addr=unix://{path}")
        assert f"cannot listen on unix://{path}: it is in use; stop what uses it" in line
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


async def test_socket_file_of_another_process_is_not_removed(etcd: EtcdServer, tmp_path: Path) -> None:
    path = tmp_path / "watchmux.sock"
    async with proxy_for(etcd, path=str(path)):
        path.unlink()
        path.write_text("mine")
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("listen", "reason"),
    [
        ("unix://{}/file", "a file that is not a socket exists there; remove it or choose another --listen-addr"),
        ("unix://{}/none/x.sock", "its directory does not exist; create it or choose another --listen-addr"),
        ("unix://{}/" + "x" * 120, "AF_UNIX path too long"),
        ("unix://", "has no socket path; write unix:///run/watchmux.sock"),
        ("unixs://{}/x.sock", "--listen-addr: unixs requires --cert-file and --key-file"),
    ],
)
def test_unusable_socket_path_is_a_one_line_error(
    listen: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("keep me")
    assert reason in refusal(capsys, f"--listen-addr={listen.format(tmp_path)}")
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.parametrize("host", LOOPBACK)
def test_a_loopback_address_on_both_sides(tmp_path: Path, host: str) -> None:
    etcd = EtcdServer()
    shown = f"[{host}]" if ":" in host else host
    behind = f"http://{shown}:{free_port()}"
    etcd.extra = [f"--listen-client-urls={etcd.url},{behind}"]
    with etcd, serving(tmp_path, f"{shown}:0", behind) as proxy:
        endpoint = str(proxy.serving()["address"])
        assert endpoint.startswith(f"{shown}:")
        assert etcd.ctl("put", "a", "1", endpoint=endpoint).stdout == "OK\n"
        assert etcd.ctl("get", "a", endpoint=f"http://{endpoint}").stdout == "a\n1\n"


async def test_all_interfaces_include_each_loopback_address(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, host="", port=0) as proxy:
        for host in LOOPBACK:
            _, writer = await asyncio.open_connection(host, proxy.port)
            writer.close()


class Resolver:
    """Resolves a name to given addresses, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, *addresses: str) -> None:
        real = socket.getaddrinfo
        self.asked = 0

        def getaddrinfo(host: str, port: int, *arguments: object, **options: object) -> list[object]:
            if host != name:
                return real(host, port, *arguments, **options)  # type: ignore[arg-type,return-value]  # handed on as it came
            self.asked += 1
            return [info for address in addresses for info in real(address, port, *arguments, **options)]  # type: ignore[arg-type]  # the same

        async def resolve(_loop: object, *arguments: object, **options: object) -> list[object]:
            return getaddrinfo(*arguments, **options)  # type: ignore[arg-type]  # the same

        import uvloop

        monkeypatch.setattr(uvloop.Loop, "getaddrinfo", resolve)


@pytest.mark.parametrize("addresses", [("::1", "127.0.0.1"), ("127.0.0.1", "::1"), ("127.0.0.2", "::1", "127.0.0.1")])
async def test_the_addresses_of_a_name_are_tried_in_turn(
    addresses: tuple[str, ...], etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolver = Resolver(monkeypatch, "etcd.example", *addresses)
    async with (
        proxy_for(f"etcd.example:{etcd.client_port}") as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        stream = await client.open_watch(b"a")
        await store.put(b"a", b"1")
        await until_async(lambda: stream.values == [b"1"], "the event")
        assert resolver.asked


@contextmanager
def deaf(port: int, *, hangs: bool) -> Iterator[None]:
    """Listen at another address without an answer: connections are accepted if it `hangs`, else packets are dropped."""
    with socket.socket() as listening, socket.socket() as first, socket.socket() as second:
        listening.bind(("127.0.0.2", port))
        listening.listen(50 if hangs else 0)
        for filler in () if hangs else (first, second):
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.2", port))
        yield


@pytest.mark.parametrize("hangs", [False, True])
async def test_unresponsive_address_delays_no_client(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch, hangs: bool
) -> None:
    Resolver(monkeypatch, "etcd.example", "127.0.0.2", "127.0.0.1")
    with deaf(etcd.client_port, hangs=hangs):
        async with proxy_for(f"etcd.example:{etcd.client_port}") as proxy:
            await until_async(lambda: proxy.health.upstream_reachable, "etcd to be reached")


async def test_an_address_that_hangs_in_the_tls_handshake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Or after it: the next address is used, and no connection stays."""
    files = make_certificates(tmp_path)
    secure = server_context(files.server_cert, files.server_key)
    async with scripted(secure) as server, scripted(secure, host="127.0.0.3", port=server.port) as silent:
        silent.mute = True
        endpoint = parse_endpoint(f"https://etcd.example:{server.port}")
        Resolver(monkeypatch, "etcd.example", "127.0.0.2", "127.0.0.3", "127.0.0.1")
        with deaf(server.port, hangs=True):
            connection = await connect(endpoint, client_context(insecure_skip_verify=True))
        assert connection.ready.done()
        await until_async(lambda: not silent.connections, "the other connection to be closed")
        connection.close()


async def test_an_endpoint_that_failed_is_tried_at_its_next_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server at its first address speaks HTTP/2 but answers no call."""
    async with scripted() as server, scripted(host="127.0.0.2", port=server.port) as hung:
        hung.on_status = lambda _: None
        Resolver(monkeypatch, "etcd.example", "127.0.0.2", "127.0.0.1")
        settings = UpstreamSettings(status_timeout_s=0.1)
        dialer = Dialer(parse_endpoints(f"etcd.example:{server.port}"), None, settings, EndpointProblems(NullLogger()))
        found = await dialer.dial(lambda _: True, lambda: None)
        assert (len(hung.asked), len(server.connections)) == (1, 1)
        found.connection.close()


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop])
@pytest.mark.parametrize("secure", [False, True])
def test_tcp_nodelay_is_set(loop: Callable[[], asyncio.AbstractEventLoop], secure: bool, tmp_path: Path) -> None:
    """Otherwise a response next to a busy stream waits 40 ms for the client's delayed acknowledgement."""
    files = make_certificates(tmp_path)
    tls = server_context(files.server_cert, files.server_key) if secure else None
    trusting = client_context(cacert=files.ca) if secure else None

    async def scenario() -> None:
        listener = Listener()
        await listener.start("127.0.0.1", 0, tls)
        async with await RawClient.connect(listener.port, tls=trusting):
            await until_async(lambda: listener.connections, "the connection")
            (connection,) = listener.connections
            assert connection._transport is not None
            accepted = connection._transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await listener.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scenario())
