"""The log of endpoints that cannot be used."""

from __future__ import annotations

from tests.upstream.recorder import RecordedLog
from upstream.problems import CALLS, WATCHES, EndpointProblems


def test_a_problem_is_logged_once_until_it_is_over() -> None:
    log = RecordedLog()
    problems = EndpointProblems(log)
    for part in (WATCHES, CALLS, WATCHES):
        problems.met(part, "a:1", "refused")
    assert len(log.lines) == 1
    problems.met(WATCHES, "a:1", "it has no leader")
    problems.met(WATCHES, "b:1", "refused")
    assert len(log.lines) == 3
    problems.over(WATCHES, "a:1")
    problems.met(WATCHES, "a:1", "refused")
    assert len(log.lines) == 3
    for part in (CALLS, WATCHES):
        problems.over(part, "a:1")
    problems.met(CALLS, "a:1", "refused")
    assert len(log.lines) == 4
