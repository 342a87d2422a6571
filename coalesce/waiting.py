"""Sessions that wait for progress: when each can be answered, found without a look at all of them at every answer.

With auth on each token has an upstream stream of its own, so one request for progress can have thousands of answers,
one after the other. A session that cannot be answered yet is listed under a trunk that holds it up, and is looked at
again when that trunk has moved; all are looked at only when it becomes known what is fresh enough, and by timer.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from typing import TYPE_CHECKING

from coalesce.inputs import NO_WATCH_ID
from coalesce.session import Place, Session, Watch

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.source import Source
    from coalesce.trunk import Trunk

_TARGETS_MAX = 64


class FreshnessTargets:
    """What etcd is known to have had after a request was made: who asked before it must not be told less.

    Numbers and revisions rise together: a later request that found a lower revision (another member, another stream)
    says more about the earlier ones as well. Bounded: without a target of its own a request has that of a later one.
    """

    __slots__ = ("_numbers", "_revisions")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._revisions: list[int] = []

    def learn(self, number: int, revision: int) -> bool:
        """After request `number` was made the store was at `revision`. False: that was known."""
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
        """Return the least revision that will do for who waits for request `number`; None = not known yet."""
        place = bisect_left(self._numbers, number)
        return self._revisions[place] if place < len(self._numbers) else None

    def clear(self) -> None:
        """Forget all."""
        self._numbers.clear()
        self._revisions.clear()


class Blocker:
    """What holds up the answer to a session: a watch whose trunk must be proven through `revision` first."""

    __slots__ = ("revision", "trunk", "watch")

    def __init__(self, watch: Watch, revision: int) -> None:
        self.watch = watch
        self.trunk: Trunk = watch.trunk
        self.revision = revision

    @property
    def holds(self) -> bool:
        """It still holds the session up."""
        watch = self.watch
        if watch.place is Place.ENDED:
            return False
        return not _in_step(watch) or self.trunk.next_revision <= self.revision


class ProgressWaiters:
    """The sessions with progress_needs."""

    __slots__ = ("_hub", "_under", "sessions", "targets")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        self.sessions: dict[Session, None] = {}
        self.targets = FreshnessTargets()
        # Those that a trunk holds up. A trunk may be gone, until they are looked at again.
        self._under: dict[Source, dict[Session, None]] = {}

    def add(self, session: Session, needs: int) -> None:
        """Take a request of a session: the proof of upstream request `needs` will do. All but two are merged."""
        session.progress_needs = (*session.progress_needs[:1], needs)
        self.sessions[session] = None

    def forget(self, session: Session) -> None:
        """Nothing is to be told to a session any more."""
        session.progress_needs = ()
        self.sessions.pop(session, None)
        self._unblock(session)

    def is_listed(self, session: Session) -> bool:
        """Whether a session that is held up waits and is listed under what holds it up; for checks."""
        blocker = session.progress_blocker
        return blocker is not None and session in self.sessions and session in self._under.get(blocker.trunk, ())

    def is_fresh(self, revision: int, needs: int) -> bool:
        """Whether etcd is known to have had no more than `revision` at some time after that request was made."""
        target = self.targets.of(needs)
        return target is not None and target <= revision

    def answer_all(self) -> None:
        """Answer everybody who can be answered. Nothing has been delivered yet in this input."""
        for session in tuple(self.sessions):
            self._answer(session)

    def learn(self, number: int, revision: int) -> bool:
        """Take what etcd had after a request, see `FreshnessTargets`. True: less may do now than was known before."""
        if not self.targets.learn(number, revision):
            return False
        self.unblock_all()
        return True

    def unblock_all(self) -> None:
        """Forget what holds sessions up, since less may do now."""
        self._under.clear()
        for session in self.sessions:
            session.progress_blocker = None

    def moved(self, sources: Iterable[Source]) -> None:
        """Answer those who can be answered now that these sources have been proven further."""
        for source in sources:
            for session in tuple(self._under.get(source, ())):
                self._answer(session)

    def _answer(self, session: Session) -> None:
        """Answer a session if that is possible; if not, note what holds it up."""
        blocker = session.progress_blocker
        if blocker is not None and blocker.holds:
            return
        target = self.targets.of(session.progress_needs[0])
        if target is None:
            return
        self._unblock(session)
        revision = self._reached(session, target)
        if revision is None:
            return
        session.progress_revision = revision
        session.progress_needs = tuple(needs for needs in session.progress_needs if not self.is_fresh(revision, needs))
        if not session.progress_needs:
            self.sessions.pop(session, None)
        hub = self._hub
        hub.stats.progress_answers += 1
        hub.answer(session, NO_WATCH_ID, hub.header_now(revision))

    def _reached(self, session: Session, target: int) -> int | None:
        """Return the p that a session may be told, `target` or more; None if there is none, and then it is blocked."""
        revision: int | None = None
        least: Watch | None = None
        known = max(session.progress_revision, target)
        # From the end: upstream watches are asked in order, so that the last one's answer tends to come last.
        for watch in reversed(session.watches.values()):
            trunk = watch.trunk
            if not _in_step(watch) or trunk.next_revision <= known:
                self._block(session, Blocker(watch, known))
                return None
            if revision is None or trunk.next_revision <= revision:
                revision, least = trunk.next_revision - 1, watch
            known = max(known, watch.progress_floor, watch.last_sent_revision)
        if revision is None or revision < known:
            if least is not None:
                self._block(session, Blocker(least, known))
            return None
        return revision

    def _block(self, session: Session, blocker: Blocker) -> None:
        session.progress_blocker = blocker
        self._under.setdefault(blocker.trunk, {})[session] = None

    def _unblock(self, session: Session) -> None:
        blocker, session.progress_blocker = session.progress_blocker, None
        if blocker is not None:
            under = self._under[blocker.trunk]
            del under[session]
            if not under:
                del self._under[blocker.trunk]


def _in_step(watch: Watch) -> bool:
    """Whether it was sent everything that its trunk has."""
    return watch.place is Place.IN_STEP and watch.source is watch.trunk
