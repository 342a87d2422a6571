"""Manual progress: requests to etcd, proofs of bookmarks, and answers to sessions.

A trunk's bookmark is proven by its events, by etcd's answers to manual requests, and by its progress notifies. Manual
requests are shared and numbered: for each waiting session the first number that is late enough is recorded. An answer
names a request after which etcd was at the answer's revision (`FreshnessTargets`): any proof of that revision is fresh
enough. No session is answered with a revision that was known before it asked.

A request asks only the upstream watches of the waiting sessions: with auth on each token has an upstream stream of its
own, and asking thousands of streams for one session costs thousands of messages and answers. An upstream watch that has
not answered is not asked again for progress_retry_s; so one slow stream delays only its own sessions. Etcd drops
requests that it cannot answer: while a session waits, the request is repeated, with pauses that double up to a bound.
Each request is bounded, in streams and in the watches examined for it; the rest goes into the next one.

A session gets p, the least bookmark of its watches' trunks, if

- p is not below the revision that etcd had after the session asked;
- all its watches are in step with their trunks: they were sent everything through p;
- p is not below any revision that one of its watches already has: the start it asked for, "now", its last event, or an
  earlier progress (a client resumes from the last revision it was sent, clientv3 even from this one).

The answer precedes any delivery of the same input: the shell may return a delivery undelivered, and then the answer
would not be true.

Ids that a compaction cancelled are not watches and block nothing, although etcd lets them silence a stream: the client
has received their cancel, and they get no events any more. A request on a session without watches is dropped, as etcd
does. Of several waiting requests, all but the first and the last are merged.

Servers without ordered progress (before 3.4.31 and 3.5.13) answer manual requests at once, and even wrongly. They are
asked for their revision only; proofs are events and progress notifies, and answers wait for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from coalesce.backfill import Backfill
from coalesce.effects import RequestProgress
from coalesce.session import Session, Watch
from coalesce.trunk import Trunk
from coalesce.waiting import ProgressWaiters
from proto.scan import Header

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.source import Source, Upstream

# How many times within bookmark_s old bookmarks are looked for: etcd may drop one or two requests.
_LOOKS = 4
# Maximum streams that one request asks, since the message and the answer of each are separate work.
STREAMS_PER_REQUEST_MAX = 256
# Maximum watches of waiting sessions that are examined for one request.
_LOOKED_AT_MAX = 20_000


class _Request:
    """The upstream watches that one request asks."""

    __slots__ = ("_again", "_now", "_retry_s", "_streams", "_streams_max", "chosen", "full", "looked_at")

    def __init__(self, now: float, retry_s: float, again: bool) -> None:
        self._now = now
        self._retry_s = retry_s
        # It also repeats requests that were answered: their proofs were not enough.
        self._again = again
        # The streams it asks. A backfill's upstream watch has a stream of its own; the others have one per token.
        self._streams: set[object] = set()
        self._streams_max = STREAMS_PER_REQUEST_MAX
        self.chosen: dict[Upstream, None] = {}
        self.looked_at = 0
        # Some upstream watches are left for the next request.
        self.full = False

    def allow(self, streams_max: int) -> None:
        """Set the maximum number of streams."""
        self._streams_max = streams_max
        self.full = False

    def take(self, upstream: Upstream, needs: int) -> bool:
        """Add an upstream watch, if sessions that wait for request `needs` require it. False: not now."""
        self.looked_at += 1
        if upstream in self.chosen or (upstream.asked >= needs and not self._again):
            return True
        if upstream.asked_at is not None and upstream.asked_at + self._retry_s > self._now:
            # An answer is outstanding.
            return False
        stream = upstream if upstream.is_backfill else upstream.said_token
        if stream not in self._streams and len(self._streams) >= self._streams_max:
            self.full = True
            return False
        self._streams.add(stream)
        self.chosen[upstream] = None
        return True


class Progress:
    """Requests to etcd, answers to sessions, and bookmarks."""

    __slots__ = (
        "_also",
        "_asked_at",
        "_bookmark_at",
        "_hub",
        "_pause_s",
        "_retry_at",
        "_soon_at",
        "_unasked",
        "_wanted",
        "waiting",
    )

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        self.waiting = ProgressWaiters(hub)
        # Waiting sessions for which not all upstream watches were asked yet.
        self._unasked: dict[Session, None] = {}
        # Upstream watches to be asked for another reason.
        self._also: dict[Upstream, None] = {}
        # The number of the newest request that is wanted.
        self._wanted = 0
        # When to ask again; None = there is no reason to.
        self._retry_at: float | None = None
        self._pause_s = 0.0
        # When the newest request was made.
        self._asked_at = 0.0
        # When to make a request that was postponed by progress_interval_s; None = there is none.
        self._soon_at: float | None = None
        # When to look for old bookmarks; None = there are no trunks.
        self._bookmark_at: float | None = None

    # who waits

    def wait(self, session: Session) -> None:
        """Record that a session requests progress."""
        if session.watches:
            self.waiting.add(session, self._hub.progress_serial + 1)
            self._unasked[session] = None
            self.want()

    def want(self, *upstreams: Upstream) -> None:
        """Make a request soon, for the waiting sessions and these upstream watches; repeat it at short pauses."""
        hub = self._hub
        self._also.update(dict.fromkeys(upstreams))
        self._wanted = hub.progress_serial + 1
        self._pause_s = hub.limits.progress_retry_s
        at = hub.now + self._pause_s
        self._retry_at = at if self._retry_at is None else min(self._retry_at, at)
        self._ask_soon()

    def began(self, watch: Watch) -> None:
        """Record a new watch."""
        hub = self._hub
        hub.notifying.began(watch)
        if self._bookmark_at is None:
            self._bookmark_at = hub.now + hub.limits.bookmark_s / _LOOKS

    def forget(self, watch: Watch) -> None:
        """Remove a watch that has ended; with the last one of its session, also the session's requests."""
        self._hub.notifying.forget(watch)
        if not watch.session.watches:
            self.forget_session(watch.session)

    def forget_session(self, session: Session) -> None:
        """Remove a session's requests."""
        self.waiting.forget(session)
        self._unasked.pop(session, None)

    def closed(self, upstream: Upstream) -> None:
        """Forget an upstream watch that was closed."""
        self._also.pop(upstream, None)

    def other_history(self) -> None:
        """Discard the freshness targets: the store's history was replaced."""
        self.waiting.targets.clear()
        self.waiting.unblock_all()

    @property
    def to_ask(self) -> Iterable[Upstream]:
        """Upstream watches to be asked, besides those of sessions; for checks."""
        return self._also

    # what is proven

    def progressed(self, upstreams: Sequence[Upstream], header: Header, number: int) -> None:
        """Handle an answer: these upstream watches are complete through a revision that etcd had after `number`."""
        hub = self._hub
        hub.observe_header(header)
        is_news = bool(number) and self.waiting.learn(number, header.revision)
        trunks: dict[Trunk, None] = {}
        if hub.ordered_progress:
            for upstream in upstreams:
                upstream.asked_at = None
                if upstream.fed is not None:
                    trunks[_trunk_of(upstream.fed)] = None
                self.proven(upstream, header.revision)
        self._settle(None if is_news else tuple(trunks))
        if self._unasked or self._also:
            self._ask_soon()

    def notified(self, upstream: Upstream, revision: int) -> None:
        """Handle a progress notify: an upstream watch is complete through `revision`."""
        trunk = _trunk_of(upstream.owner)
        self.proven(upstream, revision)
        if self.waiting.sessions:
            self._settle((trunk,))

    def proven(self, upstream: Upstream, revision: int) -> None:
        """Record that everything of an upstream watch through `revision` has arrived."""
        if upstream.closed or not upstream.created:
            return
        owner = upstream.owner
        if isinstance(owner, Backfill):
            self._hub.backfills.progressed(owner, revision)
        else:
            owner.advance(revision)

    # time

    def next_deadline(self) -> float | None:
        """Return when `expire` is due."""
        first: float | None = None
        for at in (self._soon_at, self._retry_at, self._bookmark_at):
            if at is not None and (first is None or at < first):
                first = at
        return first

    def expire(self) -> None:
        """Do what is due."""
        hub = self._hub
        if self._bookmark_at is not None and self._bookmark_at <= hub.now:
            self._look_at_bookmarks()
        if self._soon_at is not None and self._soon_at <= hub.now:
            self._ask()
        if self._retry_at is not None and self._retry_at <= hub.now:
            self._retry()

    def _settle(self, trunks: Sequence[Trunk] | None = None) -> None:
        """Answer the sessions that can be answered now: those that these trunks blocked, or (None) all.

        Nothing must have been delivered yet in this input.
        """
        if trunks is None:
            self.waiting.answer_all()
        else:
            self.waiting.moved(trunks)
        hub = self._hub
        hub.notifying.settle(trunks)
        if not self.waiting.sessions and not hub.notifying.asking:
            self.waiting.targets.clear()

    def _look_at_bookmarks(self) -> None:
        hub = self._hub
        if not hub.trunks_open:
            self._bookmark_at = None
            return
        self._bookmark_at = hub.now + hub.limits.bookmark_s / _LOOKS
        if hub.ordered_progress:
            old = hub.now - hub.limits.bookmark_s / 2
            quiet = [trunk.upstream for trunk in hub.trunks_open.values() if trunk.proven_at <= old]
            if quiet:
                self.want(*quiet)

    # requests

    def _retry(self) -> None:
        """Answer the sessions that can be answered by now; ask again if some still wait."""
        hub = self._hub
        # Events may have served as proof.
        self._settle()
        backfills = [backfill for backfill in hub.backfills.open if self._may_prove(backfill)]
        if not self.waiting.sessions and not hub.notifying.asking and not backfills:
            self._retry_at = None
            return
        self._pause_s = min(self._pause_s * 2, self._hub.limits.progress_retry_s_max)
        self._retry_at = hub.now + self._pause_s
        if not hub.ordered_progress:
            # One answer with the revision is enough; events and progress notifies prove it.
            if self.waiting.targets.of(self._wanted) is None:
                self._ask()
            return
        for backfill in backfills:
            # Backfills that received events meanwhile are not asked: events prove more than an answer would.
            if backfill.proof < hub.progress_serial:
                self._also[backfill.upstream] = None
                if backfill.is_upgrade:
                    self._also[backfill.trunk.upstream] = None
        self._also.update(dict.fromkeys(notices.trunk.upstream for notices in hub.notifying.asking))
        self._ask(again=True)

    def _may_prove(self, backfill: Backfill) -> bool:
        return backfill.upstream.created and not backfill.paused

    def _ask_soon(self) -> None:
        """Make a request, at the earliest progress_interval_s after the last one."""
        at = self._asked_at + self._hub.limits.progress_interval_s
        if at <= self._hub.now:
            self._ask()
        else:
            self._soon_at = at

    def _ask(self, again: bool = False) -> None:
        """Make a request, if there are streams to ask; `again`: also those whose answer was not enough."""
        hub = self._hub
        self._soon_at = None
        upstreams: tuple[Upstream, ...] = ()
        if hub.ordered_progress:
            request = _Request(hub.now, hub.limits.progress_retry_s, again)
            self._choose(request, again)
            upstreams = tuple(request.chosen)
            if request.full and not again:
                self._soon_at = hub.now + hub.limits.progress_interval_s
            if not upstreams:
                return
            hub.stats.progress_asked += 1
        else:
            self._also.clear()
            self._unasked.clear()
            if not self.waiting.sessions and not hub.notifying.asking:
                return
        hub.progress_serial += 1
        self._asked_at = hub.now
        for upstream in upstreams:
            upstream.asked, upstream.asked_at = hub.progress_serial, hub.now
        hub.effects.append(RequestProgress(upstreams, hub.progress_serial))

    def _choose(self, request: _Request, again: bool) -> None:
        """Choose the upstream watches; if sessions and other reasons compete, each side gets half of the streams."""
        self._choose_also(request, STREAMS_PER_REQUEST_MAX // 2)
        request.allow(STREAMS_PER_REQUEST_MAX)
        self._choose_for_sessions(request, again)
        if not request.full:
            self._choose_also(request, STREAMS_PER_REQUEST_MAX)

    def _choose_also(self, request: _Request, streams_max: int) -> None:
        request.allow(streams_max)
        serial = self._hub.progress_serial + 1
        for upstream in tuple(self._also):
            if request.take(upstream, serial):
                del self._also[upstream]
            if request.full:
                return

    def _choose_for_sessions(self, request: _Request, again: bool) -> None:
        sessions = self.waiting.sessions if again else self._unasked
        for session in tuple(sessions):
            if request.looked_at >= _LOOKED_AT_MAX:
                request.full = True
            if request.full:
                return
            # Moved to the end, so that the sessions left out now come first next time.
            sessions[session] = sessions.pop(session)
            # It may have been answered by requests for others.
            if not session.progress_needs or self._take_all(request, session, session.progress_needs[-1], again):
                self._unasked.pop(session, None)

    def _take_all(self, request: _Request, session: Session, needs: int, again: bool) -> bool:
        """Add the upstream watches of a session; False: not all of them now."""
        enough = session.progress_blocker.revision if again and session.progress_blocker is not None else None
        complete = True
        for watch in session.watches.values():
            trunk, source = watch.trunk, watch.source
            if source is trunk or source is None:
                if enough is None or trunk.next_revision <= enough:
                    complete &= request.take(trunk.upstream, needs)
            else:
                complete &= request.take(trunk.upstream, needs)
                complete &= request.take(source.upstream, needs)
        return complete


def _trunk_of(source: Source) -> Trunk:
    """Return a trunk, or that of a backfill."""
    if isinstance(source, Backfill):
        return source.trunk
    assert isinstance(source, Trunk), "there are two kinds of source"
    return source
