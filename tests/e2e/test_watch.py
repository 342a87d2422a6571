"""The Watch service, end to end: raw clients, the whole proxy, a real etcd."""

from __future__ import annotations

import asyncio

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.listening.settings import ListenerSettings
from proxy.watch.settings import WatchSettings
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import WATCH, RawClient, WatchStream
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import LIMIT_S, until_async

PREFIX, PREFIX_END = b"/p/", b"/p0"
GONE_S = 3.0
"""How soon after its last client a watcher must be gone at etcd."""


async def test_a_watch_gets_created_its_events_and_canceled(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        before = await store.put(b"a", b"0")
        stream = client.watch()
        stream.create(b"a")
        created = await stream.created()
        assert created.watch_id == 0
        assert created.header.revision == before
        assert created.header.cluster_id
        first = await store.put(b"a", b"1")
        response = await stream.next()
        assert [(event.kv.key, event.kv.value) for event in response.events] == [(b"a", b"1")]
        assert response.header.revision == first
        stream.cancel(0)
        canceled = await stream.next()
        assert canceled.canceled
        assert not canceled.cancel_reason
        stream.create(b"a")
        assert (await stream.created()).watch_id == 1


async def test_a_start_in_the_past_and_one_in_the_future(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        revisions = [await store.put(b"a", b"%d" % number) for number in range(5)]
        past, future = client.watch(), client.watch()
        past.create(b"a", start_revision=revisions[2])
        future.create(b"a", start_revision=revisions[-1] + 3)
        await past.created()
        await future.created()
        await until_async(lambda: past.values == [b"2", b"3", b"4"], "the past")
        for number in range(5, 9):
            await store.put(b"a", b"%d" % number)
        await until_async(lambda: past.values[-1] == b"8", "the present")
        await until_async(lambda: future.values == [b"7", b"8"], "the future")


async def test_five_hundred_watches_are_one_upstream_watch(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        base = etcd.watchers()
        clients = [await RawClient.connect(proxy.port) for _ in range(20)]
        streams = [client.watch() for client in clients for _ in range(25)]
        for stream in streams:
            stream.create(PREFIX, PREFIX_END)
        for stream in streams:
            await stream.created()
        assert etcd.watchers() == base + 1
        last = 0
        for number in range(10):
            last = await store.put(b"/p/%d" % (number % 3), b"%d" % number)
        expected = [b"%d" % number for number in range(10)]
        for stream in streams:
            await until_async(lambda stream=stream: len(stream.values) == 10, "all events")  # type: ignore[misc]
            assert stream.values == expected
        await assert_kept([(stream, 0) for stream in streams[:25]], etcd.endpoint, PREFIX, PREFIX_END, last)
        await until_async(lambda: etcd.watchers() == base + 1, "the watch of the check to be gone", GONE_S)
        for client in clients:
            await client.close()
        await until_async(lambda: etcd.watchers() == base, "the watcher to be gone", GONE_S)


async def test_ten_ranges_are_ten_upstream_watches(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        base = etcd.watchers()
        for number in range(50):
            await client.open_watch(b"/r/%d/" % (number % 10), b"/r/%d0" % (number % 10))
        assert etcd.watchers() == base + 10


async def test_a_start_inside_the_window_costs_etcd_nothing(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        first = await client.open_watch(PREFIX, PREFIX_END)
        revisions = [await store.put(b"/p/k", b"%d" % number) for number in range(20)]
        await until_async(lambda: len(first.values) == 20, "all events")
        base = etcd.watchers()
        opened = proxy.engine.core.stats.upstreams_opened
        streams = []
        for number in range(20):
            stream = await client.open_watch(PREFIX, PREFIX_END, start_revision=revisions[number])
            streams.append((stream, revisions[number]))
        for number, (stream, _) in enumerate(streams):
            await until_async(lambda s=stream, n=number: len(s.values) == 20 - n, "the replay")  # type: ignore[misc]
        assert etcd.watchers() == base
        assert proxy.engine.core.stats.upstreams_opened == opened
        await assert_kept(streams, etcd.endpoint, PREFIX, PREFIX_END, revisions[-1])


async def test_options_of_a_watch(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        stream = client.watch()
        deletes = [rpc_pb2.WatchCreateRequest.NOPUT]
        puts = [rpc_pb2.WatchCreateRequest.NODELETE]
        stream.create(b"a", watch_id=7, filters=deletes, prev_kv=True)
        stream.create(b"a", watch_id=8, filters=puts)
        stream.create(b"a", watch_id=8)
        assert (await stream.created()).watch_id == 7
        assert (await stream.created()).watch_id == 8
        refused = await stream.next()
        assert (refused.watch_id, refused.created, refused.canceled) == (-1, True, True)
        assert "duplicate watch ID" in refused.cancel_reason
        await store.put(b"a", b"1")
        await store.delete(b"a")
        await store.put(b"a", b"2")
        await until_async(lambda: sum(len(each.events) for each in stream.responses) == 3, "three events")
        by_id: dict[int, list[tuple[int, bytes, bytes]]] = {7: [], 8: []}
        for response in stream.responses[3:]:
            by_id[response.watch_id] += [(e.type, e.kv.value, e.prev_kv.value) for e in response.events]
        assert by_id == {7: [(1, b"", b"1")], 8: [(0, b"1", b""), (0, b"2", b"")]}


async def test_progress_is_answered(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        stream = await client.open_watch(b"a")
        revision = await store.put(b"somewhere/else", b"")
        stream.progress()
        response = await stream.next()
        assert (response.watch_id, len(response.events)) == (-1, 0)
        assert response.header.revision >= revision


async def test_a_compacted_start_is_cancelled_alone(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        good = client.watch()
        revisions = [await store.put(b"a", b"%d" % number) for number in range(10)]
        await store.compact(revisions[6])
        good.create(b"a")
        await good.created()
        stream = await client.open_watch(b"a", start_revision=revisions[1])
        canceled = await stream.next()
        assert (canceled.canceled, canceled.compact_revision) == (True, revisions[6])
        stream.create(b"a", start_revision=revisions[6])
        await stream.created()
        await until_async(lambda: stream.values == [b"6", b"7", b"8", b"9"], "what is left")
        await store.put(b"a", b"10")
        await until_async(lambda: good.values == [b"10"] and stream.values[-1] == b"10", "the next event")


async def test_a_compacted_start_within_the_history_is_served(etcd: EtcdServer) -> None:
    """etcd cancels the same watch."""
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        first = await client.open_watch(PREFIX, PREFIX_END)
        revisions = [await store.put(b"/p/k", b"%d" % number) for number in range(5)]
        await until_async(lambda: len(first.values) == 5, "the events")
        await store.compact(revisions[-1])
        second = await client.open_watch(PREFIX, PREFIX_END, start_revision=revisions[1])
        await until_async(lambda: second.values == [b"1", b"2", b"3", b"4"], "the events of the history")
    async with await RawClient.connect(etcd.client_port) as client:
        there = await client.open_watch(PREFIX, PREFIX_END, start_revision=revisions[1])
        assert (await there.next()).compact_revision == revisions[-1]


async def test_half_close_does_not_end_a_watch(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        stream = client.watch()
        stream.create(b"a")
        stream.raw.send_raw(b"", end=True)
        await stream.created()
        await store.put(b"a", b"1")
        await until_async(lambda: stream.values == [b"1"], "the event")
        assert not stream.raw.over


@pytest.mark.parametrize(
    ("raw", "status", "text"),
    [
        (b"\0\0\0\0\x02\xff\xff", Status.INTERNAL, "not a WatchRequest"),
        (b"\0\x7f\xff\xff\xff", Status.RESOURCE_EXHAUSTED, "larger than the maximum"),
        (b"\x07\0\0\0\0", Status.INTERNAL, "compression flag"),
    ],
)
async def test_a_bad_message_ends_its_stream_only(etcd: EtcdServer, raw: bytes, status: Status, text: str) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store, await RawClient.connect(proxy.port) as client:
        good, bad = client.watch(), client.watch()
        good.create(b"a")
        bad.create(b"a")
        await good.created()
        await bad.created()
        bad.raw.send_raw(raw)
        assert (await bad.raw.end())[0] == status
        assert text in bad.raw.text
        await store.put(b"a", b"1")
        await until_async(lambda: good.values == [b"1"], "the event")
        assert bad.values == []
        assert proxy.engine.core.stats.sessions == 1


async def test_a_stream_that_ends_inside_a_message(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        stream = client.call(WATCH)
        stream.send_raw(b"\0\0\0\0\x09half", end=True)
        assert (await stream.end())[0] == Status.INTERNAL


async def test_a_message_of_unknown_kind_is_ignored(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        stream = client.watch()
        stream.raw.send(b"")
        stream.raw.send(b"\x7a\x02hi")
        stream.create(b"a")
        assert (await stream.created()).watch_id == 0


async def test_requests_split_over_frames_and_compressed(etcd: EtcdServer) -> None:
    import gzip

    from proto.framing import frame

    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        request = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"a")).SerializeToString()
        split = WatchStream(client.call(WATCH))
        for byte in frame(request):
            split.raw.send_raw(bytes((byte,)))
        await split.created()
        packed = WatchStream(client.call(WATCH, [("grpc-encoding", "gzip")]))
        packed.raw.send_raw(frame(gzip.compress(request), True))
        await packed.created()


async def test_the_deadline_of_the_call(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        stream = await client.open_watch(b"a", metadata=[("grpc-timeout", "300m")])
        assert (await stream.raw.end())[0] == Status.DEADLINE_EXCEEDED
        await until_async(lambda: proxy.engine.core.stats.sessions == 0, "the session to be forgotten")


async def test_a_client_that_cancels_its_stream(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        base = etcd.watchers()
        stream = await client.open_watch(b"a")
        assert etcd.watchers() == base + 1
        stream.raw.cancel()
        await until_async(lambda: etcd.watchers() == base, "the watcher to be gone", GONE_S)
        assert proxy.engine.core.stats.sessions == 0
        assert not proxy.watches.calls


async def test_sessions_per_connection_are_limited(etcd: EtcdServer) -> None:
    settings = WatchSettings(sessions_per_connection_max=2)
    async with proxy_for(etcd, watch=settings) as proxy, await RawClient.connect(proxy.port) as client:
        streams = [client.watch() for _ in range(3)]
        status, text = await streams[2].raw.end()
        assert status == Status.RESOURCE_EXHAUSTED
        assert "too many watch streams" in text
        streams[0].raw.cancel()
        await client.open_watch(b"a")
        assert proxy.watches.refused_at["sessions_per_connection_max"] == 1


async def test_etcdctl_watches_through_the_proxy(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        process = await asyncio.create_subprocess_exec(
            *(str(etcd.binary.etcdctl), f"--endpoints=127.0.0.1:{proxy.port}", "watch", "--prefix", "/p/"),
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            await until_async(lambda: proxy.engine.core.stats.watches == 1, "etcdctl's watch")
            await store.put(b"/p/a", b"hello")
            assert process.stdout is not None
            lines = [await asyncio.wait_for(process.stdout.readline(), LIMIT_S) for _ in range(3)]
            assert lines == [b"PUT\n", b"/p/a\n", b"hello\n"]
        finally:
            process.terminate()
            await process.wait()
            process._transport.close()  # type: ignore[attr-defined]  # otherwise uvloop warns of its pipe


async def test_a_client_that_asks_without_reading_is_not_read(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port, window=65_535) as client:
        stream = client.watch()
        stream.raw.taking = False
        asked = 0
        while client.h2.local_flow_control_window(stream.raw.id) > 1000 and asked < 100_000:
            stream.create(b"a" * 200)  # A few large requests fill the window as well as many small ones.
            asked += 1
            await asyncio.sleep(0)
        assert asked < 100_000
        assert client.h2.local_flow_control_window(stream.raw.id) <= 1000
        stream.raw.take()
        await until_async(lambda: len(stream.raw.messages) == asked, "all answers")


async def test_limits_of_the_listener_reach_the_proxy(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, listener=ListenerSettings(connections_max=1)) as proxy:
        first = await RawClient.connect(proxy.port)
        await until_async(lambda: len(proxy.listener.connections) == 1, "the first")
        second = await RawClient.connect(proxy.port)
        await until_async(lambda: second.lost, "the second to be turned away")
        await first.close()
