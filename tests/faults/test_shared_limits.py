"""Limits per connection of etcd, nginx and HAProxy, which all clients of the proxy share: no client notices them."""

from __future__ import annotations

import asyncio

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient, RawStream, WatchStream
from tests.e2e.running import TIERS, direct, next_to_etcd, proxy_for
from tests.e2e.scenario import run
from tests.e2e.test_auth import token_of, with_users
from tests.etcd.fronts import Front
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

PUT = "/etcdserverpb.KV/Put"
RANGE = "/etcdserverpb.KV/Range"
GRANT = "/etcdserverpb.Lease/LeaseGrant"
KEEP_ALIVE = "/etcdserverpb.Lease/LeaseKeepAlive"


async def keep_leases(client: RawClient, count: int) -> list[RawStream]:
    """Keep so many leases alive, each on a separate stream that stays open."""
    grant = await client.unary(GRANT, rpc_pb2.LeaseGrantRequest(TTL=600).SerializeToString())
    lease = rpc_pb2.LeaseGrantResponse.FromString(grant.messages[0]).ID
    streams = [client.call(KEEP_ALIVE) for _ in range(count)]
    for stream in streams:
        stream.send(rpc_pb2.LeaseKeepAliveRequest(ID=lease).SerializeToString())
    for stream in streams:
        assert rpc_pb2.LeaseKeepAliveResponse.FromString(await stream.next()).TTL == 600
    return streams


async def puts(client: RawClient, count: int, at_a_time: int) -> list[tuple[int | None, str]]:
    """Put so many times; return the outcome of each failed call."""
    failed: list[tuple[int | None, str]] = []
    request = rpc_pb2.PutRequest(key=PREFIX + b"k", value=b"v").SerializeToString()

    async def some() -> None:
        for _ in range(count // at_a_time):
            call = client.call(PUT)
            call.send(request, end=True)
            ended = await call.end()
            if ended != (Status.OK, ""):
                failed.append(ended)

    await asyncio.gather(*(some() for _ in range(at_a_time)))
    return failed


async def others_are_served(client: RawClient, etcd: EtcdServer, watches: int = 3) -> None:
    """Puts, ranges and new watches, while others keep their streams."""
    assert await puts(client, 30, 3) == []
    read = await client.unary(RANGE, rpc_pb2.RangeRequest(key=PREFIX + b"k").SerializeToString())
    assert len(rpc_pb2.RangeResponse.FromString(read.messages[0]).kvs) == 1
    streams = [(await client.open_watch(PREFIX, PREFIX_END, start % 2), start % 2) for start in range(watches)]
    async with direct(etcd) as store:
        last = await store.put(PREFIX + b"a", b"x")
    await all_kept(streams, etcd.endpoint, last)


@pytest.mark.parametrize(
    "front", ["etcd", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("nginx", "haproxy"))]
)
def test_leases_beyond_the_stream_limit_leave_room_for_others(front: str) -> None:
    """etcd with 50 streams to a connection; nginx allows 128 and HAProxy 100 by default."""

    async def scenario(etcd: EtcdServer, endpoint: str) -> None:
        async with proxy_for(endpoint) as proxy, await RawClient.connect(proxy.port) as client:
            leases = await keep_leases(client, 150)
            await others_are_served(client, etcd)
            assert not any(lease.over for lease in leases)
            assert proxy.pool.connection_count >= 2
            assert proxy.health.serving

    if front == "etcd":
        with EtcdServer(extra=["--max-concurrent-streams=50"]) as etcd:
            run(scenario(etcd, etcd.endpoint))
    else:
        with EtcdServer() as etcd, Front(front, etcd.endpoint) as before:
            run(scenario(etcd, before.endpoint))


async def test_a_lack_of_places_shows_in_readiness() -> None:
    """Only if all allowed connections are full; it ends as soon as a place is free."""
    with EtcdServer(extra=["--max-concurrent-streams=50"]) as etcd:
        settings = UpstreamSettings(connections_per_endpoint_max=1, place_wait_s=0.2)
        async with proxy_for(etcd, upstream=settings) as proxy, await RawClient.connect(proxy.port) as client:
            leases = await keep_leases(client, 44)
            assert proxy.health.serving
            waits = client.call(PUT)
            waits.send(rpc_pb2.PutRequest(key=PREFIX + b"k").SerializeToString(), end=True)
            await until_async(lambda: not proxy.health.serving, "readiness")
            assert "calls wait for a place at etcd" in proxy.health.reason
            # The proxy's own calls have a place all the same, and watches have separate connections.
            await client.open_watch(PREFIX, PREFIX_END)
            leases[0].cancel()
            assert await waits.end() == (Status.OK, "")
            await until_async(lambda: proxy.health.serving, "readiness")


async def test_sixty_tokens_watch_at_an_etcd_with_fifty_streams() -> None:
    with EtcdServer(extra=["--max-concurrent-streams=50"]) as etcd:
        with_users(etcd)
        async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
            tokens = [await token_of(client, f"u{number % 2 + 1}") for number in range(60)]
            streams: list[WatchStream] = []
            for number, token in enumerate(tokens):
                stream = client.watch([("token", token)])
                # Separate ranges, so that each token has a stream at etcd.
                stream.create(b"a/%d" % number)
                streams.append(stream)
            for stream in streams:
                await stream.created()
            upstream = next_to_etcd(proxy).upstream
            # A hub has one more: the call that notices a lost leader, which leaves ask for.
            assert upstream.stream_count == 60 + (TIERS == 2)
            assert upstream.connection_count == 2
            assert not upstream.problem


async def _rotated(proxy: Proxy, etcd: EtcdServer, count: int) -> None:
    """Under load for that many calls: no call fails, no watch misses or repeats an event, and no error is logged."""
    async with await RawClient.connect(proxy.port) as client:
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1, 0, 1)]
        leases = await keep_leases(client, 5)
        writer = Writer(f"127.0.0.1:{proxy.port}")
        assert await puts(client, count, 20) == []
        for number in range(30):
            # The connections of the watches count streams.
            streams.append((await client.open_watch(PREFIX, PREFIX_END, 1), 1))
            assert not streams[-1][0].raw.over, number
        last = await writer.stop()
        await all_kept(streams, etcd.endpoint, last)
        assert not any(lease.over for lease in leases)
        assert proxy.engine.stats.upstream_broken == 0
        assert proxy.passthrough.stats.unavailable == 0
        assert proxy.pool.down is None


@pytest.mark.long
@pytest.mark.parametrize("more", ["", "keepalive_requests 50;", "keepalive_time 1s;"], ids=["defaults", "50", "1 s"])
def test_clients_do_not_notice_nginx_closing_connections(more: str) -> None:
    async def scenario(etcd: EtcdServer, endpoint: str) -> None:
        async with proxy_for(endpoint) as proxy:
            await _rotated(proxy, etcd, 4_000)
            await until_async(lambda: proxy.pool.rotated >= (3 if not more else 2), "connections that ended")

    with EtcdServer() as etcd, Front("nginx", etcd.endpoint, more) as before:
        run(scenario(etcd, before.endpoint))


@pytest.mark.long
async def test_clients_do_not_notice_a_haproxy_reload() -> None:
    """The old process closes its connections gracefully and keeps open streams."""
    with EtcdServer() as etcd, Front("haproxy", etcd.endpoint) as before:
        async with proxy_for(before.endpoint) as proxy, await RawClient.connect(proxy.port) as client:
            streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
            leases = await keep_leases(client, 5)
            for _ in range(3):
                loading = asyncio.create_task(puts(client, 1_000, 20))
                await asyncio.to_thread(before.reload)
                assert await loading == []
                streams.append((await client.open_watch(PREFIX, PREFIX_END, 1), 1))
            async with direct(etcd) as store:
                last = await store.put(PREFIX + b"a", b"x")
            await all_kept(streams, etcd.endpoint, last)
            assert not any(lease.over for lease in leases)
            assert proxy.engine.stats.upstream_broken == 0
            await until_async(lambda: proxy.pool.rotated >= 3, "connections that ended")
