"""The simulator's command line: many seeds, one seed step by step, or the mutation score.

python -m tests.sim SEEDS=1000            seeds 0 to 999, on all cores
python -m tests.sim SEEDS=500..2000       seeds 500 to 1999
python -m tests.sim --seed 42             one seed; a failure is shrunk
python -m tests.sim --seed 42 --steps     one seed with all its inputs and effects
python -m tests.sim --mutants             the deliberate bugs that are found, each with its seed
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed

from tests.sim.mutation import score
from tests.sim.runner import Outcome, faults, report, run, run_many, shrink

_BLOCK = 50


def _range(text: str) -> range:
    """Read SEEDS=n or SEEDS=first..last."""
    text = text.removeprefix("SEEDS=")
    first, dots, last = text.partition("..")
    return range(int(first), int(last)) if dots else range(int(first))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _one(seed: int, show_steps: bool) -> int:
    outcome = run(seed)
    if outcome.failure:
        _say(f"seed {seed}: {outcome.failure}\nshrinking {len(outcome.steps)} steps ...")
        outcome = shrink(outcome)
    if show_steps:
        run(seed, outcome.steps, trace=_say)
    if not outcome.failure:
        _say(f"seed {seed}: {len(outcome.steps)} steps, nothing found")
        return 0
    _say(report(outcome))
    return 1


def _block(seeds: range) -> tuple[Counter[str], list[Outcome]]:
    found: list[Outcome] = []
    return run_many(seeds, on_failure=found.append), found


def _many(seeds: range, failures_max: int) -> int:
    began = time.monotonic()
    found: list[Outcome] = []
    counts: Counter[str] = Counter()
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        blocks = [pool.submit(_block, seeds[at : at + _BLOCK]) for at in range(0, len(seeds), _BLOCK)]
        for block in as_completed(blocks):
            counted, failed = block.result()
            counts.update(counted)
            found += failed
            if len(found) >= failures_max:
                pool.shutdown(cancel_futures=True)
                break
    for outcome in found[:failures_max]:
        _say(report(shrink(outcome)))
    seconds = time.monotonic() - began
    injected = faults(counts)
    _say("what happened: " + ", ".join(f"{name} {number}" for name, number in sorted(counts.items())))
    _say("faults injected: " + ", ".join(f"{name} {number}" for name, number in injected.items()))
    _say(
        f"{counts['runs']} seeds in {seconds:.1f} s: {injected.total()} faults, "
        f"{counts['events checked']} events checked, {counts['invariant checks']} checks of all invariants, "
        f"{counts['failures']} violations"
    )
    return 1 if found else 0


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sim",
        description="Simulate the core, the watch client and the bundled store, with a model of etcd.",
    )
    parser.add_argument("seeds", nargs="?", type=_range, default=range(1000), help="SEEDS=n or SEEDS=first..last")
    parser.add_argument("--seed", type=int, help="run one seed, and shrink it if it fails")
    parser.add_argument("--steps", action="store_true", help="with --seed: print all inputs and effects")
    parser.add_argument("--failures-max", type=int, default=1, help="stop after so many failures")
    parser.add_argument("--mutants", action="store_true", help="search a witness for every deliberate bug")
    arguments = parser.parse_args()
    if arguments.mutants:
        return 1 if score(_say) else 0
    if arguments.seed is not None:
        return _one(arguments.seed, arguments.steps)
    return _many(arguments.seeds, arguments.failures_max)


if __name__ == "__main__":
    sys.exit(main())
