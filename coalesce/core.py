"""Public interface of the core: inputs in, effects out, time as an argument.

Each request of a client and each message of etcd is one call of a Coalescer. Each call returns effects, to be carried
out in order; `now` is in seconds, monotonic. The core does not wait, read a clock or use a socket. Exactly one caller,
the shell, drives it, one call after the other.

The protocol with the shell, besides "carry out the effects in order, then give the next input":

*Permission.* Each create asks for a check (CheckPermission). The outcome is a CreateRefusal; or Granted(header), when
the check itself read the store's revision by a linearizable call that began after the effect; or None, when auth is
already known to be off (a bare Header means the same, and also updates the newest revision known).

*Stalls.* When a message is not written completely, the shell queues the rest of it and calls `stalled(session)` at
once, even in the middle of a list of effects. From then on the core delivers nothing more to that session, but the same
list may still hold a Deliver for its watches: the shell does not write those but returns them by
`undelivered(watch, payload)`. Neither call has effects. Control answers (Send) queue behind the unsent bytes. When all
of them are written the shell calls `drained(session, now)`.

*Replays.* What lagging watches then get is bounded per turn, and the rest follows without further input:
`next_deadline()` is due at once while anything is to be replayed to a session that is not stalled.
"""

from __future__ import annotations

from collections.abc import Iterable

from coalesce.backfill import Backfill, Backfills
from coalesce.batch import Batch, Payload, batches_of
from coalesce.effects import Effect
from coalesce.ending import Cancellation
from coalesce.hub import CoreState
from coalesce.inputs import CreateRefusal, CreateRequest, Granted, Identity, UpstreamLost
from coalesce.invariants import check
from coalesce.joining import Admission, PendingRead
from coalesce.limits import CoreLimits
from coalesce.notifying import Notifying
from coalesce.progress import Progress
from coalesce.replay import Replayer
from coalesce.runs import Runs
from coalesce.session import PendingCreate, Session, Watch
from coalesce.source import Upstream
from coalesce.stats import Stats
from coalesce.trunk import Trunk, Trunks
from proto.scan import Header, WatchResponse


class Coalescer:
    """Merges the watches of many sessions into one upstream watch per range."""

    def __init__(self, limits: CoreLimits | None = None, ordered_progress: bool = True) -> None:
        """`ordered_progress`: etcd is 3.4.31, 3.5.13 or later, where answers to manual progress are reliable."""
        self._hub = hub = CoreState(limits or CoreLimits(), ordered_progress)
        hub.joining = Admission(hub)
        hub.trunks = Trunks(hub)
        hub.backfills = Backfills(hub)
        hub.replays = Replayer(hub)
        hub.runs = Runs(hub)
        hub.progress = Progress(hub)
        hub.notifying = Notifying(hub)
        hub.endings = Cancellation(hub)
        # The next deadline may have moved earlier since the last call of `next_deadline`. An ordinary event does not
        # set it.
        self.deadline_moved = True

    @property
    def limits(self) -> CoreLimits:
        """The settings; may be set. What exceeds a lowered limit stays until it ends, or until the next batch."""
        return self._hub.limits

    @limits.setter
    def limits(self, limits: CoreLimits) -> None:
        self._hub.limits = self._hub.ledger.limits = limits

    @property
    def header(self) -> Header | None:
        """The newest header of any answer of etcd; None before the first. Without it a refusal needs a read."""
        return self._hub.header

    @property
    def stats(self) -> Stats:
        """The counters and gauges."""
        return self._hub.stats

    @property
    def ordered_progress(self) -> bool:
        """Whether answers to manual progress are reliable; set for each new connection to etcd, by etcd's version."""
        return self._hub.ordered_progress

    @ordered_progress.setter
    def ordered_progress(self, ordered: bool) -> None:
        self._hub.ordered_progress = ordered
        self._hub.notifying.pace.start_over(self._hub.now)

    # a client asks

    def open_session(self, outlet: object, identity: Identity, now: float) -> Session:
        """Start a session whose answers go to `outlet`."""
        hub = self._hub
        hub.now = max(hub.now, now)
        session = Session(outlet, identity)
        hub.sessions[session] = None
        hub.stats.sessions += 1
        return session

    def create(self, session: Session, request: CreateRequest, now: float) -> list[Effect]:
        """A client requests a watch."""
        self._begin(now)
        if not session.ended:
            self._hub.joining.create(session, request)
        return self._finish()

    def cancel(self, session: Session, watch_id: int, now: float) -> list[Effect]:
        """A client cancels a watch."""
        self._begin(now)
        if not session.ended:
            self._hub.joining.cancel(session, watch_id)
        return self._finish()

    def progress(self, session: Session, now: float) -> list[Effect]:
        """A client requests progress of all its watches."""
        self._begin(now)
        if not session.ended:
            self._hub.joining.progress(session)
        return self._finish()

    def close(self, session: Session, now: float) -> list[Effect]:
        """A client's stream has ended. Not needed after EndSession, but harmless."""
        self._begin(now)
        if not session.ended:
            self._hub.endings.close(session)
        return self._finish()

    # back-pressure

    def stalled(self, session: Session) -> None:
        """A message was not written completely; the shell holds the rest. Called while effects are carried out."""
        self.deadline_moved = True
        self._hub.replays.stalled(session)

    def undelivered(self, watch: Watch, payload: Payload) -> None:
        """A delivery was not started, because its session stalled earlier in the same list of effects."""
        self.deadline_moved = True
        self._hub.replays.returned(watch, payload)

    def drained(self, session: Session, now: float) -> list[Effect]:
        """All bytes of a session are written: deliver to it again."""
        self._begin(now)
        self._hub.replays.drained(session)
        return self._finish()

    # answers to effects

    def revision_read(self, read: PendingRead, header: Header, now: float) -> list[Effect]:
        """A read of the store's revision has succeeded. The shell retries until it does; the core sees no failure."""
        self._begin(now)
        self._hub.joining.revision_read(read, header)
        return self._finish()

    def permission(
        self, check: PendingCreate, outcome: Granted | CreateRefusal | Header | None, now: float
    ) -> list[Effect]:
        """A permission check has finished; see the module's docstring for the outcomes."""
        self._begin(now)
        self._hub.joining.permission(check, outcome)
        return self._finish()

    def upstream_response(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """A response for an upstream watch: `created`, events of whole revisions, `canceled`, or a progress notify."""
        hub = self._hub
        owner = upstream.fed
        if type(owner) is not Trunk or upstream.closed or not response.plain or not hub.ledger.entries or hub.runs.open:
            return self._received(upstream, response, now)
        # Fast path, the common case: events of a trunk.
        if now > hub.now:
            hub.now = now
        header = response.header
        if header.revision and (hub.header is None or header.revision >= hub.header.revision):
            # As `CoreState.observe_header`.
            hub.header = header
        events = response.events
        if len(events) > 1:
            self._events(upstream, response)
        else:
            # etcd sends one event per response as long as watches keep up.
            stats = hub.stats
            stats.batches += 1
            stats.batch_events += 1
            owner.events += 1
            # A tuple, since the history may keep it: half the memory of a list.
            event = events[0]
            owner.ingest(Batch(header, (event,), len(event.encoded)))
        if hub.replays.fresh or hub.queued:
            self.deadline_moved = True
            return self._finish()
        effects, hub.effects = hub.effects, []
        return effects

    def _received(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """Handle a response of any kind, for any source."""
        self._begin(now)
        hub = self._hub
        hub.observe_header(response.header)
        if upstream.closed:
            return self._finish()
        owner = upstream.owner
        if response.created and not response.canceled:
            if isinstance(owner, Backfill):
                hub.backfills.created(owner)
            elif isinstance(owner, Trunk):
                hub.trunks.created(owner, response.header)
        if response.events:
            self._events(upstream, response)
        if response.canceled:
            hub.endings.canceled(upstream, response)
        elif not response.created and not response.events:
            hub.runs.end(owner)
            hub.progress.notified(upstream, response.header.revision)
            if isinstance(owner, Trunk):
                hub.notifying.notified(owner)
        return self._finish()

    def upstream_progress(self, upstreams: Iterable[Upstream], header: Header, number: int, now: float) -> list[Effect]:
        """An answer to RequestProgress: these upstream watches, if any, are complete through the header's revision.

        etcd was at that revision after RequestProgress `number` was carried out; 0: it is not known which request was
        answered.
        """
        self._begin(now)
        self._hub.progress.progressed(tuple(upstreams), header, number)
        return self._finish()

    def upstream_lost(self, upstream: Upstream, reason: UpstreamLost, now: float) -> list[Effect]:
        """An upstream watch has ended and is not resumed: end its sessions, or refuse its creates with the text."""
        self._begin(now)
        self._hub.endings.lost(upstream, reason)
        return self._finish()

    def no_leader(self, now: float) -> list[Effect]:
        """No endpoint has a leader: end the sessions that require one (`hasleader`)."""
        self._begin(now)
        self._hub.endings.no_leader()
        return self._finish()

    def other_history(self, header: Header, now: float) -> list[Effect]:
        """The store was restored from a snapshot, or replaced; it is at this header's revision now."""
        self._begin(now)
        self._hub.endings.other_history(header)
        return self._finish()

    def header_seen(self, header: Header) -> None:
        """An answer of etcd had this header; the newest header fills those of control answers."""
        self._hub.observe_header(header)

    # time

    def next_deadline(self) -> float | None:
        """Return when `expire` is due, in the time of `now`; None while nothing is."""
        # Called after nearly every input, so it is written for speed: no list, no generator.
        self.deadline_moved = False
        hub = self._hub
        first = hub.replays.next_deadline()
        if first is not None:
            # Due at once.
            return first
        if hub.joining.ready or hub.joining.answered or hub.leaving:
            return hub.now
        first = hub.progress.next_deadline()
        at = hub.notifying.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = hub.runs.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = hub.ledger.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = hub.trunks.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        at = hub.lingers.next_deadline()
        if at is not None and (first is None or at < first):
            first = at
        if hub.lagging_sessions and hub.limits.lagging_age_s_max is not None:
            since = next(iter(hub.lagging_sessions)).lagging_since
            if since is not None and (first is None or since + hub.limits.lagging_age_s_max < first):
                first = since + hub.limits.lagging_age_s_max
        return first

    def expire(self, now: float) -> list[Effect]:
        """Do what is due."""
        self._begin(now)
        hub = self._hub
        hub.joining.expire()
        hub.endings.expire()
        hub.trunks.expire()
        hub.ledger.expire(hub.now)
        hub.endings.too_far_behind()
        hub.runs.expire()
        hub.notifying.expire()
        hub.progress.expire()
        hub.replays.expire()
        return self._finish()

    def check(self) -> None:
        """Recount every invariant; see `invariants`. For tests: it walks everything. Raises InvariantBroken."""
        check(self._hub)

    def _events(self, upstream: Upstream, response: WatchResponse) -> None:
        hub = self._hub
        stats = hub.stats
        owner = upstream.owner
        batches = tuple(batches_of(response, hub.limits.response_bytes_max))
        in_run = response.fragment or len(batches) > 1 or owner in hub.runs.open
        for batch in batches:
            stats.batches += 1
            stats.batch_events += len(batch.events)
            owner = upstream.owner
            if in_run:
                hub.runs.piece(owner, batch)
                if upstream.closed:
                    return
            owner.events += len(batch.events)
            if type(owner) is Backfill:
                hub.backfills.received(owner, batch)
            else:
                owner.ingest(batch)
            if upstream.closed:
                # The rest is not needed.
                return
        if in_run and not response.fragment:
            hub.runs.end(owner)

    def _begin(self, now: float) -> None:
        self.deadline_moved = True
        hub = self._hub
        if now > hub.now:
            hub.now = now
        hub.joining.left = hub.limits.step_watches_max

    def _finish(self) -> list[Effect]:
        hub = self._hub
        if hub.replays.fresh:
            hub.replays.finish()
        if hub.queued:
            hub.backfills.fill_slots()
            hub.replays.postpone()
        # A new list, since the next input may come much later: ten thousand answers take some memory.
        effects, hub.effects = hub.effects, []
        return effects
