"""Public interface of the core: inputs in, effects out, time as an argument.

Each request of a client and each message of etcd is one call of a Coalescer. Each call returns effects, to be carried
out in order; `now` is in seconds, monotonic. The core does not wait, read a clock or use a socket. Exactly one caller,
the shell, drives it, one call after the other.

The protocol with the shell, besides "carry out the effects in order, then give the next input":

*Permission.* Each create asks for a check (CheckPermission). The outcome is a CreateRefusal; or Granted(header), when
the check itself read the store's revision by a linearizable call that began after the effect; or None, when auth is
already known to be off (a bare Header means the same, and also updates the newest revision known).

*Stalls.* When a message is not written completely, the shell queues the rest of it and calls `stalled(session)` at
once, even in the middle of a list of effects. From then on the shell writes no Deliver for its watches but returns each
by `undelivered(watch, payload)`; after that, later inputs have none for this watch. Neither call has effects. Control
answers (Send) queue behind the unsent bytes. When all of them are written the shell calls `drained(session, room_bytes,
now)`.

*Replays.* What lagging watches then get is bounded per turn, and the rest follows without further input:
`next_deadline()` is due at once while anything is to be replayed to a session that is not stalled.
"""

from __future__ import annotations

from collections.abc import Iterable

from coalesce.batch import Batch, Payload, batches_of
from coalesce.effects import Effect
from coalesce.ending import Cancellation
from coalesce.fanout import Fanout
from coalesce.inputs import CreateRefusal, CreateRequest, Granted, Identity, UpstreamLost
from coalesce.joining import Admission
from coalesce.limits import CoreLimits
from coalesce.losing import Losses
from coalesce.model import Backfill, PendingCreate, PendingRead, Session, Trunk, Upstream, Watch
from coalesce.moving import CoverMover
from coalesce.notifying import ProgressNotifier
from coalesce.placement import Placement
from coalesce.progress import Progress
from coalesce.progress_requests import ProgressRequests
from coalesce.replay import Replayer
from coalesce.revision_reads import RevisionReads
from coalesce.runs import FragmentRuns
from coalesce.state import CoreState
from coalesce.stats import Stats
from coalesce.trunk import Trunks
from coalesce.waiting import ProgressWaiters
from proto.scan import Header, WatchResponse


class Coalescer:
    """Merges the watches of many sessions into one upstream watch per range."""

    def __init__(self, limits: CoreLimits | None = None, ordered_progress: bool = True) -> None:
        """`ordered_progress`: etcd is 3.4.31, 3.5.13 or later, where answers to manual progress are reliable."""
        self._state = state = CoreState(limits or CoreLimits(), ordered_progress)
        # The parts, from the bottom up: each one calls those above it in this list only.
        self._fanout = Fanout(state)
        self._waiters = waiters = ProgressWaiters(state)
        requests = ProgressRequests(state, waiters)
        self._notifying = ProgressNotifier(state, waiters, requests)
        self._progress = progress = Progress(state, waiters, requests, self._notifying)
        self._placement = placement = Placement(state, self._fanout, requests)
        self._replayer = replayer = Replayer(state, requests, placement)
        self._runs = FragmentRuns(state, placement, replayer)
        self._reads = reads = RevisionReads(state)
        self._trunks = trunks = Trunks(state, placement)
        self._cancellation = cancellation = Cancellation(state, reads, progress, placement, replayer, trunks)
        self._losses = Losses(state, reads, progress, placement, trunks, cancellation)
        self._admission = Admission(state, reads, progress, placement, trunks, cancellation)
        self._moving = CoverMover(state, waiters, requests, self._notifying, placement, trunks)
        # The next deadline may have moved earlier since the last call of `next_deadline`. An ordinary event does not
        # set it.
        self.deadline_moved = True

    @property
    def limits(self) -> CoreLimits:
        """The settings; may be set. What exceeds a lowered limit stays until it ends, or until the next batch."""
        return self._state.limits

    @limits.setter
    def limits(self, limits: CoreLimits) -> None:
        self._state.limits = self._state.ledger.limits = limits
        self._moving.configure(limits)
        self.deadline_moved = True

    @property
    def header(self) -> Header | None:
        """The newest header of any answer of etcd; None before the first. Without it a refusal needs a read."""
        return self._state.header

    @property
    def stats(self) -> Stats:
        """The counters and gauges."""
        return self._state.stats

    @property
    def ordered_progress(self) -> bool:
        """Whether answers to manual progress are reliable; set for each new connection to etcd, by etcd's version."""
        return self._state.ordered_progress

    @ordered_progress.setter
    def ordered_progress(self, ordered: bool) -> None:
        self._state.ordered_progress = ordered
        self._notifying.pace.start_over(self._state.now)

    # a client asks

    def open_session(self, outlet: object, identity: Identity, now: float) -> Session:
        """Start a session whose answers go to `outlet`."""
        state = self._state
        state.now = max(state.now, now)
        session = Session(outlet, identity)
        state.sessions[session] = None
        state.stats.sessions += 1
        return session

    def create(self, session: Session, request: CreateRequest, now: float) -> list[Effect]:
        """A client requests a watch."""
        self._begin(now)
        if not session.ended:
            self._admission.create(session, request)
        return self._finish()

    def create_admitted(self, session: Session, request: CreateRequest, auth_off: Header, now: float) -> list[Effect]:
        """As `create`, and `permission` with this header: a recent answer, which had it, found auth off."""
        self._begin(now)
        if not session.ended:
            self._admission.create(session, request, auth_off)
        return self._finish()

    def cancel(self, session: Session, watch_id: int, now: float) -> list[Effect]:
        """A client cancels a watch."""
        self._begin(now)
        if not session.ended:
            self._admission.cancel(session, watch_id)
        return self._finish()

    def progress(self, session: Session, now: float) -> list[Effect]:
        """A client requests progress of all its watches."""
        self._begin(now)
        if not session.ended:
            self._admission.progress(session)
        return self._finish()

    def close(self, session: Session, now: float) -> list[Effect]:
        """A client's stream has ended. Not needed after EndSession, but harmless."""
        self._begin(now)
        if not session.ended:
            self._cancellation.close(session)
        return self._finish()

    # back-pressure

    def stalled(self, session: Session) -> None:
        """A message was not written completely; the shell holds the rest. Called while effects are carried out."""
        self.deadline_moved = True
        self._replayer.stalled(session)

    def undelivered(self, watch: Watch, payload: Payload) -> None:
        """A delivery was not started, because its session is stalled."""
        self.deadline_moved = True
        self._replayer.returned(watch, payload)

    def drained(self, session: Session, room_bytes: int | None, now: float) -> list[Effect]:
        """All bytes of a session are written: deliver to it again.

        `room_bytes`: how many can be written now before it stalls, so that not more is replayed; None: not known.
        """
        self._begin(now)
        self._replayer.drained(session, room_bytes)
        return self._finish()

    # answers to effects

    def revision_read(self, read: PendingRead, header: Header, now: float) -> list[Effect]:
        """A read of the store's revision has succeeded. The shell retries until it does; the core sees no failure."""
        self._begin(now)
        self._admission.revision_read(read, header)
        return self._finish()

    def permission(
        self, check: PendingCreate, outcome: Granted | CreateRefusal | Header | None, now: float
    ) -> list[Effect]:
        """A permission check has finished; see the module's docstring for the outcomes."""
        self._begin(now)
        self._admission.permission(check, outcome)
        return self._finish()

    def upstream_response(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """A response for an upstream watch: `created`, events of whole revisions, `canceled`, or a progress notify."""
        state = self._state
        owner = upstream.source
        if (
            owner is None
            or type(owner) is Backfill
            or upstream.closed
            or not response.plain
            or not state.ledger.entries
            or state.runs
        ):
            return self._received(upstream, response, now)
        # Fast path, the common case: events of a trunk. 2,400 ns instead of 3,500 (`python -m tests.bench.lanes`).
        if now > state.now:
            state.now = now
        header = response.header
        if header.revision and (state.header is None or header.revision >= state.header.revision):
            # As `CoreState.observe_header`.
            state.header = header
        events = response.events
        if len(events) > 1:
            self._events(upstream, response)
        else:
            # etcd sends one event per response as long as watches keep up.
            stats = state.stats
            stats.batches += 1
            stats.batch_events += 1
            owner.events += 1
            # A tuple, since the history may keep it: half the memory of a list.
            event = events[0]
            self._fanout.ingest(owner, Batch(header, (event,), len(event.encoded)))
        if state.to_replay or state.queued:
            self.deadline_moved = True
            return self._finish()
        effects, state.effects = state.effects, []
        return effects

    def _received(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """Handle a response of any kind, for any source."""
        self._begin(now)
        state = self._state
        state.observe_header(response.header)
        if upstream.closed:
            return self._finish()
        owner = upstream.owner
        if response.created and not response.canceled:
            if isinstance(owner, Backfill):
                self._placement.created(owner)
            elif isinstance(owner, Trunk):
                self._trunks.created(owner, response.header)
        if response.events:
            self._events(upstream, response)
        if response.canceled:
            self._losses.canceled(upstream, response)
        elif not response.created and not response.events:
            state.end_run(owner)
            self._placement.proven(upstream, response.header.revision)
            self._progress.notified(owner.trunk)
            if isinstance(owner, Trunk):
                self._notifying.notified(owner)
        return self._finish()

    def upstream_progress(self, upstreams: Iterable[Upstream], header: Header, number: int, now: float) -> list[Effect]:
        """An answer to RequestProgress: these upstream watches, if any, are complete through the header's revision.

        etcd was at that revision after RequestProgress `number` was carried out; 0: it is not known which request was
        answered.
        """
        self._begin(now)
        self._state.observe_header(header)
        trunks: dict[Trunk, None] = {}
        if self._state.ordered_progress:
            for upstream in upstreams:
                upstream.asked_at = None
                if upstream.source is not None:
                    trunks[upstream.source.trunk] = None
                self._placement.proven(upstream, header.revision)
        self._progress.answered(tuple(trunks), header, number)
        return self._finish()

    def upstream_lost(self, upstream: Upstream, reason: UpstreamLost, now: float) -> list[Effect]:
        """An upstream watch has ended and is not resumed: end its sessions, or refuse its creates with the text."""
        self._begin(now)
        self._losses.lost(upstream, reason)
        return self._finish()

    def no_leader(self, now: float) -> list[Effect]:
        """No endpoint has a leader: end the sessions that require one (`hasleader`)."""
        self._begin(now)
        self._cancellation.no_leader()
        return self._finish()

    def other_history(self, header: Header, now: float) -> list[Effect]:
        """The store was restored from a snapshot, or replaced; it is at this header's revision now."""
        self._begin(now)
        self._losses.other_history(header)
        return self._finish()

    def header_seen(self, header: Header) -> None:
        """An answer of etcd had this header; the newest header fills those of control answers."""
        self._state.observe_header(header)

    # time

    def next_deadline(self) -> float | None:
        """Return when `expire` is due, in the time of `now`; None while nothing is."""
        # Called after nearly every input, so it is written for speed: no list, no generator.
        self.deadline_moved = False
        state = self._state
        if state.to_replay_later or state.to_advance_later or state.leaving or self._reads.answered:
            return state.now
        if state.ending or state.to_end or state.to_prepare or state.restored:
            return state.now
        if (state.to_promote or state.queued) and self._placement.is_due:
            return state.now
        first = self._progress.next_deadline()
        at = self._notifying.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = self._runs.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = state.ledger.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = self._trunks.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        if state.to_move or state.covers.prefixes:
            at = self._moving.next_deadline()
            if at is not None and (first is None or at < first):
                first = at
        at = state.lingers.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        if state.lagging_sessions and state.limits.lagging_age_s_max is not None:
            since = next(iter(state.lagging_sessions)).lagging_since
            if since is not None and (first is None or since + state.limits.lagging_age_s_max < first):
                first = since + state.limits.lagging_age_s_max
        return first

    def expire(self, now: float) -> list[Effect]:
        """Do what is due."""
        self._begin(now)
        if self._state.restored is not None:
            self._losses.restore()
            self._cancellation.expire()
            return self._finish()
        self._admission.expire()
        self._cancellation.expire()
        # First, so that nothing is delivered to a session that ends in this input.
        self._cancellation.too_far_behind()
        self._losses.expire()
        self._moving.expire()
        self._trunks.expire()
        self._runs.expire()
        self._notifying.expire()
        self._progress.expire()
        # After the answers to progress requests: events that are evicted may have to be delivered first, see `runs`.
        self._state.ledger.expire(self._state.now)
        self._placement.expire()
        self._replayer.expire()
        return self._finish()

    def _events(self, upstream: Upstream, response: WatchResponse) -> None:
        state = self._state
        stats = state.stats
        owner = upstream.owner
        batches = tuple(batches_of(response, state.limits.response_bytes_max))
        in_run = response.fragment or len(batches) > 1 or owner.run is not None
        for batch in batches:
            stats.batches += 1
            stats.batch_events += len(batch.events)
            owner = upstream.owner
            if in_run:
                self._runs.piece(owner, batch)
                if upstream.closed:
                    return
            owner.events += len(batch.events)
            if isinstance(owner, Backfill):
                self._placement.received(owner, batch)
            else:
                self._fanout.ingest(owner, batch)
            if upstream.closed:
                # The rest is not needed.
                return
        if in_run and not response.fragment:
            state.end_run(owner)

    def _begin(self, now: float) -> None:
        self.deadline_moved = True
        state = self._state
        if now > state.now:
            state.now = now
        self._admission.left = 0 if state.restored else state.limits.step_watches_max

    def _finish(self) -> list[Effect]:
        """Pass on what the parts have recorded for parts above them, in a fixed order; return the effects."""
        state = self._state
        if state.restored is not None:
            return self._postpone()
        if state.to_advance or state.to_prepare:
            self._admission.finish()
        if state.to_replay:
            self._replayer.finish()
        if state.queued:
            self._placement.fill_slots()
            self._replayer.postpone()
        # A new list, since the next input may come much later: ten thousand answers take some memory.
        effects, state.effects = state.effects, []
        return effects

    def _postpone(self) -> list[Effect]:
        """Leave everything that is recorded until all trunks are restarted after a restore; return the effects."""
        self._admission.left = 0
        self._admission.finish()
        self._replayer.postpone()
        effects, self._state.effects = self._state.effects, []
        return effects
