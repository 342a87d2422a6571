"""Storms: all clients reconnect at once, and all request progress all the time; both cost etcd very little."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest

from coalesce.limits import CoreLimits
from proto.framing import frame
from proto.pb import rpc_pb2
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd, direct, next_to_etcd, proxy_for
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, also_with_a_cover
from tests.waiting import until_async

pytestmark = also_with_a_cover(pytest.mark.long)

INTERVAL_S = 0.1
REQUESTS_PER_INTERVAL = 4
PROGRESS = frame(rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()).SerializeToString())
DATA_FRAME_HEAD = len(PROGRESS).to_bytes(3, "big") + b"\0\0"


@dataclass(frozen=True)
class Asked:
    """etcd's own counts: calls started, messages received on its watch streams, and its watchers."""

    reads: int
    """Range and Txn; the test makes none of these."""

    watch_streams: int
    watch_messages: int
    """Creates, cancels and progress requests."""

    others: int
    """All other calls, without the test's own Put."""

    watchers: int


async def asked(etcd: EtcdServer) -> Asked:
    """Read etcd's own counts."""
    reads = streams = messages = others = 0
    metrics = await asyncio.to_thread(etcd.metrics)
    for name, value in metrics.items():
        if name.startswith("grpc_server_started_total{"):
            if 'grpc_method="Watch",grpc_service="etcdserverpb.Watch"' in name:
                streams += int(value)
            elif 'grpc_service="etcdserverpb.KV"' in name and ('"Range"' in name or '"Txn"' in name):
                reads += int(value)
            elif 'grpc_method="Put"' not in name:
                others += int(value)
        elif name.startswith("grpc_server_msg_received_total{") and 'grpc_service="etcdserverpb.Watch"' in name:
            messages += int(value)
    return Asked(reads, streams, messages, others, int(metrics["etcd_debugging_mvcc_watcher_total"]))


def newest(stream: WatchStream) -> int:
    """Return the revision of the newest event that a stream has received, 0 before the first."""
    assert stream.raw.status is None, (stream.raw.status, stream.raw.text)
    for message in reversed(stream.raw.messages):
        events = rpc_pb2.WatchResponse.FromString(message).events
        if events:
            mod_revision: int = events[-1].kv.mod_revision
            return mod_revision
    return 0


def open_watches(client: RawClient, starts: Sequence[int]) -> list[WatchStream]:
    """Open a watch of the range from each of the revisions, each on a new stream, without waiting for any."""
    streams = []
    for start in starts:
        stream = client.watch()
        stream.create(PREFIX, PREFIX_END, start)
        streams.append(stream)
    return streams


async def all_reached(streams: Sequence[WatchStream], revision: int) -> None:
    """Wait until all streams have the event of a revision; no response is parsed twice."""
    for stream in streams:
        await until_async(lambda s=stream: newest(s) >= revision, f"revision {revision}")  # type: ignore[misc]


async def put(store: Etcd, count: int) -> int:
    """Put so many revisions in the range, one after the other; return the last."""
    last = 0
    for number in range(count):
        last = await store.put(PREFIX + b"%d" % (number % 7), b"%d" % number)
    return last


@pytest.mark.parametrize(
    ("connections", "each"), [(20, 10), pytest.param(100, 20, marks=pytest.mark.long)], ids=["200", "2000"]
)
async def test_a_reconnect_storm_costs_etcd_nothing(etcd: EtcdServer, connections: int, each: int) -> None:
    """The connections break at different revisions during puts, and each client resumes from its own revision."""
    # On a loaded machine they may be gone for longer than a trunk lingers.
    async with (
        proxy_for(etcd, limits=CoreLimits(linger_s=30)) as proxy,
        direct(etcd) as store,
        AsyncExitStack() as open_clients,
    ):
        first = await put(store, 1)
        clients = [await RawClient.connect(proxy.port) for _ in range(connections)]
        streams = [open_watches(client, [0] * each) for client in clients]
        for mine in streams:
            for stream in mine:
                await stream.created()
        await all_reached([stream for mine in streams for stream in mine], await put(store, 20))
        # By now the trunk's own read and probe are done.
        before, began = await asked(etcd), time.monotonic()
        assert before.watchers == 1
        last = 0
        for client in clients:
            assert client.transport is not None
            client.transport.abort()
            last = await put(store, 1)
        for client in clients:
            await client.close()
        starts = [[newest(stream) + 1 for stream in mine] for mine in streams]
        again = [
            await open_clients.enter_async_context(await RawClient.connect(proxy.port)) for _ in range(connections)
        ]
        resumed: list[tuple[WatchStream, int]] = []
        for client, at in zip(again, starts, strict=True):
            resumed += [(stream, start) for stream, start in zip(open_watches(client, at), at, strict=True)]
        last = await put(store, 1)
        await all_reached([stream for stream, _ in resumed], last)
        after = await asked(etcd)
        elapsed_s = time.monotonic() - began
        assert len({start for _, start in resumed}) > connections // 4, "they were all at the same revision"
        stats = proxy.engine.core.stats
        assert (after.watchers, stats.upstreams_opened, stats.joins_backfill) == (1, 1, 0)
        assert after.watch_streams == before.watch_streams
        assert after.watch_messages - before.watch_messages <= next_to_etcd(proxy).engine.core.stats.progress_asked
        assert after.others == before.others
        # Only the probe that auth is off, at most one a second.
        assert after.reads - before.reads <= elapsed_s + 1
        await assert_kept(resumed, etcd.endpoint, PREFIX, PREFIX_END, last, first)


def ask_all(streams: Sequence[WatchStream]) -> None:
    """Request progress on every stream of one connection, without h2, which would take most of the time."""
    transport = streams[0].raw.client.transport
    assert transport is not None
    transport.write(b"".join(DATA_FRAME_HEAD + stream.raw.id.to_bytes(4, "big") + PROGRESS for stream in streams))


@pytest.mark.parametrize(
    ("connections", "each", "rounds"), [(10, 10, 20), pytest.param(10, 100, 25, marks=pytest.mark.long)]
)
async def test_progress_for_all_watches_is_requested_once(
    etcd: EtcdServer, connections: int, each: int, rounds: int
) -> None:
    """Every session asks every 100 ms during puts: each answer is true, and not older than the request."""
    async with proxy_for(etcd) as proxy, direct(etcd) as store, AsyncExitStack() as open_clients:
        first = await put(store, 1)
        by_client = []
        for _ in range(connections):
            client = await open_clients.enter_async_context(await RawClient.connect(proxy.port))
            by_client.append(open_watches(client, [0] * each))
        streams = [stream for mine in by_client for stream in mine]
        for stream in streams:
            await stream.created()
        stats, at_etcd = proxy.engine.core.stats, next_to_etcd(proxy).engine.core.stats
        loop = asyncio.get_running_loop()
        before, asked_before = await asked(etcd), at_etcd.progress_asked
        began = loop.time()
        acknowledged, answers = [], stats.progress_answers
        for number in range(rounds):
            acknowledged.append(await put(store, 1))
            for index, mine in enumerate(by_client):
                # Spread over the interval, as independent clients are.
                at = began + (number + index / connections) * INTERVAL_S
                await until_async(lambda at=at: loop.time() >= at, "its turn")  # type: ignore[misc]
                ask_all(mine)
            goal = answers + (number + 1) * len(streams)
            await until_async(lambda goal=goal: stats.progress_answers >= goal, "all answers", 40)  # type: ignore[misc]
        took_s = loop.time() - began
        # Those of the proxy at etcd: a hub serves two requests of a leaf with one if they come close together.
        requests = at_etcd.progress_asked - asked_before
        last = await put(store, 1)
        await all_reached(streams, last)
        after = await asked(etcd)
        intervals = took_s / INTERVAL_S
        assert requests <= REQUESTS_PER_INTERVAL * (intervals + 1), (requests, took_s)
        # On a slow machine, a request that follows an unanswered one is sent with a probe.
        assert requests <= after.watch_messages - before.watch_messages <= 2 * requests
        assert (after.watchers, after.watch_streams) == (1, before.watch_streams)
        for stream in streams:
            told = [each.header.revision for each in stream.responses if each.watch_id == -1]
            assert len(told) == rounds
            assert all(p >= put for p, put in zip(told, acknowledged, strict=True)), (told, acknowledged)
        await assert_kept([(stream, 0) for stream in streams], etcd.endpoint, PREFIX, PREFIX_END, last, first)
