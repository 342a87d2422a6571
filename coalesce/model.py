"""The model: sessions, their watches and pending requests, and the sources that bring the watches their events.

These classes refer to each other, so they are one module. They hold data and what can be read off it; the parts of the
core (see `core`) change them.

A session handles its requests strictly in order, as etcd's receive loop does, because clients match `created` to
their creates by order. So each request joins the session's queue; only its head is decided. The needs of a create (a
permission, a read of "now", a trunk) are requested from etcd as soon as it arrives, so that queued creates wait for
etcd concurrently.

Watch ids belong to one session: 0 in a request means automatic, a counter that never decreases and skips ids in use. An
id whose watch was cancelled by compaction stays taken until the client cancels it (etcd: mvcc/watcher.go keeps the
watcher).

There are two kinds of source: all watches of a range end up on its trunk; a backfill brings some of them there. Both
pass batches on, keep a window to replay from, and may have lagging watches: a stalled session is handled alike on both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from coalesce.ahead import AheadWatches
from coalesce.batch import FRAGMENT, PREV_KV, variant_of
from coalesce.history import History, Replayed
from coalesce.inputs import CreateRequest, Identity
from coalesce.limits import CoreLimits
from coalesce.pending import REQUEST_BYTES, PendingCancel, PendingProgress
from coalesce.place import Place
from coalesce.ranges import CoverBranch, TrunkName
from proto.scan import Header
from proto.spans import Span


class Watch:
    """One client's watch on a session."""

    __slots__ = (
        "branch",
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
        self.trunk = trunk
        # Its range below the cover, if its trunk is one.
        self.branch: CoverBranch[Group] | None = None
        self.place = Place.LAGGING
        # The trunk, or the backfill it comes through; None = it needs one.
        self.source: Source | None = None
        # Its group while IN_STEP, else None.
        self.group: Group | None = None
        # The first revision still needed; IN_STEP: unless its source is beyond it.
        self.position = position
        # One object for all three: with millions of watches, the numbers take a third of their memory.
        before = position - 1
        # Lower progress would move the client back: the start it asked for, "now", or the progress it was sent since.
        self.progress_floor = before if request.start_revision is None else request.start_revision
        # Revision of the last event sent to it, or a little later; in a group, the group's `sent_revision` counts too.
        self.sent_revision = before
        # The first value of `sent_revision`.
        self.noted_revision = before

    @property
    def next_revision(self) -> int:
        """The first revision still needed."""
        group, source = self.group, self.source
        if group is None or source is None:
            return self.position
        return max(self.position, source.next_revision if group.behind is None else group.behind)

    @property
    def is_early(self) -> bool:
        """It follows a source that has not reached its position: it needs nothing of what comes before."""
        return self.place is Place.AHEAD or (
            self.group is not None and self.source is not None and self.position > self.source.next_revision
        )

    @property
    def last_sent_revision(self) -> int:
        """No event above this revision was sent; the last one sent may be lower."""
        if self.group is not None and self.group.sent_revision > self.sent_revision:
            return self.group.sent_revision
        return self.sent_revision

    @property
    def follows_trunk(self) -> bool:
        """It was sent everything that its trunk has, and can be sent more."""
        if self.place is not Place.IN_STEP or self.source is not self.trunk or self.session.stalled:
            return False
        return self.group is not None and self.group.behind is None

    @property
    def awaits_run(self) -> bool:
        """While it lags: it is replayed only after the run of its source has ended."""
        source = self.source
        return source is not None and source.run is not None and self.variant & FRAGMENT != 0 and source.serves(self)

    @property
    def wants_prev_kv(self) -> bool:
        """It asked for prev_kv."""
        return bool(self.variant & PREV_KV)

    def __repr__(self) -> str:
        return f"Watch({self.watch_id}, {self.place.value}, next_revision={self.next_revision})"


class GroupWatches(tuple[Watch, ...]):
    """The list of a group's watches, see `listing`; `shell` is free for the shell, and dropped along with the list."""

    shell: object = None


class Group:
    """The watches of a source that are in step and of one variant.

    A session with very many of them has *own groups*, see `fanout`. These are left behind as a whole by an event.
    """

    __slots__ = ("behind", "key", "listed", "members", "newest", "sent_revision", "session", "variant")

    def __init__(self, variant: int, session: Session | None = None) -> None:
        self.variant = variant
        # Of an own group, the session of all its watches.
        self.session = session
        # Where it is among the groups of the source.
        self.key: object = variant if session is None else (variant, session)
        # Of an own group that was left behind, the first revision that its watches still need.
        self.behind: int | None = None
        self.members: dict[Watch, None] = {}
        # Kept until a watch joins or leaves, or other groups are listed.
        self.listed: GroupWatches | None = None
        # Revision of the last event sent to the group.
        self.sent_revision = 0
        # No watch has a higher position, unless the source is beyond it.
        self.newest = 0

    def add(self, watch: Watch) -> None:
        """Add a watch."""
        self.members[watch] = None
        self.listed = None

    def remove(self, watch: Watch) -> None:
        """Remove a watch."""
        del self.members[watch]
        self.listed = None


@dataclass(slots=True, eq=False)
class Blocker:
    """A watch that blocks the progress of its session: its trunk must first be proven through `revision`."""

    watch: Watch
    trunk: Trunk
    revision: int

    @property
    def holds(self) -> bool:
        """Whether it still blocks the session."""
        watch = self.watch
        if watch.place is Place.ENDED:
            return False
        return not watch.follows_trunk or self.trunk.next_revision <= self.revision


_IDS: dict[int, int] = {}  # one object for each id, in all sessions that use it


class PendingCreate:
    """A queued create. It is also the `check` of CheckPermission: the shell reads session, key and range_end."""

    __slots__ = ("bytes", "checked", "header", "key", "range_end", "reading", "refusal", "request", "session", "trunk")

    def __init__(self, session: Session, request: CreateRequest) -> None:
        self.session = session
        self.request = request
        # In etcd an empty key means the smallest one (api/v3rpc/watch.go).
        self.key = request.key or b"\x00"
        self.range_end = request.range_end
        self.bytes = REQUEST_BYTES + len(request.key) + len(request.range_end)  # of memory
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

    @property
    def has_empty_range(self) -> bool:
        """Whether no key is in its range, so that etcd refuses it (api/v3rpc/watch.go)."""
        return bool(self.range_end) and self.range_end != b"\x00" and self.key >= self.range_end


@dataclass(slots=True, eq=False)
class PendingRead:
    """A read of the store's revision, for the creates that waited when it began."""

    waiting: dict[PendingCreate, None] = field(default_factory=dict)


Pending: TypeAlias = PendingCreate | PendingCancel | PendingProgress
# Usually holds one request. An empty deque takes ten times the memory of a list, so a deque is used only for more than
# LISTED_MAX requests, where taking the first one from a list would be slow.
RequestQueue: TypeAlias = list[Pending] | deque[Pending]
LISTED_MAX = 32


@dataclass(slots=True, eq=False)
class Session:
    """One client's Watch stream."""

    # The shell's object that Deliver and Send write to; the core only passes it on.
    outlet: Any
    identity: Identity
    watches: dict[int, Watch] = field(default_factory=dict)
    # Ids that a compaction cancelled and that the client has not cancelled yet.
    compacted: set[int] | None = None
    # The next automatic id to try.
    next_id: int = 0
    # Requests not decided yet, in order; None = none.
    queue: RequestQueue | None = None
    # Memory of the queue.
    line_bytes: int = 0
    # The queue reached line_bytes_max: the shell passes in no more requests until TakeRequests.
    line_full: bool = False
    # The shell holds unsent bytes of it: nothing is sent until drained(), and events for its watches are returned.
    stalled: bool = False
    # Watches to be replayed, in the order of their turns.
    lagging: dict[Watch, None] = field(default_factory=dict)
    # Its own groups that were left behind, in the order of their turns.
    groups_behind: dict[Group, None] = field(default_factory=dict)
    # Since when it has been stalled or has had lagging watches; None = neither.
    lagging_since: float | None = None
    # Progress requests not answered yet, at most two: for each, the number of the first upstream request whose answer
    # is fresh enough (see progress).
    progress_needs: tuple[int, ...] = ()
    # What blocked the answer at the last attempt; None = no known blocker.
    progress_blocker: Blocker | None = None
    # The highest progress answered.
    progress_revision: int = 0
    # Closed by the shell, or ended by the core.
    ended: bool = False

    @property
    def has_lagging(self) -> bool:
        """Whether any of its watches is to be replayed."""
        return bool(self.lagging or self.groups_behind)

    def id_taken(self, watch_id: int) -> bool:
        """Whether a watch has this id, or a compaction cancelled that watch and the client has not done so yet."""
        return watch_id in self.watches or (self.compacted is not None and watch_id in self.compacted)

    def automatic_id(self) -> int:
        """Take the next automatic id."""
        while self.id_taken(self.next_id):
            self.next_id += 1
        watch_id = self.next_id
        self.next_id += 1
        return _IDS.setdefault(watch_id, watch_id) if watch_id < 4096 else watch_id


@dataclass(slots=True, eq=False)
class Upstream:
    """A watch at etcd as the shell sees it. It is never reopened: a source that restarts uses a new one."""

    # The source it feeds; None after that source has ended.
    source: Source | None
    # None = now.
    start_revision: int | None
    prev_kv: bool
    # It needs a stream of its own, which can be paused.
    is_backfill: bool
    key: bytes = field(init=False)
    range_end: bytes = field(init=False)
    # Etcd has answered `created`.
    created: bool = False
    # It is not needed any more; later responses are ignored.
    closed: bool = False
    # The last value of `token`, to which a refusal by etcd applies; () if it was never read.
    said_token: tuple[bytes | None, ...] = ()
    # The number of the newest progress request that asked it; 0 = none.
    asked: int = 0
    # When that request was made, while its answer is outstanding.
    asked_at: float | None = None
    # Free for the shell.
    shell: object = None

    def __post_init__(self) -> None:
        self.key, self.range_end = self.owner.key, self.owner.range_end

    @property
    def owner(self) -> Source:
        """The source it feeds; must not be read after that source has ended."""
        assert self.source is not None, "its source has ended"
        return self.source

    def leave(self, owner: Source) -> None:
        """Drop the reference to an ended source, to break the reference cycle."""
        if self.source is owner:
            self.source = None

    @property
    def watchers(self) -> int:
        """How many watches it serves."""
        return 0 if self.source is None else len(self.source.watches)

    @property
    def token(self) -> bytes | None:
        """The token to register with: that of a live watch, or of a create that waits for the source."""
        token = next(self.tokens(), None)
        self.said_token = (token,)
        return token

    def tokens(self) -> Iterator[bytes | None]:
        """Walk the tokens that etcd has not refused for this range."""
        owner = self.source
        if owner is None:
            return
        refused = owner.refused_tokens
        for session in owner.sessions():
            token = session.identity.token
            if token not in refused:
                yield token


@dataclass(slots=True, eq=False)
class FragmentRun:
    """The pieces of one response of etcd that is still incomplete, see `runs`."""

    # When the newest piece arrived, the number of batches so far, and their memory.
    at: float = 0.0
    batches: int = 0
    bytes: int = 0
    # Sessions with watches that wait for its end.
    sessions: dict[Session, None] = field(default_factory=dict)


@dataclass(slots=True, eq=False, repr=False)
class Source:
    """An upstream watch, the history of its batches, and the watches that follow it: a trunk or a backfill."""

    is_cover = False

    key: bytes
    range_end: bytes
    history: History
    # When the bookmark was last proven.
    proven_at: float
    # The first revision that it has neither delivered nor proven empty: what its watches in step need next. The
    # bookmark is one below.
    next_revision: int = field(init=False)
    # Events received since it opened.
    events: int = 0
    # Of a trunk: all watches of the range, in any place. Of a backfill: those that come through it.
    watches: dict[Watch, None] = field(default_factory=dict)
    # The watches in step, by variant.
    groups: dict[object, Group] = field(default_factory=dict)
    # The watches ahead; None = there are none.
    ahead: AheadWatches[Watch] | None = None
    # The response whose further pieces are still to come.
    run: FragmentRun | None = None
    upstream: Upstream = field(init=False)
    # The number of the newest progress request at the time when the bookmark was last proven.
    proof: int = 0
    # Tokens that etcd has refused for this range.
    refused_tokens: set[bytes | None] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.next_revision = self.history.floor

    @property
    def trunk(self) -> Trunk:
        """The trunk of its range: itself, or the one that a backfill leads to."""
        raise NotImplementedError

    @property
    def is_followed(self) -> bool:
        """Whether a watch is in step or ahead."""
        return self.ahead is not None or any(group.members for group in self.groups.values())

    def groups_of(self, watch: Watch) -> dict[object, Group]:  # noqa: ARG002  # a cover has groups per range
        """Return the groups of which one is that of this watch while it is in step."""
        return self.groups

    def replay(self, watch: Watch, limits: CoreLimits) -> Replayed:
        """Join the events that a watch has missed into one response, see `History.replay`."""
        return self.history.replay(watch.next_revision, watch.variant, limits)

    def serves(self, watch: Watch) -> bool:
        """Whether it can bring this watch the revisions it needs next, from its history or live."""
        return watch.next_revision >= self.history.floor

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions that need this source; a session may appear more than once."""
        raise NotImplementedError


@dataclass(slots=True, eq=False, repr=False)
class Trunk(Source):
    """The upstream watch of a range, its history and all watches of that range."""

    # Creates that hold it open until they join.
    joining: dict[PendingCreate, None] = field(default_factory=dict)
    # How many of its watches want prev_kv.
    prev_kv_watches: int = 0
    backfills: list[Backfill] = field(default_factory=list)
    # It waits for `created`; until then its position may be unknown.
    opening: bool = True
    # The revision from which on the history has prev_kv; None = it has none.
    prev_kv_from: int | None = field(init=False)
    # The second upstream watch, with prev_kv, that will replace the first one.
    upgrade: Backfill | None = None
    # Its watches that asked for progress_notify; None = there are none.
    notices: NotifiedWatches | None = None
    # When etcd last notified it, and how many events it had received by then.
    noticed_at: float = -1.0
    noticed_events: int = 0
    # When its linger ends; None = it is in use.
    timer_at: float | None = None
    # When it was last parked.
    parked_at: float = 0.0

    def __post_init__(self) -> None:
        Source.__post_init__(self)
        self.prev_kv_from = self.history.floor if self.history.has_prev_kv else None

    @property
    def trunk(self) -> Trunk:
        """Itself."""
        return self

    @property
    def name(self) -> TrunkName:
        """What identifies it among the trunks."""
        return self.key, self.range_end

    def join(self, watch: Watch, span: Span) -> None:  # noqa: ARG002  # a cover has watches of many ranges
        """Add a watch of a range that it contains."""
        self.watches[watch] = None
        self.prev_kv_watches += watch.wants_prev_kv

    def quit(self, watch: Watch) -> None:
        """Remove a watch, which may have been taken from `watches` already."""
        self.watches.pop(watch, None)
        self.prev_kv_watches -= watch.wants_prev_kv

    @property
    def is_used(self) -> bool:
        """Whether watches or creates need it."""
        return bool(self.watches or self.joining)

    @property
    def is_live(self) -> bool:
        """Whether etcd serves it; not while its upstream watch is still to be created, or has ended."""
        return not self.opening and not self.upstream.closed

    def serves(self, watch: Watch) -> bool:
        """Whether it can bring this watch the revisions it needs next, with prev_kv if the watch wants that."""
        position, opens_from_now = watch.next_revision, self.opening and self.upstream.start_revision is None
        if opens_from_now or (watch.wants_prev_kv and (self.prev_kv_from is None or position < self.prev_kv_from)):
            return False
        return position >= self.history.floor

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions with watches of the range, or with creates that wait for it."""
        for watch in self.watches:
            yield watch.session
        for create in self.joining:
            yield create.session

    def start_over(self, next_revision: int) -> None:
        """Drop the history and continue at `next_revision`. The watches must be unplaced."""
        self.next_revision = next_revision
        self.history.drop(next_revision)
        if self.prev_kv_from is not None:
            self.prev_kv_from = next_revision


class Backfill(Source):
    """One upstream watch for some lagging watches of a trunk; or its upgrade, see `placement`."""

    __slots__ = ("branch", "is_upgrade", "paused", "trunk")

    # The trunk that its watches move to.
    trunk: Trunk

    def __init__(
        self, trunk: Trunk, branch: CoverBranch[Group] | None, history: History, now: float, *, is_upgrade: bool
    ) -> None:
        of: Trunk | CoverBranch[Group] = branch or trunk
        super().__init__(of.key, of.range_end, history, now)
        self.trunk = trunk
        # The range of all its watches, if its trunk is a cover.
        self.branch = branch
        self.is_upgrade = is_upgrade
        self.paused = False

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions of its watches."""
        for watch in self.watches:
            yield watch.session
        if self.is_upgrade:
            yield from self.trunk.sessions()


@dataclass(slots=True, eq=False)
class NotifiedWatches:
    """The watches of one trunk that asked for progress_notify, and the state of their last round."""

    trunk: Trunk
    # When the last round was made, the trunk's event count at that time, and its revision. The initial count is that
    # at etcd's last notification: etcd skips the trunk if it had events since.
    round_at: float
    round_events: int
    round_revision: int = 0
    # By variant; none of the inner dicts is empty.
    watches: dict[int, dict[Watch, None]] = field(default_factory=dict)
    # The watches added since the last round.
    new: dict[Watch, None] = field(default_factory=dict)
    # The progress request whose answer the next round waits for, and since when; 0 = it waits for none.
    needs: int = 0
    asked_at: float = 0.0
    # When to check whether a round is due; None = there are no watches.
    timer_at: float | None = None

    def add(self, watch: Watch) -> None:
        """Add a watch."""
        self.watches.setdefault(watch.variant, {})[watch] = None
        self.new[watch] = None

    def remove(self, watch: Watch) -> None:
        """Remove a watch."""
        alike = self.watches[watch.variant]
        del alike[watch]
        if not alike:
            del self.watches[watch.variant]
        self.new.pop(watch, None)

    def candidates(self) -> list[Watch]:
        """Return the watches that may have had no event since the last round.

        An event sent to a group was sent to all of its watches, so only watches added since may still be quiet.
        """
        groups = self.trunk.groups
        found: list[Watch] = []
        for variant, watches in self.watches.items():
            group = groups.get(variant)
            if group is None or group.sent_revision <= self.round_revision:
                found += watches
            else:
                found += [watch for watch in self.new if watch.variant == variant]
        return found
