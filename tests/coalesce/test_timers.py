"""Timers: moving and stopping costs an assignment, and no timer fires twice."""

from __future__ import annotations

from coalesce.timers import Timers


class Subject:
    def __init__(self, name: str) -> None:
        self.name = name
        self.timer_at: float | None = None


def test_timers_fire_in_order_and_once() -> None:
    timers: Timers[Subject] = Timers()
    late, early = Subject("late"), Subject("early")
    timers.start(late, 5.0)
    timers.start(early, 3.0)
    assert timers.next_deadline() == 3.0
    assert [subject.name for subject in timers.due(2.9)] == []
    assert [subject.name for subject in timers.due(5.0)] == ["early", "late"]
    assert timers.next_deadline() is None
    assert len(timers) == 0


def test_a_timer_can_be_moved_and_stopped() -> None:
    timers: Timers[Subject] = Timers()
    moved, stopped = Subject("moved"), Subject("stopped")
    timers.start(moved, 1.0)
    timers.start(stopped, 1.0)
    timers.start(moved, 4.0)
    timers.stop(stopped)
    timers.stop(stopped)
    assert list(timers.due(3.9)) == []
    assert timers.next_deadline() == 4.0
    assert list(timers.due(4.0)) == [moved]


def test_a_timer_can_be_restarted_while_it_fires() -> None:
    timers: Timers[Subject] = Timers()
    subject = Subject("again")
    timers.start(subject, 1.0)
    for rung in timers.due(1.5):
        timers.start(rung, 2.0)
    assert timers.next_deadline() == 2.0


def test_moving_back_and_forth_keeps_the_heap_small() -> None:
    timers: Timers[Subject] = Timers()
    subjects = [Subject(str(n)) for n in range(10)]
    for turn in range(1000):
        for subject in subjects:
            timers.start(subject, 1.0 + turn % 3)
    assert len(timers._entries) <= 2 * len(subjects) + 65
    timers_due = list(timers.due(10.0))
    assert sorted(subject.name for subject in timers_due) == sorted(subject.name for subject in subjects)


def test_stopped_subjects_are_freed() -> None:
    """They are freed before their deadline, which may be minutes away: a subject may hold a client's whole session."""
    timers: Timers[Subject] = Timers()
    subjects = [Subject(str(n)) for n in range(1000)]
    for subject in subjects:
        timers.start(subject, 600.0)
    for subject in subjects[1:]:
        timers.stop(subject)
    assert len(timers._entries) <= 66
    assert list(timers.due(600.0)) == subjects[:1]
