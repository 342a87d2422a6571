"""TLS on both sides of the proxy: ALPN, invalid and renewed certificates, handshakes that never finish."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import shutil
import ssl
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
import trustme

from proto.pb import rpc_pb2
from proxy.listening.settings import ListenerSettings
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.secure import SecureEtcdServer
from tests.etcd.server import HOST, EtcdServer
from tests.proxy.listening.test_http1 import get
from tests.upstream.certificates import Certificates, make_certificates
from tests.waiting import LIMIT_S, until_async
from upstream.errors import BadTls
from upstream.tls import client_context, server_context

RANGE = "/etcdserverpb.KV/Range"
PROTOCOLS = ("h2", "http/1.1")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.asynccontextmanager
async def connection(
    port: int, context: ssl.SSLContext, name: str = HOST
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a TLS connection to the proxy, asking for `name` (SNI)."""
    reader, writer = await asyncio.open_connection(HOST, port, ssl=context, server_hostname=name)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@contextlib.asynccontextmanager
async def all_closed() -> AsyncIterator[None]:
    """At exit, wait until all sockets opened inside are closed: TLS sends close_notify some time after `close`."""

    def sockets() -> int:
        # List the directory first: reading it uses a descriptor itself.
        names = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]
        return sum("socket:" in name for name in names)

    before = sockets()
    yield
    await until_async(lambda: sockets() <= before, "the sockets to be closed")


def trusting(files: Certificates, protocols: Sequence[str] = PROTOCOLS) -> ssl.SSLContext:
    return client_context(cacert=files.ca, protocols=protocols)


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [(("h2",), "h2"), (("http/1.1",), "http/1.1"), (("http/1.1", "h2"), "h2"), (("other",), None)],
)
async def test_alpn_protocol_is_negotiated(
    etcd: EtcdServer, files: Certificates, offered: tuple[str, ...], chosen: str
) -> None:
    async with (
        proxy_for(etcd, tls=server_context(files.server_cert, files.server_key)) as proxy,
        connection(proxy.port, trusting(files, offered), "localhost") as (_, writer),
    ):
        assert writer.get_extra_info("ssl_object").selected_alpn_protocol() == chosen


@pytest.mark.parametrize("offered", [("http/1.1",), ("other",), PROTOCOLS])
async def test_http1_over_tls_reaches_an_etcd_with_tls(files: Certificates, offered: tuple[str, ...]) -> None:
    """The client's first bytes decide and not its ALPN; towards etcd, ALPN offers HTTP/1."""
    outward = client_context(files.client_cert, files.client_key, files.ca)
    with SecureEtcdServer(files) as etcd:
        async with (
            all_closed(),
            proxy_for(
                etcd.url, tls=server_context(files.server_cert, files.server_key, files.ca), upstream_tls=outward
            ) as proxy,
            connection(proxy.port, outward.speaking(offered)) as (reader, writer),
        ):
            writer.write(get("/version"))
            answer = await asyncio.wait_for(reader.read(), LIMIT_S)
            assert b" 200 " in answer.splitlines()[0]
            assert etcd.binary.name.encode() in answer
            await until_async(lambda: not proxy.http1.connections | proxy.http1.upstreams, "both to be closed")


def renew(files: Certificates, authority: trustme.CA, *names: str) -> bytes:
    """Write new certificates for `names` over the server's; return the certificate."""
    server = authority.issue_cert(*names)
    Path(files.server_cert).write_bytes(server.cert_chain_pems[0].bytes())
    Path(files.server_key).write_bytes(server.private_key_pem.bytes())
    authority.cert_pem.write_to_path(files.ca)
    return ssl.PEM_cert_to_DER_cert(server.cert_chain_pems[0].bytes().decode())


async def shown(port: int, context: ssl.SSLContext) -> bytes:
    """Return the certificate that the proxy presents."""
    async with connection(port, context) as (_, writer):
        found: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
        return found


async def first_byte(port: int, context: ssl.SSLContext) -> bytes:
    """Connect and wait for input: with TLS 1.3, a client learns only here that it is refused."""
    async with connection(port, context) as (reader, _):
        return await reader.readexactly(1)


async def test_renewed_files_are_used_without_a_restart(etcd: EtcdServer, tmp_path: Path) -> None:
    files = make_certificates(tmp_path)
    inward = server_context(files.server_cert, files.server_key, files.ca)
    old = client_context(files.client_cert, files.client_key, files.ca)
    async with (
        proxy_for(etcd, tls=inward) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, tls=old) as client,
    ):
        stream = await client.open_watch(b"a")
        before = await shown(proxy.port, old)
        # Half of a renewal: the key does not match the certificate. The old pair stays in use.
        authority = trustme.CA()
        shutil.copy(files.client_cert, files.server_cert)
        assert await shown(proxy.port, old) == before
        new = renew(files, authority, HOST)
        ours = authority.issue_cert("client.example")
        ours.private_key_pem.write_to_path(files.client_key)
        ours.cert_chain_pems[0].write_to_path(files.client_cert)
        assert await shown(proxy.port, old.newest()) == new
        # The old CA is no longer trusted, in either direction.
        with pytest.raises(ssl.SSLCertVerificationError):
            await shown(proxy.port, old)
        await store.put(b"a", b"1")
        await until_async(lambda: stream.values == [b"1"], "the connection of before the renewal to go on")


async def test_renewed_files_are_used_towards_etcd(tmp_path: Path) -> None:
    """After a break, the proxy reconnects with the current certificate."""
    files = make_certificates(tmp_path)
    with SecureEtcdServer(files) as etcd:
        outward = client_context(files.client_cert, files.client_key, files.ca)
        async with (
            all_closed(),
            proxy_for(etcd.url, upstream_tls=outward) as proxy,
            await RawClient.connect(proxy.port) as client,
        ):
            request = rpc_pb2.RangeRequest(key=b"a").SerializeToString()
            assert (await client.unary(RANGE, request)).status == 0
            authority = trustme.CA()
            renew(files, authority, HOST)
            ours = authority.issue_cert("client.example")
            ours.private_key_pem.write_to_path(files.client_key)
            ours.cert_chain_pems[0].write_to_path(files.client_cert)
            etcd.tls = client_context(files.client_cert, files.client_key, files.ca, protocols=("http/1.1",))
            await asyncio.to_thread(etcd.stop)
            await asyncio.to_thread(etcd.start)
            await until_async(proxy.pool.pick, "a connection to etcd")
            assert (await client.unary(RANGE, request)).status == 0


async def test_clients_without_a_valid_certificate_are_refused(
    etcd: EtcdServer, files: Certificates, tmp_path: Path
) -> None:
    strangers = make_certificates(tmp_path)

    async def refused(proxy: Proxy, context: ssl.SSLContext) -> None:
        failed = proxy.listener.stats.handshakes_failed
        with pytest.raises((ssl.SSLError, ConnectionError, EOFError)):
            await first_byte(proxy.port, context)
        await until_async(lambda: proxy.listener.stats.handshakes_failed == failed + 1, "the refusal to be counted")

    inward = server_context(files.server_cert, files.server_key, files.ca, min_version="TLS1.3")
    async with proxy_for(etcd, tls=inward) as proxy:
        await refused(proxy, client_context(cacert=files.ca))
        await refused(proxy, client_context(strangers.client_cert, strangers.client_key, files.ca))
        await refused(proxy, client_context(cacert=files.other_ca))
        old = client_context(files.client_cert, files.client_key, files.ca)
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        await refused(proxy, old)
        assert proxy.listener.stats.accepted == 0


async def test_unfinished_handshakes_time_out(etcd: EtcdServer, files: Certificates) -> None:
    """They count as connections and are closed after the timeout; other clients are not affected."""
    settings = ListenerSettings(connections_max=11, first_bytes_timeout_s=1.0)
    inward = server_context(files.server_cert, files.server_key)
    async with (
        proxy_for(etcd, tls=inward, listener=settings) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, tls=client_context(cacert=files.ca)) as client,
    ):
        stream = await client.open_watch(b"a")
        mute = [await asyncio.open_connection(HOST, proxy.port) for _ in range(10)]
        for _, writer in mute[::2]:
            writer.write(b"\x16\x03\x01\x02\x00\x01")
        await until_async(lambda: proxy.listener.handshakes == 10, "ten handshakes")
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        assert await reader.read() == b""
        writer.close()
        assert proxy.listener.stats.refused == 1
        await store.put(b"a", b"1")
        await until_async(lambda: stream.values == [b"1"], "the event")
        for reader, writer in mute:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
            writer.close()
        await until_async(lambda: proxy.listener.handshakes == 0, "all to be forgotten")
        assert proxy.listener.stats.handshakes_failed == 10
        assert +proxy.listener.stats.timed_out == {"first_bytes_timeout_s": 10}
        assert len(await shown(proxy.port, client_context(cacert=files.ca))) > 100


@pytest.mark.parametrize(
    ("days", "complaint"), [((-9, -2), "certificate has expired"), ((2, 9), "certificate is not yet valid")]
)
def test_certificate_outside_its_validity_is_refused(tmp_path: Path, days: tuple[int, int], complaint: str) -> None:
    begin, end = (datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=day) for day in days)
    wrong = trustme.CA().issue_cert("localhost", not_before=begin, not_after=end)
    cert, key = str(tmp_path / "wrong.pem"), str(tmp_path / "wrong.key")
    wrong.cert_chain_pems[0].write_to_path(cert)
    wrong.private_key_pem.write_to_path(key)
    for make in (server_context, client_context):
        with pytest.raises(BadTls, match=complaint) as refusal:
            make(cert, key)
        assert refusal.value.where == cert
