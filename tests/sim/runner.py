"""Running simulations: a seed makes a world and a list of steps; a failing list is shrunk to a minimum."""

from __future__ import annotations

import random
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tests.sim.config import make_config
from tests.sim.constants import replaced
from tests.sim.parts import REAL, Parts
from tests.sim.settle import finish
from tests.sim.steps import FAULTS, Step, execute, make_steps
from tests.sim.world import World

STEPS_MIN = 50
STEPS_MAX = 170
REACHED = (
    *("joins_live", "joins_future", "joins_history", "joins_backfill", "refused", "compacted", "replays", "upgrades"),
    *("progress_answers", "progress_notifies", "sessions_ended", "moved"),
)
"""Counters of the core that are part of an outcome: what no run ever does would prove nothing."""


@dataclass(slots=True)
class Outcome:
    """The result of one run."""

    seed: int
    steps: list[Step]
    # Empty: no failure. Else the failure's text, and its last lines of the stack.
    failure: str = ""
    stack: str = ""
    counts: Counter[str] = field(default_factory=Counter)


def steps_of(seed: int) -> list[Step]:
    """Return the list of steps of a seed."""
    rng = random.Random(seed)
    make_config(rng)
    return make_steps(rng, rng.randint(STEPS_MIN, STEPS_MAX))


def run(
    seed: int,
    steps: Sequence[Step] | None = None,
    parts: Parts = REAL,
    trace: Callable[[str], None] | None = None,
) -> Outcome:
    """Run a seed, or other steps in its world; return the result. Never raises for failures of the core."""
    rng = random.Random(seed)
    config = make_config(rng)
    chosen = list(steps_of(seed) if steps is None else steps)
    outcome = Outcome(seed, chosen)
    world: World | None = None
    try:
        with replaced(parts, config.constants):
            world = World(config, parts)
            world.trace = trace
            for step in chosen:
                if trace is not None:
                    trace(f"{step.name} {step.seed} at revision {world.store.revision}, {world.now:.2f} s")
                execute(world, step)
            if trace is not None:
                trace(f"the end, at revision {world.store.revision}, {world.now:.2f} s")
            finish(world, random.Random(seed))
    except Exception as error:
        outcome.failure = f"{type(error).__name__}: {error}"
        outcome.stack = "".join(traceback.format_exception(error)[-4:])
    if world is not None:
        outcome.counts.update(world.counts)
        outcome.counts.update({name: getattr(world.core.stats, name) for name in REACHED})
    return outcome


def shrink(outcome: Outcome, parts: Parts = REAL, runs_max: int = 600) -> Outcome:
    """Return a failing run with as few steps as possible by omission; it must fail in the same way."""
    kind = _kind(outcome)
    best = outcome
    runs = 0
    size = max(1, len(best.steps) // 2)
    while size and runs < runs_max:
        at = 0
        while at < len(best.steps) and runs < runs_max:
            steps = best.steps[:at] + best.steps[at + size :]
            runs += 1
            tried = run(outcome.seed, steps, parts)
            if tried.failure and _kind(tried) == kind:
                best = tried
            else:
                at += size
        size //= 2
    return best


def _kind(outcome: Outcome) -> str:
    """Return the kind of a failure: its text without numbers."""
    line = outcome.failure.split("\n")[0]
    return re.sub(r"0x[0-9a-f]+|\d+", "", line)[:60]


def report(outcome: Outcome) -> str:
    """Format a failure: how to reproduce it, what happened, and the steps."""
    steps = "\n".join(f"    {place:3} {step.name:16} {step.seed}" for place, step in enumerate(outcome.steps))
    constants = make_config(random.Random(outcome.seed)).constants
    small = ", ".join(f"{module}.{name} {value}" for (module, name), value in constants.items())
    return (
        f"seed {outcome.seed}: {outcome.failure}\n{outcome.stack}\n  small constants: {small or 'none'}\n"
        f"  {len(outcome.steps)} steps (python -m tests.sim --seed {outcome.seed} shows them being made):\n{steps}"
    )


def run_many(
    seeds: Sequence[int], parts: Parts = REAL, on_failure: Callable[[Outcome], None] | None = None
) -> Counter[str]:
    """Run seeds; return the counts of all events, with failures counted as such."""
    counts: Counter[str] = Counter()
    for seed in seeds:
        outcome = run(seed, parts=parts)
        counts.update(outcome.counts)
        counts["runs"] += 1
        if outcome.failure:
            counts["failures"] += 1
            if on_failure is not None:
                on_failure(outcome)
    return counts


def faults(counts: Counter[str]) -> Counter[str]:
    """Return how often each kind of fault was injected."""
    return Counter({name: counts[name] for name in sorted(FAULTS)})
