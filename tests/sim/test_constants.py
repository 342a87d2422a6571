"""Small constants: which ones there are, and that a run leaves no trace in the real modules."""

from __future__ import annotations

import ast
import random
from dataclasses import fields
from pathlib import Path

from coalesce import CoreLimits, model
from tests.sim.config import make_config
from tests.sim.constants import SMALL, namespaces, replaced
from tests.sim.mutant_table import MUTANTS
from tests.sim.mutants import load
from tests.sim.parts import REAL

# Numbers of the wire formats, the costs of one thing in another, sizes that etcd defines, and the number of tries
# after which a client sees a failure: none of them divides work.
NOT_BOUNDS = {
    *("NO_WATCH_ID", "PROGRESS_ID", "NO_PUT", "NO_DELETE", "PREV_KV", "FRAGMENT", "_KIB", "_MIB"),
    *("EVENT_OVERHEAD_BYTES", "BATCH_OVERHEAD_BYTES", "_ENVELOPE_BYTES", "REQUEST_BYTES", "_ENTRY_BYTES"),
    *(
        "PROVEN_WATCHES",
        "_EXAMINED_ENTRIES",
        "_EXAMINED_AFTER",
        "WATCH_EVENTS",
        "_MEMBER_EVENTS",
        "SESSION_WATCHES",
        "BATCHES_DROPPED",
        "_INDEX_SHARE",
        "_LOOKS",
        "TRIES_MAX",
        "_OWN_REFUSED_MAX",
    ),
    # The simulated upstream passes in its own, and its events are smaller.
    *("HELD_BYTES_MAX", "LARGE_BYTES", "JOINED_BYTES_MAX", "JOINED_DELIVERIES_BYTES_MAX"),
}
# Limits that the simulator does not change: times, and a property of upstream.
FIXED_LIMITS = {"upstream_has_limits", "progress_interval_s", "progress_retry_s", "progress_retry_s_max"}


def _numbers(file: str) -> set[str]:
    """Return the names of the module-level constants whose value is a calculation of whole numbers."""
    found: set[str] = set()
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            values = [each.value for each in ast.walk(node.value) if isinstance(each, ast.Constant)]
            is_number = not any(isinstance(each, ast.Call | ast.Tuple | ast.Dict) for each in ast.walk(node.value))
            if isinstance(target, ast.Name) and values and is_number and all(type(each) is int for each in values):
                found.add(target.id)
    return found


def test_each_bound_is_small_in_some_runs() -> None:
    """A new constant that bounds a step joins the table; any other is listed here."""
    numbers = {(each["__name__"], name) for each in namespaces(REAL) for name in _numbers(each["__file__"])}
    assert SMALL.keys() <= numbers
    assert {where for where in numbers if where not in SMALL and where[1] not in NOT_BOUNDS} == set()


def test_each_limit_is_reached_in_some_runs() -> None:
    config = make_config(random.Random(1))
    assert {each.name for each in fields(CoreLimits)} == {*config.limits, *FIXED_LIMITS, "covers"}


def test_a_quarter_of_the_seeds_has_small_constants() -> None:
    drawn = [make_config(random.Random(seed)).constants for seed in range(400)]
    assert 70 < sum(map(bool, drawn)) < 130
    assert {where for each in drawn for where in each} == SMALL.keys()


def test_constants_are_replaced_only_during_a_run() -> None:
    mutant = load(next(mutant for mutant in MUTANTS if mutant.full_module == "coalesce.model"))
    where = ("coalesce.model", "LISTED_MAX")
    before = model.LISTED_MAX
    for parts in (REAL, mutant):
        bound = [each for each in namespaces(parts) if "LISTED_MAX" in each]
        # Its own module, and the one that imports it.
        assert len(bound) == 2
        with replaced(parts, {where: 2}):
            assert [each["LISTED_MAX"] for each in bound] == [2, 2]
            assert (before == model.LISTED_MAX) == (parts is not REAL)
        assert [each["LISTED_MAX"] for each in bound] == [before, before]
