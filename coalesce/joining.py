"""From a create to a watch: what a create waits for, in which order it is refused, and where it starts.

Answers are sent in the order of the requests. The needs of a create are requested as soon as it arrives:

- a permission: always checked (CheckPermission); the shell answers at once when auth is known to be off;
- a trunk: held from the moment the permission is granted, opened if the range has none;
- a read of "now": for a create without a start revision. The read begins after the request arrived: one is in flight at
  a time and serves the creates that waited when it started; later creates wait for the next one. A permission check
  that also read the revision (Granted) serves as well. The read is sent in the same step as the create of a trunk. A
  create that opens a trunk at its own start revision needs only the approximate revision of the store, since a trunk
  must start neither above that nor far below: any recent answer is enough, otherwise "now" is read first.

When the create is at the head of its session's queue and has all it needs, it is decided. Refusals, in etcd's order: a
negative start, the permission, an empty range, an id in use; the proxy's own limits come last.

"Now" is the revision read, or the trunk's start if that is higher: a trunk that started at "now" is complete only above
its `created`. Revisions that the trunk has already delivered above "now" are replayed for this watch; those at or below
"now" that the trunk delivers later are skipped.
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

# etcd's own texts (api/v3rpc/rpctypes/error.go, storage/mvcc/watcher.go): clients compare them.
COMPACTED = "etcdserver: mvcc: required revision has been compacted"
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"
# gRPC's RESOURCE_EXHAUSTED.
_EXHAUSTED = 8


class PendingRead:
    """A read of the store's revision, for the creates that waited when it began."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: dict[PendingCreate, None] = {}


class Admission:
    """Processes the request queue of each session, and turns creates into watches."""

    __slots__ = ("_hub", "answered", "current", "later", "left", "ready")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        # The read in flight, and the next one, for creates that arrived since.
        self.current: PendingRead | None = None
        self.later: PendingRead | None = None
        # Creates whose read is answered and which are not prepared yet, with its header.
        self.answered: deque[tuple[PendingCreate, Header]] = deque()
        # Sessions whose queue continues at the next timer.
        self.ready: dict[Session, None] = {}
        # How many requests may still be decided in this step.
        self.left = hub.limits.step_watches_max

    # inputs

    def create(self, session: Session, request: CreateRequest) -> None:
        """Queue a create and request what it needs."""
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
        """Queue a cancel."""
        self._enter(session, PendingCancel(watch_id))

    def progress(self, session: Session) -> None:
        """Queue a progress request."""
        self._hub.stats.progress_requests += 1
        self._enter(session, PendingProgress())

    def permission(self, create: PendingCreate, outcome: Granted | CreateRefusal | Header | None) -> None:
        """Handle the outcome of a permission check."""
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
        """Handle the outcome of a read, and start the next one if creates wait for it."""
        if read is not self.current:
            return
        self._hub.observe_header(header)
        self.current, self.later = self.later, None
        if self.current is not None:
            self._start(self.current)
        self.answered.extend((create, header) for create in read.waiting)
        self._take_answered()

    def _take_answered(self) -> None:
        """Continue the creates whose read is answered, as many as this step allows."""
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
        """Repeat the reads that are answered but not used yet: their revisions are stale."""
        answered, self.answered = self.answered, deque()
        for create, _ in answered:
            create.reading = False
            if not create.session.ended:
                self._read(create)

    # the queue

    def expire(self) -> None:
        """Continue with the requests that exceeded an earlier step."""
        self._take_answered()
        # Each session at most once, so that one with a long queue goes behind the others.
        for session in tuple(self.ready):
            if self.left <= 0:
                return
            self.ready.pop(session, None)
            self.advance(session)

    def forget(self, session: Session) -> None:
        """Drop the queue of a session that has ended."""
        queue, session.queue = session.queue, None
        self.ready.pop(session, None)
        self._hub.stats.line_bytes -= session.line_bytes
        session.line_bytes = 0
        for request in queue or ():
            if isinstance(request, PendingCreate):
                self._hub.trunks.release(request)
                # If etcd does not answer, the read would keep the session alive.
                for read in (self.current, self.later):
                    if read is not None:
                        read.waiting.pop(request, None)

    def advance(self, session: Session) -> None:
        """Decide the requests of a session in order, until one must wait or the step's bound is reached."""
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
        """Request what a permitted create still needs."""
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
        """Request what a refusal needs: its answer has a header, so one must be known."""
        if self._hub.header is None:
            self._read(create)

    def _read(self, create: PendingCreate) -> None:
        """Read "now" for a create, by a call that begins after the create arrived."""
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
        """Discard the revision that a waiting create has read; it is stale."""
        create.header = None
        if create.request.start_revision is None:
            self._read(create)

    def _start(self, read: PendingRead) -> None:
        self._hub.stats.reads += 1
        self._hub.effects.append(ReadRevision(read))

    def _decide(self, create: PendingCreate) -> bool:
        """Answer the create at the head of its session's queue; False: it must wait."""
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
        """Answer a create with a refusal: `created` and `canceled` in one response, with watch id -1."""
        hub = self._hub
        hub.stats.refused += 1
        hub.trunks.release(create)
        hub.answer(create.session, NO_WATCH_ID, hub.header_now(), created=True, canceled=True, cancel_reason=text)

    def _join(self, create: PendingCreate) -> None:
        """Turn a create that has all it needs into a watch, and answer it."""
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
        # It has neither place nor source yet; place() assigns both.
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
