"""One etcd that fails at bad moments: in the middle of a response, while it is compacted, or silently."""

from __future__ import annotations

import asyncio

import pytest

from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from tests.e2e.judging import log_of
from tests.e2e.raw_client import RawClient
from tests.e2e.running import Etcd, direct, next_to_etcd, proxy_for, served
from tests.etcd.server import EtcdServer
from tests.faults.relay import Way, relay_to
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept, also_with_a_cover, split_proxy
from tests.waiting import until_async
from upstream.settings import ConnectionSettings, UpstreamSettings

pytestmark = also_with_a_cover()

MIB = 1 << 20


async def put_large(store: Etcd, parts: int, size: int) -> int:
    """Put `parts` keys of `size` bytes in one revision."""
    puts = [
        rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=PREFIX + b"%02d" % number, value=b"x" * size))
        for number in range(parts)
    ]
    answer = await store.kv.Txn(rpc_pb2.TxnRequest(success=puts))
    return int(answer.header.revision)


@pytest.mark.parametrize(
    "after",
    [3 * MIB, pytest.param(MIB // 2, marks=pytest.mark.long), pytest.param(7 * MIB, marks=pytest.mark.long)],
)
async def test_upstream_breaks_in_the_middle_of_a_run_of_fragments(etcd: EtcdServer, after: int) -> None:
    """After an outage, 14 MiB come in pieces of 2 MiB that end inside revisions; the connection breaks between them."""
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(etcd.endpoint, way.endpoint) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        pieces = await client.open_watch(PREFIX, PREFIX_END, fragment=True)
        streams.append((pieces, 0))
        await store.put(PREFIX + b"a", b"1")
        way.cut()
        await until_async(lambda: next_to_etcd(proxy).engine.stats.upstream_broken == 1, "the outage")
        for _ in range(12):
            await put_large(store, 4, 300_000)
        way.mend()
        way.break_after(Way.BACK, after)
        await until_async(lambda: next_to_etcd(proxy).engine.stats.upstream_broken == 2, "the break")
        way.mend()
        last = await store.put(PREFIX + b"a", b"2")
        await all_kept(streams, etcd.endpoint, last)


async def test_compacted_during_an_outage(etcd: EtcdServer) -> None:
    """Of one range, watches that missed events are cancelled with the compact revision; the others continue."""
    async with (
        relay_to(etcd.client_port) as way,
        proxy_for(way.endpoint) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        first = await store.put(PREFIX + b"a", b"1")
        behind = [await client.open_watch(PREFIX, PREFIX_END, start) for start in (0, first)]
        ahead = await client.open_watch(PREFIX, PREFIX_END, first + 40)
        other = await client.open_watch(b"/q")
        await until_async(lambda: behind[1].values == [b"1"], "the first event")
        way.cut()
        await until_async(lambda: next_to_etcd(proxy).engine.stats.upstream_broken >= 1, "the break")
        for number in range(30):
            compacted = await store.put(PREFIX + b"a", b"%d" % number)
        await store.compact(compacted)
        way.mend()
        # Events on the quiet range in between can no longer be found out.
        for stream in (*behind, other):
            await until_async(lambda s=stream: s.responses[-1].canceled, "the cancel")  # type: ignore[misc]
            response = stream.responses[-1]
            assert (response.compact_revision, response.cancel_reason) == (compacted, "")
        assert behind[0].values == []
        again = await client.open_watch(PREFIX, PREFIX_END, compacted)
        while (last := await store.put(PREFIX + b"a", b"x")) < first + 45:
            pass
        await until_async(lambda: ahead.values[-1:] == [b"x"] and len(ahead.values) == last - first - 39, "events")
        await until_async(lambda: len(again.values) == last - compacted + 1, "all since the compaction")
        assert not any(response.canceled for stream in (ahead, again) for response in stream.responses)


async def test_a_silent_outage_is_detected_and_loses_nothing(etcd: EtcdServer) -> None:
    """The connection stays open but forwards nothing: a ping detects it, and no event is lost."""
    settings = UpstreamSettings(connection=ConnectionSettings(keepalive_s=0.3, keepalive_timeout_s=0.3))
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(etcd.endpoint, way.endpoint, upstream=settings) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        await store.put(PREFIX + b"a", b"1")
        way.half_open()
        for number in range(50):
            last = await store.put(PREFIX + b"a", b"%d" % number)
        await until_async(lambda: next_to_etcd(proxy).engine.stats.upstream_broken >= 1, "the proxy to notice")
        way.mend()
        await all_kept(streams, etcd.endpoint, last)


@pytest.mark.long
async def test_connections_that_break_all_the_time(etcd: EtcdServer) -> None:
    """Every connection ends after a few kilobytes, each time at another place of the stream."""
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(etcd.endpoint, way.endpoint) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        writer = Writer(etcd.endpoint)
        for number in range(6):
            broken = next_to_etcd(proxy).engine.stats.upstream_broken
            way.break_after(Way.BACK, 700 + 397 * number)
            await until_async(lambda b=broken: next_to_etcd(proxy).engine.stats.upstream_broken > b, "a break")  # type: ignore[misc]
            way.mend()
            streams.append((await client.open_watch(PREFIX, PREFIX_END, number), number))
        await writer.more(5)
        await all_kept(streams, etcd.endpoint, await writer.stop())
        assert proxy.engine.core.stats.watches == len(streams)


async def test_a_compaction_hits_more_than_512_laggards(etcd: EtcdServer) -> None:
    """Each is cancelled alone or gets everything; live watches and the next compaction are not delayed."""
    limits = CoreLimits(history_revisions_max=10, backfills_max=20, backfill_share_revisions=0)
    async with served(etcd, limits=limits) as (_proxy, store, client):
        for number in range(700):
            newest = await store.put(PREFIX + b"%d" % (number % 7), b"%d" % number)
        live = await client.open_watch(PREFIX, PREFIX_END)
        laggards = []
        for number in range(600):
            stream = client.watch()
            stream.create(PREFIX, PREFIX_END, 2 + number)
            laggards.append((stream, 2 + number))
        middle = 350
        await store.compact(middle)
        last = await store.put(PREFIX + b"a", b"last")
        await until_async(lambda: live.values == [b"last"], "the live event")
        complete, cancelled = [], 0
        for stream, start in laggards:
            await until_async(
                lambda s=stream: s.values[-1:] == [b"last"] or (s.responses and s.responses[-1].canceled),  # type: ignore[misc]
                f"the end of the backlog of {start}",
            )
            if stream.responses[-1].canceled:
                cancelled += 1
                assert stream.responses[-1].compact_revision == middle
                assert start + len(stream.values) < middle
                got = [event.kv.mod_revision for each in stream.responses for event in each.events]
                assert got == list(range(start, start + len(got)))
                assert log_of(stream, PREFIX, PREFIX_END, start).records
            else:
                complete.append((stream, start))
        assert len(complete) >= 600 - middle
        for stream, start in complete:
            assert len(stream.values) == last - start + 1
        await until_async(lambda: etcd.watchers() == 1, "one watcher again")
        assert newest < last
        await store.compact(last)
        await store.put(PREFIX + b"a", b"more")
        await until_async(lambda: live.values == [b"last", b"more"], "the next live event")
        assert cancelled + len(complete) == 600


@pytest.mark.long
async def test_etcd_restarts_while_laggards_catch_up(etcd: EtcdServer) -> None:
    limits = CoreLimits(history_revisions_max=10, backfills_max=5)
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(way.endpoint, way.endpoint, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        for number in range(20):
            await put_large(store, 1, 500_000)
            last = await store.put(PREFIX + b"b", b"%d" % number)
        streams = []
        for number in range(10):
            stream = client.watch()
            stream.create(PREFIX, PREFIX_END, 1 + number)
            streams.append((stream, 1 + number))
        await until_async(lambda: way.passed[Way.BACK] > 3 * MIB, "some of the backlog")
        await asyncio.to_thread(etcd.kill)
        await asyncio.to_thread(etcd.start)
        last = await store.put(PREFIX + b"b", b"last")
        await all_kept(streams, etcd.endpoint, last)
