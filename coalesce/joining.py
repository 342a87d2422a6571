"""From a create to a watch: what a create waits for, in which order it is refused, and where it starts.

Answers are sent in the order of the requests. The needs of a create are requested as soon as it arrives:

- a permission: always checked (CheckPermission); the shell answers at once when auth is known to be off;
- a trunk: held from the moment the permission is granted, opened if the range has none;
- a read of "now" (see `revision_reads`): for a create without a start revision. A permission check that also read the
  revision (Granted) serves as well. The read is sent in the same step as the create of a trunk. A create that opens a
  trunk at its own start revision needs only the approximate revision of the store, since a trunk must start neither
  above that nor far below: any recent answer is enough, otherwise "now" is read first.

When the create is at the head of its session's queue and has all it needs, it is decided. It needs the answer of etcd
for its trunk only if that decides where it starts or may be a refusal (`Admission._waits_for`); so a create from a
start revision on a cold range is answered at once, like one on a range that others watch. Refusals, in etcd's order: a
negative start, the permission, an empty range, an id in use; the proxy's own limits come last.

"Now" is the revision read, or the trunk's start if that is higher: a trunk that started at "now" is complete only above
its `created`. Revisions that the trunk has already delivered above "now" are replayed for this watch; those at or below
"now" that the trunk delivers later are skipped.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from coalesce.effects import CheckPermission, TakeRequests
from coalesce.ending import Cancellation
from coalesce.inputs import NO_WATCH_ID, CreateRefusal, CreateRequest, Granted
from coalesce.model import LISTED_MAX, Pending, PendingCreate, PendingRead, Session, Trunk, Watch
from coalesce.pending import PendingCancel, PendingProgress
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.revision_reads import RevisionReads
from coalesce.state import CoreState
from coalesce.trunk import Trunks
from proto import etcd_errors
from proto.framing import Status
from proto.scan import Header

# etcd's own texts (api/v3rpc/rpctypes/error.go, storage/mvcc/watcher.go): clients compare them.
EMPTY_RANGE = "mvcc: watcher range is empty"
DUPLICATE_ID = "mvcc: duplicate watch ID provided on the WatchStream"

SMALL_CREATE_BYTES = 4 * 1024
"""Creates up to this size, in memory, may be answered before etcd answers. They are never too large for etcd, which
accepts 512 KiB in any case (server/embed/config.go, grpcOverheadBytes), and thousands of them take little memory."""


class Admission:
    """Processes the request queue of each session, and turns creates into watches."""

    def __init__(
        self,
        state: CoreState,
        reads: RevisionReads,
        progress: Progress,
        placement: Placement,
        trunks: Trunks,
        cancellation: Cancellation,
    ) -> None:
        self._state = state
        self._reads = reads
        self._progress = progress
        self._placement = placement
        self._trunks = trunks
        self._cancellation = cancellation
        # How many requests may still be decided in this step.
        self.left = state.limits.step_watches_max
        # The position of the last watch: watches that begin at one revision share the number.
        self._position = 0

    # inputs

    def create(self, session: Session, request: CreateRequest, auth_off: Header | None = None) -> None:
        """Queue a create and request what it needs; `auth_off`: the header of a recent answer that found auth off."""
        create = PendingCreate(session, request)
        self._state.stats.creates += 1
        if request.start_revision is not None and request.start_revision < 0:
            create.refusal = etcd_errors.COMPACTED
            self._refused(create)
            self._enter(session, create)
            self._go_on_from(session, create)
            return
        self._state.stats.checks += 1
        if auth_off is None:
            self._state.effects.append(CheckPermission(create))
        self._enter(session, create)
        if auth_off is not None:
            self.permission(create, auth_off)

    def cancel(self, session: Session, watch_id: int) -> None:
        """Queue a cancel."""
        cancel = PendingCancel(watch_id)
        self._enter(session, cancel)
        self._go_on_from(session, cancel)

    def progress(self, session: Session) -> None:
        """Queue a progress request."""
        self._state.stats.progress_requests += 1
        progress = PendingProgress()
        self._enter(session, progress)
        self._go_on_from(session, progress)

    def permission(self, create: PendingCreate, outcome: Granted | CreateRefusal | Header | None) -> None:
        """Handle the outcome of a permission check."""
        if create.session.ended or create.checked or create.refusal is not None:
            return
        if isinstance(outcome, CreateRefusal):
            create.refusal = outcome.text
        else:
            if isinstance(outcome, Granted):
                create.header = outcome.header
                self._state.observe_header(outcome.header)
            elif outcome is not None:
                self._state.observe_header(outcome)
            create.checked = True
            if create.has_empty_range:
                create.refusal = EMPTY_RANGE
        if create.refusal is None:
            self._prepare(create)
        if create.refusal is not None:
            self._refused(create)
        self._go_on_from(create.session, create)

    def revision_read(self, read: PendingRead, header: Header) -> None:
        """Handle the outcome of a read."""
        self._reads.answer(read, header)
        self._take_answered()

    def _take_answered(self) -> None:
        """Continue the creates whose read is answered, as many as this step allows; those of a session together."""
        answered, to_advance = self._reads.answered, self._state.to_advance
        for _ in range(min(len(answered), max(0, self.left))):
            create, header = answered.popleft()
            create.reading = False
            create.header = header
            if not create.session.ended:
                if create.refusal is None and create.trunk is None:
                    self._prepare(create)
                to_advance[create.session] = None

    # the queue

    def expire(self) -> None:
        """Continue with the requests that exceeded an earlier step."""
        self._take_answered()
        # Each session at most once, so that one with a long queue goes behind the others.
        for session in tuple(self._state.to_advance_later):
            if self.left <= 0:
                return
            self._state.to_advance_later.pop(session, None)
            self.advance(session)

    def finish(self) -> None:
        """Decide the requests that this input has made decidable."""
        state = self._state
        for create in list(islice(state.to_prepare, max(0, self.left))):
            state.to_prepare.pop(create, None)
            self.left -= 1
            if not create.session.ended and create.refusal is None:
                self._prepare(create)
                if create.refusal is not None:
                    self._refused(create)
                state.to_advance[create.session] = None
        sessions, state.to_advance = state.to_advance, {}
        for session in sessions:
            self.advance(session)

    def _go_on_from(self, session: Session, request: Pending) -> None:
        """Decide the requests of a session if this one, which has changed, is the next."""
        queue = session.queue
        if queue and queue[0] is request:
            self.advance(session)

    def advance(self, session: Session) -> None:
        """Decide the requests of a session in order, until one must wait or the step's bound is reached."""
        queue = session.queue
        while queue:
            if self.left <= 0:
                self._state.to_advance_later[session] = None
                return
            request = queue[0]
            if isinstance(request, PendingCreate):
                if not self._decide(request):
                    return
            elif isinstance(request, PendingCancel):
                self._cancellation.cancel(session, request.watch_id)
            else:
                self._progress.wait(session)
            del queue[0]
            self.left -= 1
            self._leave(session, request)
        session.queue = None

    def _leave(self, session: Session, request: Pending) -> None:
        session.line_bytes -= request.bytes
        self._state.stats.line_bytes -= request.bytes
        if session.line_full and session.line_bytes <= self._state.limits.line_bytes_max // 2:
            session.line_full = False
            self._state.effects.append(TakeRequests(session))

    def _enter(self, session: Session, request: Pending) -> None:
        if session.ended:
            return
        state, queue, size = self._state, session.queue, request.bytes
        if queue is None:
            queue = session.queue = []
        elif len(queue) >= state.limits.queue_max:
            text = f"watchmux: more than {state.limits.queue_max} requests wait on one watch stream"
            state.stats.refused_at["queue_max"] += 1
            self._cancellation.end(session, Status.RESOURCE_EXHAUSTED, text)
            return
        elif len(queue) == LISTED_MAX:
            queue = session.queue = deque(queue)
        queue.append(request)
        session.line_bytes += size
        state.stats.line_bytes += size
        if session.line_bytes >= state.limits.line_bytes_max:
            session.line_full = True

    # one create

    def _prepare(self, create: PendingCreate) -> None:
        """Request what a permitted create still needs."""
        state = self._state
        if state.restored is not None:
            # Its trunk may have another history.
            state.to_prepare[create] = None
            return
        if state.to_prepare:
            state.to_prepare.pop(create, None)
        limit = state.limits.trunks_max
        if create.trunk is None and len(state.trunks) >= limit and not self._trunks.is_open(create):
            create.refusal = f"watchmux: the limit of {limit} different ranges is reached"
            state.stats.refused_at["trunks_max"] += 1
            return
        if create.request.start_revision is None:
            # Before the trunk is opened: the read takes etcd longer than the create.
            self._read(create)
        if not self._trunks.hold(create):
            self._read(create)

    def _read(self, create: PendingCreate) -> None:
        if create.header is None:
            self._reads.read(create)

    def _refused(self, create: PendingCreate) -> None:
        """Request what a refusal needs: its answer has a header, so one must be known.

        That of an empty range at "now" is read after the create arrived, as a watch's would be, even if the permission
        is missing too: another proxy asks for etcd's revision by such creates (`upstream/watching/proof.py`).
        """
        is_probe = create.has_empty_range and create.request.start_revision is None and create.header is None
        if self._state.header is None or is_probe:
            self._reads.read(create)

    def _decide(self, create: PendingCreate) -> bool:
        """Answer the create at the head of its session's queue; False: it must wait."""
        state = self._state
        if create.refusal is None and not create.checked:
            return False
        if create.refusal is not None:
            if create.reading and (state.header is None or create.has_empty_range):
                return False
            self.refuse(create, create.refusal)
            return True
        trunk = create.trunk
        if trunk is None or (create.reading and create.header is None) or self._waits_for(trunk, create):
            return False
        session = create.session
        refusal = self._refusal(session, create.request.watch_id)
        if refusal is not None:
            self.refuse(create, refusal)
            return True
        self._join(create)
        return True

    def _waits_for(self, trunk: Trunk, create: PendingCreate) -> bool:
        """Whether a create must wait until etcd has answered that of its trunk.

        Not if the position of the trunk is known and serves it, and if etcd never refuses it: etcd checks a token once
        more, and a create that is too large ends its stream.
        """
        if trunk.upstream.closed or (self._state.ending and self._state.is_ending(trunk, create.request.prev_kv)):
            # Another one is opened, or the create is refused.
            return True
        if not trunk.opening:
            return False
        request, floor = create.request, trunk.history.floor
        if (
            request.start_revision is None
            or trunk.upstream.start_revision is None
            or create.session.identity.token is not None
            or create.bytes > SMALL_CREATE_BYTES
            or self._state.limits.upstream_has_limits
        ):
            return True
        served_from = trunk.prev_kv_from if request.prev_kv else floor
        return served_from is None or request.start_revision < max(served_from, floor)

    def _refusal(self, session: Session, watch_id: int) -> str | None:
        limits, stats = self._state.limits, self._state.stats
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
        state = self._state
        state.stats.refused += 1
        self._trunks.release(create)
        state.answer(create.session, NO_WATCH_ID, state.header_now(), created=True, canceled=True, cancel_reason=text)

    def _join(self, create: PendingCreate) -> None:
        """Turn a create that has all it needs into a watch, and answer it."""
        state = self._state
        session, request, trunk = create.session, create.request, create.trunk
        assert trunk is not None, "held since it was permitted"
        watch_id = request.watch_id or session.automatic_id()
        if request.start_revision is None:
            assert create.header is not None, "now has been read"
            now = max(create.header.revision, trunk.history.floor - 1)
            header, position = create.header.at(now), now + 1
            state.observe_header(header)
        else:
            header, position = state.header_now(), request.start_revision
        if position == self._position:
            position = self._position
        self._position = position
        watch = Watch(session, request, watch_id, trunk, position)
        session.watches[watch_id] = watch
        trunk.join(watch, (create.key, create.range_end))
        state.stats.watches += 1
        self._trunks.release(create)
        state.created(session, watch_id, header)
        self._progress.began(watch)
        # It has neither place nor source yet; place() assigns both.
        self._placement.place((watch,))
        self._count(watch)

    def _count(self, watch: Watch) -> None:
        stats = self._state.stats
        if watch.is_early and watch.source is watch.trunk:
            stats.joins_future += 1
        elif watch.follows_trunk:
            stats.joins_live += 1
        elif watch.source is watch.trunk:
            stats.joins_history += 1
        else:
            stats.joins_backfill += 1
