"""The store's background work: catching up watchers, retrying victims, expiring leases, freeing compacted space.

Each loop sleeps until there is work, does it in bounded steps, and yields to calls between steps.
"""

from __future__ import annotations

import asyncio
from time import monotonic

from upstream.store.lease import EXPIRY_CHECK_INTERVAL_S
from upstream.store.mvcc import Mvcc
from upstream.store.state import StoreState
from upstream.store.watchable import SYNC_INTERVAL_S, VICTIM_INTERVAL_S, WatchableStore
from upstream.store.writer import StoreWriter

COMPACT_KEYS_PER_STEP = 1000
"""Keys compacted between two turns of the event loop: about a millisecond."""


async def sync_watchers(watchable: WatchableStore) -> None:
    """Catch up unsynced watchers.

    As etcd's syncWatchersLoop: while batches complete watchers, the next batch follows after as much time as the last
    one took, otherwise after SYNC_INTERVAL_S. The first unsynced watcher does not wait.
    """
    work = asyncio.Event()
    watchable.on_unsynced = work.set
    while True:
        await work.wait()
        work.clear()
        while (before := watchable.unsynced) > 0:
            start = monotonic()
            left = watchable.sync()
            await asyncio.sleep(monotonic() - start if 0 < left < before else SYNC_INTERVAL_S)


async def retry_victims(watchable: WatchableStore) -> None:
    """Retry victims every VICTIM_INTERVAL_S while there are any (etcd's syncVictimsLoop)."""
    work = asyncio.Event()
    watchable.on_victim = work.set
    while True:
        await work.wait()
        work.clear()
        while watchable.victims:
            await asyncio.sleep(VICTIM_INTERVAL_S)
            watchable.retry_victims()


async def expire_leases(state: StoreState, writer: StoreWriter) -> None:
    """Revoke expired leases, checking every EXPIRY_CHECK_INTERVAL_S."""
    while True:
        await asyncio.sleep(EXPIRY_CHECK_INTERVAL_S)
        if len(state.lessor):
            await writer.write(lambda: state.expire_leases(monotonic()))


class Compactor:
    """Does the physical part of compactions, in steps."""

    def __init__(self, mvcc: Mvcc, writer: StoreWriter) -> None:
        self._mvcc = mvcc
        self._writer = writer
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the pending work unless it is running."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run(), name="store compaction")

    async def done(self) -> None:
        """Wait until all compactions so far are complete."""
        if self._task is not None:
            await asyncio.shield(self._task)

    async def stop(self) -> None:
        """Stop, even in the middle; the rest is done after the next start of the store."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        finished = False
        while not finished:
            finished = await self._writer.write(lambda: self._mvcc.compact_step(COMPACT_KEYS_PER_STEP))
            await asyncio.sleep(0)
