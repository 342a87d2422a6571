"""What etcd does by itself, seen through the proxy: notifications, the return of a client, large catch-ups."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from proto.pb import rpc_pb2
from tests.bench.sharing.front import Figures, Front
from tests.etcd.server import EtcdServer
from tests.proxy.raw_client import RawClient, WatchStream
from tests.proxy.running import Etcd, direct

INTERVAL_S = 2.0
NOTIFIED_S = 14.0
NOPUT = rpc_pb2.WatchCreateRequest.NOPUT


def port_of(address: str) -> int:
    """Return the port of HOST:PORT."""
    return int(address.rpartition(":")[2])


async def pause(seconds: float) -> None:
    """Let a load run for so long."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), seconds)


async def for_a_while(seconds: float, *tasks: Coroutine[Any, Any, None]) -> None:
    """Run tasks for so long, then cancel them."""
    running = [asyncio.create_task(task) for task in tasks]
    await pause(seconds)
    for task in running:
        task.cancel()
    for outcome in await asyncio.gather(*running, return_exceptions=True):
        if isinstance(outcome, Exception):
            raise outcome


async def write(store: Etcd, key: bytes, pause_s: float) -> None:
    """Write a key over and over."""
    while True:
        await store.put(key, b"")
        await pause(pause_s)


async def note(stream: WatchStream, at: list[float]) -> None:
    """Note when responses without events come."""
    while True:
        if not (await stream.next(60)).events:
            at.append(asyncio.get_running_loop().time())


def worst(at: list[float], start: float) -> float:
    """Return the longest time without a notification, in intervals."""
    end = start + NOTIFIED_S
    gaps = [later - earlier for earlier, later in zip([start, *at], [*at, end], strict=True)]
    return max(gaps) / INTERVAL_S


async def _notified(address: str, endpoint: str, *, with_quiet: bool) -> Figures:
    async with direct(endpoint) as store, await RawClient.connect(port_of(address)) as client:
        kinds = {"filtered watch on a busy range": (b"busy", [NOPUT])}
        if with_quiet:
            kinds |= {"quiet range": (b"quiet", [])}
        streams = {name: client.watch() for name in kinds}
        for name, (key, filters) in kinds.items():
            streams[name].create(key, progress_notify=True, filters=filters)
            await streams[name].created()
        at: dict[str, list[float]] = {name: [] for name in kinds}
        start = asyncio.get_running_loop().time()
        listeners = [note(streams[name], at[name]) for name in kinds]
        await for_a_while(NOTIFIED_S, write(store, b"busy", 0.1), *listeners)
        return {f"{name}: worst gap / interval": worst(times, start) for name, times in at.items()}


def notifications(front: Front) -> Figures:
    """progress_notify at an interval of 2 s; some range is quiet."""
    with (
        EtcdServer(None, [f"--experimental-watch-progress-notify-interval={INTERVAL_S:g}s"]) as etcd,
        front.before(etcd.endpoint) as address,
    ):
        return asyncio.run(_notified(address, etcd.endpoint, with_quiet=True))


def notifications_all_busy(front: Front) -> Figures:
    """progress_notify at an interval of 2 s; etcd has no reason to notify the proxy of any range."""
    with (
        EtcdServer(None, [f"--experimental-watch-progress-notify-interval={INTERVAL_S:g}s"]) as etcd,
        front.before(etcd.endpoint) as address,
    ):
        return asyncio.run(_notified(address, etcd.endpoint, with_quiet=False))


SCENARIOS = {"notifications": notifications, "notifications-all-busy": notifications_all_busy}
