"""The longest single step of core and watch client while something happens to very many watches at once.

Between two steps the event loop serves others, so no event of another client waits for longer than the longest step.
Pure code without sockets: what the program writes and reads for each step comes on top of it.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from coalesce import (
    CheckPermission,
    Coalescer,
    CoreLimits,
    CreateRequest,
    Deliver,
    Identity,
    OpenUpstream,
    ReadRevision,
    Session,
    Upstream,
    UpstreamLost,
)
from proto.framing import frame
from proto.http2 import JOINED_DATA_BYTES_MAX
from proto.scan import WatchResponse, encode_created, scan_watch_response
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.coalesce.shell import header, put
from upstream.settings import UpstreamSettings
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.effects import WatchReceived
from upstream.watching.state import WatchState
from upstream.watching.stream import StreamEndAction, WatchStream

WATCHES = 100_000
CREATES_OF_A_READ = 5_000
EVENTS = 94_000
START = 1000
NO_LIMITS = CoreLimits(watches_per_session_max=1 << 30, queue_max=1 << 30, linger_s=0.0)


class Steps:
    """Measures each step by the CPU clock of this thread."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.count = 0

    def __call__(self, step: Callable[..., Any], *arguments: object) -> Any:
        """Take one step, and return its result."""
        began = time.thread_time()
        result = step(*arguments)
        self.longest_s = max(self.longest_s, time.thread_time() - began)
        self.count += 1
        return result


class Many:
    """A core with very many watches, of one range or of a range each, and its upstream watches."""

    def __init__(
        self,
        count: int,
        *,
        own: bool = False,
        start: int | None = START,
        sessions: int = 1,
        covers: tuple[bytes, ...] = (),
        has_leader: bool = False,
    ) -> None:
        self.core = Coalescer(NO_LIMITS)
        self.core.limits = replace(NO_LIMITS, covers=covers)
        self.core.header_seen(header(START))
        self.now = 0.0
        self.opened: list[Upstream] = []
        self.stalled = False
        # Etcd answers creates at once.
        self.answers = True
        identity = Identity(has_leader=has_leader)
        self.sessions = [self.core.open_session(object(), identity, 0.0) for _ in range(sessions)]
        for number in range(count):
            key = b"k%07d" % number if own else b"k"
            self.create(self.sessions[number % sessions], key, start)
        self.go_on()

    def create(self, session: Session, key: bytes, start: int | None) -> None:
        """Create a watch."""
        self.carry_out(self.core.create(session, CreateRequest(key, b"", start), self.now))

    def carry_out(self, effects: Iterable[Any]) -> None:
        """Answer permission checks and creates at once; deliveries are returned if the sessions are stalled."""
        coming = list(effects)
        for effect in coming:
            kind = type(effect)
            if kind is CheckPermission:
                coming += self.core.permission(effect.check, None, self.now)
            elif kind is ReadRevision:
                coming += self.core.revision_read(effect.read, header(START), self.now)
            elif kind is OpenUpstream:
                self.opened.append(effect.upstream)
                if self.answers and (effect.upstream.start_revision is None or not self.core.stats.backfills):
                    coming += self.core.upstream_response(effect.upstream, created(START), self.now)
            elif kind is Deliver and self.stalled:
                for watch in effect.watches:
                    self.core.undelivered(watch, effect.payload)

    def get_events(self, count: int) -> None:
        """Let the first upstream watch bring events, each of a revision of its own."""
        for revision in range(START + 1, START + 1 + count):
            self.core.upstream_response(
                self.opened[0], WatchResponse(header(revision), 0, events=[put(revision)]), self.now
            )

    def go_on(self, steps: Callable[..., Any] | None = None) -> None:
        """Call `expire` as long as it is due at once; `steps` measures each."""
        while (deadline := self.core.next_deadline()) is not None and deadline <= self.now:
            effects = steps(self.core.expire, self.now) if steps is not None else self.core.expire(self.now)
            self.carry_out(effects)

    def measure(self, step: Callable[..., Any], *arguments: object) -> Steps:
        """Measure an input and what follows it."""
        gc.collect()
        gc.disable()
        steps = Steps()
        self.carry_out(steps(step, *arguments, self.now))
        self.go_on(steps)
        gc.enable()
        return steps


def created(revision: int) -> WatchResponse:
    """Return the answer to a create."""
    return WatchResponse(header(revision), 0, created=True)


def compaction(own: bool) -> Steps:
    """A compaction cancels the watches of one upstream watch."""
    many = Many(WATCHES, own=own, covers=(b"k",) if own else ())
    response = WatchResponse(header(START), 0, canceled=True, compact_revision=START + 10)
    return many.measure(many.core.upstream_response, many.opened[0], response)


def restore(own: bool) -> Steps:
    """The store is restored from a snapshot."""
    many = Many(WATCHES, own=own)
    return many.measure(many.core.other_history, header(START - 10))


def lost(own: bool, sessions: int) -> Steps:
    """An upstream watch is lost: for a cover, its ranges get trunks of their own."""
    many = Many(WATCHES, own=own, covers=(b"k",) if own else (), sessions=sessions)
    return many.measure(many.core.upstream_lost, many.opened[0], UpstreamLost(7, "etcdserver: permission denied"))


def no_leader(own: bool) -> Steps:
    """No etcd has a leader: a tenth as many sessions as watches end."""
    many = Many(WATCHES, own=own, sessions=WATCHES // 10, has_leader=True)
    return many.measure(many.core.no_leader)


def asks_for_progress(own: bool) -> Steps:
    """Etcd is asked for the progress of the session's watches."""
    many = Many(WATCHES, own=own)
    steps = many.measure(many.core.progress, many.sessions[0])
    gc.disable()
    for _ in range(9):
        many.now += 0.05
        many.go_on(steps)
    gc.enable()
    return steps


def is_answered(own: bool) -> Steps:
    """Etcd answers, for 10,000 upstream watches at a time, and the session is answered."""
    many = Many(WATCHES, own=own)
    many.carry_out(many.core.progress(many.sessions[0], many.now))
    many.now += 0.05
    many.go_on()
    steps = Steps()
    for first in range(0, len(many.opened), 10_000):
        part = tuple(many.opened[first : first + 10_000])
        answered = many.measure(many.core.upstream_progress, part, header(START + 1), 1)
        steps.longest_s = max(steps.longest_s, answered.longest_s)
        steps.count += answered.count
    return steps


def _on_a_backfill() -> tuple[Many, Session]:
    """Return a core with a trunk of one watch and a backfill for all watches of another session."""
    many = Many(0)
    many.create(many.sessions[0], b"k", START)
    session = many.core.open_session(object(), Identity(), 0.0)
    for _ in range(WATCHES):
        many.create(session, b"k", 10)
    many.go_on()
    return many, session


def backfill_event(stalled: bool) -> Steps:
    """An event for the watches of one backfill; `stalled`: the second one, after their client has stopped reading."""
    many, session = _on_a_backfill()
    backfill = many.opened[1]
    many.carry_out(many.core.upstream_response(backfill, created(START), many.now))
    if stalled:
        many.stalled = True
        many.core.stalled(session)
        for revision in (11, 12):
            response = WatchResponse(header(START), 0, events=[put(revision)])
            many.carry_out(many.core.upstream_response(backfill, response, many.now))
    response = WatchResponse(header(START), 0, events=[put(20)])
    return many.measure(many.core.upstream_response, backfill, response)


def stalls(window: int) -> Steps:
    """An event for watches of one client, which takes so many messages at a time; each step with what is returned."""
    many = Many(WATCHES)
    [session] = many.sessions
    arrived = room = 0

    def step(take: Callable[..., Any], *arguments: object) -> None:
        nonlocal arrived, room
        for effect in take(*arguments, many.now):
            for watch in effect.watches:
                if not room and not session.stalled:
                    many.core.stalled(session)
                if session.stalled:
                    many.core.undelivered(watch, effect.payload)
                else:
                    room, arrived = room - 1, arrived + 1

    steps = Steps()
    gc.collect()
    gc.disable()
    room = window
    response = WatchResponse(header(START + 1), 0, events=[put(START + 1)])
    steps(step, many.core.upstream_response, many.opened[0], response)
    while arrived < WATCHES:
        if session.stalled:
            room = window
            steps(step, many.core.drained, session, window * 60)
        else:
            steps(step, many.core.expire)
    gc.enable()
    return steps


def older_start(own: bool) -> Steps:
    """A create from an older revision opens a backfill that takes over the watches of another one."""
    del own
    many, session = _on_a_backfill()
    steps = Steps()
    [check] = steps(many.core.create, session, CreateRequest(b"k", b"", 9), many.now)
    return many.measure(many.core.permission, check.check, None)


class Opened:
    """A watch as the engine opens it."""

    __slots__ = ("is_backfill", "key", "prev_kv", "range_end", "start_revision", "token", "watchers")

    def __init__(self, key: bytes) -> None:
        self.key, self.range_end, self.start_revision, self.token = key, b"", None, None
        self.prev_kv = self.is_backfill = False
        self.watchers = 1


def watching() -> WatchState:
    """Return the state of a watch client with very many live watches."""
    state = WatchState()
    state.connect(True, START)
    for number in range(WATCHES):
        state.open(Opened(b"k%07d" % number))
    answer(state)
    return state


def answer(state: WatchState) -> None:
    """Let etcd answer all creates."""
    for stream in state.streams():
        for watch_id in range(len(stream.creating)):
            state.received(stream, WatchResponse(header(START), watch_id, created=True))


def all_steps(steps: Steps, state: WatchState, step: Callable[..., Any], *arguments: object) -> Steps:
    """Measure an input of the watch client, and what follows it."""
    gc.collect()
    gc.disable()
    steps(step, *arguments)
    while getattr(state, "goes_on", False):
        steps(state.go_on)
    gc.enable()
    return steps


def reconnect() -> Steps:
    """The connection to etcd is lost, and all watches register on another one."""
    state = watching()
    steps = all_steps(Steps(), state, state.disconnect)
    return all_steps(steps, state, state.connect, True, START)


def stream_ends(action: StreamEndAction) -> Steps:
    """A stream of 10,000 watches ends, and they register again or are lost."""
    state = watching()
    steps = all_steps(Steps(), state, state.over, next(iter(state.streams())), action, 16, "no")
    return all_steps(steps, state, state.register)


def history_grows_old() -> Steps:
    """The events of the 19 s between two timers have become too old: 5,000 in a second."""
    many = Many(1)
    many.core.limits = replace(
        NO_LIMITS, history_revisions_max=EVENTS, history_bytes_max=NO_LIMITS.history_bytes_total_max
    )
    many.get_events(EVENTS - 1)
    many.now += NO_LIMITS.history_age_s * 1.07
    return many.measure(many.core.expire)


def range_ends() -> Steps:
    """A range with 20,000 kept events ends, since its upstream watch is lost and is not used."""
    many = Many(1)
    many.get_events(NO_LIMITS.history_revisions_max - 1)
    many.carry_out(many.core.close(many.sessions[0], many.now))
    many.go_on()
    many.now += NO_LIMITS.history_linger_s * 1.1
    return many.measure(many.core.expire)


class ReadLoop:
    """The event loop of an upstream call: time, and the calls for the next turn."""

    def __init__(self) -> None:
        self.soon: list[Callable[[], object]] = []
        self.time = time.perf_counter

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call it in the next turn."""
        self.soon.append(callback)


class Owner:
    """What a read of etcd's bytes reaches: the state of the watch client, and the core."""

    scan = staticmethod(scan_watch_response)
    received_bytes = 0

    def __init__(self, many: Many, state: WatchState) -> None:
        self._many = many
        self._state = state

    def take(self, stream: WatchStream, response: WatchResponse) -> None:
        """Handle a response."""
        for effect in self._state.received(stream, response):
            if isinstance(effect, WatchReceived) and isinstance(effect.watch, Upstream):
                core = self._many.core
                self._many.carry_out(core.upstream_response(effect.watch, effect.response, self._many.now))

    def stream_ended(self, stream: WatchStream, status: int, text: str) -> None:
        """Not called."""


def creates_are_answered() -> Steps:
    """Etcd answers 5,000 creates in one read of 256 KiB."""
    many = Many(0)
    many.answers = False
    for number in range(CREATES_OF_A_READ):
        many.create(many.sessions[0], b"k%07d" % number, None)
    state = WatchState()
    state.connect(True, START)
    for upstream in many.opened:
        state.open(upstream)
    [stream] = state.streams()
    data = b"".join(frame(encode_created(header(START), watch_id)) for watch_id in range(CREATES_OF_A_READ))
    many.answers = True

    async def make() -> UpstreamWatchCall:
        return UpstreamWatchCall(Owner(many, state), stream, UpstreamSettings())

    call: Any = asyncio.run(make())
    loop = ReadLoop()
    connection = SimpleNamespace(heard_at=0.0, cork=None, batches=SimpleNamespace(interval_s=0))
    call.call = SimpleNamespace(connection=connection, ended=False, http_status=200, consumed=lambda _: None)
    call._loop = loop

    def read() -> None:
        connection.heard_at = loop.time()
        for first in range(0, len(data), JOINED_DATA_BYTES_MAX):
            call.on_data(data[first : first + JOINED_DATA_BYTES_MAX], 0)

    steps = Steps()
    gc.collect()
    gc.disable()
    steps(read)
    while loop.soon:
        steps(loop.soon.pop())
    gc.enable()
    return steps


SITUATIONS: dict[str, Callable[[], Steps]] = {
    "creates are answered, 5,000 in one read": creates_are_answered,
    "events of 19 s grow old, 5,000 in a second": history_grows_old,
    "range with 20,000 kept events ends": range_ends,
    "connection lost": reconnect,
    "upstream stream ends": partial(stream_ends, StreamEndAction.MOVED),
    "upstream stream refused": partial(stream_ends, StreamEndAction.LOST),
    "no leader": partial(no_leader, False),
    "restore, one range": partial(restore, False),
    "restore, ranges of their own": partial(restore, True),
    "compaction, one range": partial(compaction, False),
    "compaction, below a cover": partial(compaction, True),
    "upstream watch lost, one session": partial(lost, False, 1),
    "upstream watch lost, 10,000 sessions": partial(lost, False, 10_000),
    "cover refused": partial(lost, True, 1),
    "progress of one range is asked for": partial(asks_for_progress, False),
    "progress of ranges of their own is asked for": partial(asks_for_progress, True),
    "progress of one range is answered": partial(is_answered, False),
    "progress of ranges of their own is answered": partial(is_answered, True),
    "event of a backfill": partial(backfill_event, False),
    "event of a backfill, its session is stalled": partial(backfill_event, True),
    "event for a client that takes 1,000 at a time": partial(stalls, 1000),
    "event for a client that takes all": partial(stalls, WATCHES),
    "backfill from an older start": partial(older_start, False),
}


def measured(name: str, front: Front) -> Figures:
    """Measure this checkout only."""
    if front.name != "watchmux":
        return {}
    steps = SITUATIONS[name]()
    return {"steps": steps.count, "longest step, ms of CPU": steps.longest_s * 1000}


SCENARIOS: dict[str, Scenario] = {f"steps: {name}": partial(measured, name) for name in SITUATIONS}
