"""Covers with a real etcd: one upstream watch for many keys, through breaks of etcd, changes of settings and auth."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from coalesce import report
from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd, direct, proxy_for, served
from tests.e2e.test_auth import DENIED, put, token_of, with_users
from tests.etcd.server import EtcdServer
from tests.waiting import until, until_async
from upstream.credentials import Credentials

CLIENTS = 3
LIMITS = CoreLimits(covers=(b"/s/",))


async def put_all(store: Etcd, keys: list[bytes], value: bytes) -> None:
    """Put all keys, a hundred in one transaction."""
    for first in range(0, len(keys), 100):
        puts = [
            rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value)) for key in keys[first : first + 100]
        ]
        await store.kv.Txn(rpc_pb2.TxnRequest(success=puts))


async def until_count(stream: WatchStream, count: int) -> None:
    """Wait for a number of responses."""
    await until_async(lambda: len(stream.raw.messages) >= count, f"{count} responses", 60)


async def until_events(stream: WatchStream, count: int) -> None:
    """Wait for a number of events; a response may have several, if its watch was behind."""
    seen = [0, 0]

    def are_there() -> bool:
        for message in stream.raw.messages[seen[0] :]:
            seen[0] += 1
            seen[1] += len(rpc_pb2.WatchResponse.FromString(message).events)
        return seen[1] >= count

    await until_async(are_there, f"{count} events", 60)


async def watch_all(client: RawClient, keys: list[bytes]) -> WatchStream:
    """Watch each key, on one stream."""
    stream = client.watch()
    for first in range(0, len(keys), 100):
        for key in keys[first : first + 100]:
            stream.create(key)
        await until_count(stream, min(first + 100, len(keys)))
    return stream


def check_events(stream: WatchStream, keys: list[bytes], values: list[bytes]) -> None:
    """Each watch has received each value of its key once, in order, and nothing else."""
    received: dict[int, list[tuple[bytes, bytes]]] = {}
    for response in stream.responses:
        assert not response.canceled
        events = received.setdefault(response.watch_id, [])
        events += [(event.kv.key, event.kv.value) for event in response.events]
    # Automatic ids are given in the order of the creates.
    assert received == {place: [(key, value) for value in values] for place, key in enumerate(keys)}


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.long)])
async def test_many_keys_cost_etcd_one_watch(count: int) -> None:
    with EtcdServer() as etcd:
        keys = [b"/s/%05d" % place for place in range(count)]
        base = etcd.watchers()
        async with proxy_for(etcd, limits=LIMITS) as proxy, direct(etcd) as store:
            clients = [await RawClient.connect(proxy.port) for _ in range(CLIENTS)]
            streams = [await watch_all(client, keys) for client in clients]
            assert await asyncio.to_thread(etcd.watchers) == base + 1
            values = [b"1", b"2"]
            for value in values:
                await put_all(store, keys, value)
            await asyncio.to_thread(etcd.stop)
            await asyncio.to_thread(etcd.start)
            await until_async(lambda: proxy.upstream.connected, "etcd to be back")
            values.append(b"3")
            await put_all(store, keys, b"3")
            for stream in streams:
                await until_events(stream, count * len(values))
                check_events(stream, keys, values)
            assert proxy.engine.core.stats.upstreams_opened == 1
            assert await asyncio.to_thread(etcd.watchers) == base + 1
            for client in clients:
                await client.close()


async def test_a_quiet_branch_survives_a_compaction_during_a_break() -> None:
    """Its position is the cover's, which events of other keys move: nothing that it needs is compacted."""
    with EtcdServer() as etcd:
        async with served(etcd, limits=replace(LIMITS, bookmark_s=1.0)) as (proxy, store, client):
            stream = await watch_all(client, [b"/s/quiet", b"/s/busy"])
            for number in range(50):
                await store.put(b"/s/busy" if number % 10 == 0 else b"/t/other", b"%d" % number)
            last = await store.put(b"/t/other", b"last")
            (cover,) = report.trunks(proxy.engine.core, 10)
            assert cover.key == b"/s/"
            await until_async(lambda: report.trunks(proxy.engine.core, 10)[0].next_revision > last, "a bookmark")
            await store.compact(last)
            await asyncio.to_thread(etcd.stop)
            await asyncio.to_thread(etcd.start)
            await until_async(lambda: proxy.upstream.connected, "etcd to be back")
            await store.put(b"/s/quiet", b"after")
            await until_async(lambda: b"after" in stream.values, "the event")
            assert not any(response.canceled for response in stream.responses)
            assert proxy.engine.core.stats.compacted == 0


async def test_covers_change_while_clients_are_connected(etcd: EtcdServer) -> None:
    keys = [b"/s/%d" % place for place in range(20)]
    base = etcd.watchers()
    async with served(etcd, limits=CoreLimits()) as (proxy, store, client):
        stream = await watch_all(client, keys)
        assert etcd.watchers() == base + len(keys)
        proxy.engine.set_limits(LIMITS)
        await put_all(store, keys, b"1")
        await asyncio.to_thread(until, lambda: etcd.watchers() == base + 1, "one watch to be left")
        await put_all(store, keys, b"2")
        proxy.engine.set_limits(replace(LIMITS, covers=()))
        await put_all(store, keys, b"3")
        await asyncio.to_thread(until, lambda: etcd.watchers() == base + len(keys), "a watch per key")
        await put_all(store, keys, b"4")
        await until_events(stream, 4 * len(keys))
        check_events(stream, keys, [b"1", b"2", b"3", b"4"])


@pytest.mark.parametrize("allowed", [True, False])
async def test_with_auth_the_own_user_must_be_allowed_the_cover(allowed: bool) -> None:
    with EtcdServer() as etcd:
        with_users(etcd)
        prefix = b"a/" if allowed else b""
        limits = CoreLimits(covers=(prefix,))
        async with proxy_for(etcd, limits=limits, credentials=Credentials("u2", "p")) as proxy:
            core = proxy.engine.core
            async with await RawClient.connect(proxy.port) as client:
                stream = client.watch([("token", await token_of(client, "u1"))])
                stream.create(b"a/1")
                stream.create(b"a/2")
                stream.create(b"b")
                assert [(await stream.created()).watch_id for _ in range(2)] == [0, 1]
                assert (await stream.next()).cancel_reason == DENIED
                for key in ("a/1", "a/2", "a/3", "b"):
                    await put(etcd, key, "v")
                await until_async(lambda: len(stream.raw.messages) >= 5, "the events")
                assert [event.kv.key for each in stream.responses for event in each.events] == [b"a/1", b"a/2"]
                assert core.stats.trunks == (1 if allowed else 2)
                assert core.stats.covers[prefix].refused == (0 if allowed else 1)


async def test_with_a_namespace_a_cover_has_the_prefix_of_the_clients(etcd: EtcdServer) -> None:
    keys = [b"/s/%d" % place for place in range(20)]
    base = etcd.watchers()
    async with served(etcd, limits=LIMITS, namespace=b"/team") as (proxy, store, client):
        stream = await watch_all(client, keys)
        assert etcd.watchers() == base + 1
        # Neither is in the namespace's cover.
        await put_all(store, [*keys, b"/team/t/0"], b"of others")
        await put_all(store, [b"/team" + key for key in keys], b"1")
        await until_events(stream, len(keys))
        check_events(stream, keys, [b"1"])
        cover = proxy.engine.core.stats.covers[b"/s/"]
        assert (cover.events, cover.unwanted_events) == (len(keys), 0)
