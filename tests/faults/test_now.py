"""A watch from now never gets a put that was acknowledged before its create, however far the trunk lags."""

from __future__ import annotations

import asyncio

import pytest

from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, served
from tests.etcd.server import EtcdServer
from tests.faults.relay import Way, relay_to
from tests.faults.scene import bookmark, reached, split_proxy
from tests.waiting import until_async

PUT = "/etcdserverpb.KV/Put"


async def _put(etcd: EtcdServer, client: RawClient, store: object, way: str, value: bytes) -> int:
    if way == "through the proxy":
        message = rpc_pb2.PutRequest(key=b"a", value=value).SerializeToString()
        call = await client.unary(PUT, message)
        return rpc_pb2.PutResponse.FromString(call.messages[0]).header.revision
    if way == "by another process":
        shown = await asyncio.to_thread(etcd.ctl, "put", "a", value.decode(), "--write-out=fields")
        fields = dict(line.split(" : ") for line in shown.stdout.splitlines() if " : " in line)
        return int(fields['"Revision"'])
    return int(await store.put(b"a", value))  # type: ignore[attr-defined]  # an Etcd


@pytest.mark.parametrize("way", ["through the proxy", "direct to etcd", "by another process"])
@pytest.mark.parametrize(
    ("calls_s", "watches_s"), [pytest.param(0.0, 0.0, marks=pytest.mark.long), (0.0, 0.15), (0.1, 0.0)]
)
async def test_an_acknowledged_put_is_never_delivered(
    etcd: EtcdServer, way: str, calls_s: float, watches_s: float
) -> None:
    """The trunk is far behind the reads, or ahead of them."""
    async with (
        relay_to(etcd.client_port) as calls,
        relay_to(etcd.client_port) as watches,
        split_proxy(calls.endpoint, watches.endpoint) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        first = await client.open_watch(b"a")
        calls.delay(Way.BACK, calls_s)
        watches.delay(Way.BACK, watches_s)
        streams = []
        revisions = []
        for number in range(4):
            acknowledged = await _put(etcd, client, store, way, b"%d" % number)
            stream = client.watch()
            stream.create(b"a")
            # etcd is ahead before the answer arrives: this put may be delivered or not, but all of it.
            between = await store.put(b"a", b"between")
            streams.append((stream, acknowledged))
            revisions += [acknowledged, between]
        headers = [(await stream.created()).header.revision for stream, _ in streams]
        last = await store.put(b"a", b"last")
        for (stream, acknowledged), header in zip(streams, headers, strict=True):
            assert header >= acknowledged
            await until_async(lambda s=stream: s.values[-1:] == [b"last"], "the last event")  # type: ignore[misc]
            got = [event.kv.mod_revision for response in stream.responses for event in response.events]
            assert got == [each for each in (*revisions, last) if each > header]
        assert len(first.values) == 9


async def test_one_read_serves_all_creates_that_wait_for_it(etcd: EtcdServer) -> None:
    async with relay_to(etcd.client_port) as calls, split_proxy(calls.endpoint, etcd.endpoint) as proxy:
        client = await RawClient.connect(proxy.port)
        await client.open_watch(b"a")
        reads = proxy.reader.reads
        calls.delay(Way.BACK, 0.1)
        streams = [client.watch() for _ in range(50)]
        for stream in streams:
            stream.create(b"a")
        for stream in streams:
            await stream.created()
        # The probe that auth is off, the read in flight when most creates came, and the next one.
        assert proxy.reader.reads - reads <= 3
        await client.close()


async def test_a_quiet_trunk_survives_a_compaction_and_a_break(etcd: EtcdServer) -> None:
    """Bookmarks: the store is compacted far beyond the trunk's last event, then the upstream connection breaks."""
    limits = CoreLimits(bookmark_s=0.4)
    async with (
        relay_to(etcd.client_port) as way,
        split_proxy(way.endpoint, way.endpoint, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        await store.put(b"quiet", b"0")
        streams = [await client.open_watch(b"quiet", start_revision=start) for start in (0, 0, 2)]
        for _ in range(300):
            last = await store.put(b"other", b"x")
        await until_async(lambda: bookmark(proxy, b"quiet") >= last, "the bookmark to be renewed")
        await store.compact(last)
        way.cut()
        await until_async(lambda: proxy.engine.stats.upstream_broken >= 1, "the break")
        way.mend()
        await store.put(b"quiet", b"1")
        for stream in streams:
            await until_async(lambda s=stream: s.values[-1:] == [b"1"], "the event after the break")  # type: ignore[misc]
        assert [stream.values for stream in streams] == [[b"1"], [b"1"], [b"0", b"1"]]
        assert not any(response.canceled for stream in streams for response in stream.responses)
        assert proxy.engine.core.stats.compacted == 0


async def test_a_future_watch_on_a_cold_range_is_not_compacted(etcd: EtcdServer) -> None:
    """Its start revision is written and compacted at once; etcd has such a watch synced from the beginning."""
    async with served(etcd) as (proxy, store, client):
        for turn in range(8):
            key = b"cold%d" % turn
            before = await store.put(b"other", b"x")
            registered = etcd.watchers()
            stream = await client.open_watch(key, start_revision=before + 1 + turn % 2)
            # The client has its answer before etcd has the watch.
            await until_async(lambda count=registered: etcd.watchers() > count, "the watch at etcd")  # type: ignore[misc]
            for number in range(4):
                last = await store.put(key, b"%d" % number)
            await store.compact(last)
            await until_async(lambda s=stream, r=last: reached(s, r) or s.responses[-1].canceled, "the last")  # type: ignore[misc]
            assert stream.values == [b"0", b"1", b"2", b"3"][turn % 2 :]
        assert proxy.engine.core.stats.compacted == 0
