"""Events for many clients, written in parts, end to end: raw clients, the whole proxy, a real etcd."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

CLIENTS = 8
PUTS = 40


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make two connections a part, and two clients many."""
    monkeypatch.setattr("proxy.listening.write_queue.PART_CONNECTIONS", 2)
    monkeypatch.setattr("proxy.watch.delivery.ALONE_MAX", 2)


@pytest.mark.usefixtures("small_parts")
async def test_each_watch_gets_all_events_in_order(etcd: EtcdServer) -> None:
    """All clients watch two keys on one stream, and one key of their own; these events overtake the others."""
    async with proxy_for(etcd) as proxy, direct(etcd) as store, AsyncExitStack() as stack:
        streams = []
        for number in range(CLIENTS):
            client = await stack.enter_async_context(await RawClient.connect(proxy.port))
            streams.append(stream := client.watch())
            for key in (b"a", b"b", b"own%d" % number):
                stream.create(key)
                await stream.created()
        behind = 0

        async def watch_turns() -> None:
            nonlocal behind
            while True:
                behind += proxy.listener.output.behind
                await asyncio.sleep(0)

        turns = asyncio.create_task(watch_turns())
        keys = [key for number in range(PUTS) for key in (b"a", b"b", b"own%d" % (number % CLIENTS))]
        await asyncio.gather(*[store.put(key, b"%d" % number) for number, key in enumerate(keys)])
        expected = [2 * PUTS + keys.count(b"own%d" % number) for number in range(CLIENTS)]
        await until_async(lambda: [len(stream.values) for stream in streams] == expected, "all events")
        turns.cancel()
        for stream in streams:
            revisions: dict[int, list[int]] = {}
            for response in stream.responses:
                revisions.setdefault(response.watch_id, []).extend(event.kv.mod_revision for event in response.events)
            assert all(found == sorted(set(found)) for found in revisions.values())
        assert behind
        assert not proxy.listener.output.behind
