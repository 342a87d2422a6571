"""The watch client without the core, and the store without both: no event is lost or repeated.

This also proves the model: a simulator whose etcd loses events would blame the proxy for them.
"""

from __future__ import annotations

import pytest

from tests.sim.store_alone import run_store
from tests.sim.upstream_alone import run_alone

BLOCK = 100
FIRST, *LATER = range(0, 1000, BLOCK)


@pytest.mark.parametrize("bundled", [False, True], ids=["model", "bundled store"])
@pytest.mark.parametrize("first", [FIRST, *(pytest.param(later, marks=pytest.mark.long) for later in LATER)])
def test_no_event_is_lost_or_repeated(first: int, bundled: bool) -> None:
    for seed in range(first, first + BLOCK):
        assert run_alone(seed, bundled) == "", f"run_alone({seed}, {bundled})"


@pytest.mark.parametrize("first", [FIRST, *(pytest.param(later, marks=pytest.mark.long) for later in LATER)])
def test_the_store_keeps_every_write(first: int) -> None:
    for seed in range(first, first + BLOCK):
        assert run_store(seed) == "", f"run_store({seed})"
