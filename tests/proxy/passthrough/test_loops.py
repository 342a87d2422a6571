"""A loop of proxies is refused: one that is its own endpoint, and two that are each other's."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import grpc.aio
import pytest

from proto.pb import rpc_pb2
from proxy.listening import http1
from proxy.server import Proxy
from tests.e2e.running import Etcd, change_endpoints, direct, proxy_for
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.proxy.listening.test_http1 import ask, get
from tests.waiting import until_async
from upstream.heads import HOPS, HOPS_MAX, next_hop
from upstream.settings import UpstreamSettings
from upstream.watch_route import RouteIds

QUICK = UpstreamSettings(create_timeout_s=0.4)
"""The route of the watches is checked every 0.4 s."""


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
        async with direct(f"{HOST}:{proxies[0].port}") as client:
            await refused(client, proxies)
            await until_async(lambda: any(proxy.pool.loop for proxy in proxies), "the loop to be found")
            # From now on no call goes round.
            before = sum(proxy.passthrough.stats.calls for proxy in proxies)
            for _ in range(20):
                await refused(client, proxies)
        # The dials of watches and members take the same way, so the exact number varies.
        assert sum(proxy.passthrough.stats.calls for proxy in proxies) - before <= 20 * (count + 2)
        assert sum(proxy.passthrough.stats.refused_at["hops_max"] for proxy in proxies) > 20
        assert not any(proxy.health.serving or proxy.upstream.connected for proxy in proxies)


async def refused(client: Etcd, proxies: Sequence[Proxy]) -> None:
    """Make a call that is refused because of a loop of these proxies."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await client.kv.Range(rpc_pb2.RangeRequest(key=b"a"))
    assert refusal.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    text = str(refusal.value.details())
    assert any(f"in a loop by way of {HOST}:{proxy.port}:" in text for proxy in proxies)


@asynccontextmanager
async def pair(etcd: EtcdServer, *, chained: bool) -> AsyncIterator[tuple[Proxy, Proxy]]:
    """Yield two proxies in front of etcd; `chained`: the second one in front of the first one."""
    async with (
        proxy_for(etcd, watch_endpoints=[], upstream=QUICK) as first,
        proxy_for(f"{HOST}:{first.port}" if chained else etcd, watch_endpoints=[], upstream=QUICK) as second,
    ):
        await until_async(lambda: first.health.serving and second.health.serving, "both to serve")
        yield first, second


def at(etcd: EtcdServer, place: str, role: str) -> tuple[list[str], list[str]]:
    """Return the endpoints of a proxy that sends its calls or its watches to a place."""
    return ([place], []) if role == "calls" else ([etcd.endpoint], [place])


@pytest.mark.parametrize("role", ["calls", "watches"])
async def test_a_change_of_endpoints_to_a_loop_is_refused(etcd: EtcdServer, role: str) -> None:
    """The proxy itself, or one that leads back to it; it goes on with the old endpoints."""
    async with pair(etcd, chained=True) as (first, second):
        for proxy in (first, second):
            place = f"{HOST}:{proxy.port}"
            problem = await change_endpoints(first, *at(etcd, place, role))
            assert problem.startswith(f"{place}: its {role} lead back to this proxy, in a loop: {place};")
        assert [endpoint.text for endpoint in first.endpoints] == [etcd.endpoint]
        async with direct(f"{HOST}:{second.port}") as client:
            assert await client.put(b"a", b"1") == 2


@pytest.mark.parametrize("role", ["calls", "watches"])
async def test_a_loop_that_arises_later_is_found(etcd: EtcdServer, role: str) -> None:
    """The endpoint in use gets this proxy as its endpoint, and is of a release that finds no loop."""
    async with pair(etcd, chained=False) as (first, second):
        place = f"{HOST}:{second.port}"
        assert await change_endpoints(first, *at(etcd, place, role)) == ""
        await until_async(lambda: first.upstream.server and first.upstream.server.endpoint == place, "the move")
        second.upstream.dialer._ids = second.pool._ids = RouteIds()
        second.set_endpoints(*at(etcd, f"{HOST}:{first.port}", role))
        await until_async(lambda: "in a loop" in first.health.reason, "the loop to be found")
        second.set_endpoints([etcd.endpoint])
        await until_async(lambda: first.health.serving and second.health.serving, "both to serve again")


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
