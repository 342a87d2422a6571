"""Random walks: for every seed, every watch has received exactly the events it asked for."""

from __future__ import annotations

import pytest

from tests.coalesce.walk import walk

STEPS = 300


@pytest.mark.parametrize("seed", range(30))
def test_every_watch_gets_exactly_its_events(seed: int) -> None:
    walk(seed, STEPS)


@pytest.mark.parametrize("seed", range(10))
def test_walks_without_ordered_progress(seed: int) -> None:
    made = walk(seed, STEPS, ordered_progress=False)
    assert made.core.stats.progress_asked == 0


def test_walks_reach_every_kind_of_step() -> None:
    """A walk that never stalls, upgrades or compacts would prove little."""
    stats = [walk(seed, STEPS).core.stats for seed in range(100, 110)]
    for name in (
        "joins_live", "joins_future", "joins_history", "joins_backfill", "refused", "compacted", "progress_answers",
        "progress_notifies", "sessions_ended", "replays", "returned", "stalls", "upgrades",
    ):  # fmt: skip
        assert sum(getattr(each, name) for each in stats) > 0, name
