"""Which endpoints are in force after changes, answers and ends of the process that examines them."""

from __future__ import annotations

from proxy.process.endpoints import EndpointLists, EndpointsDecision, Examination, ExaminationResult

OLD, NEW, OTHER = (EndpointLists([text], []) for text in ("old:1", "new:1", "other:1"))


def test_new_endpoints_are_in_force_after_a_good_answer() -> None:
    decision = EndpointsDecision(OLD)
    decision.want(NEW)
    assert decision.pending == Examination(1, NEW)
    assert decision.in_force == OLD
    assert decision.examined(ExaminationResult(1, "")) == NEW
    assert decision.in_force == NEW


def test_refused_endpoints_are_examined_again_when_wanted_again() -> None:
    """What was wrong may have been corrected elsewhere."""
    decision = EndpointsDecision(OLD)
    for count in (1, 2):
        decision.want(NEW)
        assert decision.examined(ExaminationResult(count, "a loop")) == NEW
        assert decision.in_force == OLD
        assert decision.pending is None


def test_an_answer_about_earlier_endpoints_decides_nothing() -> None:
    decision = EndpointsDecision(OLD)
    decision.want(NEW)
    assert decision.pending is not None
    late = ExaminationResult(decision.pending.number, "")
    for wanted in (OTHER, OLD):
        decision.want(wanted)
        assert decision.examined(late) is None
        assert decision.in_force == OLD
    assert decision.pending is None


def test_an_answer_counts_once() -> None:
    """Reports repeat it, and it must not undo a later decision."""
    decision = EndpointsDecision(OLD)
    decision.want(NEW)
    answer = ExaminationResult(1, "")
    assert decision.examined(answer) == NEW
    decision.want(OLD)
    assert decision.examined(ExaminationResult(2, "")) == OLD
    assert decision.examined(answer) is None
    assert decision.in_force == OLD
