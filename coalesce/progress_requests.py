"""Requests to etcd for manual progress: which upstream watches they ask, and when.

A request asks only the upstream watches of the waiting sessions: with auth on each token has an upstream stream of its
own, and asking thousands of streams for one session costs thousands of messages and answers. An upstream watch that has
not answered is not asked again for progress_retry_s; so one slow stream delays only its own sessions. Etcd drops
requests that it cannot answer: while a session waits, the request is repeated, with pauses that double up to a bound.
Each request is bounded, in streams and in the watches examined for it; the rest goes into the next one.

Servers without ordered progress (before 3.4.31 and 3.5.13) answer manual requests at once, and even wrongly. They are
asked for their revision only; proofs are events and progress notifies, and answers wait for these.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice

from coalesce.effects import RequestProgress
from coalesce.model import Backfill, Session, Upstream
from coalesce.state import CoreState
from coalesce.waiting import ProgressWaiters

# Maximum streams that one request asks, since the message and the answer of each are separate work.
STREAMS_PER_REQUEST_MAX = 256
# Maximum upstream watches that one request asks for other reasons than waiting sessions: 1 us of CPU for each.
UPSTREAMS_PER_REQUEST_MAX = 10_000
# Maximum watches of waiting sessions that are examined for one request: 1 us of CPU for each.
_LOOKED_AT_MAX = 10_000


class _Request:
    """The upstream watches that one request asks."""

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
        if upstream.closed or upstream in self.chosen or (upstream.asked >= needs and not self._again):
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


class ProgressRequests:
    """Makes and repeats the requests."""

    def __init__(self, state: CoreState, waiters: ProgressWaiters) -> None:
        self._state = state
        self._waiters = waiters
        # Waiting sessions for which not all upstream watches were asked yet.
        self._unasked: dict[Session, None] = {}
        # Of those with very many watches: where the next request goes on, and whether all before could be asked.
        self._begun: dict[Session, tuple[int, bool]] = {}
        # The number of the newest request that is wanted.
        self._wanted = 0
        # When to ask again; None = there is no reason to.
        self._retry_at: float | None = None
        self._pause_s = 0.0
        # When the newest request was made.
        self._asked_at = 0.0
        # When to make a request that was postponed by progress_interval_s; None = there is none.
        self._soon_at: float | None = None

    def want_for(self, session: Session) -> None:
        """Make a request soon for a session that has begun to wait."""
        self._unasked[session] = None
        self._begun.pop(session, None)
        self.want()

    def want(self, *upstreams: Upstream) -> None:
        """Make a request soon, for the waiting sessions and these upstream watches; repeat it at short pauses."""
        state = self._state
        self._add(upstreams)
        self._wanted = state.progress_serial + 1
        self._pause_s = state.limits.progress_retry_s
        at = state.now + self._pause_s
        self._retry_at = at if self._retry_at is None else min(self._retry_at, at)
        self._ask_soon()

    def _add(self, upstreams: Iterable[Upstream]) -> None:
        """Let the next request ask these too; one that etcd has ended is closed while its watches end or move."""
        self._state.to_ask.update((upstream, None) for upstream in upstreams if not upstream.closed)

    def forget(self, session: Session) -> None:
        """Remove a session that does not wait any more."""
        self._unasked.pop(session, None)
        self._begun.pop(session, None)

    def go_on(self) -> None:
        """Ask the upstream watches that were left out of the last request."""
        if self._unasked or self._state.to_ask:
            self._ask_soon()

    def next_deadline(self) -> float | None:
        """Return when to call `expire` or, if `is_retry_due` is True then, `retry`."""
        if self._soon_at is None or self._retry_at is None:
            return self._retry_at if self._soon_at is None else self._soon_at
        return min(self._soon_at, self._retry_at)

    def expire(self) -> None:
        """Make the request that was postponed, if it is due."""
        if self._soon_at is not None and self._soon_at <= self._state.now:
            self._ask()

    @property
    def is_retry_due(self) -> bool:
        """Whether to ask again now, unless all sessions can be answered."""
        return self._retry_at is not None and self._retry_at <= self._state.now

    def retry(self) -> None:
        """Ask again if sessions, rounds or backfills still wait for progress."""
        state, waiters = self._state, self._waiters
        backfills = [backfill for backfill in state.backfills if self._may_prove(backfill)]
        if not waiters.sessions and not waiters.rounds and not backfills:
            self._retry_at = None
            return
        self._pause_s = min(self._pause_s * 2, state.limits.progress_retry_s_max)
        self._retry_at = state.now + self._pause_s
        if not state.ordered_progress:
            # One answer with the revision is enough; events and progress notifies prove it.
            if waiters.targets.of(self._wanted) is None:
                self._ask()
            return
        for backfill in backfills:
            # Backfills that received events meanwhile are not asked: events prove more than an answer would.
            if backfill.proof < state.progress_serial:
                state.to_ask[backfill.upstream] = None
                if backfill.is_upgrade:
                    self._add((backfill.trunk.upstream,))
        self._add(notices.trunk.upstream for notices in waiters.rounds)
        self._ask(again=True)

    def _may_prove(self, backfill: Backfill) -> bool:
        return backfill.upstream.created and not backfill.upstream.closed and not backfill.paused

    def _ask_soon(self) -> None:
        """Make a request, at the earliest progress_interval_s after the last one."""
        at = self._asked_at + self._state.limits.progress_interval_s
        if at <= self._state.now:
            self._ask()
        else:
            self._soon_at = at

    def _ask(self, again: bool = False) -> None:
        """Make a request, if there are streams to ask; `again`: also those whose answer was not enough."""
        state, waiters = self._state, self._waiters
        self._soon_at = None
        upstreams: tuple[Upstream, ...] = ()
        if state.ordered_progress:
            request = _Request(state.now, state.limits.progress_retry_s, again)
            self._choose(request, again)
            upstreams = tuple(request.chosen)
            if request.full and not again:
                self._soon_at = state.now + state.limits.progress_interval_s
            if not upstreams:
                return
            state.stats.progress_asked += 1
        else:
            state.to_ask.clear()
            self._unasked.clear()
            self._begun.clear()
            if not waiters.sessions and not waiters.rounds:
                return
        state.progress_serial += 1
        self._asked_at = state.now
        for upstream in upstreams:
            upstream.asked, upstream.asked_at = state.progress_serial, state.now
        state.effects.append(RequestProgress(upstreams, state.progress_serial))

    def _choose(self, request: _Request, again: bool) -> None:
        """Choose the upstream watches; if sessions and other reasons compete, each side gets half of the streams."""
        self._choose_also(request, STREAMS_PER_REQUEST_MAX // 2)
        request.allow(STREAMS_PER_REQUEST_MAX)
        self._choose_for_sessions(request, again)
        if not request.full:
            self._choose_also(request, STREAMS_PER_REQUEST_MAX)

    def _choose_also(self, request: _Request, streams_max: int) -> None:
        request.allow(streams_max)
        serial = self._state.progress_serial + 1
        to_ask = self._state.to_ask
        room = max(0, UPSTREAMS_PER_REQUEST_MAX - len(request.chosen))
        others = len(to_ask) > room
        for upstream in tuple(islice(to_ask, room)):
            taken = request.take(upstream, serial)
            if request.full:
                return
            del to_ask[upstream]
            if not taken:
                # Behind the others: its answer is outstanding.
                to_ask[upstream] = None
        request.full = others

    def _choose_for_sessions(self, request: _Request, again: bool) -> None:
        sessions = self._waiters.sessions if again else self._unasked
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
        begin, complete = self._begun.pop(session, (0, True))
        end = begin + _LOOKED_AT_MAX - request.looked_at
        for watch in islice(session.watches.values(), begin, end):
            trunk, source = watch.trunk, watch.source
            if source is trunk or source is None:
                if enough is None or trunk.next_revision <= enough:
                    complete &= request.take(trunk.upstream, needs)
            else:
                complete &= request.take(trunk.upstream, needs)
                complete &= request.take(source.upstream, needs)
        if len(session.watches) > end:
            # Watches that end meanwhile may let others be passed over: these are asked when the request is repeated.
            self._begun[session] = end, complete
            request.full = True
            return False
        return complete
