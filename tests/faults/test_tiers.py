"""Two levels of proxies: hubs that restart in front of live leaves, and what etcd sees of them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc.aio

from coalesce.ending import OTHER_HISTORY
from coalesce.limits import CoreLimits
from proxy.server import Proxy, ProxySettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import change_endpoints, direct, next_to_etcd, proxy_for, two_tiers
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.faults.relay import relay_to
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

WATCHERS = "etcd_debugging_mvcc_watcher_total"


async def hub_at(etcd: EtcdServer, port: int) -> Proxy:
    """Start a hub on a port."""
    hub = Proxy(ProxySettings(endpoints=etcd.endpoint, tune_gc=False, port=port))
    await hub.start()
    return hub


async def calls_and_creates(leaf: Proxy, stopping: asyncio.Event) -> int:
    """Make calls and watches until stopped, none of which may fail; return how many."""
    done = 0
    async with direct(f"{HOST}:{leaf.port}") as calls, await RawClient.connect(leaf.port) as client:
        while not stopping.is_set():
            revision = await calls.put(b"/c/%d" % (done % 50), b"1")
            async with asyncio.timeout(10):
                stream = await client.open_watch(b"/c/%d" % (done % 50), start_revision=revision)
                assert (await stream.next()).events[0].kv.mod_revision == revision
            stream.raw.cancel()
            done += 1
    return done


async def test_hubs_restart_in_turn_and_no_client_notices(etcd: EtcdServer) -> None:
    """No event is lost, and no call and no create fails."""
    ports = [free_port(), free_port()]
    hubs = [await hub_at(etcd, port) for port in ports]
    places = ",".join(f"{HOST}:{port}" for port in ports)
    async with (
        proxy_for(etcd, watch_endpoints=places) as one,
        proxy_for(etcd, watch_endpoints=places) as two,
        await RawClient.connect(one.port) as client,
        await RawClient.connect(two.port) as other,
    ):
        streams = [(await each.open_watch(PREFIX, PREFIX_END, 1), 1) for each in (client, other)]
        writer = Writer(etcd.endpoint, 0.002)
        await writer.more(20)
        stopping = asyncio.Event()
        others = [asyncio.create_task(calls_and_creates(leaf, stopping)) for leaf in (one, two)]
        for turn in (0, 1, 0, 1):
            breaks = one.upstream.breaks + two.upstream.breaks
            carried = any(hubs[turn].listener.connections)
            await hubs[turn].drain(0.5)
            await writer.more(20)
            hubs[turn] = await hub_at(etcd, ports[turn])
            await until_async(lambda: one.upstream.connected and two.upstream.connected, "both leaves to go on")
            assert not carried or one.upstream.breaks + two.upstream.breaks > breaks
            await writer.more(20)
        stopping.set()
        assert min(await asyncio.gather(*others)) >= 4
        await all_kept(streams, etcd.endpoint, await writer.stop())
        assert one.engine.stats.upstream_broken + two.engine.stats.upstream_broken > 0
    for hub in hubs:
        await hub.stop()


async def test_etcd_serves_one_watch_for_all_leaves(etcd: EtcdServer) -> None:
    async with AsyncExitStack() as stack:
        hub = await stack.enter_async_context(proxy_for(etcd))
        streams = []
        for _ in range(3):
            leaf = await stack.enter_async_context(proxy_for(etcd, watch_endpoints=f"{HOST}:{hub.port}"))
            client = await stack.enter_async_context(await RawClient.connect(leaf.port))
            streams += [await client.open_watch(PREFIX, PREFIX_END) for _ in range(10)]
        calls = await stack.enter_async_context(direct(etcd))
        revision = await calls.put(PREFIX + b"1", b"1")
        for stream in streams:
            assert (await stream.next()).events[0].kv.mod_revision == revision
        assert etcd.metrics()[WATCHERS] == 1


async def test_watches_of_another_cluster_are_not_served(etcd: EtcdServer) -> None:
    with EtcdServer(etcd.binary) as foreign:
        async with proxy_for(foreign) as hub, proxy_for(etcd, watch_endpoints=f"{HOST}:{hub.port}") as leaf:
            await until_async(lambda: "another cluster" in leaf.health.reason, "the leaf to refuse the hub")
            async with await RawClient.connect(leaf.port) as client:
                stream = client.watch()
                stream.create(PREFIX)
                status, text = await stream.raw.end()
                assert status == grpc.StatusCode.UNAVAILABLE.value[0]
                assert "another cluster" in text


async def test_a_restore_cancels_once_through_two_tiers(etcd: EtcdServer, tmp_path: Path) -> None:
    """The leaf's connection lives on through the restore: when it ends later, the leaf finds no second restore."""
    async with (
        two_tiers(etcd) as leaf,
        direct(etcd) as calls,
        await RawClient.connect(leaf.port) as client,
    ):
        await until_async(lambda: leaf.upstream.connected, "the leaf to use its hub")
        # More than the entries of the restored log, which begins again.
        for _ in range(50):
            await calls.put(PREFIX + b"a", b"kept")
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        stream = await client.open_watch(PREFIX, PREFIX_END)
        for _ in range(10):
            await calls.put(PREFIX + b"a", b"lost")
        await until_async(lambda: len(stream.values) == 10, "the events")
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        await until_async(lambda: stream.responses[-1].canceled, "the cancel")
        assert stream.responses[-1].cancel_reason == OTHER_HISTORY
        again = await client.open_watch(PREFIX, PREFIX_END)
        breaks = leaf.upstream.breaks
        for connection in tuple(next_to_etcd(leaf).listener.connections):
            connection.abort()
        await until_async(lambda: leaf.upstream.breaks > breaks and leaf.upstream.connected, "the hub again")
        revision = await calls.put(PREFIX + b"a", b"new")
        await until_async(lambda: again.values, "an event")
        assert again.responses[-1].events[0].kv.mod_revision == revision
        assert leaf.engine.stats.went_back == next_to_etcd(leaf).engine.stats.went_back == 1


async def test_a_leaf_without_watches_notices_a_restore(etcd: EtcdServer, tmp_path: Path) -> None:
    """Its hub has no watch to cancel; no client that comes back gets events of the old history."""
    async with (
        two_tiers(etcd, limits=CoreLimits(linger_s=0)) as leaf,
        direct(etcd) as calls,
        await RawClient.connect(leaf.port) as client,
    ):
        await until_async(lambda: leaf.upstream.connected, "the leaf to use its hub")
        for _ in range(20):
            kept = await calls.put(PREFIX + b"a", b"kept")
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        stream = await client.open_watch(PREFIX, PREFIX_END)
        for _ in range(5):
            await calls.put(PREFIX + b"a", b"lost")
        await until_async(lambda: len(stream.values) == 5, "the events")
        stream.raw.cancel()
        await until_async(lambda: leaf.engine.core.stats.parked == 1, "the trunk to be parked")
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        for _ in range(6):
            await calls.put(PREFIX + b"a", b"new")
        await until_async(lambda: leaf.engine.stats.went_back == 1, "the leaf to notice")
        again = await client.open_watch(PREFIX, PREFIX_END, kept + 1)
        await until_async(lambda: len(again.values) >= 6, "the events")
        assert again.values == 6 * [b"new"]


async def test_proxies_that_watch_each_other_are_refused(etcd: EtcdServer) -> None:
    port = free_port()
    async with (
        proxy_for(etcd, watch_endpoints=f"{HOST}:{port}") as leaf,
        proxy_for(f"{HOST}:{leaf.port}", watch_endpoints=[], port=port),
        await RawClient.connect(leaf.port) as client,
    ):
        await until_async(lambda: "in a loop" in leaf.health.reason, "the loop to be found")
        stream = client.watch()
        stream.create(PREFIX)
        status, text = await stream.raw.end()
        assert status == grpc.StatusCode.UNAVAILABLE.value[0]
        assert f"in a loop: {HOST}:{port};" in text
        assert not leaf.health.serving


async def test_a_loop_of_watch_endpoints_is_named(etcd: EtcdServer) -> None:
    """Each of three proxies has --endpoints at etcd and takes its watches from the next one; a fourth uses them."""
    places = [f"{HOST}:{free_port()}" for _ in range(3)]
    async with AsyncExitStack() as stack:
        loop = [
            await stack.enter_async_context(
                proxy_for(etcd, port=int(place.rpartition(":")[2]), watch_endpoints=places[(turn + 1) % 3])
            )
            for turn, place in enumerate(places)
        ]
        other = await stack.enter_async_context(proxy_for(etcd, watch_endpoints=places[0]))
        way = f"in a loop: {places[1]} -> {places[2]} -> {places[0]};"
        await until_async(lambda: way in loop[0].health.reason, "the loop to be found")
        assert not loop[0].health.serving
        async with await RawClient.connect(loop[0].port) as client:
            stream = client.watch()
            stream.create(PREFIX)
            status, text = await stream.raw.end()
            assert status == grpc.StatusCode.UNAVAILABLE.value[0]
            assert way in text
        assert not other.upstream.connected
        # One of them gets another hub: all of them serve.
        hub = await stack.enter_async_context(proxy_for(etcd, watch_endpoints=[]))
        assert await change_endpoints(loop[2], [etcd.endpoint], [f"{HOST}:{hub.port}"]) == ""
        everyone = (*loop, other)
        await until_async(lambda: all(proxy.health.serving for proxy in everyone), "all to serve")


def uses(leaf: Proxy, hub: str) -> bool:
    """Return whether a leaf takes its watches from this hub."""
    return leaf.upstream.server is not None and leaf.upstream.server.endpoint == hub


async def test_a_hub_without_etcd_is_left_for_another_one(etcd: EtcdServer) -> None:
    """The hub still serves its clients' connections, so that only its own route to etcd shows it."""
    async with (
        relay_to(etcd.client_port) as way,
        proxy_for(way.endpoint) as cut_off,
        proxy_for(etcd) as other,
    ):
        hubs = [f"{HOST}:{hub.port}" for hub in (cut_off, other)]
        settings = UpstreamSettings(create_timeout_s=0.4)
        async with (
            proxy_for(etcd, watch_endpoints=hubs, upstream=settings) as leaf,
            await RawClient.connect(leaf.port) as client,
        ):
            await until_async(lambda: leaf.upstream.connected, "the leaf to use a hub")
            if not uses(leaf, hubs[0]):
                assert await change_endpoints(leaf, [etcd.endpoint], hubs[:1]) == ""
                await until_async(lambda: uses(leaf, hubs[0]), "the first hub")
                assert await change_endpoints(leaf, [etcd.endpoint], hubs) == ""
            streams = [(await client.open_watch(PREFIX, PREFIX_END, 1), 1)]
            writer = Writer(etcd.endpoint, 0.002)
            await writer.more(20)
            way.cut()
            await until_async(lambda: uses(leaf, hubs[1]), "the other hub")
            await writer.more(20)
            await all_kept(streams, etcd.endpoint, await writer.stop())
            way.mend()
