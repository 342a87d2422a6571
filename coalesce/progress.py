"""Manual progress: proofs of bookmarks, and answers to sessions.

A trunk's bookmark is proven by its events, by etcd's answers to manual requests, and by its progress notifies. Manual
requests are shared and numbered: for each waiting session the first number that is late enough is recorded. An answer
names a request after which etcd was at the answer's revision (`FreshnessTargets`): any proof of that revision is fresh
enough. No session is answered with a revision that was known before it asked.

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
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coalesce.model import Session, Trunk, Watch
from coalesce.notifying import ProgressNotifier
from coalesce.progress_requests import ProgressRequests
from coalesce.state import CoreState
from coalesce.waiting import ProgressWaiters
from proto.scan import Header

# How many times within bookmark_s old bookmarks are looked for: etcd may drop one or two requests.
_LOOKS = 4

# To prove a trunk takes as long as to examine so many watches.
PROVEN_WATCHES: Final = 5

TRUNKS_PER_LOOK_MAX = 10_000
"""Maximum trunks that are examined for old bookmarks in one step: 0.1 us of CPU for each."""


class Progress:
    """Answers to sessions and rounds that wait for progress, and bookmarks that stay fresh."""

    def __init__(
        self, state: CoreState, waiters: ProgressWaiters, requests: ProgressRequests, notifying: ProgressNotifier
    ) -> None:
        self._state = state
        self._waiters = waiters
        self._requests = requests
        self._notifying = notifying
        # When to look for old bookmarks; None = there are no trunks.
        self._bookmark_at: float | None = None
        # The trunks that are still to be examined, the number of parts in all, and the oldest proof found so far.
        self._to_look: list[Trunk] = []
        self._parts = 1
        self._oldest = 0.0

    # who waits

    def wait(self, session: Session) -> None:
        """Record that a session requests progress."""
        if session.watches:
            self._waiters.add(session, self._state.progress_serial + 1)
            self._requests.want_for(session)

    def began(self, watch: Watch) -> None:
        """Record a new watch."""
        self._notifying.began(watch)
        if self._bookmark_at is None:
            self._bookmark_at = self._state.now + self._state.limits.bookmark_s / _LOOKS

    def forget(self, watch: Watch) -> None:
        """Remove a watch that has ended; with the last one of its session, also the session's requests."""
        self._notifying.forget(watch)
        if not watch.session.watches:
            self.forget_session(watch.session)

    def forget_session(self, session: Session) -> None:
        """Remove a session's requests."""
        self._waiters.forget(session)
        self._requests.forget(session)

    def other_history(self) -> None:
        """Discard the freshness targets: the store's history was replaced."""
        self._waiters.targets.clear()
        self._waiters.unblock_all()

    # what is proven

    def answered(self, trunks: Sequence[Trunk], header: Header, number: int) -> None:
        """Handle an answer to request `number`, which has proven these trunks or backfills of them."""
        is_news = bool(number) and self._waiters.learn(number, header.revision)
        self._settle(None if is_news else trunks, PROVEN_WATCHES * len(trunks))
        self._requests.go_on()

    def notified(self, trunk: Trunk) -> None:
        """Handle a progress notify, which has proven this trunk or a backfill of it."""
        if self._waiters.sessions:
            self._settle((trunk,))

    def _settle(self, trunks: Sequence[Trunk] | None = None, spent: int = 0) -> None:
        """Answer the sessions that can be answered now: those that these trunks blocked, or (None) all.

        Nothing must have been delivered yet in this input. `spent`: see `ProgressWaiters.answer`.
        """
        waiters = self._waiters
        if self._state.restored is not None:
            # Repeated by timer.
            return
        if trunks is None:
            waiters.check_all()
        else:
            waiters.moved(trunks)
        waiters.answer(spent)
        self._notifying.settle(trunks)
        if not waiters.sessions and not waiters.rounds:
            waiters.targets.clear()

    # time

    def next_deadline(self) -> float | None:
        """Return when `expire` is due."""
        if self._waiters.to_check:
            return self._state.now
        at = self._requests.next_deadline()
        if at is None or (self._bookmark_at is not None and self._bookmark_at < at):
            return self._bookmark_at
        return at

    def expire(self) -> None:
        """Do what is due."""
        self._waiters.answer()
        if self._bookmark_at is not None and self._bookmark_at <= self._state.now:
            self._look_at_bookmarks()
        self._requests.expire()
        if self._requests.is_retry_due:
            # Events may have served as proof.
            self._settle()
            self._requests.retry()

    def _look_at_bookmarks(self) -> None:
        """Examine some trunks, so that each is examined _LOOKS times within bookmark_s."""
        state = self._state
        if not self._to_look:
            if not state.trunks:
                self._bookmark_at = None
                state.stats.bookmark_age_s = 0.0
                return
            self._to_look = list(state.trunks.values())
            self._parts = -(-len(self._to_look) // TRUNKS_PER_LOOK_MAX)
            self._oldest = state.now
        part = [trunk for trunk in self._to_look[-TRUNKS_PER_LOOK_MAX:] if not trunk.upstream.closed]
        del self._to_look[-TRUNKS_PER_LOOK_MAX:]
        self._bookmark_at = state.now + state.limits.bookmark_s / _LOOKS / self._parts
        self._oldest = min((trunk.proven_at for trunk in part if trunk.proven_at < self._oldest), default=self._oldest)
        if not self._to_look:
            state.stats.bookmark_age_s = state.now - self._oldest
        if state.ordered_progress:
            old = state.now - state.limits.bookmark_s / 2
            quiet = [trunk.upstream for trunk in part if trunk.proven_at <= old]
            if quiet:
                self._requests.want(*quiet)
