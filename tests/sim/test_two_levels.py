"""Two levels of the core: no guarantee is broken for the clients of a worker, and nothing is left at the hub."""

from __future__ import annotations

import pytest

from tests.sim.mutant_table import MUTANTS
from tests.sim.mutants import load
from tests.sim.two_levels import run_two_levels

BLOCK = 20
FIRST, *LATER = range(0, 1000, BLOCK)


@pytest.mark.parametrize("first", [FIRST, *(pytest.param(later, marks=pytest.mark.long) for later in LATER)])
def test_a_worker_before_a_hub_keeps_the_guarantees(first: int) -> None:
    for seed in range(first, first + BLOCK):
        assert run_two_levels(seed) == "", f"run_two_levels({seed})"


@pytest.mark.parametrize(
    "name", ["progress for who is behind", "what was handed back is lost", "a backfill stays open"]
)
def test_a_deliberate_bug_is_found_at_two_levels(name: str) -> None:
    parts = load(next(mutant for mutant in MUTANTS if mutant.name == name))
    assert any(run_two_levels(seed, parts) for seed in range(100))
