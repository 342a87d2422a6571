"""From a create to a watch: what it waits for, in which order it is refused, and where it starts.

Requests arrive in an order, and that is the order of the answers. What a create needs is asked for when it arrives:

- permission: always asked (CheckPermission); the shell says at once when auth is known to be off;
- a trunk: held from the moment the permission is there, opened if the range has none;
- a read of "now": for a create without a start revision. The read begins after the request arrived: one is in flight at
  a time and serves those who waited when it started, later ones wait for the next. A permission check that read the
  revision by the way (Granted) serves as well. It is sent in the same step as the create of a trunk. A
  create that opens a trunk at a start of its own only has to know about which revision the store has, since a trunk
  must not start above that nor far below: what any answer said a moment ago will do, else "now" is read first.

When the create is at the head of its session's queue and has all it needs, it is decided. Refusals, in etcd's order:
a negative start, the permission, an empty range, an id in use; our own limits come last.

"Now" is the read, or more if the trunk knows no better: a trunk that has begun at "now" itself is complete from above
its `created`. What the trunk has delivered beyond is replayed; what it has not reached is skipped for this watch.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from coalesce.effects import CheckPermission, ReadRevision, TakeRequests
from coalesce.inputs import NO_WATCH_ID, CreateRefusal, CreateRequest, Granted
from coalesce.session import LISTED_MAX, Pending, PendingCancel, PendingCreate, PendingProgress, Place, Session, Watch
from proto.scan import Header

if TYPE_CHECKING:
    from coalesce.hub import CoreState

# etcd's own words (api/v3rpc/rpctypes/error.go, storage/mvcc/watcher.go): clients compare them.
COMPACTED = "etcdserver: mvcc: required revision has been compacted"
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"
# gRPC's RESOURCE_EXHAUSTED.
_EXHAUSTED = 8


class PendingRead:
    """A read of the store's revision, for those who waited when it began."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: dict[PendingCreate, None] = {}


class Admission:
    """The line of each session, and how creates become watches."""

    __slots__ = ("_hub", "answered", "current", "later", "left", "ready")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        # The read in flight, and the one for those who came since.
        self.current: PendingRead | None = None
        self.later: PendingRead | None = None
        # Creates whose read has come and which have yet to be prepared, with its header.
        self.answered: deque[tuple[PendingCreate, Header]] = deque()
        # Sessions whose line goes on when the timer rings.
        self.ready: dict[Session, None] = {}
        # What may still be decided in this step.
        self.left = hub.limits.step_watches_max

    # inputs

    def create(self, session: Session, request: CreateRequest) -> None:
        """Take a create in line and ask for what it needs."""
        create = PendingCreate(session, request)
        self._hub.stats.creates += 1
        if request.start_revision is not None and request.start_revision < 0:
            create.refusal = COMPACTED
            self._refused(create)
        else:
            self._hub.stats.checks += 1
            self._hub.effects.append(CheckPermission(create))
        self._enter(session, create)

    def cancel(self, session: Session, watch_id: int) -> None:
        """Take a cancel in line."""
        self._enter(session, PendingCancel(watch_id))

    def progress(self, session: Session) -> None:
        """Take a progress request in line."""
        self._hub.stats.progress_requests += 1
        self._enter(session, PendingProgress())

    def permission(self, create: PendingCreate, outcome: Granted | CreateRefusal | Header | None) -> None:
        """Take the outcome of a check."""
        if create.session.ended or create.checked or create.refusal is not None:
            return
        if isinstance(outcome, CreateRefusal):
            create.refusal = outcome.text
        else:
            if isinstance(outcome, Granted):
                create.header = outcome.header
                self._hub.observe_header(outcome.header)
            elif outcome is not None:
                self._hub.observe_header(outcome)
            create.checked = True
            if len(create.range_end) and create.range_end != b"\x00" and create.key >= create.range_end:
                create.refusal = EMPTY_RANGE
        if create.refusal is None:
            self._prepare(create)
        if create.refusal is not None:
            self._refused(create)
        self.advance(create.session)

    def revision_read(self, read: PendingRead, header: Header) -> None:
        """Take the outcome of a read, and start the one for those who came since."""
        if read is not self.current:
            return
        self._hub.observe_header(header)
        self.current, self.later = self.later, None
        if self.current is not None:
            self._start(self.current)
        self.answered.extend((create, header) for create in read.waiting)
        self._take_answered()

    def _take_answered(self) -> None:
        """Go on with creates whose read has come, as many as this step allows."""
        answered = self.answered
        while answered and self.left > 0:
            create, header = answered.popleft()
            create.reading = False
            create.header = header
            if not create.session.ended:
                self.left -= 1
                if create.refusal is None:
                    self._prepare(create)
                self.advance(create.session)

    def drop_answered(self) -> None:
        """Read again what was read and not used yet: it is true no more."""
        answered, self.answered = self.answered, deque()
        for create, _ in answered:
            create.reading = False
            if not create.session.ended:
                self._read(create)

    # the line

    def expire(self) -> None:
        """Decide what was too much for an earlier step."""
        self._take_answered()
        # Each session once at most, so that one with a long line stands behind the others again.
        for session in tuple(self.ready):
            if self.left <= 0:
                return
            self.ready.pop(session, None)
            self.advance(session)

    def forget(self, session: Session) -> None:
        """Drop the line of a session that has ended."""
        queue, session.queue = session.queue, None
        self.ready.pop(session, None)
        self._hub.stats.line_bytes -= session.line_bytes
        session.line_bytes = 0
        for request in queue or ():
            if isinstance(request, PendingCreate):
                self._hub.trunks.release(request)
                # An etcd that does not answer would keep the session here.
                for read in (self.current, self.later):
                    if read is not None:
                        read.waiting.pop(request, None)

    def advance(self, session: Session) -> None:
        """Decide the requests of a session, in order, up to the first that must wait, or as many as a step allows."""
        queue = session.queue
        while queue:
            if self.left <= 0:
                self.ready[session] = None
                return
            request = queue[0]
            if isinstance(request, PendingCreate):
                if not self._decide(request):
                    return
            elif isinstance(request, PendingCancel):
                self._hub.endings.cancel(session, request.watch_id)
            else:
                self._hub.progress.wait(session)
            del queue[0]
            self.left -= 1
            self._leave(session, request)
        session.queue = None

    def _leave(self, session: Session, request: Pending) -> None:
        session.line_bytes -= request.bytes
        self._hub.stats.line_bytes -= request.bytes
        if session.line_full and session.line_bytes <= self._hub.limits.line_bytes_max // 2:
            session.line_full = False
            self._hub.effects.append(TakeRequests(session))

    def _enter(self, session: Session, request: Pending) -> None:
        if session.ended:
            return
        if session.queue is None:
            session.queue = []
        elif len(session.queue) >= self._hub.limits.queue_max:
            text = f"watchmux: more than {self._hub.limits.queue_max} requests wait on one watch stream"
            self._hub.stats.refused_at["queue_max"] += 1
            self._hub.endings.end(session, _EXHAUSTED, text)
            return
        elif len(session.queue) == LISTED_MAX:
            session.queue = deque(session.queue)
        session.queue.append(request)
        session.line_bytes += request.bytes
        self._hub.stats.line_bytes += request.bytes
        if session.line_bytes >= self._hub.limits.line_bytes_max:
            session.line_full = True
        if len(session.queue) == 1:
            self.advance(session)

    # one create

    def _prepare(self, create: PendingCreate) -> None:
        """Ask for what a permitted create still needs."""
        needs_read = create.request.start_revision is None
        limit = self._hub.limits.trunks_max
        trunks = self._hub.trunks_open
        if create.trunk is None and len(trunks) >= limit and (create.key, create.range_end) not in trunks:
            create.refusal = f"watchmux: the limit of {limit} different ranges is reached"
            self._hub.stats.refused_at["trunks_max"] += 1
            return
        if not self._hub.trunks.hold(create):
            needs_read = True
        if needs_read and create.header is None:
            self._read(create)

    def _refused(self, create: PendingCreate) -> None:
        """See to what a refusal needs: the answer has a header, so the store must have been heard of."""
        if self._hub.header is None:
            self._read(create)

    def _read(self, create: PendingCreate) -> None:
        """Have "now" read for a create, by a call that begins after it came."""
        if create.reading:
            return
        create.reading = True
        if self.current is None:
            self.current = PendingRead()
            self.current.waiting[create] = None
            self._start(self.current)
            return
        if self.later is None:
            self.later = PendingRead()
        self.later.waiting[create] = None

    def read_again(self, create: PendingCreate) -> None:
        """Forget what a waiting create has read: it is true no more."""
        create.header = None
        if create.request.start_revision is None:
            self._read(create)

    def _start(self, read: PendingRead) -> None:
        self._hub.stats.reads += 1
        self._hub.effects.append(ReadRevision(read))

    def _decide(self, create: PendingCreate) -> bool:
        """Answer the create at the head of its session's line; False: it must wait."""
        hub = self._hub
        if create.refusal is None and not create.checked:
            return False
        if create.refusal is not None:
            if hub.header is None and create.reading:
                return False
            self.refuse(create, create.refusal)
            return True
        trunk = create.trunk
        if trunk is None or trunk.opening or (create.reading and create.header is None):
            return False
        session = create.session
        refusal = self._refusal(session, create.request.watch_id)
        if refusal is not None:
            self.refuse(create, refusal)
            return True
        self._join(create)
        return True

    def _refusal(self, session: Session, watch_id: int) -> str | None:
        limits, stats = self._hub.limits, self._hub.stats
        if watch_id and session.id_taken(watch_id):
            return DUPLICATE_ID
        # Ids that a compaction cancelled are kept until the client cancels them, so they count.
        if len(session.watches) + len(session.compacted or ()) >= limits.watches_per_session_max:
            stats.refused_at["watches_per_session_max"] += 1
            return f"watchmux: the limit of {limits.watches_per_session_max} watches of one stream is reached"
        if stats.watches + stats.ids_kept >= limits.watches_max:
            stats.refused_at["watches_max"] += 1
            return f"watchmux: the limit of {limits.watches_max} watches is reached"
        return None

    def refuse(self, create: PendingCreate, text: str) -> None:
        """Answer a create with a refusal: `created` and `canceled` in one, of no watch."""
        hub = self._hub
        hub.stats.refused += 1
        hub.trunks.release(create)
        hub.answer(create.session, NO_WATCH_ID, hub.header_now(), created=True, canceled=True, cancel_reason=text)

    def _join(self, create: PendingCreate) -> None:
        """Make a create that has all it needs a watch, and answer it."""
        hub = self._hub
        session, request, trunk = create.session, create.request, create.trunk
        assert trunk is not None, "held since it was permitted"
        watch_id = request.watch_id or session.automatic_id()
        if request.start_revision is None:
            assert create.header is not None, "now has been read"
            now = max(create.header.revision, trunk.history.floor - 1)
            header, position = create.header.at(now), now + 1
            hub.observe_header(header)
        else:
            header, position = hub.header_now(), request.start_revision
        watch = Watch(session, request, watch_id, trunk, position)
        session.watches[watch_id] = watch
        trunk.watches[watch] = None
        trunk.prev_kv_watches += watch.wants_prev_kv
        hub.stats.watches += 1
        hub.trunks.release(create)
        hub.answer(session, watch_id, header, created=True)
        hub.progress.began(watch)
        # It has no place yet, and no source; house() gives it both.
        hub.place((watch,))
        self._count(watch)

    def _count(self, watch: Watch) -> None:
        stats = self._hub.stats
        if watch.place is Place.IN_STEP and watch.source is watch.trunk:
            stats.joins_live += 1
        elif watch.place is Place.AHEAD and watch.source is watch.trunk:
            stats.joins_future += 1
        elif watch.source is watch.trunk:
            stats.joins_history += 1
        else:
            stats.joins_backfill += 1
