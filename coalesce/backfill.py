"""Backfills: private upstream watches that bring watches too old for the history up to their trunk.

Lagging watches share a backfill whenever it still holds, or has not yet reached, the revision they need. A backfill for
an older revision takes over the watches of those that have brought nothing yet, so that many watches share one in any
order of arrival. A backfill is a source like a trunk: its watches are in step with it, ahead of it, or lag within its
window. The window slows it down to the speed of its sessions: when it is full and no watch is in step or ahead, the
backfill is paused; otherwise the oldest batches are evicted, and the watches that needed them get another backfill in
the next turn of their session.

A watch leaves as soon as the trunk can serve it. The last one closes the backfill. In a quiet range a backfill proves
its position by progress, since its responses carry the store's revision and prove only their last event.

An *upgrade* is the backfill that gives a trunk prev_kv: a second upstream watch of the trunk, with prev_kv, that serves
the first watches which want it. Both run until both are proven at one revision; there the trunk takes over the
upgrade's upstream watch and closes its own. Live watches are not affected.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from coalesce.batch import Batch
from coalesce.effects import PauseUpstream, ResumeUpstream
from coalesce.session import Place, Session, Watch
from coalesce.source import Source
from coalesce.trunk import Trunk

if TYPE_CHECKING:
    from coalesce.hub import CoreState


class Backfill(Source):
    """One upstream watch for some lagging watches of a trunk."""

    __slots__ = ("is_upgrade", "paused", "trunk")

    def __init__(
        self, hub: CoreState, trunk: Trunk, start_revision: int, prev_kv: bool, *, is_upgrade: bool = False
    ) -> None:
        super().__init__(hub, trunk.key, trunk.range_end, start_revision, prev_kv)
        self.trunk = trunk
        self.is_upgrade = is_upgrade
        self.paused = False
        # An upgrade uses the trunks' stream: it replaces a trunk's upstream watch soon, and must not be paused.
        self.open(start_revision, prev_kv, not is_upgrade)

    def sessions(self) -> Iterator[Session]:
        """Walk the sessions of its watches."""
        for watch in self.watches:
            yield watch.session
        if self.is_upgrade:
            yield from self.trunk.sessions()

    def can_serve(self, watch: Watch) -> bool:
        """Whether a watch may share this backfill, given its position."""
        position = watch.position
        if watch.wants_prev_kv and not self.history.has_prev_kv:
            return False
        if self.is_upgrade:
            return position >= self.history.floor
        return self.history.floor <= position <= self.next_revision + self.hub.limits.backfill_share_revisions

    def superseded_by(self, watch: Watch) -> bool:
        """Whether an older backfill, opened for `watch`, makes this one redundant.

        Only as long as this one has brought nothing, so that nothing is read twice and no watch is delayed without end.
        """
        if self.next_revision != self.upstream.start_revision or (self.history.has_prev_kv and not watch.wants_prev_kv):
            return False
        furthest = watch.position + self.hub.limits.backfill_share_revisions
        if not watch.position < self.next_revision <= furthest:
            return False
        return all(each.place is not Place.LAGGING and each.position <= furthest for each in self.watches)


class Backfills:
    """Opens, shares, paces and closes backfills."""

    __slots__ = ("_hub", "open")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        # All of them, upgrades included.
        self.open: dict[Backfill, None] = {}

    def house(self, watch: Watch) -> None:
        """Assign an unplaced watch to a backfill, or queue it for one. Its session must not be stalled."""
        hub = self._hub
        trunk = watch.trunk
        if watch.wants_prev_kv:
            self.upgrade(trunk)
        backfill = self._shared(watch)
        if backfill is None:
            spared = [each for each in trunk.backfills if each.superseded_by(watch)]
            if not spared and hub.stats.backfills >= hub.limits.backfills_max:
                hub.detach(watch)
                watch.place = Place.QUEUED
                hub.queued[watch] = None
                hub.stats.queued += 1
                return
            backfill = Backfill(hub, trunk, watch.position, watch.wants_prev_kv)
            trunk.backfills.append(backfill)
            self.open[backfill] = None
            hub.stats.backfills += 1
            for other in spared:
                self._take_over(other, backfill)
        hub.attach(watch, backfill)
        if watch.position < backfill.next_revision:
            hub.mark_lagging(watch)
            hub.replays.want(watch.session)
        else:
            self.resume_live(watch, backfill)

    def created(self, backfill: Backfill) -> None:
        """Etcd has registered a backfill: its progress can be requested."""
        backfill.upstream.created = True
        backfill.refused_tokens.clear()
        self._ask(backfill)

    def received(self, backfill: Backfill, batch: Batch) -> None:
        """Pass on a batch of a backfill, and move the watches that have caught up to the trunk."""
        self._trim(backfill)
        if backfill not in self.open:
            # The last watch of an upgrade was too slow, so the upgrade is not needed any more.
            return
        before = backfill.next_revision
        backfill.ingest(batch)
        if backfill not in self.open:
            # To keep the batch, older ones were sent and evicted, which was all that its watches needed.
            return
        if backfill.is_upgrade:
            self._feed(backfill, before, batch)
        else:
            if not backfill.paused and not backfill.fanout.has_watches and self._is_read_enough(backfill):
                backfill.paused = True
                self._hub.effects.append(PauseUpstream(backfill.upstream))
            self.promote(backfill)

    def progressed(self, backfill: Backfill, revision: int) -> None:
        """Everything through `revision` has arrived."""
        before = backfill.next_revision
        backfill.advance(revision)
        if backfill.is_upgrade:
            self._feed(backfill, before, None)
        else:
            self.promote(backfill)

    def promote(self, backfill: Backfill) -> None:
        """Move the watches to the trunk that it can serve now."""
        trunk = backfill.trunk
        if trunk.opening or backfill.next_revision < trunk.history.floor:
            return
        for watch in [watch for watch in backfill.watches if trunk.serves(watch)]:
            self._hub.unplace(watch)
            self._hub.place((watch,))

    def on_watch_left(self, source: Source, watch: Watch) -> None:
        """Record that a watch has left; the last one closes the backfill.

        An upgrade stays while any watch of the trunk wants prev_kv: without it, such a watch on another backfill could
        not move to the trunk.
        """
        assert isinstance(source, Backfill), "not a trunk"
        del source.watches[watch]
        if not source.watches and not source.upstream.closed and not source.is_upgrade:
            self.close(source)
        upgrade = source.trunk.upgrade
        if upgrade is None or upgrade.watches or upgrade.upstream.closed:
            return
        if not source.trunk.prev_kv_watches:
            self.close(upgrade)

    def close(self, backfill: Backfill, *, gone: bool = False) -> None:
        """Close a backfill without watches; `gone`: etcd has ended it already."""
        hub = self._hub
        hub.close_upstream(backfill.upstream, gone=gone)
        self._forget(backfill)

    def resume_live(self, watch: Watch, backfill: Backfill) -> None:
        """Let an unplaced watch that has caught up with its backfill follow it; resumes a paused backfill."""
        backfill.fanout.add(watch)
        if backfill.paused:
            backfill.paused = False
            self._hub.effects.append(ResumeUpstream(backfill.upstream))
            self._ask(backfill)

    def _ask(self, backfill: Backfill) -> None:
        """Request the progress of a backfill; for an upgrade also that of its trunk: both must meet at one revision."""
        if backfill.is_upgrade:
            self._hub.progress.want(backfill.upstream, backfill.trunk.upstream)
        else:
            self._hub.progress.want(backfill.upstream)

    def _take_over(self, other: Backfill, backfill: Backfill) -> None:
        """Move the watches of one backfill to an older one; the last of them closes it."""
        for watch in tuple(other.watches):
            self._hub.unplace(watch)
            self._hub.attach(watch, backfill)
            backfill.fanout.add(watch)

    def _trim(self, backfill: Backfill) -> None:
        """Evict the batches that no watch of a backfill needs any more, before the next one is added."""
        history = backfill.history
        lagging = [watch for watch in backfill.watches if watch.place is Place.LAGGING]
        history.evict_below(min([watch.position for watch in lagging], default=backfill.next_revision))
        if backfill.fanout.has_watches or backfill.is_upgrade:
            history.evict_to(self._window_bytes_max(backfill))
            for watch in lagging:
                if watch.place is Place.LAGGING and watch.source is backfill and watch.position < history.floor:
                    # Too slow for the others: it gets another backfill in its turn.
                    self._hub.detach(watch)
                    # It may have waited for the end of a run.
                    self._hub.replays.want(watch.session)

    def fill_slots(self) -> None:
        """Serve queued watches while a backfill may be opened, or one can be closed whose sessions are all stalled."""
        hub = self._hub
        while hub.queued and (hub.stats.backfills < hub.limits.backfills_max or self._give_up_stalled()):
            watch = next(iter(hub.queued))
            hub.unplace(watch)
            hub.place((watch,))

    def _give_up_stalled(self) -> bool:
        """Close a backfill all of whose sessions are stalled; its watches get another when these drain."""
        for backfill in self.open:
            if not backfill.is_upgrade and all(watch.session.stalled for watch in backfill.watches):
                for watch in tuple(backfill.watches):
                    self._hub.detach(watch)
                return True
        return False

    def _shared(self, watch: Watch) -> Backfill | None:
        trunk = watch.trunk
        fitting = [backfill for backfill in trunk.backfills if backfill.can_serve(watch)]
        if trunk.upgrade is not None and trunk.upgrade.can_serve(watch):
            fitting.append(trunk.upgrade)
        return max(fitting, key=lambda backfill: backfill.next_revision, default=None)

    def _is_read_enough(self, backfill: Backfill) -> bool:
        """Whether to pause a backfill whose watches all lag: it is full, or its watches cannot use it.

        They cannot when other histories took the memory, and the revisions that they need next were evicted.
        """
        if backfill.history.bytes > self._window_bytes_max(backfill):
            return True
        return all(watch.position < backfill.history.floor for watch in backfill.watches)

    def _window_bytes_max(self, backfill: Backfill) -> int:
        """Return the memory that a backfill may hold; while a run arrives, at least the whole run."""
        hub = self._hub
        limit = hub.limits.backfill_bytes_max
        return max(limit, hub.runs.bytes_max) if backfill in hub.runs.open else limit

    def _forget(self, backfill: Backfill) -> None:
        self._hub.runs.end(backfill)
        backfill.history.drop(backfill.next_revision)
        backfill.upstream.leave(backfill)
        del self.open[backfill]
        if backfill.is_upgrade:
            backfill.trunk.upgrade = None
            return
        backfill.trunk.backfills.remove(backfill)
        self._hub.stats.backfills -= 1

    def restore_upgrade(self, trunk: Trunk) -> None:
        """Reopen a lost upgrade if watches want prev_kv."""
        if trunk.prev_kv_watches:
            self.upgrade(trunk)

    def upgrade(self, trunk: Trunk) -> None:
        """Open an upgrade for a trunk, if it has no prev_kv and none is open.

        It does not start below the compact revision: etcd would cancel it, and watches that need an older revision are
        on a backfill or cancelled.
        """
        if trunk.prev_kv_from is not None or trunk.upgrade is not None:
            return
        hub = self._hub
        hub.stats.upgrades += 1
        start = max(trunk.next_revision, hub.compact_revision)
        trunk.upgrade = Backfill(hub, trunk, start, True, is_upgrade=True)
        self.open[trunk.upgrade] = None

    def _feed(self, upgrade: Backfill, before: int, batch: Batch | None) -> None:
        """Let the trunk take over the upgrade's upstream watch, once both can be brought to one revision.

        `batch` took the upgrade from `before` to its position. A trunk that is behind `before` (it was reopened, or the
        upgrade started above a compaction) first catches up by its own upstream watch.
        """
        hub = self._hub
        trunk = upgrade.trunk
        if trunk.opening or not before <= trunk.next_revision <= upgrade.next_revision:
            return
        prev_kv_from = trunk.next_revision
        trunk.history.has_prev_kv = True
        if batch is not None:
            # The trunk's history keeps a batch of its own.
            trunk.ingest(Batch(batch.header, batch.events, batch.size))
        trunk.advance(upgrade.next_revision - 1)
        hub.close_upstream(trunk.upstream)
        trunk.upstream = upgrade.upstream
        trunk.upstream.feed(trunk)
        trunk.prev_kv_from = prev_kv_from
        watches = list(upgrade.watches)
        for watch in watches:
            hub.unplace(watch)
            # Not by detach(), which could close the upstream watch.
            watch.source = None
        upgrade.watches.clear()
        self._forget(upgrade)
        hub.place(watches)
        for backfill in tuple(trunk.backfills):
            self.promote(backfill)
