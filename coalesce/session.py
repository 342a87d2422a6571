"""Sessions, their watches, and the queue of their pending requests.

A session handles its requests strictly in order, as etcd's receive loop does, because clients match `created` to
their creates by order. So each request joins the session's queue; only its head is decided. The needs of a create (a
permission, a read of "now", a trunk) are requested from etcd as soon as it arrives, so that queued creates wait for
etcd concurrently.

Watch ids belong to one session: 0 in a request means automatic, a counter that never decreases and skips ids in use. An
id whose watch was cancelled by compaction stays taken until the client cancels it (etcd: mvcc/watcher.go keeps the
watcher).
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from typing import TYPE_CHECKING, TypeAlias

from coalesce.batch import PREV_KV, variant_of
from coalesce.inputs import CreateRequest, Identity
from proto.scan import Header

if TYPE_CHECKING:
    from coalesce.fanout import Ahead, Group
    from coalesce.source import Source
    from coalesce.trunk import Trunk
    from coalesce.waiting import Blocker


class Place(Enum):
    """Where a watch is; exactly one of these applies."""

    # In a group of its source: needs exactly what the source needs next, and gets each batch as it arrives.
    IN_STEP = "in step"
    # In its source's heap: needs nothing before its position, which the source has not reached.
    AHEAD = "ahead"
    # In its session's `lagging`: has events to be replayed, or has lost its source and needs another one.
    LAGGING = "lagging"
    # Queued for a backfill.
    QUEUED = "queued"
    # Cancelled, or its session has ended.
    ENDED = "ended"


class Watch:
    """One client's watch on a session."""

    __slots__ = (
        "ahead",
        "group",
        "noted_revision",
        "outlet",
        "place",
        "position",
        "progress_floor",
        "progress_notify",
        "sent_revision",
        "session",
        "source",
        "trunk",
        "variant",
        "watch_id",
    )

    def __init__(self, session: Session, request: CreateRequest, watch_id: int, trunk: Trunk, position: int) -> None:
        self.session = session
        # The session's outlet, copied for the hot loop.
        self.outlet = session.outlet
        self.watch_id = watch_id
        self.variant = variant_of(request.no_put, request.no_delete, request.prev_kv, request.fragment)
        self.progress_notify = request.progress_notify
        # The trunk of its range.
        self.trunk = trunk
        self.place = Place.LAGGING
        # The trunk, or the backfill it comes through; None = it needs one.
        self.source: Source | None = None
        # Its group while IN_STEP, else None.
        self.group: Group | None = None
        # Its entry in the heap while AHEAD, else None.
        self.ahead: Ahead | None = None
        # The first revision still needed, while not IN_STEP.
        self.position = position
        # Lower progress would move the client back: the start it asked for, "now", or the progress it was sent since.
        self.progress_floor = request.start_revision if request.start_revision is not None else position - 1
        # Revision of the last event sent to it, or a little later; in a group, the group's `sent_revision` counts too.
        self.sent_revision = position - 1
        # The first value of `sent_revision`.
        self.noted_revision = position - 1

    @property
    def next_revision(self) -> int:
        """The first revision still needed."""
        if self.group is not None and self.source is not None:
            return self.source.fanout.next_revision
        return self.position

    @property
    def last_sent_revision(self) -> int:
        """No event above this revision was sent; the last one sent may be lower."""
        if self.group is not None and self.group.sent_revision > self.sent_revision:
            return self.group.sent_revision
        return self.sent_revision

    @property
    def wants_prev_kv(self) -> bool:
        """It asked for prev_kv."""
        return bool(self.variant & PREV_KV)

    def __repr__(self) -> str:
        return f"Watch({self.watch_id}, {self.place.value}, next_revision={self.next_revision})"


REQUEST_BYTES = 512
"""Memory of a queued request in addition to its keys: objects, and list entries."""


class PendingCreate:
    """A queued create. It is also the `check` of CheckPermission: the shell reads session, key and range_end."""

    __slots__ = ("bytes", "checked", "header", "key", "range_end", "reading", "refusal", "request", "session", "trunk")

    def __init__(self, session: Session, request: CreateRequest) -> None:
        self.session = session
        self.request = request
        # In etcd an empty key means the smallest one (api/v3rpc/watch.go).
        self.key = request.key or b"\x00"
        self.range_end = request.range_end
        # Memory.
        self.bytes = REQUEST_BYTES + len(request.key) + len(request.range_end)
        # The permission was granted.
        self.checked = False
        # Why it is refused; None = not refused so far. The answer waits for its turn.
        self.refusal: str | None = None
        # A read of "now" that began after this request arrived; None = not read.
        self.header: Header | None = None
        # Waits for such a read.
        self.reading = False
        # The trunk it holds open until it joins.
        self.trunk: Trunk | None = None


class PendingCancel:
    """A queued cancel."""

    __slots__ = ("watch_id",)

    bytes = REQUEST_BYTES

    def __init__(self, watch_id: int) -> None:
        self.watch_id = watch_id


class PendingProgress:
    """A queued progress request."""

    __slots__ = ()

    bytes = REQUEST_BYTES


Pending: TypeAlias = PendingCreate | PendingCancel | PendingProgress
# Usually holds one request. An empty deque takes ten times the memory of a list, so a deque is used only for more than
# LISTED_MAX requests, where taking the first one from a list would be slow.
RequestQueue: TypeAlias = list[Pending] | deque[Pending]
LISTED_MAX = 32


class Session:
    """One client's Watch stream."""

    __slots__ = (
        "compacted",
        "ended",
        "identity",
        "lagging",
        "lagging_since",
        "line_bytes",
        "line_full",
        "next_id",
        "outlet",
        "progress_blocker",
        "progress_needs",
        "progress_revision",
        "queue",
        "stalled",
        "watches",
    )

    def __init__(self, outlet: object, identity: Identity) -> None:
        # The shell's object that Deliver and Send write to.
        self.outlet = outlet
        self.identity = identity
        self.watches: dict[int, Watch] = {}
        # Ids that a compaction cancelled and that the client has not cancelled yet.
        self.compacted: set[int] | None = None
        # The next automatic id to try.
        self.next_id = 0
        # Requests not decided yet, in order; None = none.
        self.queue: RequestQueue | None = None
        # Memory of the queue.
        self.line_bytes = 0
        # The queue reached line_bytes_max: the shell passes in no more requests until TakeRequests.
        self.line_full = False
        # The shell holds unsent bytes of it: nothing is delivered until drained().
        self.stalled = False
        # Watches to be replayed, in the order of their turns.
        self.lagging: dict[Watch, None] = {}
        # Since when `lagging` has been non-empty; None = it is empty.
        self.lagging_since: float | None = None
        # Progress requests not answered yet, at most two: for each, the number of the first upstream request whose
        # answer is fresh enough (see progress).
        self.progress_needs: tuple[int, ...] = ()
        # What blocked the answer at the last attempt; None = no known blocker.
        self.progress_blocker: Blocker | None = None
        # The highest progress answered.
        self.progress_revision = 0
        # Closed by the shell, or ended by the core.
        self.ended = False

    def id_taken(self, watch_id: int) -> bool:
        """Whether a watch has this id, or a compaction cancelled that watch and the client has not done so yet."""
        return watch_id in self.watches or (self.compacted is not None and watch_id in self.compacted)

    def automatic_id(self) -> int:
        """Take the next automatic id."""
        while self.id_taken(self.next_id):
            self.next_id += 1
        self.next_id += 1
        return self.next_id - 1
