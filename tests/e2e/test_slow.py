"""Clients that do not read: they lose no event, delay no other client, and cost little memory."""

from __future__ import annotations

import asyncio
import resource
import sys

import pytest

from coalesce.limits import CoreLimits
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import WINDOW_BYTES_MAX, RawClient, WatchStream
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

PREFIX, PREFIX_END = b"/p/", b"/p0"
MIB = 1024 * 1024


async def watch_of(client: RawClient) -> WatchStream:
    """Open a stream with a watch of everything below PREFIX."""
    return await client.open_watch(PREFIX, PREFIX_END)


async def complete(stream: WatchStream, count: int, limit_s: float = 30.0) -> None:
    """Wait until so many events were received."""
    counted = [0, 0]

    def all_there() -> bool:
        for response in stream.responses[counted[0] :]:
            counted[0] += 1
            counted[1] += len(response.events)
        return counted[1] >= count

    await until_async(all_there, f"{count} events", limit_s)


def memory_mib() -> float:
    """Return the peak memory of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else MIB)


async def _stop_and_go(etcd: EtcdServer, *, socket: bool, history_bytes: int, puts: int, value: bytes) -> None:
    """One client stops reading, its window or socket full, during `puts`; another one reads them all the time."""
    limits = CoreLimits(history_bytes_max=history_bytes)
    async with (
        proxy_for(etcd, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, window=65_535) as slow_client,
        await RawClient.connect(proxy.port) as quick_client,
    ):
        slow, neighbour, quick = await watch_of(slow_client), await watch_of(slow_client), await watch_of(quick_client)
        assert slow_client.transport is not None
        if socket:
            slow_client.transport.pause_reading()
        else:
            slow.raw.taking = False
        last = 0
        for number in range(puts):
            last = await store.put(b"/p/%d" % (number % 7), b"%d" % number + value)
        await complete(quick, puts)
        assert proxy.engine.core.stats.stalls >= 1
        if not socket:
            await complete(neighbour, puts)
        assert len(slow.values) < puts
        slow_client.transport.resume_reading()
        slow.raw.take()
        await complete(slow, puts)
        await complete(neighbour, puts)
        watches = [(stream, 0) for stream in (slow, neighbour, quick)]
        await assert_kept(watches, etcd.endpoint, PREFIX, PREFIX_END, last)
        backfills = proxy.engine.core.stats.joins_backfill
        assert proxy.engine.core.stats.upstreams_opened >= (1 if history_bytes > puts * len(value) else 2), backfills


@pytest.mark.parametrize("socket", [False, True], ids=["window", "socket"])
def test_a_client_stops_and_catches_up_from_history(etcd: EtcdServer, socket: bool) -> None:
    run(_stop_and_go(etcd, socket=socket, history_bytes=64 * MIB, puts=400, value=b"x" * 20_000))


@pytest.mark.parametrize("socket", [False, True], ids=["window", "socket"])
def test_a_client_stops_and_catches_up_by_a_backfill(etcd: EtcdServer, socket: bool) -> None:
    run(_stop_and_go(etcd, socket=socket, history_bytes=1 * MIB, puts=400, value=b"x" * 20_000))


async def test_a_large_event_without_a_window_repeats_no_output(etcd: EtcdServer) -> None:
    """A large event finds the connection's window used up; later the socket is full: each event comes once."""
    async with (
        proxy_for(etcd) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, connection_window=65_535) as client,
        await RawClient.connect(proxy.port) as quick_client,
    ):
        held, large = client.watch(), client.watch()
        held.create(b"/held")
        await held.created()
        large.create(b"/large")
        await large.created()
        small = [await watch_of(client) for _ in range(20)]
        quick = await watch_of(quick_client)
        held.raw.taking = False
        await store.put(b"/held", b"x" * 100_000)
        await until_async(lambda: client.h2.inbound_flow_control_window == 0, "a used up window")
        await store.put(b"/large", b"x" * 100_000)
        await until_async(lambda: proxy.engine.core.stats.stalls == 2, "the large event to wait")
        held.raw.take()
        await until_async(lambda: len(large.values) == 1, "the large event")
        client.h2.increment_flow_control_window(WINDOW_BYTES_MAX - MIB)
        client.flush()
        await store.put(b"/p/k", b"before the socket is full")
        for stream in small:
            await complete(stream, 1)
        assert client.transport is not None
        client.transport.pause_reading()
        # None is large: the events are joined to one write per turn.
        for _ in range(100):
            last = await store.put(b"/p/k", b"x" * 7_000)
        await complete(quick, 101)
        assert proxy.engine.core.stats.stalls > 2
        client.transport.resume_reading()
        for stream in small:
            await complete(stream, 101)
        await assert_kept([(stream, 0) for stream in (*small, quick)], etcd.endpoint, PREFIX, PREFIX_END, last)


async def test_a_slow_client_that_is_compacted_is_cancelled_alone(etcd: EtcdServer) -> None:
    limits = CoreLimits(history_bytes_max=100_000)
    async with (
        proxy_for(etcd, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port, window=65_535) as slow_client,
        await RawClient.connect(proxy.port) as quick_client,
    ):
        slow, quick = await watch_of(slow_client), await watch_of(quick_client)
        slow.raw.taking = False
        for number in range(100):
            last = await store.put(b"/p/k", b"%d" % number + b"x" * 20_000)
        await store.compact(last)
        await complete(quick, 100)
        slow.raw.take()
        await until_async(lambda: slow.responses[-1].canceled, "the cancel")
        assert slow.responses[-1].compact_revision == last
        await store.put(b"/p/k", b"still here")
        await complete(quick, 101)
        assert quick.values[-1] == b"still here"


@pytest.mark.long
async def test_a_client_that_does_not_read_while_100_mb_pass(etcd: EtcdServer) -> None:
    before = memory_mib()
    value = b"x" * 100_000
    async with (
        proxy_for(etcd) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as stopped,
        await RawClient.connect(proxy.port) as quick_client,
    ):
        streams = [await watch_of(stopped) for _ in range(50)]
        quick = await watch_of(quick_client)
        quick.raw.messages.clear()
        assert stopped.transport is not None
        stopped.transport.pause_reading()
        for number in range(1000):
            await store.put(b"/p/k", b"%d" % number + value)
            if number % 50 == 49:
                await complete(quick, 50)
                # Discarded as they come, so that they do not count as the proxy's memory.
                quick.raw.messages.clear()
        # Each of 51 streams was sent 100 MB; the history keeps 16 MiB.
        assert memory_mib() - before < 200
        assert proxy.engine.core.stats.history_bytes < 17 * MIB
        stopped.transport.resume_reading()
        for stream in streams:
            stream.raw.cancel()
        await asyncio.sleep(0)


async def test_a_stalled_stream_that_ends_returns_its_window(etcd: EtcdServer) -> None:
    """Otherwise each such stream would shrink the connection's window."""
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port, window=0) as client:
        stream = client.watch()
        stream.create(b"a")
        await until_async(lambda: any(call.stalled for call in proxy.watches.calls), "the stall")
        (connection,) = proxy.listener.connections
        before = connection.h2.receive_window + connection.h2._unreturned
        for _ in range(20):
            stream.create(b"a" * 1000)
        await until_async(
            lambda: connection.h2.receive_window + connection.h2._unreturned < before, "the requests to wait"
        )
        stream.raw.cancel()
        await until_async(lambda: not proxy.watches.calls, "the end")
        whole = proxy.listener.settings.http2.connection_window
        assert connection.h2.receive_window + connection.h2._unreturned == whole
