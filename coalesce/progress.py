"""Progress: what sessions are told about how far they are, and how that is proven.

A trunk's bookmark is proven by its events, by etcd's answers to manual requests, and by its progress notifies. Manual
requests are shared: one is in flight at a time and serves all who waited when it was made; who comes later waits for
the next. They are numbered, who waits knows the first number that will do, and with an answer comes the number of a
request after which etcd was at the answer's revision (`Targets`): what reaches that revision is fresh enough, whatever
proves it; nobody is answered with what was known before it asked. Etcd drops requests that it cannot answer: while
somebody waits, the request is repeated, with pauses that double up to a bound.

A session is told p, the least bookmark of its watches' trunks, if

- p is no less than what etcd had after the session asked;
- all its watches are in step with their trunks: they were sent everything through p;
- p is not below what any of its watches knows already: the start it asked for, "now", its last event, an earlier
  progress (a client resumes from the last revision it was told, clientv3 even from this one).

It is told before anything is delivered in the same input: the shell may hand a delivery back, and then it would not
be true.

Ids that a compaction cancelled are no watches and hold nothing up, although etcd lets them silence a stream: the
client has been told that they are dead, and nothing will ever come of them. A request on a session without watches is
dropped, as etcd does. Of those that wait, all but the first and the last are merged.

Servers without ordered progress (before 3.4.31 and 3.5.13) answer manual requests at once and even wrongly. They are
only asked which revision they have; proofs are events and progress notifies, and answers take as long as these do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING

from coalesce.backfill import Backfill
from coalesce.effects import RequestProgress
from coalesce.inputs import NO_WATCH_ID
from coalesce.session import Place, Session, Watch
from proto.scan import Header

if TYPE_CHECKING:
    from coalesce.hub import Hub
    from coalesce.source import Upstream

# Old bookmarks are looked for this many times within bookmark_s: one request may be dropped, or two.
_LOOKS = 4
_TARGETS_MAX = 64


class Targets:
    """What etcd is known to have had after a request was made: who asked before it must not be told less.

    Numbers and revisions rise together: a later request that found a lower revision (another member, another stream)
    says more about the earlier ones as well. Bounded: without a target of its own a request has that of a later one.
    """

    __slots__ = ("_numbers", "_revisions")

    def __init__(self) -> None:
        self._numbers: list[int] = []
        self._revisions: list[int] = []

    def learn(self, number: int, revision: int) -> None:
        """After request `number` was made the store was at `revision`."""
        place = bisect_left(self._numbers, number)
        if place < len(self._numbers) and self._revisions[place] <= revision:
            return
        end = place + (self._numbers[place : place + 1] == [number])
        first = bisect_left(self._revisions, revision, 0, place)
        self._numbers[first:end] = [number]
        self._revisions[first:end] = [revision]
        if len(self._numbers) > _TARGETS_MAX:
            del self._numbers[0], self._revisions[0]

    def of(self, number: int) -> int | None:
        """Return the least revision that will do for who waits for request `number`; None = not known yet."""
        place = bisect_left(self._numbers, number)
        return self._revisions[place] if place < len(self._numbers) else None

    def clear(self) -> None:
        """Forget all."""
        self._numbers.clear()
        self._revisions.clear()


class Progress:
    """Requests to etcd, answers to sessions, progress notifies and bookmarks."""

    __slots__ = (
        "_asked_at",
        "_bookmark_at",
        "_hub",
        "_in_flight",
        "_pause_s",
        "_retry_at",
        "_soon_at",
        "_wanted",
        "targets",
        "waiting",
    )

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        # Sessions with progress_needs.
        self.waiting: dict[Session, None] = {}
        self.targets = Targets()
        # The newest request has not been answered by anybody.
        self._in_flight = False
        # The number of the newest request that somebody wants made.
        self._wanted = 0
        # When to ask again; None = nobody waits.
        self._retry_at: float | None = None
        self._pause_s = 0.0
        # When the newest request was made.
        self._asked_at = 0.0
        # When to make one that is wanted and would come too soon after the newest; None = none is.
        self._soon_at: float | None = None
        # When to look for old bookmarks; None = there are no trunks.
        self._bookmark_at: float | None = None

    # who wants to know

    def wait(self, session: Session) -> None:
        """Take note that a session asks for progress."""
        if not session.watches:
            return
        needs = self._hub.progress_serial + 1
        session.progress_needs = (*session.progress_needs[:1], needs)
        self.waiting[session] = None
        self.want()

    def want(self) -> None:
        """Have a request made, now or as soon as the one in flight is answered."""
        self._wanted = self._hub.progress_serial + 1
        self._pause_s = self._hub.limits.progress_retry_s
        if not self._in_flight:
            self._ask_soon()
        elif self._retry_at is not None:
            self._retry_at = min(self._retry_at, self._hub.now + self._pause_s)

    def began(self, watch: Watch) -> None:
        """Take note of a new watch."""
        hub = self._hub
        hub.notifying.began(watch)
        if self._bookmark_at is None:
            self._bookmark_at = hub.now + hub.limits.bookmark_s / _LOOKS

    def forget(self, watch: Watch) -> None:
        """A watch is gone; with the last one of its session goes what the session has asked."""
        self._hub.notifying.forget(watch)
        if not watch.session.watches:
            self.forget_session(watch.session)

    def forget_session(self, session: Session) -> None:
        """Nothing is to be told to a session any more."""
        session.progress_needs = ()
        self.waiting.pop(session, None)

    # what is proven

    def progressed(self, upstreams: Sequence[Upstream], header: Header, number: int) -> None:
        """Take what came of requests: all of these are complete through a revision that followed request `number`."""
        hub = self._hub
        hub.saw(header)
        if number:
            self.targets.learn(number, header.revision)
        if upstreams and hub.ordered_progress:
            for upstream in upstreams:
                self.proven(upstream, header.revision)
            self._in_flight = False
        self._settle()
        if self._wanted > hub.progress_serial and not self._in_flight:
            self._ask_soon()

    def proven(self, upstream: Upstream, revision: int) -> None:
        """Take note that everything of an upstream watch through `revision` has come."""
        if upstream.closed or not upstream.created:
            return
        owner = upstream.owner
        if isinstance(owner, Backfill):
            self._hub.backfills.progressed(owner, revision)
        else:
            owner.advance(revision)

    # time

    def next_deadline(self) -> float | None:
        """Return when something is to be done next."""
        first: float | None = None
        for at in (self._soon_at, self._retry_at, self._bookmark_at):
            if at is not None and (first is None or at < first):
                first = at
        return first

    def settle_waiting(self) -> None:
        """Answer those who can be answered, since something was proven. Nothing has been delivered in this input."""
        if self.waiting:
            self._settle()

    def expire(self) -> None:
        """Do what is due."""
        hub = self._hub
        if self._bookmark_at is not None and self._bookmark_at <= hub.now:
            self._look_at_bookmarks()
        if self._soon_at is not None and self._soon_at <= hub.now:
            self._ask()
        if self._retry_at is not None and self._retry_at <= hub.now:
            self._retry()

    def _answer(self, session: Session) -> None:
        """Answer a session that waits, if it can be answered now."""
        hub = self._hub
        revision = self._reached(session)
        if revision is None or not self.is_fresh(revision, session.progress_needs[0]):
            return
        session.progress_revision = revision
        session.progress_needs = tuple(needs for needs in session.progress_needs if not self.is_fresh(revision, needs))
        if not session.progress_needs:
            self.waiting.pop(session, None)
        hub.stats.progress_answers += 1
        hub.answer(session, NO_WATCH_ID, hub.header_now(revision))

    def is_fresh(self, revision: int, needs: int) -> bool:
        """Whether etcd is known to have had no more than `revision` at some time after that request was made."""
        target = self.targets.of(needs)
        return target is not None and target <= revision

    def _reached(self, session: Session) -> int | None:
        """Return the p that a session may be told; None if there is none."""
        revision: int | None = None
        known = session.progress_revision
        for watch in session.watches.values():
            trunk = watch.trunk
            if watch.place is not Place.IN_STEP or watch.source is not trunk:
                return None
            if revision is None or trunk.next_revision <= revision:
                revision = trunk.next_revision - 1
            known = max(known, watch.progress_floor, watch.last_sent_revision)
        if revision is None or revision < known:
            return None
        return revision

    def _settle(self) -> None:
        """Tell all who wait what can be told now. Nothing has been delivered yet in this input."""
        for session in tuple(self.waiting):
            self._answer(session)
        self._hub.notifying.settle()
        if not self.waiting and not self._hub.notifying.asking:
            self.targets.clear()

    def _look_at_bookmarks(self) -> None:
        hub = self._hub
        if not hub.trunks_open:
            self._bookmark_at = None
            return
        self._bookmark_at = hub.now + hub.limits.bookmark_s / _LOOKS
        old = hub.now - hub.limits.bookmark_s / 2
        if hub.ordered_progress and any(trunk.proven_at <= old for trunk in hub.trunks_open.values()):
            self.want()

    def _retry(self) -> None:
        """Look again whether anybody can be answered; if somebody still waits, ask again."""
        hub = self._hub
        # Events may have done as proof.
        self._settle()
        backfills = [backfill for backfill in self._hub.backfills.open if self._may_prove(backfill)]
        if not self.waiting and not hub.notifying.asking and not backfills:
            self._in_flight = False
            self._retry_at = None
            return
        self._pause_s = min(self._pause_s * 2, self._hub.limits.progress_retry_s_max)
        asks = bool(self.waiting or hub.notifying.asking)
        if not hub.ordered_progress:
            # One answer that tells the revision will do; what is to prove it comes by itself.
            asks = asks and self.targets.of(self._wanted) is None
        elif not asks:
            asks = any(each.proof < hub.progress_serial for each in backfills)
        if asks:
            self._ask()
        else:
            # Events keep coming, and prove more than an answer would.
            self._retry_at = self._hub.now + self._pause_s

    def _may_prove(self, backfill: Backfill) -> bool:
        return backfill.upstream.created and not backfill.paused

    def _ask_soon(self) -> None:
        """Make a request, but not too soon after the newest."""
        at = self._asked_at + self._hub.limits.progress_interval_s
        if at <= self._hub.now:
            self._ask()
        else:
            self._soon_at = at

    def _ask(self) -> None:
        hub = self._hub
        hub.progress_serial += 1
        self._asked_at = hub.now
        self._soon_at = None
        self._retry_at = hub.now + self._pause_s
        if hub.ordered_progress:
            self._in_flight = True
            hub.stats.progress_asked += 1
        if hub.ordered_progress or self.waiting or hub.notifying.asking:
            hub.effects.append(RequestProgress(hub.all_upstreams(), hub.progress_serial))
