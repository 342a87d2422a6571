"""The mutation score: which of the deliberate bugs are found, and by which witness.

A witness is a seed that finds a bug: of the simulator with one or two levels, of the watch client or the store alone.
`mutant_witnesses.json` records one for each bug, so that the test need not search; a witness that no longer works after
changes of the simulation is searched again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.sim.mutant_table import MUTANTS
from tests.sim.mutants import Mutant, load
from tests.sim.parts import REAL, Parts
from tests.sim.runner import run
from tests.sim.store_alone import run_store
from tests.sim.two_levels import run_two_levels
from tests.sim.upstream_alone import run_alone

WITNESSES = Path(__file__).with_name("mutant_witnesses.json")
# Every mutant is found well before this; the seeds are the same each time, so the result is deterministic.
SEEDS_MAX = 300

_TRIALS: dict[str, Callable[[int, Parts], str]] = {
    "simulation": lambda seed, parts: run(seed, parts=parts).failure,
    "client on the model": lambda seed, parts: run_alone(seed, False, parts),
    "client on the store": lambda seed, parts: run_alone(seed, True, parts),
    "store": run_store,
    "two levels": run_two_levels,
}

Witness = tuple[str, int]
"""The kind of run, and its seed."""


def known_witnesses() -> dict[str, Witness]:
    """Return the recorded witnesses, by the mutants' names."""
    return {name: (kind, seed) for name, (kind, seed) in json.loads(WITNESSES.read_text()).items()}


def is_found_by(mutant: Mutant, witness: Witness) -> bool:
    """Return whether this witness finds the bug."""
    kind, seed = witness
    return bool(_TRIALS[kind](seed, load(mutant)))


def search(mutant: Mutant) -> Witness | None:
    """Return a witness that finds the bug, or None."""
    parts = load(mutant)
    known = known_witnesses().get(mutant.name)
    if known is not None and is_found_by(mutant, known):
        return known
    below = any(getattr(parts, name) is not getattr(REAL, name) for name in ("watch_state", "feed", "store"))
    kinds = ["simulation", "client on the model", "client on the store", "store"] if below else ["simulation"]
    if mutant.two_levels:
        kinds = ["two levels"]
    for seed in range(SEEDS_MAX):
        for kind in kinds:
            if _TRIALS[kind](seed, parts):
                return kind, seed
    return None


def _search_named(mutant: Mutant) -> tuple[str, Witness | None]:
    return mutant.name, search(mutant)


def score(say: Callable[[str], None], mutants: Iterable[Mutant] = MUTANTS) -> int:
    """Search a witness for each mutant and record them all; return how many mutants were missed."""
    found: dict[str, Witness] = {}
    missed = 0
    with ProcessPoolExecutor() as pool:
        for name, witness in pool.map(_search_named, mutants):
            if witness is None:
                missed += 1
                say(f"MISSED    {name}")
            else:
                found[name] = witness
                say(f"found     {name}: {witness[0]}, seed {witness[1]}")
    lines = (f"{json.dumps(name)}: {json.dumps(witness)}" for name, witness in found.items())
    WITNESSES.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    say(f"mutation score: {len(found)} of {len(found) + missed}")
    return missed
