"""Runs: one response of etcd reaches a watch with fragment as one response, in fragments.

A catch-up response has up to a thousand revisions, of any size, and arrives from upstream in several pieces. A watch
without fragment gets these as separate responses. A watch with fragment expects the whole as one run of fragments
(clientv3 joins them), and nothing may come between the fragments on its stream. So while the pieces of a run arrive,
such watches lag behind their source, and after the last piece they are replayed from its history.

A run is bounded in bytes (fragment_run_bytes_max, and three quarters of what histories may keep), and in the events of
one replay. At the bound, and when the next piece is late, it ends early: the pieces so far are sent, up to the end of a
revision, and the rest is another run. A piece that is too large for any history is not held back.

Events that are held back are sent before they are evicted for any reason (the memory of other ranges, age), even if the
proxy is busy: after a run has ended, its watches wait for their turn of replaying, and more events arrive meanwhile.
Otherwise a watch could request the same revisions again and again.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from coalesce.backfill import Backfill
from coalesce.batch import FRAGMENT, Batch
from coalesce.history import Guard
from coalesce.session import Place, Session, Watch

if TYPE_CHECKING:
    from coalesce.hub import CoreState
    from coalesce.source import Source

# Maximum wait for the next piece of a run: the connection may have broken, and then the rest comes as a new response.
PATIENCE_S: Final = 1.0


class FragmentRun:
    """The pieces of one response that is still incomplete."""

    __slots__ = ("at", "batches", "bytes", "sessions")

    def __init__(self) -> None:
        # When the newest piece arrived, the number of batches so far, and their memory.
        self.at = 0.0
        self.batches = 0
        self.bytes = 0
        # Sessions with watches that wait for its end.
        self.sessions: dict[Session, None] = {}


class Runs:
    """The runs that are incomplete."""

    __slots__ = ("_hub", "open")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        self.open: dict[Source, FragmentRun] = {}

    @property
    def bytes_max(self) -> int:
        """The memory at which a run ends early; histories keep more, so no part of a run is evicted."""
        limits = self._hub.limits
        kept = min(limits.history_bytes_max, limits.history_bytes_total_max) * 3 // 4
        return min(limits.fragment_run_bytes_max, kept)

    def _fits(self, run: FragmentRun, batch: Batch) -> bool:
        batches_max = self._hub.limits.history_revisions_max * 3 // 4
        return run.bytes + batch.memory_bytes <= self.bytes_max and run.batches < batches_max

    def waits(self, watch: Watch) -> bool:
        """Whether a lagging watch is replayed only after the run of its source has ended."""
        source = watch.source
        return watch.variant & FRAGMENT != 0 and source in self.open and source.serves(watch)

    def wake_later(self, watch: Watch) -> None:
        """Register a watch that waits for a run; the other watches of its session are replayed before it."""
        assert watch.source is not None, "it waits for the run of its source"
        session = watch.session
        self.open[watch.source].sessions[session] = None
        self._guard(watch.source, watch.position)
        del session.lagging[watch]
        session.lagging[watch] = None

    def hold(self, session: Session) -> bool:
        """Whether all lagging watches of a session wait for runs; if so, the end of the first one replays it."""
        if not all(map(self.waits, session.lagging)):
            return False
        for watch in session.lagging:
            assert watch.source is not None, "it waits for the run of its source"
            self.open[watch.source].sessions[session] = None
            self._guard(watch.source, watch.position)
        return True

    def has_work(self, session: Session) -> bool:
        """Whether some lagging watch of a session can be replayed now."""
        return bool(session.lagging) and (not self.open or not all(map(self.waits, session.lagging)))

    def piece(self, source: Source, batch: Batch) -> None:
        """Handle a batch that is a part of a run, before it is delivered: hold back the watches with fragment."""
        hub = self._hub
        run = self.open.get(source)
        if run is not None and not self._fits(run, batch):
            self._break(source)
            run = None
            if isinstance(source, Backfill) and source not in hub.backfills.open:
                # Its watches needed nothing more.
                return
        if run is None:
            run = FragmentRun()
            if not self._fits(run, batch):
                return
            self.open[source] = run
            self._guard(source, source.next_revision)
        run.at = hub.now
        run.batches += 1
        run.bytes += batch.memory_bytes
        for variant, group in source.fanout.groups.items():
            if variant & FRAGMENT:
                for watch in group.listed():
                    hub.unplace(watch)
                    hub.mark_lagging(watch)
                    run.sessions[watch.session] = None

    def _break(self, source: Source) -> None:
        """Send the pieces of a run now, while the history still holds all of them, and end the run."""
        for watch in self._held(source):
            self._hub.replays.replay_now(watch)
        self.end(source)

    def _held(self, source: Source) -> list[Watch]:
        """Return the watches that wait for the run of a source and can be sent its pieces now."""
        return [
            watch
            for watch in source.watches
            if watch.place is Place.LAGGING
            and watch.source is source
            and watch.variant & FRAGMENT
            and not watch.session.stalled
        ]

    def _guard(self, source: Source, position: int) -> None:
        """Guard the history from this position on: held-back watches get their events before these are evicted."""
        guard = source.history.guard
        if guard is None or position < guard.first_revision:
            source.history.guard = Guard(position, partial(self._release, source))

    def _release(self, source: Source, last_revision: int) -> None:
        """Before a history evicts the batch with this last revision, send it to the held-back watches."""
        held = self._held(source)
        if any(watch.position <= last_revision for watch in held):
            self._break(source)
        elif held:
            self._guard(source, min(watch.position for watch in held))

    def end(self, source: Source) -> None:
        """End the run of a source, if there is one: replay the sessions that waited."""
        run = self.open.pop(source, None)
        if run is not None:
            for session in run.sessions:
                self._hub.replays.want(session)

    def next_deadline(self) -> float | None:
        """Return when the next piece of some run is late; None while no run is open."""
        return min(run.at for run in self.open.values()) + PATIENCE_S if self.open else None

    def expire(self) -> None:
        """End the runs whose next piece is late."""
        now = self._hub.now
        for source in [source for source, run in self.open.items() if run.at + PATIENCE_S <= now]:
            self.end(source)
