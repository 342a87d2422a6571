"""Catch-up: watches far behind get all events in order, delay no one, share backfills, and leave one upstream watch.

The store is written through the proxy's own upstream pool, directly to etcd: the only client here that is fast enough.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from proxy.measuring.load import judge
from proxy.server import Proxy
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, also_with_a_cover
from tests.waiting import LIMIT_S, until_async

pytestmark = also_with_a_cover(pytest.mark.long)

PUT = "/etcdserverpb.KV/Put"
WRITERS = 200
ELSEWHERE = b"/q/"
MIB = 1024 * 1024


async def fill(proxy: Proxy, count: int, one_in: int = 1) -> int:
    """Put `count` revisions, one in so many below PREFIX and the others elsewhere; return the last revision."""
    numbers = iter(range(count))
    last = 0

    async def write() -> None:
        nonlocal last
        for number in numbers:
            prefix = PREFIX if number % one_in == 0 else ELSEWHERE
            message = rpc_pb2.PutRequest(key=prefix + b"%d" % (number % 50), value=b"%d" % number).SerializeToString()
            data, _ = await proxy.pool.unary(PUT, message, timeout_s=60)
            last = max(last, rpc_pb2.PutResponse.FromString(data).header.revision)

    await asyncio.gather(*(write() for _ in range(WRITERS)))
    return last


def newest(stream: WatchStream) -> int:
    """Return the revision of the newest event that a stream has received, 0 before the first."""
    assert not stream.raw.over, (stream.raw.status, stream.raw.text)
    for message in reversed(stream.raw.messages):
        events = rpc_pb2.WatchResponse.FromString(message).events
        if events:
            mod_revision: int = events[-1].kv.mod_revision
            return mod_revision
    return 0


async def reached(stream: WatchStream, revision: int, limit_s: float = LIMIT_S) -> None:
    """Wait until a stream has received the event of a revision."""
    await until_async(lambda: newest(stream) >= revision, f"the event of revision {revision}", limit_s)


class Peaks:
    """The maximum of each sampled count."""

    def __init__(self) -> None:
        self.history_bytes = 0
        self.backfills = 0
        self.watchers = 0


@contextmanager
def watching(proxy: Proxy, etcd: EtcdServer) -> Iterator[Peaks]:
    """Sample the core every 2 ms, and etcd's own count as often as it answers."""
    peaks = Peaks()
    stats = proxy.engine.core.stats
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle | None = None

    def look() -> None:
        nonlocal timer
        peaks.history_bytes = max(peaks.history_bytes, stats.history_bytes)
        peaks.backfills = max(peaks.backfills, stats.backfills)
        timer = loop.call_later(0.002, look)

    async def count() -> None:
        while True:
            peaks.watchers = max(peaks.watchers, await asyncio.to_thread(etcd.watchers))

    look()
    counting = loop.create_task(count())
    try:
        yield peaks
    finally:
        counting.cancel()
        if timer is not None:
            timer.cancel()


async def one_watcher_left(proxy: Proxy, etcd: EtcdServer, limit_s: float = LIMIT_S) -> None:
    """Wait until etcd itself counts only the trunk."""
    await until_async(lambda: proxy.engine.core.stats.backfills == 0, "the backfills to be closed", limit_s)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + limit_s
    while (count := await asyncio.to_thread(etcd.watchers)) != 1:
        assert loop.time() < deadline, f"{count} upstream watchers are left"


@pytest.mark.parametrize("revisions", [5_000, pytest.param(100_000, marks=pytest.mark.long)])
@pytest.mark.timeout(240)
async def test_a_watch_far_behind_catches_up_without_delaying_others(
    etcd: EtcdServer, revisions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Live events are delivered while a watch of the same range catches up from the first revision."""
    # etcd sends a thousand revisions at a time, to the checker as well.
    monkeypatch.setattr(judge, "TRUTH_LIMIT_S", 90.0)
    limits = CoreLimits(history_bytes_max=MIB // 4, history_bytes_total_max=MIB, backfill_bytes_max=MIB // 4)
    async with (
        proxy_for(etcd, limits=limits) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
        await RawClient.connect(proxy.port) as slow,
    ):
        last = await fill(proxy, revisions)
        live = [await client.open_watch(PREFIX, PREFIX_END) for _ in range(10)]
        loop = asyncio.get_running_loop()
        delays: list[float] = []
        behind = 0
        with watching(proxy, etcd) as peaks:
            laggard = await slow.open_watch(PREFIX, PREFIX_END, 2)
            while newest(laggard) < last:
                put = await store.put(PREFIX + b"live", b"%d" % len(delays))
                began = loop.time()
                for stream in live:
                    await reached(stream, put)
                delays.append(loop.time() - began)
                behind += newest(laggard) < last
            end = await store.put(PREFIX + b"live", b"end")
            streams = [*live, laggard]
            await until_async(lambda: all(newest(stream) >= end for stream in streams), "the last event")
            await one_watcher_left(proxy, etcd)
        assert behind >= 2, "nothing was live while the watch caught up"
        assert statistics.median(delays) < 1.0
        assert peaks.backfills == 1
        assert peaks.watchers <= 2
        assert peaks.history_bytes <= limits.history_bytes_total_max
        await assert_kept([(laggard, 2)], etcd.endpoint, PREFIX, PREFIX_END, end)
        await assert_kept([(stream, 0) for stream in live], etcd.endpoint, PREFIX, PREFIX_END, end, last)


@pytest.mark.parametrize("order", ["oldest first", "newest first", "any"])
@pytest.mark.parametrize(
    ("laggards", "revisions"),
    [pytest.param(40, 4_000, id="40"), pytest.param(300, 100_000, marks=pytest.mark.long, id="300")],
)
@pytest.mark.timeout(240)
async def test_laggards_share_backfills(etcd: EtcdServer, laggards: int, revisions: int, order: str) -> None:
    """The range has no further events: only progress can show a backfill that it is complete."""
    limits = CoreLimits(history_bytes_total_max=64 * MIB)
    async with proxy_for(etcd, limits=limits) as proxy, await RawClient.connect(proxy.port) as client:
        await fill(proxy, revisions, one_in=20)
        async with direct(etcd) as store:
            end = await store.put(PREFIX + b"end", b"")
        live = await client.open_watch(PREFIX, PREFIX_END)
        starts = [2 + number * revisions // laggards for number in range(laggards)]
        if order == "any":
            random.Random(7).shuffle(starts)
        elif order == "newest first":
            starts.reverse()
        streams = [(client.watch(), start) for start in starts]
        with watching(proxy, etcd) as peaks:
            for stream, start in streams:
                stream.create(PREFIX, PREFIX_END, start)
            await until_async(lambda: all(newest(stream) >= end for stream, _ in streams), "everything", 60)
            await one_watcher_left(proxy, etcd)
        assert proxy.engine.core.stats.joins_backfill >= laggards * 3 // 4, "they were no laggards"
        # One for each shared stretch would do; a watch that comes while others are running may need another.
        enough = 2 * (1 + revisions // limits.backfill_share_revisions)
        assert peaks.backfills <= enough
        # The trunk, and some that etcd has not closed yet when others are already open.
        assert peaks.watchers <= 1 + max(enough, laggards // 4)
        assert peaks.history_bytes <= limits.history_bytes_total_max
        assert live.values == []
        await assert_kept(streams, etcd.endpoint, PREFIX, PREFIX_END, end)


async def test_a_backfill_of_an_empty_range_ends(etcd: EtcdServer) -> None:
    """The range never has an event: the laggards are live at once, and one upstream watch is left."""
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        await fill(proxy, 2_000, one_in=2_001)
        live = await client.open_watch(b"empty")
        laggards = [await client.open_watch(b"empty", start_revision=2 + 100 * number) for number in range(10)]
        await one_watcher_left(proxy, etcd)
        async with direct(etcd) as store:
            put = await store.put(b"empty", b"no more")
        await until_async(lambda: all(newest(stream) == put for stream in (live, *laggards)), "the event")
        await assert_kept(
            [(live, 0), *((stream, 2 + 100 * number) for number, stream in enumerate(laggards))],
            etcd.endpoint,
            b"empty",
            b"",
            put,
        )
