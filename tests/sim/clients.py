"""Simulated clients: their requests, the required answers, and the log of every watch for the guarantee checkers.

A client sees only bytes, as a real one does. When it sends a request, it records the answer that etcd would give: the
id, or the refusal. Properties that the log of one watch does not show are checked here, per session: the order of
`created`, ids, uninterrupted fragments, cancels answered once, real headers, sizes.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from coalesce.guarantees.checkers import (
    DELETE,
    PUT,
    Bookmark,
    Canceled,
    Change,
    Created,
    Opened,
    PreviousValue,
    Received,
    Reopened,
    Truth,
    WatchLog,
    check,
)
from proto.pb import rpc_pb2
from tests.sim.failure import SimulationFailure
from tests.sim.model_stream import CLUSTER_ID
from tests.sim.permissions import INVALID_TOKEN

COMPACTED = "etcdserver: mvcc: required revision has been compacted"
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"


# Limits of all sessions together: a client cannot predict when it reaches them.
SHARED_LIMIT = re.compile(r"watchmux: the limit of \d+ (watches|different ranges) is reached")
# The reason with which the simulator's etcd cancels an upstream watch permanently.
LOST = "etcdserver: the simulator took it"
OTHER_HISTORY = "watchmux: the history of the store was replaced (restored from a snapshot?)"
NO_LEADER = "etcdserver: no leader"

# Header, id and prefix of a response; limits count events.
_ENVELOPE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Spec:
    """The options of a watch, apart from its start and id."""

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
    # The revision to resume from; None while it starts from now and does not know that revision yet.
    next_revision: int | None = None
    watch_id: int = 0
    created: bool = False
    # Finally over: cancelled by the client, refused, or given up.
    over: bool = False
    # Cancelled by the server: it may be opened again.
    compact_revision: int = 0
    canceled: bool = False
    # The highest revision it received on this session; whether the store has gone back below that since.
    told_revision: int = 0
    bookmarks: int = 0
    doomed: bool = False
    _run: list[Change] = field(default_factory=list)

    @classmethod
    def make(cls, spec: Spec, start_revision: int | None, by_header: bool) -> SimWatch:
        """Return a watch that has not been sent yet."""
        log = WatchLog(spec.key, spec.range_end, spec.no_put, spec.no_delete, spec.prev_kv)
        return cls(spec, start_revision, log, by_header, start_revision)

    def sent(self) -> None:
        """Send its create, with `next_revision` as the start."""
        opened = Reopened if self.log.records else Opened
        self.log.records.append(opened(self.next_revision))
        self.created = self.canceled = False
        self.told_revision = 0
        self.compact_revision = 0
        self._run.clear()

    def got_created(self, revision: int) -> None:
        """Handle its `created`."""
        self.created = True
        self.log.records.append(Created(revision))
        if self.next_revision is None:
            self.next_revision = revision + 1
            self.told_revision = revision

    def got_events(self, revision: int, changes: list[Change], fragment: bool) -> None:
        """Handle a response with events."""
        self.log.records.append(Received(revision, changes, fragment))
        self._run.extend(changes)
        if not fragment:
            last = revision if self.by_header else self._run[-1].mod_revision
            self.next_revision = max(self.next_revision or 0, last + 1)
            self.told_revision = max(self.told_revision, last, self._run[-1].mod_revision)
            self._run.clear()

    def got_bookmark(self, revision: int) -> None:
        """Handle a progress response."""
        self.log.records.append(Bookmark(revision))
        self.bookmarks += 1
        self.told_revision = max(self.told_revision, revision)
        self.next_revision = max(self.next_revision or 0, revision + 1)

    def got_canceled(self, compact_revision: int, reason: str) -> None:
        """Handle a `canceled`."""
        self.log.records.append(Canceled(compact_revision, reason))
        self.canceled = True
        self.compact_revision = compact_revision
        if compact_revision:
            self.next_revision = max(self.next_revision or 0, compact_revision)

    def went_back(self, revision: int, live: bool) -> None:
        """Start a new log after a restore to `revision`; the log so far has been checked."""
        self.doomed = live and self.created and self.told_revision > revision
        if not live:
            self.forget()
        else:
            # What it received on this session is still true, or it is doomed; earlier sessions have been checked.
            records = self.log.records
            first = max(place for place, record in enumerate(records) if isinstance(record, Opened | Reopened))
            start = records[first].start_revision  # type: ignore[union-attr]  # one of the two, as looked for
            kept = [] if self.doomed else records[first + 1 :]
            self.log = WatchLog(*self.log.asked, records=[Opened(start), *kept])

    def forget(self) -> None:
        """Note that its log is no longer true. It may be opened again, from now."""
        self.log = WatchLog(*self.log.asked)
        self.next_revision = None
        self.told_revision = 0
        self.doomed = False
        self.canceled = True


def judge_logs(watches: Iterable[SimWatch], truth: Truth, complete_through: Callable[[SimWatch], int | None]) -> None:
    """Check the log of every watch against the truth. Raises SimulationFailure for the first violation."""
    for watch in watches:
        violations = check(watch.log, truth, complete_through(watch), safe_headers=True)
        if violations:
            records = "\n    ".join(map(str, watch.log.records))
            found = "\n  ".join(f"{each.guarantee}: {each.text}" for each in violations)
            raise SimulationFailure(f"guarantees broken for {watch.spec}:\n  {found}\n    {records}")


@dataclass(slots=True)
class SentCreate:
    """An unanswered create."""

    watch: SimWatch
    start_revision: int | None
    # As requested; 0 is automatic.
    watch_id: int
    # The store's revision when it was sent: "now" is not before it.
    sent_at: int


@dataclass(slots=True)
class SentCancel:
    """A cancel that the proxy has not decided yet."""

    watch_id: int


def leaves(session: Any, watch: Any = None) -> bool:
    """Return whether an effect has no receiver: its session has ended in the core, or its watch is being removed."""
    if session.ended and watch is not None and session.watches.get(watch.watch_id) is not watch:
        raise SimulationFailure("a delivery to a watch that is gone")
    return bool(session.ended)


@dataclass(slots=True, eq=False)
class SimSession:
    """One Watch stream of a client, and its outlet: messages written to it that the client has not read yet."""

    # Bytes it takes before it stalls.
    window: int
    response_bytes_max: int
    # Why a range is refused to this client; "" is allowed.
    permission: Callable[[bytes, bytes], str]
    # From this size on a response is split for watches with fragment.
    fragment_bytes: int
    # Live watches of a session.
    watches_max: int = 100_000
    # Whether limits of all sessions together are so small that one may be reached.
    narrow: bool = False
    # Whether the client's token has alternated between valid and invalid, so that the result of a check is unknown.
    fickle: Callable[[], bool] = bool
    # Whether the proxy knows by now that the store was restored, if it was.
    noticed: Callable[[], bool] = lambda: True
    core: Any = None
    # It has created a watch whose key is too large for etcd.
    poisoned: bool = False
    stalled: bool = False
    # The input during which it stalled, when that was, and the ids that had a watch then.
    stalled_input: int = 0
    stalled_at: float = 0.0
    stalled_ids: tuple[int, ...] = ()
    # The watches whose events it has returned since, with their source, and during which input it did so last.
    returned: dict[tuple[Any, Any], int] = field(default_factory=dict)
    ended: tuple[int, str] | None = None
    # The client is gone: nothing more may be sent.
    closed: bool = False
    outbox: deque[bytes] = field(default_factory=deque)
    outbox_bytes: int = 0
    # Undecided creates and cancels, in order: the proxy decides them in this order, as etcd does.
    requests: deque[SentCreate | SentCancel] = field(default_factory=deque)
    # Ids in use, as etcd would count them at this point of the stream: a compaction cancel leaves them taken.
    taken: dict[int, SimWatch] = field(default_factory=dict)
    # Watches by id from their `created` to their `canceled`.
    announced: dict[int, SimWatch] = field(default_factory=dict)
    # Unanswered progress requests: how many creates had been sent before each.
    progress: deque[int] = field(default_factory=deque)
    creates_sent: int = 0
    # What the store was at, at least, when each request came that the proxy has not answered.
    progress_floors: deque[int] = field(default_factory=deque)
    # No answer has come since the last request; the proxy may answer several with one.
    progress_waits: bool = False
    # The highest revision of any event or bookmark: what the proxy says after it knows that much.
    told_revision: int = 0
    next_id: int = 0
    _run_id: int | None = None

    # what the client sends

    def sent_create(self, watch: SimWatch, watch_id: int, revision: int) -> None:
        """Note that a create leaves now, at this revision of the store."""
        self.requests.append(SentCreate(watch, watch.next_revision, watch_id, revision))
        self.creates_sent += 1
        watch.sent()

    def sent_cancel(self, watch_id: int) -> None:
        """Note that a cancel leaves now."""
        self.requests.append(SentCancel(watch_id))

    def store_went_back(self, revision: int) -> None:
        """The store was restored to `revision`: "now" may be as low as that."""
        self.told_revision = min(self.told_revision, revision)
        for request in self.requests:
            if isinstance(request, SentCreate):
                request.sent_at = min(request.sent_at, revision)
        self.progress_floors = deque(min(floor, revision) for floor in self.progress_floors)

    def sent_progress(self, revision: int) -> None:
        """Note that a progress request leaves now, while every member of etcd is at `revision` or above."""
        self.progress.append(self.creates_sent)
        self.progress_waits = True
        if self.core.queue is None and not self.core.progress_needs:
            self.progress_floors.clear()
        self.progress_floors.append(revision)

    def unanswered(self) -> str:
        """Tell what should have been answered by now; empty when nothing is left."""
        creates = [each for each in self.requests if isinstance(each, SentCreate)]
        cancels = [each for each in self.requests if isinstance(each, SentCancel) and each.watch_id in self.taken]
        return f"never answered: {creates} {cancels}" if creates or cancels else ""

    def _pass_cancels(self, wanted: int | None) -> None:
        """Drop the cancels at the head of the line that need no answer, up to the one of `wanted`, included."""
        while self.requests and isinstance(self.requests[0], SentCancel):
            watch_id = self.requests.popleft().watch_id
            if watch_id == wanted:
                return
            if watch_id in self.taken:
                raise SimulationFailure(f"the cancel of {watch_id} was skipped")
        if wanted is not None:
            raise SimulationFailure(f"the cancel of {wanted} is answered, but was not requested here")

    def _decision(self, create: SentCreate, permission: Callable[[bytes, bytes], str]) -> tuple[int, str]:
        """Return the id that etcd would give this create at this place, or -1 and why it would refuse it."""
        spec = create.watch.spec
        key = spec.key or b"\0"
        if create.start_revision is not None and create.start_revision < 0:
            return -1, COMPACTED
        if refusal := permission(key, spec.range_end):
            return -1, refusal
        if spec.range_end and spec.range_end != b"\0" and key >= spec.range_end:
            return -1, EMPTY_RANGE
        if create.watch_id and create.watch_id in self.taken:
            return -1, DUPLICATE_ID
        if len(self.taken) >= self.watches_max:
            return -1, f"watchmux: the limit of {self.watches_max} watches of one stream is reached"
        if create.watch_id:
            return create.watch_id, ""
        watch_id = self.next_id
        while watch_id in self.taken:
            watch_id += 1
        return watch_id, ""

    def now_may_be(self, revision: int) -> None:
        """From here on, "now" of unanswered creates may be this."""
        for request in self.requests:
            if isinstance(request, SentCreate):
                request.sent_at = min(request.sent_at, revision)

    # messages from the proxy

    def answered(self, message: bytes) -> None:
        """Hold a control answer, as it is written, against the requests for progress that wait now."""
        response = rpc_pb2.WatchResponse.FromString(message[5:])
        if response.watch_id != -1 or response.created or not self.progress_floors:
            return
        floor = self.progress_floors.popleft()
        if response.header.revision < floor:
            raise SimulationFailure(f"{_short(response)}: every member was at {floor} when it was requested")
        # Of several pending ones the proxy answers the first and the last; one queued after a create is not pending.
        # By name: a mutant core has different class objects.
        in_line = sum(type(request).__name__ == "PendingProgress" for request in self.core.queue or ())
        while len(self.progress_floors) > in_line + 1:
            self.progress_floors.popleft()

    def note_returned(self, watch: Any, payload: Any, this_input: int) -> None:
        """Check that a session that had stalled before gets no progress, and each watch no more than one event."""
        if self.stalled_input < this_input:
            if not payload.event_count:
                raise SimulationFailure("progress for a session that had stalled before")
            if self.returned.get((watch, watch.source), this_input) < this_input:
                raise SimulationFailure("a second delivery to a watch of a stalled session")
        if payload.event_count:
            # Progress that is returned leaves a watch in its place; a move to another source may put it in step again.
            self.returned[watch, watch.source] = this_input

    def write(self, messages: tuple[bytes, ...]) -> bool:
        """Queue messages for the client; False when they do not fit in its window (they are queued all the same)."""
        if self.ended is not None or self.closed:
            raise SimulationFailure("written to a session that has ended")
        self.outbox.extend(messages)
        self.outbox_bytes += sum(map(len, messages))
        return self.outbox_bytes <= self.window

    def end(self, status: int, text: str, *, has_leader: bool) -> None:
        """Accept the end of the stream; the client sees it when it has read everything before it."""
        if self.ended is not None:
            raise SimulationFailure("a session ended twice")
        self.ended = (status, text)
        because = [LOST, "behind for more than"]
        because += ["requests wait on one watch stream", "etcd refuses a cover"] * self.narrow
        because += [NO_LEADER] if has_leader else []
        because += ["larger than max"] if self.poisoned else []
        # A permanently refused token ends its own sessions, and no others.
        because += ["etcdserver: "] if self.fickle() or self.permission(b"\0", b"\0") else []
        if not any(text.find(part) >= 0 for part in because):
            raise SimulationFailure(f"a session ended with {status} {text!r}")

    # reads of the client

    def read(self, revision: int, compact_revision: int) -> None:
        """Read one message; the store is at `revision` now, compacted at `compact_revision`."""
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
            self._events(response, len(message), compact_revision)
            self.told_revision = max(self.told_revision, response.events[-1].kv.mod_revision)
        else:
            self._bookmark(response)
            self.told_revision = max(self.told_revision, response.header.revision)

    def _check_header(self, response: rpc_pb2.WatchResponse, revision: int) -> None:
        header = response.header
        if header.cluster_id != CLUSTER_ID or not header.member_id or not header.raft_term:
            raise SimulationFailure(f"no real header in {_short(response)}")
        if not 0 < header.revision <= revision:
            raise SimulationFailure(
                f"header revision {header.revision} in {_short(response)}, the store is at {revision}"
            )

    def _check_news(self, response: rpc_pb2.WatchResponse) -> None:
        """A control answer has the newest header that is known; only "now" is as old as its read."""
        if response.header.revision < self.told_revision:
            raise SimulationFailure(f"{_short(response)} after {self.told_revision} was sent")

    def _created(self, response: rpc_pb2.WatchResponse, revision: int) -> None:
        self._pass_cancels(None)
        if not self.requests:
            raise SimulationFailure(f"{_short(response)} answers no create")
        create = self.requests.popleft()
        assert isinstance(create, SentCreate), "cancels have been passed"
        watch = create.watch
        watch_id, reason = self._decision(create, self.permission)
        if self.fickle() and INVALID_TOKEN in (reason, response.cancel_reason):
            # Requested when the token was in the other state.
            other = self._decision(create, lambda _key, _range_end: "" if reason == INVALID_TOKEN else INVALID_TOKEN)
            watch_id, reason = other if other[1] == response.cancel_reason else (watch_id, reason)
        if response.canceled:
            if response.watch_id != -1 or response.compact_revision:
                raise SimulationFailure(f"refused with {_short(response)}")
            shared = self.narrow and SHARED_LIMIT.fullmatch(response.cancel_reason)
            if not response.cancel_reason or (response.cancel_reason not in (reason, LOST) and not shared):
                raise SimulationFailure(f"refused with {response.cancel_reason!r}, should be {reason!r}")
            watch.over = True
            return
        if reason:
            raise SimulationFailure(f"created, but must be refused with {reason!r}")
        if response.watch_id != watch_id:
            raise SimulationFailure(f"created with id {response.watch_id}, should be {watch_id}")
        if watch.next_revision is not None:
            self._check_news(response)
        elif not create.sent_at <= response.header.revision <= revision:
            text = f"now is {response.header.revision}, but was {create.sent_at} when asked and is {revision}"
            raise SimulationFailure(text)
        if not create.watch_id:
            self.next_id = watch_id + 1
        self.taken[watch_id] = self.announced[watch_id] = watch
        watch.got_created(response.header.revision)

    def _canceled(self, response: rpc_pb2.WatchResponse) -> None:
        self._check_news(response)
        watch_id, reason = response.watch_id, response.cancel_reason
        # None: a compaction cancelled it before; its id stays taken until the client cancels it too.
        watch = self.announced.pop(watch_id, None)
        if watch is None and (watch_id not in self.taken or reason or response.compact_revision):
            raise SimulationFailure(f"{_short(response)}: no such watch")
        if reason and (reason != OTHER_HISTORY or response.compact_revision != response.header.revision):
            # A created watch ends only as at etcd: with a compact_revision, or with its stream.
            raise SimulationFailure(f"{_short(response)}: cancelled with {reason!r}")
        if not response.compact_revision:
            if not reason:
                self._pass_cancels(watch_id)
            del self.taken[watch_id]
        if watch is not None:
            watch.over = not reason and not response.compact_revision
            if reason:
                watch.forget()
            else:
                watch.got_canceled(response.compact_revision, reason)

    def _events(self, response: rpc_pb2.WatchResponse, size: int, compact_revision: int) -> None:
        watch = self.announced.get(response.watch_id)
        if watch is None:
            raise SimulationFailure(f"{_short(response)}: no such watch")
        if watch.doomed and self.noticed():
            raise SimulationFailure(f"{_short(response)}: events of two histories on one watch")
        if response.fragment and not watch.spec.fragment:
            raise SimulationFailure(f"{_short(response)}: a fragment for a watch without `fragment`")
        changes = [decode_change(event) for event in response.events]
        for change in changes if watch.spec.prev_kv else ():
            # The checkers excuse all that any compaction may have removed; here the actual compactions are known.
            overwrites = change.kind == DELETE or change.version > 1
            if change.prev is None and overwrites and change.mod_revision > compact_revision:
                raise SimulationFailure(f"{change} without its previous value")
        limit = max(self.response_bytes_max, self.fragment_bytes if watch.spec.fragment else 0)
        if size > limit + _ENVELOPE_BYTES and changes[0].mod_revision != changes[-1].mod_revision:
            raise SimulationFailure(f"a joined response of {size} bytes, the limit is {self.response_bytes_max}")
        if watch.spec.fragment and len(changes) > 1 and size > self.fragment_bytes + _ENVELOPE_BYTES:
            raise SimulationFailure(f"{size} bytes and {len(changes)} events, not cut to {self.fragment_bytes}")
        watch.got_events(response.header.revision, changes, response.fragment)

    def _bookmark(self, response: rpc_pb2.WatchResponse) -> None:
        if response.cancel_reason or response.compact_revision or response.fragment:
            raise SimulationFailure(f"{_short(response)} is empty")
        revision = response.header.revision
        if response.watch_id != -1:
            watch = self.announced.get(response.watch_id)
            if watch is None or not watch.spec.progress_notify:
                raise SimulationFailure(f"{_short(response)}: progress for a watch without progress_notify")
            watch.got_bookmark(revision)
            return
        if not self.progress:
            raise SimulationFailure(f"{_short(response)}: progress that was not requested")
        answered = self.creates_sent - sum(isinstance(each, SentCreate) for each in self.requests)
        if self.progress.popleft() > answered:
            raise SimulationFailure(f"{_short(response)}: progress before the `created` of an earlier create")
        self.progress_waits = False
        for watch in self.announced.values():
            watch.got_bookmark(revision)


def decode_change(event: Any) -> Change:
    """Return a decoded mvccpb.Event in the form of the checkers."""
    kv = event.kv
    prev = None
    if event.HasField("prev_kv"):
        old = event.prev_kv
        prev = PreviousValue(old.value, old.create_revision, old.mod_revision, old.version, old.lease)
    kind = DELETE if event.type else PUT
    return Change(kind, kv.key, kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease, prev)


def _short(response: rpc_pb2.WatchResponse) -> str:
    flags = [name for name in ("created", "canceled", "fragment") if getattr(response, name)]
    revisions = [event.kv.mod_revision for event in response.events]
    return f"<response id {response.watch_id} header {response.header.revision} {' '.join(flags)} events {revisions}>"
