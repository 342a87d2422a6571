"""progress_notify: quiet watches get progress under their own id, as often as etcd sends it.

Operators set the interval at etcd, and etcd does not say what it is. So every upstream watch asks for progress_notify,
and what etcd sends is passed on: a *round* goes over the watches of the trunk that asked. A watch gets progress if it
had no event since the last round, is in step with its trunk, and its start is not in the future. As in etcd
(api/v3rpc/watch.go, sendLoop), the first round after its create counts.

Etcd leaves an upstream watch out that had events. On such a trunk a watch may be quiet all the same: its filters drop
the events, or it is new. Then only the pace is missing, since the trunk's events themselves prove how far it is. The
pace is learnt from the spacing of etcd's notifications on any trunk without events in between (`Pace`), and rounds of
our own keep it. Until it is known (it takes three notifications, and on a proxy all of whose trunks are busy none may
ever come) rounds are made every UNKNOWN_PACE_S, which is no longer than any interval in use; yet while some trunk is
quiet and etcd does not notify it, the interval is longer than half of that time, and the rounds become as rare.

A setting of our own, progress_notify_s, makes rounds on all trunks at least so often; so does a notification of etcd
that is overdue. Such a round, and one on a busy trunk, waits for progress that is as new as the round (see
`progress`), but on a busy trunk not for long: there its newest event will do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from coalesce.batch import Bookmark
from coalesce.effects import Deliver
from coalesce.session import Place, Watch

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.trunk import Trunk

# The pace while etcd's is not known; nobody sets a shorter interval but for a test.
UNKNOWN_PACE_S = 1.0
# No interval below is believed: a loop that was held up sees notifications close behind each other.
PACE_S_MIN = 0.1
# Spacings are alike that differ by this part: streams have jitters of their own.
_AGREEING = 0.25
# Etcd's interval is up to a tenth longer on one stream than on another (GetProgressReportInterval).
_JITTER = 1.1
_NEVER = float("inf")
# A notification that is so much later than the pace is not waited for.
_OVERDUE = 1.2
# The part of a pace that a round on a busy trunk waits for fresh progress.
_PATIENCE = 0.05
# Watches that get progress in one step, and trunks that are looked at; more wait for the next ring of the timer, which
# is due at once.
WATCHES_PER_STEP = 1000


class Pace:
    """How often etcd notifies, learnt from what it sends on the present connection."""

    __slots__ = ("_last_s", "_longer_than_s", "_seconds", "_taken_at", "since")

    def __init__(self) -> None:
        # When the connection was made: what came before is of another stream, and maybe of another server.
        self.since = -1.0
        # The interval; None = not known yet.
        self._seconds: float | None = None
        # The newest spacing, and when it was taken. One alone may be wrong: notifications can be held up on their way.
        self._last_s = 0.0
        self._taken_at = 0.0
        # A quiet trunk was not notified for so long that the interval must be longer than this.
        self._longer_than_s = 0.0

    def start_over(self, now: float) -> None:
        """Forget what was learnt: there is another connection."""
        self.since = now
        self._seconds = None
        self._last_s = self._longer_than_s = 0.0

    def learn(self, spacing_s: float, now: float) -> None:
        """Take the time between two notifications of one trunk. All trunks of a stream are notified at once."""
        if spacing_s < PACE_S_MIN or (self._last_s and now - self._taken_at < spacing_s / 2):
            return
        last_s, self._last_s, self._taken_at = self._last_s, spacing_s, now
        if abs(spacing_s - last_s) <= _AGREEING * last_s:
            self._seconds = min(spacing_s, last_s)

    def heard_nothing(self, quiet_s: float) -> None:
        """Take note that etcd did not notify a trunk that had no event for so long. It may have left one out."""
        self._longer_than_s = max(self._longer_than_s, quiet_s / (2 * _JITTER))

    @property
    def is_known(self) -> bool:
        """Two spacings in a row were alike."""
        return self._seconds is not None

    @property
    def seconds(self) -> float:
        """Etcd's interval as far as it is known, else what is no longer than that."""
        if self._seconds is not None:
            return self._seconds
        return max(UNKNOWN_PACE_S, self._longer_than_s)


class Notices:
    """The watches of one trunk that asked for progress_notify, and when they got it last."""

    __slots__ = (
        "asked_at",
        "needs",
        "new",
        "round_at",
        "round_events",
        "round_revision",
        "timer_at",
        "trunk",
        "watches",
    )

    def __init__(self, trunk: Trunk, now: float) -> None:
        self.trunk = trunk
        # By variant; no dict in it is empty.
        self.watches: dict[int, dict[Watch, None]] = {}
        # Those of them that came since the last round.
        self.new: dict[Watch, None] = {}
        # When the last round was made, how far the trunk was, and what it had received by then; at first the latter is
        # of etcd's last notification: what came since has etcd leave the trunk out.
        self.round_at = now
        self.round_revision = 0
        self.round_events = trunk.noticed_events
        # The progress request whose proof the next round waits for, and since when; 0 = it waits for none.
        self.needs = 0
        self.asked_at = 0.0
        # When to see whether a round is due; None = there are no watches.
        self.timer_at: float | None = None

    def add(self, watch: Watch) -> None:
        """Take a watch in."""
        self.watches.setdefault(watch.variant, {})[watch] = None
        self.new[watch] = None

    def remove(self, watch: Watch) -> None:
        """Let a watch go."""
        alike = self.watches[watch.variant]
        del alike[watch]
        if not alike:
            del self.watches[watch.variant]
        self.new.pop(watch, None)

    def candidates(self) -> list[Watch]:
        """Return those that may have had no event since the last round.

        What a group of watches in step was sent, all of its watches were sent: only those that are new may be quiet.
        """
        groups = self.trunk.fanout.groups
        found: list[Watch] = []
        for variant, watches in self.watches.items():
            group = groups.get(variant)
            if group is None or group.sent_revision <= self.round_revision:
                found += watches
            else:
                found += [watch for watch in self.new if watch.variant == variant]
        return found


def _is_quiet(watch: Watch, round_revision: int) -> bool:
    """Whether a watch had no event since a round, and can be given progress now."""
    trunk = watch.trunk
    return (
        watch.place is Place.IN_STEP
        and watch.source is trunk
        and watch.last_sent_revision <= max(round_revision, watch.noted_revision)
        and watch.progress_floor < trunk.next_revision
    )


class Notifying:
    """Rounds of progress over the watches that asked for it."""

    __slots__ = ("_hub", "_rounds", "asking", "pace")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        self.pace = Pace()
        # Those whose round waits for progress.
        self.asking: dict[Notices, None] = {}
        # Rounds that go on: the watches to come, and how far their trunk was at the round before.
        self._rounds: deque[tuple[Iterator[Watch], int]] = deque()

    def began(self, watch: Watch) -> None:
        """Take note of a new watch."""
        if not watch.progress_notify:
            return
        trunk = watch.trunk
        notices = trunk.notices
        if notices is None:
            notices = trunk.notices = Notices(trunk, self._hub.now)
            self._set_timer(notices)
        notices.add(watch)

    def forget(self, watch: Watch) -> None:
        """A watch is gone."""
        notices = watch.trunk.notices
        if notices is not None and watch.progress_notify:
            notices.remove(watch)
            if not notices.watches:
                self.asking.pop(notices, None)
                self._hub.notices.stop(notices)
                watch.trunk.notices = None

    def notified(self, trunk: Trunk) -> None:
        """Etcd has notified a trunk, whose bookmark has been moved: pass it on."""
        now = self._hub.now
        at = trunk.noticed_at
        if at > self.pace.since and trunk.events == trunk.noticed_events:
            self.pace.learn(now - at, now)
        trunk.noticed_at = now
        trunk.noticed_events = trunk.events
        if trunk.notices is not None and not trunk.opening:
            self._round(trunk.notices)

    def settle(self, trunks: Sequence[Trunk] | None = None) -> None:
        """Make the rounds that waited for progress which has come: of these trunks, or (None) of all."""
        moved = tuple(self.asking) if trunks is None else [trunk.notices for trunk in trunks]
        for notices in moved:
            if (
                notices is not None
                and notices in self.asking
                and self._hub.progress.waiting.is_fresh(notices.trunk.next_revision - 1, notices.needs)
            ):
                self._round(notices)

    def next_deadline(self) -> float | None:
        """Return when something is to be done next."""
        return self._hub.now if self._rounds else self._hub.notices.next_deadline()

    def expire(self) -> None:
        """Go on with a round that was too large for one step, and see which ones are due."""
        self._deliver()
        for notices in islice(self._hub.notices.due(self._hub.now), WATCHES_PER_STEP):
            self._look(notices)

    def _look(self, notices: Notices) -> None:
        """Make a round, or ask for what it needs, if it is due."""
        hub, trunk, pace = self._hub, notices.trunk, self.pace
        busy = trunk.events != notices.round_events
        if not busy and not pace.is_known and not trunk.opening and notices.round_at > pace.since:
            pace.heard_nothing(hub.now - notices.round_at)
        wanted_s = min(self._setting_s(), pace.seconds if busy else self._overdue_s())
        if trunk.opening or notices.round_at + wanted_s > hub.now:
            self._set_timer(notices)
        elif not any(_is_quiet(watch, notices.round_revision) for watch in notices.candidates()):
            self._end_round(notices)
        elif busy and (not hub.ordered_progress or (notices.needs and hub.now > notices.asked_at)):
            self._round(notices)
        else:
            self._ask(notices, pace.seconds * _PATIENCE if busy else wanted_s)

    def _setting_s(self) -> float:
        """Return the interval that is set here; infinite if it is not shorter than etcd's, which does as well then."""
        setting_s = self._hub.limits.progress_notify_s
        return _NEVER if self.pace.is_known and setting_s * _JITTER >= self.pace.seconds else setting_s

    def _overdue_s(self) -> float:
        """Return after which time a quiet trunk is not left to etcd's own notification any more."""
        return self.pace.seconds * _OVERDUE if self.pace.is_known else _NEVER

    def _ask(self, notices: Notices, patience_s: float) -> None:
        """Have the round wait for progress that is as new as now; one that is overdue keeps its place."""
        hub = self._hub
        if not notices.needs:
            notices.needs = hub.progress_serial + 1
            notices.asked_at = hub.now
            self.asking[notices] = None
            hub.progress.want(notices.trunk.upstream)
        hub.notices.start(notices, hub.now + patience_s)

    def _round(self, notices: Notices) -> None:
        """Give progress to the quiet watches of a trunk."""
        self._rounds.append((iter(notices.candidates()), notices.round_revision))
        self._end_round(notices)
        self._deliver()

    def _end_round(self, notices: Notices) -> None:
        trunk = notices.trunk
        notices.round_at = self._hub.now
        notices.round_revision = trunk.next_revision - 1
        notices.round_events = trunk.events
        notices.needs = 0
        notices.new.clear()
        self.asking.pop(notices, None)
        self._set_timer(notices)

    def _set_timer(self, notices: Notices) -> None:
        """Look again when a round would be due on a busy trunk; it may be one by then."""
        hub = self._hub
        setting_s, pace_s = self._setting_s(), self.pace.seconds
        at = notices.round_at + min(setting_s, pace_s)
        if at <= hub.now:
            # Etcd's own notification is awaited.
            at = hub.now + pace_s * (_JITTER - 1 if self.pace.is_known else _JITTER / 2)
            if notices.round_at + setting_s > hub.now:
                at = min(at, notices.round_at + setting_s)
        hub.notices.start(notices, at)

    def _deliver(self) -> None:
        """Go on with the rounds, over as many watches as one step may look at."""
        rounds, left = self._rounds, WATCHES_PER_STEP
        while rounds and left:
            coming, before = rounds[0]
            watches = list(islice(coming, left))
            if len(watches) < left:
                rounds.popleft()
            left -= len(watches)
            self._send([watch for watch in watches if _is_quiet(watch, before)])

    def _send(self, watches: list[Watch]) -> None:
        """Give progress to watches of one trunk."""
        if watches:
            hub = self._hub
            revision = watches[0].trunk.next_revision - 1
            for watch in watches:
                watch.progress_floor = revision
            hub.stats.progress_notifies += len(watches)
            hub.stats.delivered += len(watches)
            hub.effects.append(Deliver(Bookmark(hub.header_now(revision)), watches))
