"""Places: where each watch is, and the backfills that bring watches to their trunk.

A backfill is a private upstream watch for watches that need events older than their trunk's history. Lagging watches
share one whenever it still holds, or has not yet reached, the revision they need, up to 10,000 of them. A backfill for
an older revision takes over the watches of those that have brought nothing yet, so that many watches share one in any
order of arrival.
When all backfills that may be open are, further watches are queued by range; a backfill that is opened for a range
takes all of its queued watches that it can serve. A backfill is a source like a trunk: its watches are in step with it,
ahead of it, or lag within its window. The window slows it down to the speed of its sessions: when it is full and no
watch is in step or ahead, the backfill is paused; otherwise the oldest batches are evicted, and the watches that needed
them get another backfill in the next turn of their session.

A watch leaves as soon as the trunk can serve it; of many, a part in each step. The last one closes the backfill. In a
quiet range a backfill proves its position by progress, since its responses carry the store's revision and prove only
their last event.

An *upgrade* is the backfill that gives a trunk prev_kv: a second upstream watch of the trunk, with prev_kv, that serves
the first watches which want it. Both run until both are proven at one revision; there the trunk takes over the
upgrade's upstream watch and closes its own. Live watches are not affected.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from operator import attrgetter
from typing import Final

from coalesce.batch import Batch
from coalesce.effects import PauseUpstream, ResumeUpstream
from coalesce.fanout import Fanout
from coalesce.model import Backfill, Group, Session, Trunk, Upstream, Watch
from coalesce.place import Place
from coalesce.progress_requests import ProgressRequests
from coalesce.ranges import CoverBranch
from coalesce.state import CoreState

SHARED_BY_MAX: Final = 10_000
"""Maximum watches that share a backfill: each of its events examines all of them in one step, 0.2 us for each."""

UPGRADED_MAX: Final = 1_000
"""Maximum watches on an upgrade: they move to the trunk in one step, 3 us for each. Others get a backfill."""


class Placement:
    """Places watches; opens, shares, paces and closes backfills."""

    def __init__(self, state: CoreState, fanout: Fanout, requests: ProgressRequests) -> None:
        self._state = state
        self._fanout = fanout
        self._requests = requests
        # How many watches of the queue and of backfills may still be examined until the next timer.
        self.left = state.limits.step_watches_max
        # The first range of the queue, if some of its watches have been placed: the others may share their backfill.
        self._begun: Trunk | CoverBranch[Group] | None = None

    # places

    def place(self, watches: Iterable[Watch]) -> None:
        """Place unplaced watches: in step, ahead, lagging, or on a backfill."""
        for watch in watches:
            trunk = watch.trunk
            if trunk.serves(watch):
                self._attach(watch, trunk)
                if watch.position < trunk.next_revision:
                    self.mark_lagging(watch)
                    self._state.want_replay(watch.session)
                else:
                    self._fanout.add(watch)
            elif watch.session.stalled or watch.session.ended:
                self.detach(watch)
                self.mark_lagging(watch)
            else:
                self._assign_backfill(watch)

    def mark_lagging(self, watch: Watch) -> None:
        """Place an unplaced watch as lagging: in its session's turn it is replayed, or gets a new source."""
        state, session = self._state, watch.session
        watch.place = Place.LAGGING
        session.lagging[watch] = None
        state.stats.lagging += 1
        state.note_behind(session)

    def catch_up(self, group: Group, session: Session) -> None:
        """Let an own group that was sent everything follow its source again."""
        self._fanout.catch_up(group, session)

    def set_aside(self, watch: Watch) -> None:
        """Move a watch from any place to the lagging ones of its session."""
        if watch.place is not Place.LAGGING:
            self.unplace(watch)
            self.mark_lagging(watch)

    def unplace(self, watch: Watch) -> None:
        """Remove a watch from its current place and record its position. The caller must place it again at once."""
        state, place = self._state, watch.place
        if place is Place.LAGGING:
            session = watch.session
            del session.lagging[watch]
            state.stats.lagging -= 1
            state.note_behind(session)
        elif place is Place.QUEUED:
            alike = state.queued[watch.branch or watch.trunk]
            del alike[watch]
            if not alike:
                del state.queued[watch.branch or watch.trunk]
            state.stats.queued -= 1
        elif watch.source is not None:
            self._fanout.remove(watch)

    def detach(self, watch: Watch) -> None:
        """Remove an unplaced watch from its source; a backfill without watches is closed.

        An upgrade stays while any watch of the trunk wants prev_kv: without it, such a watch on another backfill could
        not move to the trunk.
        """
        source, watch.source = watch.source, None
        if not isinstance(source, Backfill):
            return
        del source.watches[watch]
        if not source.watches and not source.upstream.closed and not source.is_upgrade:
            self.close(source)
        upgrade = source.trunk.upgrade
        if upgrade is None or upgrade.watches or upgrade.upstream.closed:
            return
        if not source.trunk.prev_kv_watches:
            self.close(upgrade)

    def _attach(self, watch: Watch, source: Trunk | Backfill) -> None:
        """Set the source of an unplaced watch."""
        if watch.source is not None:
            self.detach(watch)
        watch.source = source
        if isinstance(source, Backfill):
            source.watches[watch] = None

    # backfills

    def _assign_backfill(self, watch: Watch) -> None:
        """Assign an unplaced watch to a backfill, or queue it for one. Its session must not be stalled."""
        state = self._state
        trunk = watch.trunk
        if watch.wants_prev_kv:
            self.upgrade(trunk)
        backfill = self._shared(watch)
        if backfill is None:
            spared = self._superseded_by(watch)
            if not spared and state.stats.backfills >= state.limits.backfills_max:
                self.detach(watch)
                watch.place = Place.QUEUED
                state.queued.setdefault(watch.branch or watch.trunk, {})[watch] = None
                state.stats.queued += 1
                return
            backfill = self._open(trunk, watch.branch, watch.position, watch.wants_prev_kv, is_upgrade=False)
            trunk.backfills.append(backfill)
            state.stats.backfills += 1
            for other in spared:
                self._take_over(other, backfill)
        self._attach(watch, backfill)
        if watch.position < backfill.next_revision:
            self.mark_lagging(watch)
            state.want_replay(watch.session)
        else:
            self.resume_live(watch, backfill)

    def _open(
        self, trunk: Trunk, branch: CoverBranch[Group] | None, start_revision: int, prev_kv: bool, *, is_upgrade: bool
    ) -> Backfill:
        state = self._state
        history = state.new_history(start_revision, prev_kv)
        backfill = Backfill(trunk, branch, history, state.now, is_upgrade=is_upgrade)
        state.backfills[backfill] = None
        # An upgrade uses the trunks' stream: it replaces a trunk's upstream watch soon, and must not be paused.
        state.open_upstream(backfill, start_revision, prev_kv, not is_upgrade)
        return backfill

    def created(self, backfill: Backfill) -> None:
        """Etcd has registered a backfill: its progress can be requested."""
        backfill.upstream.created = True
        backfill.refused_tokens.clear()
        self._ask(backfill)

    def received(self, backfill: Backfill, batch: Batch) -> None:
        """Pass on a batch of a backfill, and move the watches that have caught up to the trunk."""
        self._trim(backfill)
        if backfill not in self._state.backfills:
            # The last watch of an upgrade was too slow, so the upgrade is not needed any more.
            return
        before = backfill.next_revision
        # An upgrade's batch may go to the trunk as well, whose history keeps one of its own.
        again = Batch(batch.header, batch.events, batch.size) if backfill.is_upgrade else batch
        self._fanout.ingest(backfill, batch)
        if backfill not in self._state.backfills:
            # To keep the batch, older ones were sent and evicted, which was all that its watches needed.
            return
        if backfill.is_upgrade:
            self._feed(backfill, before, again)
        else:
            if not backfill.paused and not backfill.is_followed and self._is_read_enough(backfill):
                backfill.paused = True
                self._state.effects.append(PauseUpstream(backfill.upstream))
            self._promote(backfill)

    def proven(self, upstream: Upstream, revision: int) -> None:
        """Record that everything of an upstream watch through `revision` has arrived."""
        if upstream.closed or not upstream.created:
            return
        source = upstream.owner
        before = source.next_revision
        self._fanout.advance(source, revision)
        if isinstance(source, Backfill):
            if source.is_upgrade:
                self._feed(source, before, None)
            else:
                self._promote(source)

    def _promote(self, backfill: Backfill) -> None:
        """Move the watches to the trunk that it can serve now; those that exceed this step, at the next timer."""
        trunk = backfill.trunk
        if trunk.is_live and backfill.next_revision >= trunk.history.floor:
            self._state.to_promote[backfill] = len(backfill.watches)
            self._promote_some(backfill)

    def _promote_some(self, backfill: Backfill) -> None:
        """Move the watches among the next ones that are to be examined; those that stay go behind the others."""
        state = self._state
        left = state.to_promote.pop(backfill)
        examined = list(islice(backfill.watches, min(left, self.left)))
        self.left -= len(examined)
        for watch in examined:
            if backfill.trunk.serves(watch):
                self.unplace(watch)
                self.place((watch,))
            else:
                del backfill.watches[watch]
                backfill.watches[watch] = None
        left = min(left - len(examined), len(backfill.watches))
        if left and backfill in state.backfills:
            state.to_promote[backfill] = left

    def close(self, backfill: Backfill, *, gone: bool = False) -> None:
        """Close a backfill without watches; `gone`: etcd has ended it already."""
        self._state.close_upstream(backfill.upstream, gone=gone)
        self._forget(backfill)

    def resume_live(self, watch: Watch, backfill: Backfill) -> None:
        """Let an unplaced watch that has caught up with its backfill follow it; resumes a paused backfill."""
        self._fanout.add(watch)
        if backfill.paused:
            backfill.paused = False
            self._state.effects.append(ResumeUpstream(backfill.upstream))
            self._ask(backfill)

    def _ask(self, backfill: Backfill) -> None:
        """Request the progress of a backfill; for an upgrade also that of its trunk: both must meet at one revision."""
        if backfill.is_upgrade:
            self._requests.want(backfill.upstream, backfill.trunk.upstream)
        else:
            self._requests.want(backfill.upstream)

    def _take_over(self, other: Backfill, backfill: Backfill) -> None:
        """Move the watches of one backfill to an older one; the last of them closes it."""
        for watch in tuple(other.watches):
            self.unplace(watch)
            self._attach(watch, backfill)
            self._fanout.add(watch)

    def _trim(self, backfill: Backfill) -> None:
        """Evict the batches that no watch of a backfill needs any more, before the next one is added."""
        history = backfill.history
        for watch in backfill.watches:
            if watch.session.stalled:
                # The window must keep what it will need, and the backfill may have to be paused.
                self.set_aside(watch)
        lagging = [watch for watch in backfill.watches if watch.place is Place.LAGGING]
        history.evict_below(min([watch.position for watch in lagging], default=backfill.next_revision))
        if backfill.is_followed or backfill.is_upgrade:
            history.evict_to(self._window_bytes_max(backfill))
            for watch in lagging:
                if watch.place is Place.LAGGING and watch.source is backfill and watch.position < history.floor:
                    # Too slow for the others: it gets another backfill in its turn.
                    self.detach(watch)
                    # It may have waited for the end of a run.
                    self._state.want_replay(watch.session)

    def expire(self) -> None:
        """Go on with the watches that can move to their trunks, and with the queue at the end of this input."""
        self.left = self._state.limits.step_watches_max
        for backfill in tuple(self._state.to_promote):
            if self.left <= 0:
                return
            if backfill in self._state.to_promote:
                self._promote_some(backfill)

    @property
    def is_due(self) -> bool:
        """Whether watches only wait for the next timer."""
        return bool(self._state.to_promote) or (self.left <= 0 and bool(self._state.queued))

    def fill_slots(self) -> None:
        """Place queued watches while a backfill may be opened, or one can be closed whose sessions are all stalled.

        All of one range, the one that needs the oldest revision first: the others share the backfill opened for it.
        """
        state = self._state
        while state.queued and self.left > 0:
            # At once: to find the first one of a dict takes time for each one that was deleted before it.
            for range_ in list(islice(state.queued, self.left)):
                if self.left <= 0:
                    return
                if range_ in state.queued and not self._fill_from(range_):
                    return

    def _fill_from(self, range_: Trunk | CoverBranch[Group]) -> bool:
        """Place queued watches of a range; False: no further backfill can be opened."""
        state = self._state
        alike = state.queued[range_]
        is_full = state.stats.backfills >= state.limits.backfills_max
        if is_full and range_ is not self._begun and not self._give_up_stalled():
            return False
        watches = sorted(islice(alike, self.left), key=attrgetter("position"))
        others = len(alike) - len(watches)
        self.left -= len(watches)
        for watch in watches:
            self.unplace(watch)
            self.place((watch,))
        again = len(state.queued.get(range_, ())) - others
        if again:
            # They need a further backfill: they wait behind the other ranges.
            state.queued[range_] = state.queued.pop(range_)
        self._begun = range_ if others and not again else None
        return True

    def _give_up_stalled(self) -> bool:
        """Close a backfill all of whose sessions are stalled; its watches get another when these drain.

        False: none is closed, or its watches exceed this step.
        """
        for backfill in self._state.backfills:
            if backfill.upstream.closed or backfill.is_upgrade:
                continue
            if all(watch.session.stalled for watch in backfill.watches):
                given_up = list(islice(backfill.watches, self.left))
                self.left -= len(given_up)
                for watch in given_up:
                    self.set_aside(watch)
                    self.detach(watch)
                return backfill not in self._state.backfills
        return False

    def _shared(self, watch: Watch) -> Backfill | None:
        trunk = watch.trunk
        fitting = [backfill for backfill in trunk.backfills if self._can_share(backfill, watch)]
        if trunk.upgrade is not None and self._can_share(trunk.upgrade, watch):
            fitting.append(trunk.upgrade)
        return max(fitting, key=lambda backfill: backfill.next_revision, default=None)

    def _can_share(self, backfill: Backfill, watch: Watch) -> bool:
        """Whether a watch may share this backfill, given its position."""
        position, floor = watch.position, backfill.history.floor
        most = UPGRADED_MAX if backfill.is_upgrade else SHARED_BY_MAX
        if backfill.upstream.closed or len(backfill.watches) >= most:
            return False
        if watch.branch is not backfill.branch or (watch.wants_prev_kv and not backfill.history.has_prev_kv):
            return False
        if backfill.is_upgrade:
            return position >= floor
        return floor <= position <= backfill.next_revision + self._state.limits.backfill_share_revisions

    def _superseded_by(self, watch: Watch) -> list[Backfill]:
        """Return the backfills that an older one, opened for `watch`, replaces; a step has room for their watches."""
        found, left = [], self._state.limits.step_watches_max
        for backfill in watch.trunk.backfills:
            if len(backfill.watches) <= left and self._is_superseded(backfill, watch):
                left -= len(backfill.watches)
                found.append(backfill)
        return found

    def _is_superseded(self, backfill: Backfill, watch: Watch) -> bool:
        """Whether an older backfill, opened for `watch`, makes this one redundant.

        Only as long as this one has brought nothing, so that nothing is read twice and no watch is delayed without end.
        """
        has_prev_kv = backfill.history.has_prev_kv
        if watch.branch is not backfill.branch or backfill.upstream.closed:
            return False
        if backfill.next_revision != backfill.upstream.start_revision or (has_prev_kv and not watch.wants_prev_kv):
            return False
        furthest = watch.position + self._state.limits.backfill_share_revisions
        if not watch.position < backfill.next_revision <= furthest:
            return False
        return all(each.place is not Place.LAGGING and each.position <= furthest for each in backfill.watches)

    def _is_read_enough(self, backfill: Backfill) -> bool:
        """Whether to pause a backfill whose watches all lag: it is full, or its watches cannot use it.

        They cannot when other histories took the memory, and the revisions that they need next were evicted.
        """
        if backfill.history.bytes > self._window_bytes_max(backfill):
            return True
        return all(watch.position < backfill.history.floor for watch in backfill.watches)

    def _window_bytes_max(self, backfill: Backfill) -> int:
        """Return the memory that a backfill may hold; while a run arrives, at least the whole run."""
        state = self._state
        limit = state.limits.backfill_bytes_max
        return max(limit, state.limits.run_bytes_max) if backfill.run is not None else limit

    def _forget(self, backfill: Backfill) -> None:
        self._state.end_run(backfill)
        backfill.history.discard()
        backfill.upstream.leave(backfill)
        del self._state.backfills[backfill]
        self._state.to_promote.pop(backfill, None)
        self._state.ending.pop(backfill, None)
        if backfill.is_upgrade:
            backfill.trunk.upgrade = None
            return
        backfill.trunk.backfills.remove(backfill)
        self._state.stats.backfills -= 1

    def restore_upgrade(self, trunk: Trunk) -> None:
        """Open an upgrade that was lost, or had to wait, if watches want prev_kv."""
        if trunk.prev_kv_watches:
            self.upgrade(trunk)

    def upgrade(self, trunk: Trunk) -> None:
        """Open an upgrade for a trunk, if it has no prev_kv and none is open. Not for a cover, see `cover`.

        It does not start below the compact revision: etcd would cancel it, and watches that need an older revision are
        on a backfill or cancelled. It waits until it is known where the trunk starts.
        """
        if trunk.prev_kv_from is not None or trunk.upgrade is not None:
            return
        if trunk.opening and trunk.upstream.start_revision is None:
            return
        state = self._state
        state.stats.upgrades += 1
        start = max(trunk.next_revision, state.compact_revision)
        trunk.upgrade = self._open(trunk, None, start, True, is_upgrade=True)

    def _feed(self, upgrade: Backfill, before: int, batch: Batch | None) -> None:
        """Let the trunk take over the upgrade's upstream watch, once both can be brought to one revision.

        `batch` took the upgrade from `before` to its position. A trunk that is behind `before` (it was reopened, or the
        upgrade started above a compaction) first catches up by its own upstream watch.
        """
        state = self._state
        trunk = upgrade.trunk
        if not trunk.is_live or not before <= trunk.next_revision <= upgrade.next_revision:
            return
        prev_kv_from = trunk.next_revision
        trunk.history.has_prev_kv = True
        if batch is not None:
            self._fanout.ingest(trunk, batch)
        self._fanout.advance(trunk, upgrade.next_revision - 1)
        state.close_upstream(trunk.upstream)
        trunk.upstream = upgrade.upstream
        trunk.upstream.source = trunk
        trunk.prev_kv_from = prev_kv_from
        watches = list(upgrade.watches)
        for watch in watches:
            self.unplace(watch)
            # Not by detach(), which could close the upstream watch.
            watch.source = None
        upgrade.watches.clear()
        self._forget(upgrade)
        self.place(watches)
        for backfill in tuple(trunk.backfills):
            self._promote(backfill)
