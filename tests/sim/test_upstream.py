"""The watch client without the core, and the store without both: nothing is lost and nothing repeated.

This also proves the model: a simulator whose etcd loses events would blame the proxy for them.
"""

from __future__ import annotations

import pytest

from tests.sim.store_alone import run_store
from tests.sim.upstream_alone import run_alone

SEEDS = 200
BLOCK = 100


@pytest.mark.parametrize("bundled", [False, True], ids=["model", "bundled store"])
@pytest.mark.parametrize("first", range(0, SEEDS, BLOCK))
def test_nothing_is_lost_or_repeated(first: int, bundled: bool) -> None:
    for seed in range(first, first + BLOCK):
        assert run_alone(seed, bundled) == "", f"run_alone({seed}, {bundled})"


def test_the_store_holds_what_was_written() -> None:
    for seed in range(300):
        assert run_store(seed) == "", f"run_store({seed})"
