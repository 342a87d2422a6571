"""The last client of a range disconnects and returns: meanwhile etcd serves no watch, and no event is missing."""

from __future__ import annotations

import asyncio

from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until, until_async


async def test_a_client_that_comes_back_costs_etcd_one_watch(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        core = proxy.engine.core
        async with await RawClient.connect(proxy.port) as client:
            stream = await client.open_watch(b"a")
            revisions = [await store.put(b"a", b"%d" % number) for number in range(3)]
            await until_async(lambda: len(stream.values) == 3, "the events")
            assert await asyncio.to_thread(etcd.watchers) == 1
        await until_async(lambda: core.stats.parked == 1, "the range to be parked")
        await asyncio.to_thread(until_none, etcd)
        for number in range(3, 5):
            await store.put(b"a", b"%d" % number)
        async with await RawClient.connect(proxy.port) as client:
            stream = await client.open_watch(b"a", start_revision=revisions[1])
            await store.put(b"a", b"5")
            await until_async(lambda: len(stream.values) >= 5, "everything since")
            assert stream.values == [b"1", b"2", b"3", b"4", b"5"]
            assert await asyncio.to_thread(etcd.watchers) == 1
        assert (core.stats.resumed, core.stats.joins_backfill, core.stats.upstreams_opened) == (1, 0, 2)


def until_none(etcd: EtcdServer) -> None:
    """Wait until etcd serves no watch."""
    until(lambda: etcd.watchers() == 0, "etcd to be rid of the watch")
