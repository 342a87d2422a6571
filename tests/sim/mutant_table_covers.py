"""Deliberate bugs in covers: the watches of many ranges on one upstream watch."""

from __future__ import annotations

from tests.sim.mutants import Mutant

COVER_MUTANTS: tuple[Mutant, ...] = (
    # Which events a branch gets.
    Mutant(
        "a branch gets the events of its neighbours",
        "fanout",
        "Variants(batch.header, part, self._state",
        "Variants(batch.header, events, self._state",
    ),
    Mutant(
        "a branch gets one event of each transaction",
        "fanout",
        "parts.setdefault(branch, []).append(event)",
        "parts[branch] = [event]",
    ),
    Mutant(
        "a watch that starts inside a batch gets the events of its neighbours",
        "fanout",
        "if source.is_cover and watch.branch is not None:",
        "if False:",
    ),
    Mutant(
        "a watch from now below a cover gets what came before it",
        "fanout",
        "if group.newest > batch.first_revision:",
        "if False:",
    ),
    Mutant("a replay of a prefix is not filtered", "cover", "limits, branch.span)", "limits)"),
    Mutant(
        "replays of different ranges share a result", "replay", "key = (source, watch.branch,", "key = (source, None,"
    ),
    Mutant(
        "watches of different ranges share a backfill",
        "placement",
        "if watch.branch is not backfill.branch or (",
        "if (",
    ),
    # Which ranges belong to a cover.
    Mutant("a key that is a whole prefix is not found", "ranges", "if length <= len(key)", "if length < len(key)"),
    Mutant(
        "a range that reaches beyond a cover belongs to it",
        "ranges",
        "range_end != FROM_KEY and range_end <= end",
        "range_end != FROM_KEY",
    ),
    # Positions.
    Mutant(
        "a watch forgets where it was when it moves",
        "moving",
        "self._placement.unplace(watch)",
        "self._placement.unplace(watch); watch.position = target.next_revision",
    ),
    Mutant("a moved watch gets no notifications", "moving", "self._notifying.began(watch)", "pass"),
    # Covers that come and go.
    Mutant("a removed cover keeps its watches", "moving", "if trunk.retired:", "if False:"),
    Mutant("a refused cover is tried again at once", "losing", "state.now + COVER_RETRY_S", "state.now"),
    Mutant("creates of a refused cover are forgotten", "losing", "self._state.to_prepare[create] = None", "pass"),
    Mutant(
        "a cover uses the tokens of clients",
        "cover",
        "yield from ()",
        "yield from super().sessions()",
    ),
    Mutant("a branch stays when its last watch leaves", "cover", "self.index.remove(branch.span)", "pass"),
)
