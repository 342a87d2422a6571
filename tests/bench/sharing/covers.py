"""Covers: clients that each watch keys of their own, with and without one upstream watch for all of them.

The scenarios at an etcd compare its watchers, CPU and bytes for the same writes; `--cover` is given to the proxy in
those that say so. "branches" measures the core alone, so it has figures for one route only.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time

import uvloop

from coalesce import CheckPermission, Coalescer, CoreLimits, CreateRequest, Deliver, Identity, OpenUpstream
from coalesce.model import Upstream
from proto.pb import rpc_pb2
from proto.scan import WatchResponse, scan_watch_response
from tests.bench.load import WATCH
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.sharing.bystander import quantiles
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.sharing.list_storm import SENT, server_before
from tests.bench.sharing.lists import cpu_s
from tests.bench.targets import Target
from tests.bench.wire import RawClient, RequestBlocks, message_frame
from tests.coalesce.shell import header, put
from tests.e2e.running import Etcd, direct
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import until_async

PREFIX = b"s/"
KEYS = 3_000
CLIENTS = 3
STREAMS_PER_CONNECTION = 100
WRITES_AT_ONCE = 20
HISTORY = 6
"""Writes of each key before the storm: the default window holds all of them, and each client needs the last half."""
EVENTS = 20_000
LIMIT_S = 300.0
CREATES = (
    'grpc_server_msg_received_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"}'
)


def key_of(place: int) -> bytes:
    return PREFIX + b"%06d" % place


class Watcher(RawClient):
    """One connection with streams that each watch one key, and what they have received."""

    def __init__(self) -> None:
        super().__init__()
        self._blocks = RequestBlocks(WATCH, HOST)
        self._left: dict[int, bytes] = {}
        self.wanted: dict[int, int] = {}
        """Events that each stream still waits for, `created` included."""
        self.began: dict[int, float] = {}
        self.delays: list[float] = []
        self.events = 0
        self.refused = 0

    def watch(self, place: int, key: bytes, start_revision: int, wanted: int) -> None:
        """Open a stream with one watch; `wanted` events are expected."""
        stream = 2 * place + 1
        create = rpc_pb2.WatchCreateRequest(key=key, start_revision=start_revision)
        message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
        self.wanted[stream], self.began[stream] = wanted + 1, time.perf_counter()
        self.transport.write(frame(HEADERS, 4, stream, self._blocks.take()) + message_frame(stream, message))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags
        if kind != DATA:
            return
        left = self._left.pop(stream, b"") + data[start:end]
        while len(left) >= 5 and len(left) >= (size := 5 + int.from_bytes(left[1:5], "big")):
            response = scan_watch_response(left[5:size])
            self.refused += response.canceled
            self.events += len(response.events)
            self.wanted[stream] -= len(response.events) + response.created
            if not self.wanted[stream]:
                self.delays.append(time.perf_counter() - self.began[stream])
            left = left[size:]
        if left:
            self._left[stream] = left


async def watch_all(port: int, starts: list[int], wanted: int) -> list[Watcher]:
    """Watch each key from its start revision (0: now), each on a stream of its own."""
    loop, watchers = asyncio.get_running_loop(), list[Watcher]()
    for _ in range(0, len(starts), STREAMS_PER_CONNECTION):
        _, watcher = await loop.create_connection(Watcher, HOST, port)
        watchers.append(watcher)
    for place, start in enumerate(starts):
        watchers[place // STREAMS_PER_CONNECTION].watch(
            place % STREAMS_PER_CONNECTION, key_of(place % KEYS), start, wanted
        )
    return watchers


async def until(watchers: list[Watcher], left: int) -> None:
    """Wait until each stream waits for so many events."""
    await until_async(
        lambda: not any(count > left for watcher in watchers for count in watcher.wanted.values()), "events", LIMIT_S
    )
    assert not any(watcher.refused or watcher.broken for watcher in watchers)


async def write(store: Etcd, keys: list[bytes]) -> int:
    """Put all keys; return the last revision."""
    revision = 0
    for first in range(0, len(keys), WRITES_AT_ONCE):
        revisions = await asyncio.gather(*(store.put(key, b"v" * 100) for key in keys[first : first + WRITES_AT_ONCE]))
        revision = max(revisions)
    return revision


def unique_keys(*, cover: bool, unwatched: bool) -> Scenario:
    """Make the scenario of keys with three clients each; `unwatched`: half of the writes concern no client."""

    async def measured(front: Front, etcd: EtcdServer, port: int) -> Figures:
        async with direct(etcd) as store:
            watchers = await watch_all(port, [0] * KEYS * CLIENTS, 1)
            await until(watchers, 1)
            count, before, cpu, proxy_cpu = etcd.watchers(), etcd.metrics(), cpu_s(etcd), cpu_s(front)
            await write(store, [key_of(place) for place in range(KEYS)])
            if unwatched:
                await write(store, [PREFIX + b"x%06d" % place for place in range(KEYS)])
            await until(watchers, 0)
            return {
                "watchers at etcd": count,
                "etcd CPU s": cpu_s(etcd) - cpu,
                "etcd sent MiB": (etcd.metrics()[SENT] - before[SENT]) / 2**20,
                "proxy CPU s": cpu_s(front) - proxy_cpu,
                "events": sum(watcher.events for watcher in watchers),
            }

    def scenario(front: Front) -> Figures:
        flags = (f"--cover={PREFIX.decode()}",) if cover and front.root is not None else ()
        with EtcdServer() as etcd, server_before(front, etcd, *flags) as server:
            return uvloop.run(measured(front, etcd, server.port))

    return scenario


def storm(front: Front) -> Figures:
    """All clients come back at once, each from a revision inside the window."""

    async def measured(etcd: EtcdServer, port: int) -> Figures:
        async with direct(etcd) as store:
            watchers = await watch_all(port, [0] * KEYS, HISTORY)
            await until(watchers, HISTORY)
            start = 0
            for number in range(HISTORY):
                start = start if number != HISTORY // 2 else await store.revision() + 1
                await write(store, [key_of(place) for place in range(KEYS)])
            await until(watchers, 0)
            for watcher in watchers:
                watcher.transport.close()
            opened = etcd.metrics()[CREATES]
            again = await watch_all(port, [start] * KEYS, HISTORY - HISTORY // 2)
            await until(again, 0)
            delays = [delay for watcher in again for delay in watcher.delays]
            return {**quantiles("last event", delays), "watch requests at etcd": etcd.metrics()[CREATES] - opened}

    flags = () if front.root is None else (f"--cover={PREFIX.decode()}",)
    with EtcdServer() as etcd, server_before(front, etcd, *flags) as server:
        return uvloop.run(measured(etcd, server.port))


def covered_core(count: int) -> tuple[Coalescer, Upstream, float]:
    """Return a core with so many branches of one watch each, the upstream watch, and the memory of each in bytes."""
    core = Coalescer(CoreLimits(covers=(PREFIX,)))
    core.header_seen(header(10))
    upstreams: list[Upstream] = []
    gc.collect()
    own = Target("", 0, os.getpid())
    before = own.memory_mib()
    for place in range(count):
        if place % 1000 == 0:
            session = core.open_session(object(), Identity(), 0.0)
        effects = list(core.create(session, CreateRequest(key_of(place), b"", 11), 0.0))
        for effect in effects:
            if isinstance(effect, CheckPermission):
                effects += core.permission(effect.check, None, 0.0)
            elif isinstance(effect, OpenUpstream):
                upstreams.append(effect.upstream)
                effects += core.upstream_response(effect.upstream, WatchResponse(header(10), 0, created=True), 0.0)
    gc.collect()
    memory = (own.memory_mib() - before) * 2**20 / count
    assert (core.stats.watches, len(upstreams)) == (count, 1)
    return core, upstreams[0], memory


def branches(front: Front) -> Figures:
    """The core alone: the CPU of an event and of a bookmark, and the memory of a branch, with few and many branches."""
    figures: Figures = {}
    if front.name != "watchmux":
        return figures
    for count in (100, 100_000):
        core, upstream, memory = covered_core(count)
        responses = [
            WatchResponse(header(11 + number), 0, events=[put(11 + number, key_of(number % count))])
            for number in range(EVENTS)
        ]
        gc.disable()
        began, delivered = time.process_time(), 0
        for response in responses:
            delivered += sum(type(effect) is Deliver for effect in core.upstream_response(upstream, response, 0.0))
        figures[f"us per event, {count:,} branches"] = (time.process_time() - began) / EVENTS * 1e6
        assert delivered == EVENTS
        began = time.process_time()
        for number in range(1000):
            core.upstream_response(upstream, WatchResponse(header(100_000 + number), 0), 0.0)
        figures[f"us per bookmark, {count:,} branches"] = (time.process_time() - began) / 1000 * 1e6
        gc.enable()
        if count > 1000:
            figures["bytes per branch with its watch"] = memory
    figures["peak memory MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures


SCENARIOS: dict[str, Scenario] = {
    "covers: unique keys": unique_keys(cover=True, unwatched=False),
    "covers: unique keys, half of the writes unwatched": unique_keys(cover=True, unwatched=True),
    "covers: unique keys, no cover": unique_keys(cover=False, unwatched=False),
    "covers: storm": storm,
    "covers: branches": branches,
}
