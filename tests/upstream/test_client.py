"""The public client."""

from __future__ import annotations

import asyncio

import pytest

from tests.etcd.server import EtcdServer
from tests.upstream.scripted import scripted
from tests.waiting import until_async
from upstream.client import Compacted, EtcdWatcher
from upstream.errors import BadEndpoint, CallFailed


async def test_events_through_a_restart(etcd: EtcdServer) -> None:
    async with EtcdWatcher(etcd.endpoint) as watcher:
        responses = watcher.watch(b"a", range_end=b"b")
        created = await anext(responses)
        assert created.created
        assert created.header.revision == 1
        await asyncio.to_thread(etcd.ctl, "put", "a1", "x")
        first = await anext(responses)
        assert [(event.kv.key, event.kv.value) for event in first.events] == [(b"a1", b"x")]
        await asyncio.to_thread(etcd.kill)
        await asyncio.to_thread(etcd.start)
        await asyncio.to_thread(etcd.ctl, "put", "a2", "y")
        second = await anext(responses)
        assert [event.kv.key for event in second.events] == [b"a2"]
        assert second.header.revision == 3
        await responses.aclose()  # type: ignore[attr-defined] # it is a generator
        await until_async(lambda: etcd.watchers() == 0, "the watch to be gone")
        again = watcher.watch(b"a2", start_revision=2)
        assert (await anext(again)).created
        assert [event.kv.mod_revision for event in (await anext(again)).events] == [3]
        await asyncio.to_thread(etcd.ctl, "compact", "3")
        with pytest.raises(Compacted, match="below 3") as compacted:
            async for _ in watcher.watch(b"a", start_revision=1):
                pass
        assert compacted.value.compact_revision == 3


async def test_a_slow_reader_is_not_sent_more_than_it_takes() -> None:
    async with scripted() as etcd, EtcdWatcher(etcd.endpoint) as watcher:
        responses = watcher.watch(b"k", start_revision=1)
        await anext(responses)
        call = etcd.watches()[0]
        for revision in range(1, 100_001, 10):
            call.answer(0, 100_000, list(range(revision, revision + 10)))
        await until_async(lambda: call.stream.blocked, "the window to be full")
        last = 0
        async for response in responses:
            for event in response.events:
                assert event.kv.mod_revision == last + 1
                last += 1
            if last == 100_000:
                break
        assert not call.stream.blocked


async def test_refusals_and_the_end() -> None:
    with pytest.raises(BadEndpoint):
        EtcdWatcher("http://")
    async with scripted() as etcd:
        async with EtcdWatcher([etcd.endpoint], token="secret") as watcher:
            etcd.on_watch = lambda call, _: call.end(7, "etcdserver: permission denied")
            with pytest.raises(CallFailed, match="PERMISSION_DENIED: etcdserver: permission denied"):
                await anext(watcher.watch(b"a"))
            assert etcd.watches()[0].metadata[b"token"] == b"secret"
            etcd.on_watch = etcd.answer_watch
            waiting = watcher.watch(b"b")
            await anext(waiting)
            nothing = asyncio.ensure_future(anext(waiting))
            await asyncio.sleep(0)
        with pytest.raises(CallFailed, match="was closed"):
            await nothing
