"""Simulated clients: what they ask, what they must be answered, and the log of every watch for the guarantee checkers.

A client sees only bytes, as a real one does. It keeps, at the moment a request leaves, what etcd would answer: the
id, or the refusal. What the guarantees cannot see in the log of one watch is judged here, per session: the order of
`created`, ids, fragments that nothing interrupts, cancels answered once, real headers, sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from coalesce.guarantees import (
    DELETE,
    PUT,
    Bookmark,
    Canceled,
    Change,
    Created,
    Opened,
    Previous,
    Received,
    Reopened,
    WatchLog,
)
from proto.pb import rpc_pb2
from tests.sim.model_stream import CLUSTER_ID

COMPACTED = "etcdserver: mvcc: required revision has been compacted"
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"


class SimulationFailure(AssertionError):
    """The proxy did something that no client may see."""


@dataclass(frozen=True, slots=True)
class Spec:
    """What a watch asks for, apart from its start and id."""

    key: bytes
    range_end: bytes
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    fragment: bool = False
    progress_notify: bool = False


@dataclass(slots=True, eq=False)
class SimWatch:
    """One watch of a client, through all its sessions."""

    spec: Spec
    start_revision: int | None
    log: WatchLog
    # Resumes at header + 1 of every response, as Node's etcd3 does; else from its last event or bookmark.
    by_header: bool
    # What it would resume from; None while it wants now and does not know yet what that was.
    next_revision: int | None = None
    watch_id: int = 0
    created: bool = False
    # Over for good: cancelled by the client, refused, or given up.
    over: bool = False
    # Cancelled by the server: it may be opened again.
    compact_revision: int = 0
    canceled: bool = False
    cancel_asked: bool = False
    _run: list[Change] = field(default_factory=list)

    @classmethod
    def make(cls, spec: Spec, start_revision: int | None, by_header: bool) -> SimWatch:
        """Return a watch that has not been sent yet."""
        log = WatchLog(spec.key, spec.range_end, spec.no_put, spec.no_delete, spec.prev_kv)
        return cls(spec, start_revision, log, by_header, start_revision)

    def sent(self) -> None:
        """Its create leaves, with `next_revision` as the start."""
        opened = Reopened if self.log.records else Opened
        self.log.records.append(opened(self.next_revision))
        self.created = self.canceled = self.cancel_asked = False
        self.compact_revision = 0
        self._run.clear()

    def got_created(self, revision: int) -> None:
        """Its `created` came."""
        self.created = True
        self.log.records.append(Created(revision))
        if self.next_revision is None:
            self.next_revision = revision + 1

    def got_events(self, revision: int, changes: list[Change], fragment: bool) -> None:
        """A response with events came."""
        self.log.records.append(Received(revision, changes, fragment))
        self._run.extend(changes)
        if not fragment:
            last = revision if self.by_header else self._run[-1].mod_revision
            self.next_revision = max(self.next_revision or 0, last + 1)
            self._run.clear()

    def got_bookmark(self, revision: int) -> None:
        """A progress response came."""
        self.log.records.append(Bookmark(revision))
        self.next_revision = max(self.next_revision or 0, revision + 1)

    def got_canceled(self, compact_revision: int, reason: str) -> None:
        """A `canceled` came."""
        self.log.records.append(Canceled(compact_revision, reason))
        self.canceled = True
        self.compact_revision = compact_revision
        if compact_revision:
            self.next_revision = max(self.next_revision or 0, compact_revision)


@dataclass(slots=True)
class Expected:
    """What the answer to a create must be."""

    watch: SimWatch
    watch_id: int
    reason: str
    # The store's revision when the create was sent: "now" is not before it.
    sent_at: int


@dataclass(slots=True, eq=False)
class SimSession:
    """One Watch stream of a client, and its outlet: what was written to it and not read by the client yet."""

    # Bytes it takes before it stalls.
    window: int
    response_bytes_max: int
    # Why a range is refused to this client; "" is allowed.
    permission: Callable[[bytes, bytes], str]
    core: Any = None
    stalled: bool = False
    ended: tuple[int, str] | None = None
    # The client is gone: nothing may be sent any more.
    closed: bool = False
    outbox: deque[bytes] = field(default_factory=deque)
    outbox_bytes: int = 0
    expected: deque[Expected] = field(default_factory=deque)
    # Ids in use, as etcd would count them when a request arrives; and the watches whose `created` came, by id.
    taken: dict[int, SimWatch] = field(default_factory=dict)
    announced: dict[int, SimWatch] = field(default_factory=dict)
    # Cancels sent and not answered: id -> how many.
    cancels: dict[int, int] = field(default_factory=dict)
    # Progress requests not answered: how many creates had been sent before each.
    progress: deque[int] = field(default_factory=deque)
    creates_sent: int = 0
    # No answer has come since the last request; the proxy may answer several with one.
    progress_waits: bool = False
    _next_id: int = 0
    _run_id: int | None = None

    # what the client sends

    def expect(self, watch: SimWatch, start_revision: int | None, watch_id: int, revision: int) -> None:
        """Note what etcd would answer to this create, which leaves now, at this revision of the store."""
        spec = watch.spec
        reason = ""
        if start_revision is not None and start_revision < 0:
            reason = COMPACTED
        elif refusal := self.permission(spec.key or b"\0", spec.range_end):
            reason = refusal
        elif spec.range_end and spec.range_end != b"\0" and (spec.key or b"\0") >= spec.range_end:
            reason = EMPTY_RANGE
        elif watch_id and watch_id in self.taken:
            reason = DUPLICATE_ID
        elif not watch_id:
            while self._next_id in self.taken:
                self._next_id += 1
            watch_id = self._next_id
            self._next_id += 1
        if reason:
            watch_id = -1
        else:
            self.taken[watch_id] = watch
            watch.watch_id = watch_id
        watch.sent()
        self.expected.append(Expected(watch, watch_id, reason, revision))
        self.creates_sent += 1

    def expect_progress(self) -> None:
        """Note that a progress request leaves now."""
        self.progress.append(self.creates_sent)
        self.progress_waits = True

    def expect_cancel(self, watch_id: int) -> None:
        """Note that a cancel leaves now."""
        watch = self.taken.pop(watch_id, None)
        if watch is not None:
            watch.cancel_asked = True
            self.cancels[watch_id] = self.cancels.get(watch_id, 0) + 1

    # what the proxy writes

    def write(self, messages: tuple[bytes, ...]) -> bool:
        """Queue messages for the client; False when they do not fit in its window (they are queued all the same)."""
        if self.ended is not None or self.closed:
            raise SimulationFailure("written to a session that is over")
        self.outbox.extend(messages)
        self.outbox_bytes += sum(map(len, messages))
        return self.outbox_bytes <= self.window

    # what the client reads

    def read(self, revision: int) -> None:
        """Take one message; `revision` is the store's now."""
        message = self.outbox.popleft()
        self.outbox_bytes -= len(message)
        if message[0] or int.from_bytes(message[1:5], "big") != len(message) - 5:
            raise SimulationFailure(f"a bad gRPC prefix: {message[:5]!r} before {len(message) - 5} bytes")
        response = rpc_pb2.WatchResponse.FromString(message[5:])
        self._check_header(response, revision)
        if self._run_id is not None and (response.watch_id != self._run_id or not response.events):
            raise SimulationFailure(f"{_short(response)} between the fragments of watch {self._run_id}")
        self._run_id = response.watch_id if response.fragment else None
        if response.created:
            self._created(response, revision)
        elif response.canceled:
            self._canceled(response)
        elif response.events:
            self._events(response, len(message))
        else:
            self._bookmark(response)

    def _check_header(self, response: rpc_pb2.WatchResponse, revision: int) -> None:
        header = response.header
        if header.cluster_id != CLUSTER_ID or not header.member_id or not header.raft_term:
            raise SimulationFailure(f"no real header in {_short(response)}")
        if not 0 < header.revision <= revision:
            raise SimulationFailure(
                f"header revision {header.revision} in {_short(response)}, the store is at {revision}"
            )

    def _created(self, response: rpc_pb2.WatchResponse, revision: int) -> None:
        if not self.expected:
            raise SimulationFailure(f"{_short(response)} answers no create")
        expected = self.expected.popleft()
        watch = expected.watch
        if response.canceled:
            self._refused(response, expected)
            return
        if expected.reason:
            raise SimulationFailure(f"created, but should be refused with {expected.reason!r}")
        if response.watch_id != expected.watch_id:
            raise SimulationFailure(f"created with id {response.watch_id}, should be {expected.watch_id}")
        if response.watch_id in self.announced:
            raise SimulationFailure(f"id {response.watch_id} is in use")
        if watch.next_revision is None and not expected.sent_at <= response.header.revision <= revision:
            text = f"now is {response.header.revision}, but was {expected.sent_at} when asked and is {revision}"
            raise SimulationFailure(text)
        self.announced[response.watch_id] = watch
        watch.got_created(response.header.revision)

    def _refused(self, response: rpc_pb2.WatchResponse, expected: Expected) -> None:
        watch, reason = expected.watch, response.cancel_reason
        if response.watch_id != -1 or response.compact_revision:
            raise SimulationFailure(f"refused with {_short(response)}")
        if reason != expected.reason:
            raise SimulationFailure(f"refused with {reason!r}, should be {expected.reason!r}")
        watch.over = True

    def _canceled(self, response: rpc_pb2.WatchResponse) -> None:
        watch_id = response.watch_id
        watch = self.announced.get(watch_id)
        if watch is None:
            raise SimulationFailure(f"{_short(response)}: no such watch")
        if response.compact_revision:
            if response.cancel_reason:
                raise SimulationFailure(f"a compaction cancel with reason {response.cancel_reason!r}")
            if watch.canceled:
                raise SimulationFailure(f"{_short(response)}: cancelled twice")
            watch.got_canceled(response.compact_revision, response.cancel_reason)
            return
        if self.cancels.get(watch_id):
            self.cancels[watch_id] -= 1
            if not self.cancels[watch_id]:
                del self.cancels[watch_id]
            if response.cancel_reason:
                raise SimulationFailure(f"the client's own cancel with reason {response.cancel_reason!r}")
            watch.over = True
        elif not response.cancel_reason:
            raise SimulationFailure(f"{_short(response)}: nobody asked for it")
        else:
            # Lost upstream, with a reason: the id is free again.
            if self.taken.get(watch_id) is watch:
                del self.taken[watch_id]
        watch.got_canceled(0, response.cancel_reason)
        del self.announced[watch_id]

    def _events(self, response: rpc_pb2.WatchResponse, size: int) -> None:
        watch = self.announced.get(response.watch_id)
        if watch is None:
            raise SimulationFailure(f"{_short(response)}: no such watch")
        if response.fragment and not watch.spec.fragment:
            raise SimulationFailure(f"{_short(response)}: a fragment for a watch that did not ask for them")
        changes = [decode_change(event) for event in response.events]
        if size > self.response_bytes_max and changes[0].mod_revision != changes[-1].mod_revision:
            raise SimulationFailure(f"a joined response of {size} bytes, the limit is {self.response_bytes_max}")
        watch.got_events(response.header.revision, changes, response.fragment)

    def _bookmark(self, response: rpc_pb2.WatchResponse) -> None:
        if response.cancel_reason or response.compact_revision or response.fragment:
            raise SimulationFailure(f"{_short(response)} says nothing")
        revision = response.header.revision
        if response.watch_id != -1:
            watch = self.announced.get(response.watch_id)
            if watch is None or not watch.spec.progress_notify:
                raise SimulationFailure(f"{_short(response)}: progress for a watch that did not ask for it")
            watch.got_bookmark(revision)
            return
        if not self.progress:
            raise SimulationFailure(f"{_short(response)}: progress that nobody asked for")
        if self.progress.popleft() > self.creates_sent - len(self.expected):
            raise SimulationFailure(f"{_short(response)}: progress before the `created` of an earlier create")
        self.progress_waits = False
        for watch in self.announced.values():
            if not watch.canceled:
                watch.got_bookmark(revision)


def decode_change(event: Any) -> Change:
    """Return a decoded mvccpb.Event as the checkers want it."""
    kv = event.kv
    prev = None
    if event.HasField("prev_kv"):
        old = event.prev_kv
        prev = Previous(old.value, old.create_revision, old.mod_revision, old.version, old.lease)
    kind = DELETE if event.type else PUT
    return Change(kind, kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease, prev)


def _short(response: rpc_pb2.WatchResponse) -> str:
    flags = [name for name in ("created", "canceled", "fragment") if getattr(response, name)]
    revisions = [event.kv.mod_revision for event in response.events]
    return f"<response id {response.watch_id} header {response.header.revision} {' '.join(flags)} events {revisions}>"
