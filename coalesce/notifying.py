"""progress_notify: quiet watches get progress under their own id, as often as etcd sends it.

Operators set the interval at etcd, and etcd does not report it. So every upstream watch asks for progress_notify, and
etcd's notifications are passed on: a *round* goes over the watches of the trunk that asked for them. A watch gets
progress if it had no event since the last round, is in step with its trunk, and its start is not in the future. As in
etcd (api/v3rpc/watch.go, sendLoop), the first round after its create counts.

Etcd skips an upstream watch that had events. On such a trunk a watch may still be quiet: its filters drop the events,
or it is new. Then only the interval is missing, since the trunk's events prove its progress. The interval, or pace, is
learnt from the time between notifications on any trunk without events in between (`NotifyInterval`), and the core
makes its own rounds at that pace. Until it is known (this takes three notifications, and on a proxy all of whose trunks
are busy there may never be one) rounds are made every UNKNOWN_PACE_S, which is no longer than any interval in use; but
while a trunk is quiet and etcd does not notify it, the interval must be longer than half of that time, and the rounds
become less frequent accordingly.

The setting progress_notify_s makes rounds on all trunks at least that often; so does an overdue notification of etcd.
Such a round, and one on a busy trunk, waits for progress that is as new as the round (see `progress`), but on a busy
trunk only briefly: after that the trunk's newest event is used.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter

from coalesce.batch import notification_payload
from coalesce.effects import Deliver
from coalesce.model import NotifiedWatches, Trunk, Watch
from coalesce.progress_requests import ProgressRequests
from coalesce.state import CoreState
from coalesce.waiting import ProgressWaiters

# The pace while etcd's interval is not known; shorter intervals are set in tests only.
UNKNOWN_PACE_S = 1.0
# Shorter intervals are ignored: after a delay of the loop, notifications arrive in quick succession.
PACE_S_MIN = 0.1
# Two intervals agree if they differ by at most this fraction: each stream has its own jitter.
_AGREEING = 0.25
# Etcd's interval is up to a tenth longer on one stream than on another (GetProgressReportInterval).
_JITTER = 1.1
_NEVER = float("inf")
# A notification is overdue after this many times the pace.
_OVERDUE = 1.2
# The fraction of the pace for which a round on a busy trunk waits for fresh progress.
_PATIENCE = 0.05
# Maximum watches that get progress in one step, and trunks whose rounds are examined or begin; the rest waits for the
# next timer, which is due at once.
WATCHES_PER_STEP = 1000
_TRUNK_OF = attrgetter("trunk")


class NotifyInterval:
    """Etcd's interval of progress notifications, learnt from those on the current connection."""

    def __init__(self) -> None:
        # When the connection was made: earlier notifications are of another stream, and maybe of another server.
        self.since = -1.0
        # The interval; None = not known yet.
        self._seconds: float | None = None
        # The newest interval, and when it was measured. A single one may be wrong: notifications can be delayed.
        self._last_s = 0.0
        self._taken_at = 0.0
        # A quiet trunk was not notified for so long that the interval must be longer than this.
        self._longer_than_s = 0.0

    def start_over(self, now: float) -> None:
        """Discard what was learnt: there is a new connection."""
        self.since = now
        self._seconds = None
        self._last_s = self._longer_than_s = 0.0

    def learn(self, spacing_s: float, now: float) -> None:
        """Record the time between two notifications of one trunk. Etcd notifies all trunks of a stream at once."""
        if spacing_s < PACE_S_MIN or (self._last_s and now - self._taken_at < spacing_s / 2):
            return
        last_s, self._last_s, self._taken_at = self._last_s, spacing_s, now
        if abs(spacing_s - last_s) <= _AGREEING * last_s:
            self._seconds = min(spacing_s, last_s)

    def heard_nothing(self, quiet_s: float) -> None:
        """Record that etcd did not notify a trunk that was quiet for so long. It may have skipped one notification."""
        self._longer_than_s = max(self._longer_than_s, quiet_s / (2 * _JITTER))

    @property
    def is_known(self) -> bool:
        """Whether two consecutive intervals agreed."""
        return self._seconds is not None

    @property
    def seconds(self) -> float:
        """Etcd's interval if it is known, else a lower bound of it."""
        if self._seconds is not None:
            return self._seconds
        return max(UNKNOWN_PACE_S, self._longer_than_s)


def _is_quiet(watch: Watch, round_revision: int) -> bool:
    """Whether a watch had no event since a round, and can get progress now."""
    trunk = watch.trunk
    return (
        watch.follows_trunk
        and watch.last_sent_revision <= max(round_revision, watch.noted_revision)
        and watch.progress_floor < trunk.next_revision
    )


class ProgressNotifier:
    """Makes rounds of progress over the watches that asked for it."""

    def __init__(self, state: CoreState, waiters: ProgressWaiters, requests: ProgressRequests) -> None:
        self._state = state
        self._waiters = waiters
        self._requests = requests
        self.pace = NotifyInterval()
        # Unfinished rounds: the remaining watches, and the trunk's revision at the round before.
        self._rounds: deque[tuple[Iterator[Watch], int]] = deque()
        # Notices whose progress may have arrived.
        self._proven: dict[NotifiedWatches, None] = {}

    def began(self, watch: Watch) -> None:
        """Add a new watch, if it asked for progress_notify."""
        if not watch.progress_notify:
            return
        trunk = watch.trunk
        notices = trunk.notices
        if notices is None:
            notices = trunk.notices = NotifiedWatches(trunk, self._state.now, trunk.noticed_events)
            self._set_timer(notices)
        notices.add(watch)

    def forget(self, watch: Watch) -> None:
        """Remove a watch that has ended."""
        notices = watch.trunk.notices
        if notices is not None and watch.progress_notify:
            notices.remove(watch)
            if not notices.watches:
                self._waiters.rounds.pop(notices, None)
                self._proven.pop(notices, None)
                self._state.notices.stop(notices)
                watch.trunk.notices = None

    def notified(self, trunk: Trunk) -> None:
        """Etcd has notified a trunk, whose bookmark is already updated: make a round."""
        now = self._state.now
        at = trunk.noticed_at
        if at > self.pace.since and trunk.events == trunk.noticed_events:
            self.pace.learn(now - at, now)
        trunk.noticed_at = now
        trunk.noticed_events = trunk.events
        if trunk.notices is not None and not trunk.opening:
            self._round(trunk.notices)
            self._deliver()

    def settle(self, trunks: Sequence[Trunk] | None = None) -> None:
        """Make the rounds whose progress has arrived, of these trunks or (None) of all, as many as one step allows."""
        rounds = self._waiters.rounds
        if trunks is None:
            self._proven.update(rounds)
        elif rounds:
            all_notices = (trunk.notices for trunk in trunks)
            self._proven.update((notices, None) for notices in all_notices if notices is not None and notices in rounds)
        self._settle_some()
        self._deliver()

    def _settle_some(self) -> None:
        for notices in list(islice(self._proven, WATCHES_PER_STEP)):
            del self._proven[notices]
            waits = notices in self._waiters.rounds
            if waits and self._waiters.is_fresh(notices.trunk.next_revision - 1, notices.needs):
                self._round(notices)

    def next_deadline(self) -> float | None:
        """Return when `expire` is due."""
        return self._state.now if self._rounds or self._proven else self._state.notices.next_deadline()

    def expire(self) -> None:
        """Continue rounds that were too large for one step, and start those that are due."""
        self._settle_some()
        for notices in islice(self._state.notices.due(self._state.now), WATCHES_PER_STEP):
            self._look(notices)
        self._deliver()

    def _look(self, notices: NotifiedWatches) -> None:
        """If a round is due, make it, or request the progress it needs."""
        state, trunk, pace = self._state, notices.trunk, self.pace
        busy = trunk.events != notices.round_events
        if not busy and not pace.is_known and not trunk.opening and notices.round_at > pace.since:
            pace.heard_nothing(state.now - notices.round_at)
        wanted_s = min(self._setting_s(), pace.seconds if busy else self._overdue_s())
        if trunk.opening or notices.round_at + wanted_s > state.now:
            self._set_timer(notices)
        elif not any(_is_quiet(watch, notices.round_revision) for watch in notices.candidates()):
            self._end_round(notices)
        elif busy and (not state.ordered_progress or (notices.needs and state.now > notices.asked_at)):
            self._round(notices)
        else:
            self._ask(notices, pace.seconds * _PATIENCE if busy else wanted_s)

    def _setting_s(self) -> float:
        """Return progress_notify_s; infinite if it is not shorter than etcd's interval, which is then sufficient."""
        setting_s = self._state.limits.progress_notify_s
        return _NEVER if self.pace.is_known and setting_s * _JITTER >= self.pace.seconds else setting_s

    def _overdue_s(self) -> float:
        """Return the time after which a quiet trunk no longer waits for etcd's notification."""
        return self.pace.seconds * _OVERDUE if self.pace.is_known else _NEVER

    def _ask(self, notices: NotifiedWatches, patience_s: float) -> None:
        """Let the round wait for progress that is as new as now; one that waits already keeps its request."""
        state = self._state
        if not notices.needs:
            notices.needs = state.progress_serial + 1
            notices.asked_at = state.now
            self._waiters.rounds[notices] = None
            self._requests.want(notices.trunk.upstream)
        state.notices.start(notices, state.now + patience_s)

    def _round(self, notices: NotifiedWatches) -> None:
        """Begin a round: the quiet watches of a trunk are to get progress."""
        self._rounds.append((iter(notices.candidates()), notices.round_revision))
        self._end_round(notices)

    def _end_round(self, notices: NotifiedWatches) -> None:
        trunk = notices.trunk
        notices.round_at = self._state.now
        notices.round_revision = trunk.next_revision - 1
        notices.round_events = trunk.events
        notices.needs = 0
        notices.new.clear()
        self._waiters.rounds.pop(notices, None)
        self._set_timer(notices)

    def _set_timer(self, notices: NotifiedWatches) -> None:
        """Check again when a round would be due on a busy trunk, since the trunk may be busy by then."""
        state = self._state
        setting_s, pace_s = self._setting_s(), self.pace.seconds
        at = notices.round_at + min(setting_s, pace_s)
        if at <= state.now:
            # Wait for etcd's own notification.
            at = state.now + pace_s * (_JITTER - 1 if self.pace.is_known else _JITTER / 2)
            if notices.round_at + setting_s > state.now:
                at = min(at, notices.round_at + setting_s)
        state.notices.start(notices, at)

    def _deliver(self) -> None:
        """Continue the rounds, over as many watches as one step allows."""
        rounds, left = self._rounds, WATCHES_PER_STEP
        while rounds and left:
            coming, before = rounds[0]
            watches = list(islice(coming, left))
            if len(watches) < left:
                rounds.popleft()
            left -= len(watches)
            quiet = [watch for watch in watches if _is_quiet(watch, before)]
            # Since the round began, some may have moved to other trunks, see `moving`.
            for trunk, alike in groupby(quiet, _TRUNK_OF):
                self._send(trunk, list(alike))

    def _send(self, trunk: Trunk, watches: list[Watch]) -> None:
        """Send progress to watches of one trunk."""
        state = self._state
        revision = trunk.next_revision - 1
        for watch in watches:
            watch.progress_floor = revision
        state.stats.progress_notifies += len(watches)
        state.stats.delivered += len(watches)
        state.effects.append(Deliver(notification_payload(state.header_now(revision)), watches))
