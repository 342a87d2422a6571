"""Watches as clientv3 keeps them: many on one stream, resumed from their next revision whenever the stream breaks.

It behaves as clientv3 does (client/v3/watch.go): `created` answers are matched to creates by order; a watch from now is
resumed from exactly the revision of its `created`; any other from its last event, or from the last response without
events, plus one; a fragmented response counts when its last piece has arrived; the client also cancels an id whose
watch etcd has cancelled.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from proto.pb import rpc_pb2
from tests.soak.spool import Kind, Spool, WatchPlan

PATH = "/etcdserverpb.Watch/Watch"
CHANNEL = (
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.http2.max_pings_without_data", 0),
)
WRITE_FAILED = "Internal error from Core"
"""grpc.aio's error for a call whose connection broke during a write, before it learns why (grpc/aio/_call.py)."""

SLOW_CHANNEL = (*CHANNEL, ("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 16_384))


@dataclass
class Habits:
    """The behaviour of a stream of watches: the weight of each possible action in a turn, and how it reads."""

    turn_s: float = 1.0
    progress: float = 0.0
    drop: float = 0.0
    swap: float = 0.0
    """Cancel a watch and open another one."""
    pause: float = 0.0
    """The share of responses after which it stops reading for a while."""
    pause_s: float = 0.0


@dataclass
class Watch:
    """One watch, through all streams."""

    number: int
    plan: WatchPlan
    next_revision: int
    """0: now."""
    start_revision: int = 0
    """The start revision of its last create."""


class Seen:
    """The observations of a client process."""

    def __init__(self) -> None:
        self.revision = 1
        self.endings: Counter[str] = Counter()
        """How streams ended."""
        self.faults: list[str] = []
        """Responses and errors that should not have occurred."""


class Stream:
    """Watches on one stream."""

    def __init__(
        self, channel: grpc.aio.Channel, spool: Spool, seen: Seen, habits: Habits, planned: Callable[[], WatchPlan]
    ) -> None:
        self._open: Any = channel.stream_stream(
            PATH, request_serializer=rpc_pb2.WatchRequest.SerializeToString, response_deserializer=None
        )
        self._spool = spool
        self._seen = seen
        self._habits = habits
        self._planned = planned
        self.watches: list[Watch] = []
        self._by_id: dict[int, Watch] = {}
        self._pending: deque[Watch | None] = deque()
        """Unanswered creates; None: no longer waited for."""
        self._call: Any = None
        self._sending: asyncio.Task[None] | None = None
        self._outbox: asyncio.Queue[rpc_pb2.WatchRequest] = asyncio.Queue()
        self.asked = 0
        """Progress requests so far."""
        self.told: list[int] = []
        """The revisions of the answers to them."""
        self.hurried = False
        """Whether the run is near its end: no more pauses and random actions."""
        self.stopping = False

    def add(self) -> Watch:
        """Plan one more watch; it is opened with the next stream."""
        plan = self._planned()
        watch = Watch(self._spool.plan(plan), plan, plan.start_revision)
        self.watches.append(watch)
        return watch

    @property
    def is_created(self) -> bool:
        """Whether every watch is created."""
        return len(self._by_id) == len(self.watches)

    def has_all(self, revision: int) -> bool:
        """Whether every watch has events or progress through `revision`."""
        return all(watch.next_revision > revision for watch in self.watches)

    def waits_for_the_future(self, revision: int) -> bool:
        """Whether etcd sends no progress before a write after `revision`, because a watch starts there.

        This holds for a watch that was planned to start there during the last writes, and for one that has the newest
        event and is resumed above it. Progress for the other watches of its stream has to wait as well.
        """
        return any(watch.start_revision > revision for watch in self.watches)

    def state(self) -> str:
        """Return its state, for a fault's text."""
        starts = [(watch.start_revision, watch.next_revision) for watch in self.watches]
        sending = "over" if self._sending is None or self._sending.done() else "alive"
        return (
            f"{self.asked} requests for progress, {len(self.told)} answers {self.told[-3:]}, {self._outbox.qsize()} to "
            f"be sent, sending is {sending}, {len(self._pending)} creates and {len(self._by_id)} watches, started at "
            f"and needing {starts}, {self._call}"
        )

    def ask_progress(self) -> None:
        """Send a progress request."""
        self.asked += 1
        self._outbox.put_nowait(rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()))

    async def run(self) -> None:
        """Keep the watches until stopped."""
        mischief = asyncio.create_task(self._behave())
        while not self.stopping:
            try:
                await self._session()
            except grpc.aio.AioRpcError as error:
                self._ended(error.code(), error.details() or "")
            except asyncio.CancelledError:
                # grpc.aio reports our own cancel of the call in the same way.
                if asyncio.current_task().cancelling():  # type: ignore[union-attr]  # we are in a task
                    raise
            await asyncio.sleep(random.uniform(0.01, 0.1))
        mischief.cancel()

    def _ended(self, code: grpc.StatusCode, text: str) -> None:
        told = f"{code.name}: {text[:80]}"
        if code not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED) and text != WRITE_FAILED:
            self._seen.faults.append(f"a stream ended {told}")
        self._seen.endings[told.partition("ipv4:")[0]] += 1

    async def _session(self) -> None:
        self._by_id.clear()
        self._pending.clear()
        self._outbox = asyncio.Queue()
        self._call = call = self._open(wait_for_ready=True)
        for watch in self.watches:
            self._create(watch)
        self._sending = sending = asyncio.create_task(self._send(call))
        try:
            while (message := await call.read()) is not grpc.aio.EOF:
                self._take(message)
                habits = self._habits
                if not self.hurried and habits.pause and random.random() < habits.pause:
                    await asyncio.sleep(random.uniform(0, habits.pause_s))
            self._ended(await call.code(), await call.details() or "")
        finally:
            sending.cancel()
            call.cancel()

    async def _send(self, call: Any) -> None:
        try:
            while True:
                await call.write(await self._outbox.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, grpc.aio.UsageError):
            # grpc may continue a call on another connection although it has reported that a write failed: then the
            # reader would wait for answers to requests that were never sent.
            call.cancel()

    def _create(self, watch: Watch) -> None:
        watch.start_revision = watch.next_revision
        plan = watch.plan
        kind = rpc_pb2.WatchCreateRequest
        create = kind(
            key=plan.key,
            range_end=plan.range_end,
            start_revision=watch.next_revision,
            filters=[kind.NOPUT] * plan.no_put + [kind.NODELETE] * plan.no_delete,
            prev_kv=plan.prev_kv,
            fragment=plan.fragment,
            progress_notify=plan.progress_notify,
        )
        self._spool.note(watch.number, Kind.OPENED, b"%d" % watch.next_revision)
        self._pending.append(watch)
        self._outbox.put_nowait(rpc_pb2.WatchRequest(create_request=create))

    def _cancel(self, watch_id: int) -> None:
        cancel = rpc_pb2.WatchCancelRequest(watch_id=watch_id)
        self._outbox.put_nowait(rpc_pb2.WatchRequest(cancel_request=cancel))

    def _take(self, message: bytes) -> None:
        response = rpc_pb2.WatchResponse.FromString(message)
        self._seen.revision = max(self._seen.revision, response.header.revision)
        if response.created:
            self._created(response, message)
        elif response.watch_id == -1:
            self.told.append(response.header.revision)
            for watch in self._by_id.values():
                self._spool.note(watch.number, Kind.RESPONSE, message)
                watch.next_revision = max(watch.next_revision, response.header.revision + 1)
        elif (found := self._by_id.get(response.watch_id)) is not None:
            self._spool.note(found.number, Kind.RESPONSE, message)
            self._followed(found, response)

    def _created(self, response: rpc_pb2.WatchResponse, message: bytes) -> None:
        watch = self._pending.popleft()
        if response.canceled:
            self._seen.faults.append(f"a create was refused: {response.cancel_reason}")
        elif watch is None:
            self._cancel(response.watch_id)
        else:
            self._spool.note(watch.number, Kind.RESPONSE, message)
            self._by_id[response.watch_id] = watch
            watch.next_revision = watch.next_revision or response.header.revision

    def _followed(self, watch: Watch, response: rpc_pb2.WatchResponse) -> None:
        if response.canceled:
            del self._by_id[response.watch_id]
            self._cancel(response.watch_id)
            if response.compact_revision:
                watch.next_revision = response.compact_revision
            else:
                self._seen.faults.append(f"a watch was cancelled: {response.cancel_reason}")
            self._create(watch)
        elif not response.events:
            watch.next_revision = response.header.revision + 1
        elif not response.fragment:
            watch.next_revision = response.events[-1].kv.mod_revision + 1

    async def _behave(self) -> None:
        habits = self._habits
        while True:
            await asyncio.sleep(random.uniform(0.2, 1.8) * habits.turn_s)
            chance = random.random()
            if self.hurried or chance < habits.progress:
                self.ask_progress()
            elif chance < habits.progress + habits.drop:
                if self._call is not None:
                    self._seen.endings["dropped by the client"] += 1
                    self._call.cancel()
            elif chance < habits.progress + habits.drop + habits.swap:
                self._swap()

    def _swap(self) -> None:
        watch = random.choice(self.watches)
        self.watches.remove(watch)
        self._spool.note(watch.number, Kind.LEFT)
        for watch_id, each in tuple(self._by_id.items()):
            if each is watch:
                del self._by_id[watch_id]
                self._cancel(watch_id)
        for place, waiting in enumerate(self._pending):
            if waiting is watch:
                self._pending[place] = None
        self._create(self.add())
