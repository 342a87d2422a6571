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

from collections.abc import Iterable
from typing import Final

from coalesce.batch import FRAGMENT, Batch
from coalesce.cover import Cover
from coalesce.model import Backfill, FragmentRun, Group, Source
from coalesce.placement import Placement
from coalesce.replay import Replayer
from coalesce.state import CoreState

# Maximum wait for the next piece of a run: the connection may have broken, and then the rest comes as a new response.
PATIENCE_S: Final = 1.0


class FragmentRuns:
    """Begins runs and ends them."""

    def __init__(self, state: CoreState, placement: Placement, replayer: Replayer) -> None:
        self._state = state
        self._placement = placement
        self._replayer = replayer

    def piece(self, source: Source, batch: Batch) -> None:
        """Handle a batch that is a part of a run, before it is delivered: hold back the watches with fragment."""
        state = self._state
        run = source.run
        if run is not None and not self._fits(run, batch):
            self._replayer.break_run(source)
            run = None
            if isinstance(source, Backfill) and source not in state.backfills:
                # Its watches needed nothing more.
                return
        if run is None:
            run = FragmentRun()
            if not self._fits(run, batch):
                return
            state.runs[source] = source.run = run
            self._replayer.hook_eviction(source, source.next_revision)
        run.at = state.now
        run.batches += 1
        run.bytes += batch.memory_bytes
        for groups in _reached(source, batch):
            for group in tuple(groups.values()):
                for watch in tuple(group.members) if group.variant & FRAGMENT else ():
                    self._placement.unplace(watch)
                    self._placement.mark_lagging(watch)
                    run.sessions[watch.session] = None

    def _fits(self, run: FragmentRun, batch: Batch) -> bool:
        limits = self._state.limits
        batches_max = limits.history_revisions_max * 3 // 4
        return run.bytes + batch.memory_bytes <= limits.run_bytes_max and run.batches < batches_max

    def next_deadline(self) -> float | None:
        """Return when the next piece of some run is late; None while no run is open."""
        runs = self._state.runs
        return min(run.at for run in runs.values()) + PATIENCE_S if runs else None

    def expire(self) -> None:
        """End the runs whose next piece is late."""
        state = self._state
        for source in [source for source, run in state.runs.items() if run.at + PATIENCE_S <= state.now]:
            state.end_run(source)


def _reached(source: Source, batch: Batch) -> Iterable[dict[object, Group]]:
    """Return the groups that a batch reaches: those of the source, or of the branches whose keys it has."""
    if not isinstance(source, Cover):
        return (source.groups,)
    return [branch.groups for branch in source.branches_of(batch)]
