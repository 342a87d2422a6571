"""Runs: what etcd sends as one response reaches a watch with fragment as one response, in fragments.

A catch-up response has up to a thousand revisions, of any size, and comes from upstream in several pieces. To a watch
without fragment these are responses of their own. A watch with fragment expects the whole as one run of fragments
(clientv3 joins them), and nothing may come between the fragments on its stream. So while the pieces of a run come in,
such watches lag behind their source, and with the last piece they are replayed from its history.

A run is bounded in bytes (fragment_run_bytes_max, and three quarters of what histories may keep), and in the events of
one replay. At the bound, and when the next piece does not come in time, it ends early: what has come is sent, between
two revisions, and the rest is another run. A piece that no history could keep is not held back.

What is held back is sent before it is evicted, whatever evicts it (the memory of other ranges, age) and however much
work others have: a run that has ended waits for a turn of replaying, and more comes in meanwhile. Otherwise a watch
could ask for the same revisions again, for ever.
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

# The next piece of a run is waited for so long: the connection may be gone, and the rest begin anew.
PATIENCE_S: Final = 1.0


class FragmentRun:
    """The pieces of one response, as long as more are to come."""

    __slots__ = ("at", "batches", "bytes", "sessions")

    def __init__(self) -> None:
        # When the newest piece came, how many there are, and their memory.
        self.at = 0.0
        self.batches = 0
        self.bytes = 0
        # Those whose watches wait for its end.
        self.sessions: dict[Session, None] = {}


class Runs:
    """The runs that are coming in."""

    __slots__ = ("_hub", "open")

    def __init__(self, hub: CoreState) -> None:
        self._hub = hub
        self.open: dict[Source, FragmentRun] = {}

    @property
    def bytes_max(self) -> int:
        """The memory of a run from which on it ends early: histories keep more, so nothing of it is evicted."""
        limits = self._hub.limits
        kept = min(limits.history_bytes_max, limits.history_bytes_total_max) * 3 // 4
        return min(limits.fragment_run_bytes_max, kept)

    def _fits(self, run: FragmentRun, batch: Batch) -> bool:
        batches_max = self._hub.limits.history_revisions_max * 3 // 4
        return run.bytes + batch.memory_bytes <= self.bytes_max and run.batches < batches_max

    def waits(self, watch: Watch) -> bool:
        """Whether a lagging watch is to be replayed only when the run of its source has ended."""
        source = watch.source
        return watch.variant & FRAGMENT != 0 and source in self.open and source.serves(watch)

    def wake_later(self, watch: Watch) -> None:
        """Replay a watch that waits when the run has ended, and let the others of its session be replayed before."""
        assert watch.source is not None, "it waits for the run of its source"
        session = watch.session
        self.open[watch.source].sessions[session] = None
        self._guard(watch.source, watch.position)
        del session.lagging[watch]
        session.lagging[watch] = None

    def hold(self, session: Session) -> bool:
        """Whether all that lags of a session waits for runs: then it is replayed when the first of them has ended."""
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
        """A batch is coming that is not the last of its run, or follows others: hold back what wants it in one."""
        hub = self._hub
        run = self.open.get(source)
        if run is not None and not self._fits(run, batch):
            self._break(source)
            run = None
            if isinstance(source, Backfill) and source not in hub.backfills.open:
                # That was all that was wanted of it.
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
        """Send what there is of a run now, as long as the history has all of it: more is about to come."""
        for watch in self._held(source):
            self._hub.replays.replay_now(watch)
        self.end(source)

    def _held(self, source: Source) -> list[Watch]:
        """Return the watches that can be sent what the history of a source has of their run."""
        return [
            watch
            for watch in source.watches
            if watch.place is Place.LAGGING
            and watch.source is source
            and watch.variant & FRAGMENT
            and not watch.session.stalled
        ]

    def _guard(self, source: Source, position: int) -> None:
        """Have watches at this position, or behind it, sent what they wait for before it is evicted."""
        guard = source.history.guard
        if guard is None or position < guard.first_revision:
            source.history.guard = Guard(position, partial(self._release, source))

    def _release(self, source: Source, last_revision: int) -> None:
        """A history is about to evict a batch with this last revision: send what is held back before."""
        held = self._held(source)
        if any(watch.position <= last_revision for watch in held):
            self._break(source)
        elif held:
            self._guard(source, min(watch.position for watch in held))

    def end(self, source: Source) -> None:
        """The run of a source, if there is one, is complete: replay those who waited."""
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
