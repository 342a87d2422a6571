"""Ended objects are freed at once, by reference counting, without waiting for the garbage collector.

The collector examines old objects only once in millions of allocations (see GC_THRESHOLDS in proxy/server.py), so a
session, a call or a trunk in a reference cycle with its own parts would stay for hours: a leak.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import pytest

from coalesce import CoreLimits
from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.server import GC_THRESHOLDS, Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import served
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

OURS = ("proxy.", "proto.", "coalesce.", "upstream.")
TIMES = 20

What = Callable[[Proxy, RawClient, int], Awaitable[list[RawClient]]]
"""An action with the proxy, a client and a past revision; returns its own clients, whose objects are not checked."""


@contextmanager
def collected() -> Iterator[Callable[[], Counter[str]]]:
    """Yield a function that returns the types of our objects that only a collection has freed."""

    def found() -> Counter[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        gc.set_debug(0)
        names = (f"{type(each).__module__}.{type(each).__qualname__}" for each in gc.garbage)
        counts = Counter(name for name in names if name.startswith(OURS))
        gc.garbage.clear()
        return counts

    gc.collect()
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()


async def watch_streams(proxy: Proxy, client: RawClient, past: int) -> list[RawClient]:
    """Streams with watches, from now and from the past, that the client resets."""
    del proxy
    streams = [client.watch() for _ in range(TIMES)]
    for number, stream in enumerate(streams):
        stream.create(b"k%d" % (number % 3), start_revision=past * (number % 2), prev_kv=number % 5 == 0)
        stream.progress()
    for stream in streams:
        await stream.created()
    for stream in streams:
        stream.raw.cancel()
    return [client]


async def single_watches(proxy: Proxy, client: RawClient, past: int) -> list[RawClient]:
    """Watches created and cancelled on a stream that stays open."""
    del proxy
    stream = client.watch()
    for number in range(TIMES):
        stream.create(b"k%d" % number, start_revision=past * (number % 2), progress_notify=True)
        stream.cancel((await stream.created()).watch_id)
        while not (await stream.next()).canceled:
            pass
    stream.raw.cancel()
    return [client]


async def connections(proxy: Proxy, client: RawClient, past: int) -> list[RawClient]:
    """Connections that are lost with all their streams."""
    del client, past
    clients = [await RawClient.connect(proxy.port) for _ in range(TIMES)]
    for each in clients:
        await each.open_watch(b"k")
        await each.unary("/etcdserverpb.KV/Range", rpc_pb2.RangeRequest(key=b"k").SerializeToString())
        await each.close()
    return clients


async def calls(proxy: Proxy, client: RawClient, past: int) -> list[RawClient]:
    """Pass-through calls: answered, refused, cancelled."""
    del proxy, past
    for number in range(TIMES):
        put = rpc_pb2.PutRequest(key=b"k%d" % number, value=b"v").SerializeToString()
        assert (await client.unary("/etcdserverpb.KV/Put", put)).status == 0
        assert (await client.unary("/etcdserverpb.KV/None", b"")).status == Status.UNIMPLEMENTED
        given_up = client.call("/etcdserverpb.Lease/LeaseKeepAlive")
        given_up.cancel()
    return [client]


@pytest.mark.parametrize("what", [watch_streams, single_watches, connections, calls])
async def test_ended_objects_are_freed_without_the_collector(etcd: EtcdServer, what: What) -> None:
    async with served(etcd, limits=CoreLimits(linger_s=0.05)) as (proxy, store, client):
        past = await store.put(b"k0", b"v")
        for number in range(1, 5):
            await store.put(b"k%d" % number, b"v")
        # Everything that is created once exists by now.
        await what(proxy, client, past)
        await _at_rest(proxy)
        with collected() as found:
            clients = await what(proxy, client, past)
            await _at_rest(proxy)
            assert found() == Counter()
            del clients


async def _at_rest(proxy: Proxy) -> None:
    def empty() -> bool:
        stats = proxy.engine.core.stats
        return not (stats.sessions or stats.trunks or stats.backfills)

    await until_async(empty, "the core to be empty")
    await until_async(lambda: len(proxy.listener.connections) == 1, "the connections to be gone")
    await until_async(lambda: proxy.listener.streams == 0, "the streams to be gone")


def test_a_collection_examines_few_young_objects() -> None:
    """Events wait for it."""
    examined: list[int] = []

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            examined.append(sum(len(gc.get_objects(generation)) for generation in range(info["generation"] + 1)))

    gc.collect()
    usual = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        kept = [[number] for number in range(50_000)]
    finally:
        gc.set_threshold(*usual)
        gc.callbacks.remove(note)
    assert len(kept) > 10_000 > 3 * max(examined)
