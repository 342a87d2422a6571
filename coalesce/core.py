"""The core's face: inputs in, effects out, time passed in.

Everything a client asks and everything etcd says is one call of a Coalescer. Each call returns what is to be done, in
order; `now` is in seconds, monotonic. Nothing here waits, reads a clock or knows a socket, and exactly one caller
drives it, one call after the other.

The protocol with the shell, beside "carry the effects out in order, then give the next input":

*Permission.* Each create asks for a check (CheckPermission). The outcome is a Refusal; or Granted(header), when the
check itself read the store's revision by a linearizable call that began after the effect; or None, when auth is known
to be off by whatever was learnt earlier (a bare Header is the same, and only tells the newest revision known).

*Stalls.* When a message does not go out whole, the shell queues the rest of it and calls `stalled(session)` at once,
also in the middle of a list of effects. From then on nothing more is delivered to that session, but the same list may
still hold a Deliver for its watches: those the shell does not write but hands back, `undelivered(watch, payload)`.
Neither has effects. Control answers (Send) queue behind what is unsent. When all is written the shell calls
`drained(session, now)`.

*Replays.* What lagging watches get after that is bounded per turn, and the rest comes by itself: `next_deadline()` is
due at once while anything is to be replayed to a session that is not stalled. The shell never has to ask for more.
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
        """`ordered_progress`: etcd is 3.4.31, 3.5.13 or later, where manual progress can be built on."""
        self._hub = hub = CoreState(limits or CoreLimits(), ordered_progress)
        hub.joining = Admission(hub)
        hub.trunks = Trunks(hub)
        hub.backfills = Backfills(hub)
        hub.replays = Replayer(hub)
        hub.runs = Runs(hub)
        hub.progress = Progress(hub)
        hub.notifying = Notifying(hub)
        hub.endings = Cancellation(hub)
        self.deadline_moved = True
        """`next_deadline` may be sooner than when it was last asked. Not so after an event like any other."""

    @property
    def limits(self) -> CoreLimits:
        """Its settings; may be set. What exceeds a lowered limit stays until it goes, or the next batch comes."""
        return self._hub.limits

    @limits.setter
    def limits(self, limits: CoreLimits) -> None:
        self._hub.limits = self._hub.ledger.limits = limits

    @property
    def header(self) -> Header | None:
        """The newest header of any answer of etcd; None before the first. Without one a refusal needs a read."""
        return self._hub.header

    @property
    def stats(self) -> Stats:
        """Its counters and gauges."""
        return self._hub.stats

    @property
    def ordered_progress(self) -> bool:
        """Whether manual progress is built on; to be set for each new connection to etcd, by etcd's version."""
        return self._hub.ordered_progress

    @ordered_progress.setter
    def ordered_progress(self, ordered: bool) -> None:
        self._hub.ordered_progress = ordered
        self._hub.notifying.pace.start_over(self._hub.now)

    # a client asks

    def open_session(self, outlet: object, identity: Identity, now: float) -> Session:
        """Begin a session whose answers go to `outlet`."""
        hub = self._hub
        hub.now = max(hub.now, now)
        session = Session(outlet, identity)
        hub.sessions[session] = None
        hub.stats.sessions += 1
        return session

    def create(self, session: Session, request: CreateRequest, now: float) -> list[Effect]:
        """A client asks for a watch."""
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
        """A client asks for progress of all its watches."""
        self._begin(now)
        if not session.ended:
            self._hub.joining.progress(session)
        return self._finish()

    def close(self, session: Session, now: float) -> list[Effect]:
        """A client's stream is gone. Not needed after EndSession, and harmless."""
        self._begin(now)
        if not session.ended:
            self._hub.endings.close(session)
        return self._finish()

    # back-pressure

    def stalled(self, session: Session) -> None:
        """A session could not take everything; the rest waits in the shell. Called while effects are carried out."""
        self.deadline_moved = True
        self._hub.replays.stalled(session)

    def undelivered(self, watch: Watch, payload: Payload) -> None:
        """A delivery was not begun, because its session stalled earlier in the same list of effects."""
        self.deadline_moved = True
        self._hub.replays.returned(watch, payload)

    def drained(self, session: Session, now: float) -> list[Effect]:
        """Everything of a session is written: it goes on."""
        self._begin(now)
        self._hub.replays.drained(session)
        return self._finish()

    # answers to effects

    def revision_read(self, read: PendingRead, header: Header, now: float) -> list[Effect]:
        """A read of the store's revision came back. The shell retries until it does; a read never fails here."""
        self._begin(now)
        self._hub.joining.revision_read(read, header)
        return self._finish()

    def permission(
        self, check: PendingCreate, outcome: Granted | CreateRefusal | Header | None, now: float
    ) -> list[Effect]:
        """A check came back; see above for the outcomes."""
        self._begin(now)
        self._hub.joining.permission(check, outcome)
        return self._finish()

    def upstream_response(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """An upstream watch spoke: `created`, events of whole revisions, `canceled`, or a progress notify."""
        hub = self._hub
        owner = upstream.fed
        if type(owner) is not Trunk or upstream.closed or not response.plain or not hub.ledger.entries or hub.runs.open:
            return self._received(upstream, response, now)
        # As nearly always: events of a trunk.
        if now > hub.now:
            hub.now = now
        header = response.header
        if header.revision and (hub.header is None or header.revision >= hub.header.revision):
            # As `CoreState.saw`.
            hub.header = header
        events = response.events
        if len(events) > 1:
            self._events(upstream, response)
        else:
            # What etcd sends as long as everybody keeps up.
            stats = hub.stats
            stats.batches += 1
            stats.batch_events += 1
            owner.events += 1
            # A tuple, since it may be kept: half the memory of a list.
            event = events[0]
            owner.ingest(Batch(header, (event,), len(event.encoded)))
        if hub.replays.fresh or hub.queued:
            self.deadline_moved = True
            return self._finish()
        effects, hub.effects = hub.effects, []
        return effects

    def _received(self, upstream: Upstream, response: WatchResponse, now: float) -> list[Effect]:
        """Take a response of any kind, for any source."""
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

        Etcd was there after RequestProgress `number` was carried out; 0: it is not known which one was answered.
        """
        self._begin(now)
        self._hub.progress.progressed(tuple(upstreams), header, number)
        return self._finish()

    def upstream_lost(self, upstream: Upstream, reason: UpstreamLost, now: float) -> list[Effect]:
        """An upstream watch is over for good: end its sessions (UNAVAILABLE), or cancel its watches with the text."""
        self._begin(now)
        self._hub.endings.lost(upstream, reason)
        return self._finish()

    def no_leader(self, now: float) -> list[Effect]:
        """No endpoint has a leader: the sessions that asked to be told end."""
        self._begin(now)
        self._hub.endings.no_leader()
        return self._finish()

    def other_history(self, header: Header, now: float) -> list[Effect]:
        """The store was restored from a snapshot, or is another one; it is at this header's revision now."""
        self._begin(now)
        self._hub.endings.other_history(header)
        return self._finish()

    def header_seen(self, header: Header) -> None:
        """Some answer of etcd had this header; the newest one fills the headers of control answers."""
        self._hub.observe_header(header)

    # time

    def next_deadline(self) -> float | None:
        """Return when `expire` is due, in the time of `now`; None while nothing is."""
        # Asked after nearly each input, so it is written for speed: no list, no generator.
        self.deadline_moved = False
        hub = self._hub
        first = hub.replays.next_deadline()
        if first is not None:
            # At once.
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
        """Do what time has made due."""
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
                # Nobody needs the rest.
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
        # Not kept until the next input, which may be long in coming: ten thousand answers are some memory.
        effects, hub.effects = hub.effects, []
        return effects
