"""Behaviour of etcd as seen through the proxy: notifications, returning clients, large catch-ups."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from typing import Any

from proto.pb import rpc_pb2
from tests.bench.sharing.bystander import port_of
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd, direct
from tests.etcd.cluster import cluster
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

INTERVAL_S = 2.0
NOTIFIED_S = 14.0
NOPUT = rpc_pb2.WatchCreateRequest.NOPUT


async def pause(seconds: float) -> None:
    """Run a load for so long."""
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
    """Record when responses without events arrive."""
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


def notifications(*, with_quiet: bool) -> Scenario:
    """Make the scenario of progress_notify at an interval of 2 s; without a quiet range etcd notifies no watch."""

    def scenario(front: Front) -> Figures:
        with (
            EtcdServer(None, [f"--experimental-watch-progress-notify-interval={INTERVAL_S:g}s"]) as etcd,
            front.before(etcd.endpoint) as address,
        ):
            return asyncio.run(_notified(address, etcd.endpoint, with_quiet=with_quiet))

    return scenario


RETURNED_S = 4.0
CLIENTS = 20
ELSEWHERE = 3000
"""Revisions of other ranges meanwhile: more than the look-back of a trunk of a cold range."""


async def _returned(address: str, etcd: EtcdServer, front: Front) -> Figures:
    """Watch from each revision on, disconnect, and later resume each watch from its last revision."""
    port = port_of(address)
    async with direct(etcd) as store:
        revisions = [await store.put(b"k", b"%d" % number) for number in range(CLIENTS)]
        async with await RawClient.connect(port) as client:
            streams = [client.watch() for _ in revisions]
            for stream in streams:
                stream.create(b"k", start_revision=revisions[0])
                await stream.created()
            await until_async(lambda: all(len(stream.values) == CLIENTS for stream in streams), "the events")
        await pause(1.0)
        left = await asyncio.to_thread(etcd.watchers)
        for number in range(CLIENTS, CLIENTS + 50):
            await store.put(b"k", b"%d" % number)
        for _ in range(ELSEWHERE // 100):
            await asyncio.gather(*(store.put(b"elsewhere", b"") for _ in range(100)))
        await pause(RETURNED_S)
        before = _upstream_opened(front)
        async with await RawClient.connect(port) as client:
            streams = [client.watch() for _ in revisions]
            for stream, revision in zip(streams, revisions, strict=True):
                stream.create(b"k", start_revision=revision)
            await store.put(b"k", b"%d" % (CLIENTS + 50))
            wanted = [[b"%d" % number for number in range(first, CLIENTS + 51)] for first in range(CLIENTS)]
            await until_async(lambda: all(s.values[-1:] == [b"%d" % (CLIENTS + 50)] for s in streams), "the rest", 20)
            wrong = sum(stream.values != events for stream, events in zip(streams, wanted, strict=True))
        return {
            "watches at etcd 1 s after the last client left": left,
            "upstream watches opened for the return": _upstream_opened(front) - before if front.proxy else CLIENTS,
            "clients with lost or repeated events": wrong,
        }


def _upstream_opened(front: Front) -> float:
    return front.proxy.metric("watchmux_upstream_opened_total") if front.proxy else 0.0


def returning(front: Front) -> Figures:
    """20 clients of one range reconnect 5 s after they left, each from another revision."""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return asyncio.run(_returned(address, etcd, front))


EVENTS = 10
EVENT_BYTES = 1_000_000


async def _caught_up(address: str, endpoint: str) -> Figures:
    async with direct(endpoint) as store, await RawClient.connect(port_of(address)) as client:
        revisions = [await store.put(b"k", bytes(EVENT_BYTES)) for _ in range(EVENTS)]
        await client.open_watch(b"k")
        counts: dict[str, float | str] = {}
        for kind, fragment in (("with fragment", True), ("without", False)):
            stream = client.watch()
            start = asyncio.get_running_loop().time()
            stream.create(b"k", start_revision=revisions[0], fragment=fragment)
            await until_async(lambda stream=stream: len(stream.values) == EVENTS, "the events", 20)  # type: ignore[misc]  # bound
            took_ms = 1000 * (asyncio.get_running_loop().time() - start)
            responses = [response for response in stream.responses if response.events]
            counts[f"{kind}: responses seen by the client"] = sum(not response.fragment for response in responses)
            counts[f"{kind}: largest message, MB"] = max(response.ByteSize() for response in responses) / 1e6
            counts[f"{kind}: ms"] = took_ms
        return counts


def large_catch_up(front: Front) -> Figures:
    """10 events of 1 MB from the past, with fragment and without."""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return asyncio.run(_caught_up(address, etcd.endpoint))


HASLEADER = [("hasleader", "true")]
LEADERLESS_S = 15.0


async def _leaderless(front: Front) -> Figures:
    async with cluster() as members:
        left, *others = members.members
        way = front.before(left.endpoint)
        # The relays between the members run in this loop.
        address = await asyncio.to_thread(way.__enter__)
        try:
            async with await RawClient.connect(port_of(address)) as client:
                stream = client.watch(HASLEADER)
                await pause(1.0)
                watchers = await asyncio.to_thread(left.watchers)
                for member in others:
                    member.hold_still()
                start = asyncio.get_running_loop().time()
                with contextlib.suppress(AssertionError):
                    await stream.raw.end(LEADERLESS_S)
                text = stream.raw.text if stream.raw.over else f"not ended in {LEADERLESS_S:g} s"
                took_s = asyncio.get_running_loop().time() - start
        finally:
            await asyncio.to_thread(way.__exit__, None, None, None)
        return {"a stream without a watch": text, "s after the members stopped": took_s, "watchers at etcd": watchers}


def leaderless(front: Front) -> Figures:
    """Two of three members stop; a stream with hasleader has no watch."""
    return asyncio.run(_leaderless(front))


SCENARIOS: dict[str, Scenario] = {
    "notifications": notifications(with_quiet=True),
    "notifications-all-busy": notifications(with_quiet=False),
    "return-within-linger": returning,
    "large-catch-up": large_catch_up,
    "leaderless-stream": leaderless,
}
