"""The core under simulation: many seeds without a finding, and deliberate bugs that are all found.

A failure prints its seed and the few steps that reproduce it. `python -m tests.sim --seed N --steps` prints the run.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

import coalesce as real_core
from tests.sim.mutant_table import MUTANTS
from tests.sim.mutant_table_upstream import CLIENT_MUTANTS, STORE_MUTANTS
from tests.sim.mutants import FAMILIES, Mutant, family_of, load
from tests.sim.mutation import is_found_by, known_witnesses, search
from tests.sim.runner import REACHED, Outcome, faults, report, run, run_many, shrink, steps_of
from upstream.store import watchable
from upstream.watching import state as watch_state

SEEDS = 1500
BLOCK = 100
LONG_SEEDS = 12_000
LONG_BLOCK = 500


@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_no_failure_is_found(first: int) -> None:
    """Runs with all kinds of faults, a quarter of them with small constants: no guarantee is broken, nothing leaks."""
    found: list[Outcome] = []
    counts = run_many(range(first, first + BLOCK), on_failure=found.append)
    assert counts["runs"] == BLOCK
    assert not found, report(shrink(found[0]))
    # The runs reach the critical states.
    assert all(number > 5 for number in faults(counts).values()), faults(counts)
    # Pauses are rare: a hundred other seeds may have a single one. So are groups that wait for a later turn.
    rare = ("pauses", "groups behind") if first == 0 else ()
    for what in ("stalls", "returned", "backfills", "ended sessions", "reads", *rare):
        assert counts[what] > 5, (what, counts[what])
    for name in REACHED:
        assert counts[name] > 0, name


@pytest.mark.long
@pytest.mark.parametrize("first", range(SEEDS, LONG_SEEDS, LONG_BLOCK))
def test_no_failure_is_found_in_many_seeds(first: int) -> None:
    """The rarest finding so far took one seed in eight thousand."""
    found: list[Outcome] = []
    run_many(range(first, first + LONG_BLOCK), on_failure=found.append)
    assert not found, report(shrink(found[0]))


def test_nothing_is_delivered_to_a_session_that_has_just_ended() -> None:
    """A fragment run was given up in the same input as a session that was behind for too long."""
    outcome = run(70404)
    assert not outcome.failure, report(outcome)


def test_a_trunk_used_again_moves_to_the_wider_cover() -> None:
    """Its watches had moved there when etcd refused the longer cover, which had one more watch of the range."""
    outcome = run(81392)
    assert not outcome.failure, report(outcome)


@pytest.mark.parametrize("seed", [30301, 36683, 37598, 37662, 77655])
def test_what_is_under_way_is_not_judged(seed: int) -> None:
    """Two ticks of etcd without time in between; a cover opened again at the end; a stalled watch that moves."""
    outcome = run(seed)
    assert not outcome.failure, report(outcome)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_deliberate_bug_is_found(mutant: Mutant) -> None:
    witness = known_witnesses().get(mutant.name)
    assert (witness is not None and is_found_by(mutant, witness)) or search(mutant), f"missed: {mutant}"


def test_a_change_without_effect_is_not_found() -> None:
    """Of each family of modules, one is loaded as for a deliberate bug, but its line stays as it is."""
    of_families = {family_of(mutant): mutant for mutant in MUTANTS if "\n" not in mutant.old}
    assert set(of_families) == set(FAMILIES)
    witnesses = known_witnesses()
    for mutant in of_families.values():
        assert not is_found_by(mutant._replace(new=mutant.old), witnesses[mutant.name]), mutant


def test_the_witnesses_are_of_the_mutants() -> None:
    """`make mutants` writes them; a new or renamed mutant has none yet."""
    assert list(known_witnesses()) == [mutant.name for mutant in MUTANTS]
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_a_mutant_leaves_the_real_core_alone() -> None:
    mutants = [load(MUTANTS[0]), load(CLIENT_MUTANTS[0]), load(STORE_MUTANTS[0])]
    assert mutants[0].core.Coalescer is not real_core.Coalescer
    assert mutants[1].watch_state.WatchState is not watch_state.WatchState
    assert mutants[2].store.watchable.ServedStream is not watchable.ServedStream
    for module in (real_core, watch_state, watchable):
        assert importlib.import_module(module.__name__) is module
    assert __import__("coalesce.core").core.Coalescer is real_core.Coalescer
    assert importlib.import_module("upstream.watching.state") is watch_state
    assert __import__("upstream.store.watchable").store.watchable is watchable


def test_a_mutant_whose_line_is_gone_is_an_error() -> None:
    with pytest.raises(LookupError, match=r"occur 0 times in coalesce\.core"):
        load(Mutant("gone", "core", "no such line", ""))


def test_a_seed_is_the_same_run_each_time() -> None:
    def trace(seed: int) -> list[str]:
        lines: list[str] = []
        outcome = run(seed, trace=lines.append)
        # Sessions and requests are printed by their addresses.
        kept = [line for line in lines if "session" not in line and " at 0x" not in line]
        return [*kept, str(sorted(outcome.counts.items()))]

    assert trace(11) == trace(11)
    assert trace(11) != trace(12)


def test_any_part_of_a_run_is_a_run() -> None:
    for seed in range(20):
        steps = steps_of(seed)
        for part in (steps[::2], steps[1::2], steps[len(steps) // 2 :], []):
            outcome = run(seed, part)
            assert not outcome.failure, report(outcome)


def test_a_failure_is_shrunk_to_a_few_steps() -> None:
    # A mutant with short runs: each subset of the steps that is tried is a run.
    parts = load(next(mutant for mutant in MUTANTS if mutant.name == "a watch below the floor is served"))
    outcome = next(outcome for seed in range(10, 60) if (outcome := run(seed, parts=parts)).failure)
    small = shrink(outcome, parts)
    assert small.failure
    assert len(small.steps) < len(outcome.steps) / 3
    assert f"seed {outcome.seed}" in report(small)


def test_the_score_is_the_recorded_one() -> None:
    said = re.search(r"(\d+) of (\d+) are found", Path("CONTRIBUTING.md").read_text())
    assert said is not None
    assert said.groups() == (str(len(known_witnesses())), str(len(MUTANTS)))
