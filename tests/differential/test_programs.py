"""Each program of the table gives the same result directly and through the proxy, on every etcd."""

from __future__ import annotations

from collections.abc import Iterator

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


NAMESPACED = [program for program in PROGRAMS if not (program.auth or program.fresh or program.members > 1)]
"""Programs that use only keys; a namespace does not affect users and members."""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(
            program,
            marks=() if number % 12 == 0 else pytest.mark.long,
            id=program.name,
        )
        for number, program in enumerate(NAMESPACED)
    ],
)
def test_the_same_through_a_namespace(program: Program, stages: Stages) -> None:
    binary = etcds()[0]
    recordings = run(stages.get(binary, program, b"/ns\xff").run(program), program.limit_s)
    judge(binary, program, recordings)


def few_fast(every: int, first: int) -> list[ParameterSet]:
    """Return the programs that share an etcd; only each `every`-th from `first` on is not marked long."""
    return [
        pytest.param(
            program, marks=() if number % every == first and not program.long else pytest.mark.long, id=program.name
        )
        for number, program in enumerate(PROGRAMS)
        if not program.fresh
    ]


@pytest.mark.parametrize("program", few_fast(12, 6))
def test_the_same_through_two_tiers(program: Program, stages: Stages) -> None:
    binary = etcds()[0]
    recordings = run(stages.get(binary, program, tiers=2).run(program), program.limit_s)
    judge(binary, program, recordings)


@pytest.mark.parametrize("program", few_fast(48, 9))
def test_the_same_through_workers(program: Program, stages: Stages) -> None:
    """A hub and two workers; the crowd and the program's connections are served by either of them."""
    binary = etcds()[0]
    recordings = run(stages.get(binary, program, workers=2).run(program), program.limit_s)
    judge(binary, program, recordings)


KEPT_BY_A_COVER = {"a compacted watch next to a live one"}
"""A live watch of another key keeps the history of the cover, which serves the compacted start."""


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(program, marks=() if number % 12 == 3 and not program.long else pytest.mark.long, id=program.name)
        for number, program in enumerate(PROGRAMS)
        if not program.fresh and program.name not in KEPT_BY_A_COVER
    ],
)
def test_the_same_below_a_cover(program: Program, stages: Stages) -> None:
    """All watches share one upstream watch of all keys; with users, which the cover needs a user for, none does."""
    binary = etcds()[0]
    recordings = run(stages.get(binary, program).run(program, covers=(b"",)), program.limit_s)
    judge(binary, program, recordings)


def test_names_are_unique() -> None:
    names = [program.name for program in PROGRAMS]
    assert len(names) == len(set(names))
