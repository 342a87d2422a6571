"""The watch client without the core, and the store without both: no event is lost or repeated.

This also proves the model: a simulator whose etcd loses events would blame the proxy for them.
"""

from __future__ import annotations

import random

import pytest

from tests.sim.model_store import Member, Store
from tests.sim.store_alone import run_store
from tests.sim.upstream_alone import STEPS, Harness, run_alone
from tests.sim.upstream_shell import AnyMember, Callbacks, UpstreamShell

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


def test_a_run_does_not_depend_on_addresses_of_objects() -> None:
    """The order of a set of objects would."""
    harnesses: list[Harness] = []

    def run_again(seed: int) -> list[str]:
        harness = Harness(random.Random(seed), False)
        # Kept, so that the objects of the next run have other addresses.
        harnesses.append(harness)
        for _ in range(STEPS):
            harness.step()
        return [repr(upstream.log.records) for upstream in harness.all]

    for seed in range(200):
        assert run_again(seed) == run_again(seed), seed


class Unrecognised(UpstreamShell):
    """A watch client that does not recognise the history of any store."""

    def _recognise(self, *_: object) -> bool:
        return False


@pytest.mark.parametrize("seed", range(10))
def test_a_leader_that_is_not_recognised_is_still_one(seed: int) -> None:
    """The search begins again after it, as in the real client: the other member alone does not prove "no leader"."""
    store, rng, reports = Store(), random.Random(seed), list[str]()
    led, cut_off = Member(store, 0xE0, 1000, True), Member(store, 0xE1, 1000, True)

    def has_leader(member: AnyMember) -> bool:
        return member is led

    on = Callbacks(
        lambda *_: None, lambda *_: None, lambda *_: None, lambda _: None, no_leader=lambda: reports.append("no leader")
    )
    shell = Unrecognised([led, cut_off], 128, lambda *_: "", on, has_leader=has_leader)
    for _ in range(10):
        shell.connect(rng)
    assert not reports
    assert not shell.choice.leaderless
