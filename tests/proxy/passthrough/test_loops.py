"""A loop of proxies is refused: one that is its own endpoint, and two that are each other's."""

from __future__ import annotations

from contextlib import AsyncExitStack

import grpc
import grpc.aio
import pytest

from proto.pb import rpc_pb2
from proxy.listening import http1
from proxy.server import Proxy
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.proxy.listening.test_http1 import ask, get
from tests.waiting import until_async
from upstream.heads import HOPS, HOPS_MAX, next_hop


async def circle(stack: AsyncExitStack, count: int) -> list[Proxy]:
    """Start `count` proxies, each of which has the next one as its endpoint."""
    ports = [free_port() for _ in range(count)]
    return [
        await stack.enter_async_context(proxy_for(f"{HOST}:{ports[(index + 1) % count]}", port=port))
        for index, port in enumerate(ports)
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
async def test_a_call_in_a_loop_is_refused(count: int) -> None:
    async with AsyncExitStack() as stack:
        proxies = await circle(stack, count)
        await until_async(lambda: all(proxy.pool.connected for proxy in proxies), "connections")
        before = sum(proxy.passthrough.stats.calls for proxy in proxies)
        async with direct(f"{HOST}:{proxies[0].port}") as client:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await client.kv.Range(rpc_pb2.RangeRequest(key=b"a"))
        assert refused.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        text = str(refused.value.details())
        assert any(f"in a loop by way of {HOST}:{proxy.port}:" in text for proxy in proxies)
        # The dials of watches and members take the same way, so the exact number varies.
        assert sum(proxy.passthrough.stats.calls for proxy in proxies) - before <= 20 * HOPS_MAX
        assert sum(proxy.passthrough.stats.refused_at["hops_max"] for proxy in proxies) > 0
        assert not any(proxy.health.serving or proxy.upstream.connected for proxy in proxies)


@pytest.mark.parametrize("count", [1, 2])
async def test_an_http1_connection_in_a_loop_is_refused(count: int) -> None:
    async with AsyncExitStack() as stack:
        proxies = await circle(stack, count)
        answer = await ask(f"{HOST}:{proxies[0].port}", get("/version"))
        assert b" 508 " in answer.splitlines()[0]
        assert b"in a loop by way of " in answer


async def test_calls_through_two_proxies_reach_etcd(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as first, proxy_for(f"{HOST}:{first.port}") as second:
        async with direct(f"{HOST}:{second.port}") as client:
            assert await client.put(b"a", b"1") == 2
        answer = await ask(f"{HOST}:{second.port}", get("/version"))
        assert b" 200 " in answer.splitlines()[0]


def test_hops_are_counted_in_the_metadata() -> None:
    assert next_hop([(b":path", b"/a")]) == (0, [(b":path", b"/a"), (HOPS, b"1")])
    assert next_hop([(HOPS, b"1"), (b"te", b"trailers")]) == (1, [(HOPS, b"2"), (b"te", b"trailers")])
    for forged in (b"", b"-1", b"x", b"100", b"9" * 5000):
        assert next_hop([(HOPS, forged)])[0] == HOPS_MAX


def test_hops_are_counted_in_the_first_request_of_http1() -> None:
    hops, opening = http1.next_hop(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (hops, opening) == (0, b"GET / HTTP/1.1\r\nWatchmux-Hops: 1\r\nHost: a\r\n\r\n")
    assert http1.next_hop(opening) == (1, b"GET / HTTP/1.1\r\nWatchmux-Hops: 2\r\nHost: a\r\n\r\n")
    assert http1.next_hop(b"GET /" + b"a" * 10_000) == (0, b"GET /" + b"a" * 10_000)
