"""HTTP/1 on the same port: forwarded to etcd, or refused with a reason."""

from __future__ import annotations

import asyncio
import json

import pytest

from proxy.admin.client_port import ClientPages
from proxy.admin.port import Exposition
from proxy.listening.http1 import Http1Settings
from tests.e2e.running import proxy_for
from tests.e2e.scenario import run as run_scenario
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.proxy.passthrough.test_passthrough import passing
from tests.waiting import LIMIT_S, until_async
from upstream.endpoints import parse_endpoint


async def ask(address: str, request: bytes) -> bytes:
    """Send raw bytes and return the response until the connection ends."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(request)
        return await asyncio.wait_for(reader.read(), LIMIT_S)
    finally:
        writer.close()


def get(path: str) -> bytes:
    """Return a GET request that closes its connection."""
    return f"GET {path} HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n".encode()


def test_pages_and_json_gateway_come_from_etcd(etcd: EtcdServer) -> None:
    async def run() -> None:
        async with passing(etcd.endpoint) as running:
            version = await ask(running.address, get("/version"))
            assert b" 200 " in version.splitlines()[0]
            assert json.loads(version.partition(b"\r\n\r\n")[2])["etcdserver"] == etcd.binary.name
            body = b'{"key": "YQ==", "value": "MQ=="}'
            head = b"POST /v3/kv/put HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
            assert b" 200 " in (await ask(running.address, head % len(body) + body)).splitlines()[0]
            # Nothing is left of a connection that both sides have ended.
            await until_async(lambda: not running.http1.connections and not running.http1.upstreams, "their end")

    asyncio.run(run())
    assert etcd.ctl("get", "a").stdout == "a\n1\n"


async def test_first_bytes_may_come_one_by_one(etcd: EtcdServer) -> None:
    async with passing(etcd.endpoint) as running:
        host, _, port = running.address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for byte in get("/health"):
            writer.write(bytes([byte]))
            await writer.drain()
        assert b'"health":"true"' in await asyncio.wait_for(reader.read(), LIMIT_S)
        writer.close()


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00", b"\0\0\0\0", b"get / HTTP/1.1\r\n\r\n", b"A" * 40])
async def test_garbage_is_refused_with_a_reason(etcd: EtcdServer, garbage: bytes) -> None:
    async with passing(etcd.endpoint) as running:
        answer = await ask(running.address, garbage)
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"neither HTTP/2 nor HTTP/1" in answer


async def test_unreachable_etcd_is_a_bad_gateway() -> None:
    port = free_port()
    async with passing(f"{HOST}:{port}") as running:
        answer = await ask(running.address, get("/version"))
        assert answer.startswith(b"HTTP/1.1 502 ")
        assert f"{HOST}:{port}".encode() in answer


def test_dead_endpoint_is_not_used() -> None:
    """The dead endpoint is listed first. Once the other one is killed too, requests get 502, not the last response."""
    with EtcdServer() as other:

        async def scenario() -> None:
            async with proxy_for(f"{HOST}:{free_port()},{other.endpoint}") as proxy:
                await until_async(lambda: proxy.pool.pick() is not None, "a connection to the live one")
                for _ in range(4):
                    answer = await ask(f"{HOST}:{proxy.port}", get("/version"))
                    assert answer.startswith(b"HTTP/1.1 200 ")
                other.kill()
                await until_async(lambda: proxy.pool.pick() is None, "its loss")
                assert (await ask(f"{HOST}:{proxy.port}", get("/version"))).startswith(b"HTTP/1.1 502 ")

        run_scenario(scenario())


async def test_http1_connections_and_their_start_are_bounded(etcd: EtcdServer) -> None:
    """A connection above the limit gets 503, and one without a complete method 408."""
    async with passing(etcd.endpoint) as running:
        running.http1.settings = Http1Settings(connections_max=1)
        host, _, port = running.address.rpartition(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GE")
        await writer.drain()
        await until_async(lambda: running.http1.connections, "the connection to be taken over")
        assert (await ask(running.address, get("/version"))).startswith(b"HTTP/1.1 503 ")
        writer.close()
        await until_async(lambda: not running.http1.connections, "its end")
        running.http1.settings = Http1Settings(opening_timeout_s=0.1)
        assert (await ask(running.address, b"GE")).startswith(b"HTTP/1.1 408 ")
        assert (running.http1.refused[503], running.http1.refused[408]) == (1, 1)


def test_own_pages_of_the_hub(etcd: EtcdServer) -> None:
    """A worker forwards them, on a bounded number of connections."""

    async def scenario() -> None:
        async with proxy_for(etcd) as hub, passing(etcd.endpoint) as running:
            exposition = Exposition(hub, "the hub")
            hub.http1.own = ClientPages(lambda: (exposition.metrics, exposition.health))
            await until_async(lambda: hub.health.serving, "etcd")
            running.http1.hub = parse_endpoint(f"{HOST}:{hub.port}")
            running.http1.settings = Http1Settings(hub_connections_max=1)
            assert (await ask(running.address, get("/proxy/health"))).startswith(b"HTTP/1.1 200 ")
            await until_async(lambda: not running.http1.connections, "its end")
            host, _, port = running.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /proxy/metrics HTTP/1.1\r\nHost: etcd\r\n\r\n")
            await reader.readuntil(b"watchmux_connections ")
            assert (await ask(running.address, get("/proxy/health"))).startswith(b"HTTP/1.1 503 ")
            assert (await ask(running.address, get("/version"))).startswith(b"HTTP/1.1 200 ")
            writer.close()
            running.http1.hub = parse_endpoint(f"{HOST}:{free_port()}")
            await until_async(lambda: not running.http1.connections, "the end of the last one")
            assert b"the hub at " in await ask(running.address, get("/proxy/health"))

    run_scenario(scenario())


def test_the_proxys_own_pages_are_on_the_client_port(etcd: EtcdServer) -> None:
    """As on the client port of etcd's grpc-proxy; with a namespace too, which refuses all that is forwarded."""

    async def scenario(namespace: bytes) -> None:
        async with proxy_for(etcd, namespace=namespace) as proxy:
            address = f"{HOST}:{proxy.port}"
            exposition = Exposition(proxy, address)
            proxy.http1.own = own = ClientPages(lambda: (exposition.metrics, exposition.health))
            await until_async(lambda: proxy.health.serving, "etcd")
            health = await ask(address, get("/proxy/health"))
            assert health.startswith(b"HTTP/1.1 200 ")
            assert b'"health":"true"' in health
            # The path may arrive byte by byte.
            reader, writer = await asyncio.open_connection(HOST, proxy.port)
            for byte in get("/proxy/metrics?x=1"):
                writer.write(bytes([byte]))
                await writer.drain()
            page = await asyncio.wait_for(reader.read(), LIMIT_S)
            writer.close()
            assert b"\nwatchmux_watches 0.0\n" in page
            # Made at most once a second: any client may ask.
            body = page.partition(b"\r\n\r\n")[2]
            assert (await ask(address, get("/proxy/metrics"))).endswith(body)
            etcds = await ask(address, get("/metrics"))
            assert etcds.startswith(b"HTTP/1.1 501 ") if namespace else b"etcd_server_has_leader" in etcds
            assert proxy.http1.descriptors() == 0 or not namespace
            await until_async(lambda: not own.connections, "its connections to be closed")

    for namespace in (b"", b"/app/"):
        run_scenario(scenario(namespace))
