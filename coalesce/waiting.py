"""Sessions that wait for progress, indexed so that an answer of etcd does not require a walk over all of them.

With auth on each token has an upstream stream of its own, so one request for progress can have thousands of answers,
one after the other. A session that cannot be answered yet is listed under a trunk that blocks it, and is checked again
when that trunk has advanced; all sessions are checked only when a new freshness target is learnt, and by timer. Each
step checks a part of them, with what is proven by then; the rest follows at the next timers, which are due at once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from itertools import islice
from operator import length_hint
from typing import Final

from coalesce.inputs import NO_WATCH_ID
from coalesce.model import Blocker, Group, NotifiedWatches, Session, Trunk, Watch
from coalesce.state import CoreState

_TARGETS_MAX = 64
CHECKED_WATCHES_MAX: Final = 10_000
"""Watches that are examined in one step to answer sessions, or those of one session: 0.1 us of CPU for each."""

ANSWERED_SESSIONS_MAX: Final = 200
"""Sessions that are checked in one step: to answer one takes 10 us of CPU, with what the shell does."""


class FreshnessTargets:
    """Revisions that etcd is known to have had after each request: sessions that asked before it must not get less.

    Numbers and revisions increase together: a later request that found a lower revision (another member, another
    stream) lowers the targets of the earlier ones as well. Bounded: a request without a target uses a later one's.
    """

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._revisions: list[int] = []

    def learn(self, number: int, revision: int) -> bool:
        """Record that the store was at `revision` after request `number` was made. False: no new information."""
        place = bisect_left(self._numbers, number)
        if place < len(self._numbers) and self._revisions[place] <= revision:
            return False
        end = place + (self._numbers[place : place + 1] == [number])
        first = bisect_left(self._revisions, revision, 0, place)
        self._numbers[first:end] = [number]
        self._revisions[first:end] = [revision]
        if len(self._numbers) > _TARGETS_MAX:
            del self._numbers[0], self._revisions[0]
        return True

    def of(self, number: int) -> int | None:
        """Return the least revision that is fresh enough for request `number`; None = not known yet."""
        place = bisect_left(self._numbers, number)
        return self._revisions[place] if place < len(self._numbers) else None

    def clear(self) -> None:
        """Drop all targets."""
        self._numbers.clear()
        self._revisions.clear()


class ProgressWaiters:
    """The sessions with progress_needs, and the rounds of progress_notify that wait for progress."""

    def __init__(self, state: CoreState) -> None:
        self._state = state
        self.sessions: dict[Session, None] = {}
        # Those of them that may be answered now.
        self.to_check: dict[Session, None] = {}
        # Notices whose round waits for progress.
        self.rounds: dict[NotifiedWatches, None] = {}
        self.targets = FreshnessTargets()
        # Blocked sessions by trunk. A trunk may be closed already, until its sessions are checked again.
        self._under: dict[Trunk, dict[Session, None]] = {}

    def add(self, session: Session, needs: int) -> None:
        """Add a request of a session: an answer to upstream request `needs` is fresh enough. All but two are merged."""
        session.progress_needs = (*session.progress_needs[:1], needs)
        self.sessions[session] = None

    def forget(self, session: Session) -> None:
        """Remove a session and its requests."""
        session.progress_needs = ()
        self.sessions.pop(session, None)
        self.to_check.pop(session, None)
        self.unblock(session)

    def is_listed(self, session: Session) -> bool:
        """Whether a blocked session waits and is listed under the trunk that blocks it; for checks."""
        blocker = session.progress_blocker
        return blocker is not None and session in self.sessions and session in self._under.get(blocker.trunk, ())

    def is_fresh(self, revision: int, needs: int) -> bool:
        """Whether etcd is known to have had no more than `revision` at some time after request `needs` was made."""
        target = self.targets.of(needs)
        return target is not None and target <= revision

    def check_all(self) -> None:
        """Let all sessions be checked."""
        self.to_check.update(self.sessions)

    def moved(self, trunks: Iterable[Trunk]) -> None:
        """Let the sessions be checked that these trunks blocked, which have advanced."""
        for trunk in trunks:
            self.to_check.update(self._under.get(trunk, ()))

    def answer(self, spent: int = 0) -> None:
        """Answer those of the sessions to be checked that can be answered, as many as one step allows.

        Nothing must have been delivered yet in this input. `spent`: what it has cost so far, in watches.
        """
        left = CHECKED_WATCHES_MAX - spent
        for session in list(islice(self.to_check, ANSWERED_SESSIONS_MAX)):
            if left < len(session.watches) and left < CHECKED_WATCHES_MAX:
                return
            del self.to_check[session]
            left -= self._answer(session)

    def learn(self, number: int, revision: int) -> bool:
        """Record a target, see `FreshnessTargets`. True: a lower revision may be enough than was known before."""
        if not self.targets.learn(number, revision):
            return False
        self.unblock_all()
        return True

    def unblock_all(self) -> None:
        """Drop all blockers, since a lower revision may be enough now."""
        self._under.clear()
        for session in self.sessions:
            session.progress_blocker = None

    def _answer(self, session: Session) -> int:
        """Answer a session if possible; otherwise record its blocker. Return how many watches this took."""
        blocker = session.progress_blocker
        if blocker is not None and blocker.holds:
            return 1
        target = self.targets.of(session.progress_needs[0])
        if target is None:
            return 1
        self.unblock(session)
        # In reverse: upstream watches are asked in order, so the last one's answer tends to arrive last.
        examining = reversed(session.watches.values())
        revision = self._reached(session, target, examining)
        if revision is None:
            return len(session.watches) - length_hint(examining)
        session.progress_revision = revision
        session.progress_needs = tuple(needs for needs in session.progress_needs if not self.is_fresh(revision, needs))
        if not session.progress_needs:
            self.sessions.pop(session, None)
        state = self._state
        state.stats.progress_answers += 1
        state.answer(session, NO_WATCH_ID, state.header_now(revision))
        return len(session.watches)

    def _reached(self, session: Session, target: int, watches: Iterator[Watch]) -> int | None:
        """Return the progress that may be sent to a session, `target` or more; None if it is blocked."""
        # Written for speed, since a session may have a hundred thousand watches.
        least: Watch | None = None
        following = 0
        known = max(session.progress_revision, target)
        group: Group | None = None
        for watch in watches:
            trunk = watch.trunk
            next_revision = trunk.next_revision
            if next_revision <= known or watch.group is None or watch.source is not trunk or session.stalled:
                self._block(session, Blocker(watch, trunk, known))
                return None
            if watch.group is not group:
                group = watch.group
                if group.behind is not None:
                    self._block(session, Blocker(watch, trunk, known))
                    return None
                # As `Watch.last_sent_revision`.
                if group.sent_revision > known:
                    known = group.sent_revision
            if least is None or next_revision < following:
                following, least = next_revision, watch
            if watch.progress_floor > known:
                known = watch.progress_floor
            if watch.sent_revision > known:
                known = watch.sent_revision
        if least is None:
            return None
        if following <= known:
            self._block(session, Blocker(least, least.trunk, known))
            return None
        return following - 1

    def _block(self, session: Session, blocker: Blocker) -> None:
        session.progress_blocker = blocker
        self._under.setdefault(blocker.trunk, {})[session] = None

    def unblock(self, session: Session) -> None:
        """Drop the blocker of a session, since it may have changed."""
        blocker, session.progress_blocker = session.progress_blocker, None
        if blocker is not None:
            under = self._under[blocker.trunk]
            del under[session]
            if not under:
                del self._under[blocker.trunk]
