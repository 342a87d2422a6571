"""Each program of the table gives the same result directly and through the proxy, on every etcd."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
from _pytest.mark.structures import ParameterSet

from tests.differential.defects import excused, known
from tests.differential.freedoms import differences
from tests.differential.lawful import violations
from tests.differential.player import LIMIT_S
from tests.differential.recording import Recording
from tests.differential.stage import COLD, CROWDED, DIRECT, Stage
from tests.differential.steps import Program
from tests.differential.table import PROGRAMS
from tests.e2e.scenario import run
from tests.etcd.binaries import EtcdBinary, etcds

STALLED_S = 1.0
"""How long to wait for a response that a known defect withholds."""
Kind = tuple[EtcdBinary, tuple[str, ...], int, bool, bytes, int, int]


STAGES_MAX = 2
"""The number of stages kept: an idle etcd still uses CPU time."""


class Stages:
    """The stages that programs share, the most recently used ones."""

    def __init__(self) -> None:
        self._running: dict[Kind, Stage] = {}
        """In order of use, the most recent last."""

    def get(
        self, binary: EtcdBinary, program: Program, namespace: bytes = b"", tiers: int = 1, workers: int = 0
    ) -> Stage:
        """Return the stage for a program, started if necessary."""
        kind = (binary, program.flags, program.members, program.auth, namespace, tiers, workers)
        stage = self._running.pop(kind, None)
        if stage is None:
            self._close_to(STAGES_MAX - 1)
            stage = Stage(binary, program.flags, program.members, program.auth, namespace, tiers, workers)
            stage.__enter__()
        self._running[kind] = stage
        return stage

    def _close_to(self, count: int) -> None:
        """Close the least recently used ones until `count` are left."""
        while len(self._running) > count:
            self._running.pop(next(iter(self._running))).__exit__(None, None, None)

    def close(self) -> None:
        """Close all of them."""
        self._close_to(0)


@pytest.fixture(scope="module")
def stages() -> Iterator[Stages]:
    """The shared stages."""
    shared = Stages()
    yield shared
    shared.close()


def _rows() -> Iterator[ParameterSet]:
    current, *older = etcds()
    for binary in (current, *older):
        for program in PROGRAMS:
            marks = (pytest.mark.long,) if binary is not current or program.long else ()
            if binary.version >= program.since:
                yield pytest.param(binary, program, id=f"{binary.name}-{program.name}", marks=marks)


@pytest.mark.parametrize(("binary", "program"), list(_rows()))
def test_the_same_through_the_proxy(binary: EtcdBinary, program: Program, stages: Stages) -> None:
    limit_s = STALLED_S if any(defect.stalls for defect in known(binary.version, program)) else LIMIT_S
    if program.fresh:
        with Stage(binary, program.flags, program.members, program.auth) as stage:
            recordings = run(stage.run(program, limit_s), program.limit_s)
    else:
        recordings = run(stages.get(binary, program).run(program, limit_s), program.limit_s)
    judge(binary, program, recordings)


def judge(binary: EtcdBinary, program: Program, recordings: dict[str, Recording]) -> None:
    """Compare a program's recordings of all routes."""
    direct = recordings[DIRECT]
    defects = known(binary.version, program)
    stalls = any(defect.stalls for defect in defects)
    assert not direct.vain or stalls, f"the program waits for what etcd does not send: {direct.vain}"
    found = {f"{way}: {line}" for way in (DIRECT, COLD, CROWDED) for line in violations(program, recordings[way])}
    found |= {f"{way}: {line}" for way in (COLD, CROWDED) for line in differences(program, direct, recordings[way])}
    unexcused = sorted(line for line in found if not excused(line, defects))
    assert not unexcused, "\n".join(unexcused)


class Way(NamedTuple):
    """A way of running the proxy in which clients must not notice a difference."""

    every: int
    first: int
    """Only each `every`-th program, from number `first` on, is not marked long."""
    namespace: bytes = b""
    tiers: int = 1
    workers: int = 0
    """A hub and so many workers; the crowd and the program's connections are served by any of them."""
    covers: tuple[bytes, ...] = ()

    def suits(self, program: Program) -> bool:
        """Whether a program can be run so: it shares an etcd, and a namespace does not affect users and members."""
        if self.covers and program.name in KEPT_BY_A_COVER:
            return False
        return not (program.fresh or (self.namespace and (program.auth or program.members > 1)))


WAYS = {
    "a namespace": Way(12, 0, namespace=b"/ns\xff"),
    "two tiers": Way(12, 6, tiers=2),
    "workers": Way(48, 9, workers=2),
    # All watches share one upstream watch of all keys; with users, which the cover needs a user for, none does.
    "a cover": Way(12, 3, covers=(b"",)),
}

KEPT_BY_A_COVER = {"a compacted watch next to a live one"}
"""A live watch of another key keeps the history of the cover, which serves the compacted start."""


def _ways() -> Iterator[ParameterSet]:
    for name, way in WAYS.items():
        for number, program in enumerate(PROGRAMS):
            if way.suits(program):
                is_long = number % way.every != way.first or program.long
                marks = (pytest.mark.long,) if is_long else ()
                yield pytest.param(way, program, id=f"{name}-{program.name}", marks=marks)


@pytest.mark.parametrize(("way", "program"), list(_ways()))
def test_the_same_in_each_way_to_run_the_proxy(way: Way, program: Program, stages: Stages) -> None:
    binary = etcds()[0]
    stage = stages.get(binary, program, way.namespace, way.tiers, way.workers)
    judge(binary, program, run(stage.run(program, covers=way.covers), program.limit_s))


def test_names_are_unique() -> None:
    names = [program.name for program in PROGRAMS]
    assert len(names) == len(set(names))
