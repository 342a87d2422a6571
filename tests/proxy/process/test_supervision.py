"""Supervision of the processes of --workers: a table of what happens, and what is to be done then."""

from __future__ import annotations

import pytest

from proxy.process.supervision import (
    HUB,
    LATE_S,
    LOOK_S_MAX,
    RESTART_S_FIRST,
    RESTART_S_MAX,
    SILENT_S,
    STOP_GRACE_S,
    TOGETHER_S,
    Action,
    KillProcess,
    Phase,
    StartProcess,
    StopProcess,
    Supervision,
)

ONE, TWO = "worker-1", "worker-2"


def due(state: Supervision, now: float) -> list[Action]:
    """Return what is to be done, as done: processes that start are started."""
    actions = list(state.due(now))
    for action in actions:
        if isinstance(action, StartProcess):
            state.started(action.name, now)
    return actions


def running(workers: int = 2) -> Supervision:
    """Return the state at time 0, with all processes ready."""
    state = Supervision(workers, lambda: 1.0)
    for _ in range(3):
        for action in due(state, 0):
            state.reported(action.name, 0)
    assert state.was_ready
    return state


def hear(state: Supervision, now: float) -> None:
    """All running processes report."""
    for process in state.processes.values():
        if process.running:
            state.reported(process.name, now)


def silent(state: Supervision, since: float, now: float) -> bool:
    """Look at the processes as often as the parent does; return whether there was nothing to do until now."""
    looks = int((now - since) / LOOK_S_MAX) + 1
    return not any(due(state, since + (now - since) * look / looks) for look in range(1, looks + 1))


def test_the_hub_starts_first_then_one_worker_then_the_rest() -> None:
    state = Supervision(3, lambda: 1.0)
    assert due(state, 0) == [StartProcess(HUB)]
    assert due(state, 1) == []
    state.reported(HUB, 1)
    assert due(state, 1) == [StartProcess(ONE)]
    assert due(state, 1) == []
    state.reported(ONE, 2)
    assert due(state, 2) == [StartProcess(TWO), StartProcess("worker-3")]


def test_a_parent_that_was_stopped_kills_no_process() -> None:
    """Their reports wait to be read: they are silent from now on."""
    state = running()
    assert due(state, 1) == []
    assert due(state, 100) == []
    assert state.takers(100) == [ONE, TWO]
    hear(state, 101)
    assert silent(state, 101, 100.9 + SILENT_S)
    assert due(state, 101 + SILENT_S) == [KillProcess(HUB), KillProcess(ONE), KillProcess(TWO)]


def test_a_process_that_cannot_be_started_is_tried_again() -> None:
    state = running()
    state.ended(ONE, 1)
    assert list(state.due(1)) == [StartProcess(ONE)]
    waits = []
    for _ in range(9):
        state.not_started(ONE, 1)
        waits.append(state.processes[ONE].start_at - 1)
    assert waits == sorted(waits)
    assert waits[0] >= RESTART_S_FIRST
    assert waits[-1] == RESTART_S_MAX
    assert state.processes[ONE].starts == 1


@pytest.mark.parametrize("name", [HUB, ONE, TWO])
def test_a_process_that_ends_is_restarted_at_once(name: str) -> None:
    state = running()
    state.ended(name, 5)
    assert state.next_deadline() == 5
    assert due(state, 5) == [StartProcess(name)]
    assert not state.failed


def test_restarts_in_a_row_wait_longer_and_longer() -> None:
    state = running()
    now, waits = 1.0, []
    for _ in range(12):
        hear(state, now)
        state.ended(ONE, now)
        waits.append(state.processes[ONE].start_at - now)
        now = state.processes[ONE].start_at
        state.reported(HUB, now)
        state.reported(TWO, now)
        assert due(state, now) == [StartProcess(ONE)]
    assert waits[:4] == [0, RESTART_S_FIRST, 2 * RESTART_S_FIRST, 4 * RESTART_S_FIRST]
    assert waits[-1] == RESTART_S_MAX
    state.reported(ONE, now)
    state.ended(ONE, now + RESTART_S_MAX)
    assert state.processes[ONE].start_at == now + RESTART_S_MAX


def test_a_silent_process_is_killed_once_and_restarted() -> None:
    state = running()
    assert silent(state, 0, 10)
    hear(state, 10)
    state.reported(HUB, 10 + SILENT_S / 2)
    state.reported(TWO, 10 + SILENT_S / 2)
    assert silent(state, 10, 10 + SILENT_S - 1)
    assert state.next_deadline() == 10 + SILENT_S
    assert due(state, 10 + SILENT_S) == [KillProcess(ONE)]
    assert due(state, 10 + SILENT_S) == []
    state.ended(ONE, 10 + SILENT_S)
    assert due(state, 10 + SILENT_S) == [StartProcess(ONE)]


@pytest.mark.parametrize("name", [HUB, ONE])
def test_a_process_that_cannot_start_stops_the_whole(name: str) -> None:
    state = Supervision(2, lambda: 1.0)
    due(state, 0)
    if name != HUB:
        state.reported(HUB, 0)
        due(state, 0)
    state.ended(name, 1)
    assert state.failed
    assert due(state, 1) == ([] if name == HUB else [StopProcess(HUB)])
    if name != HUB:
        state.ended(HUB, 2)
    assert due(state, 2) == []
    assert state.phase is Phase.GONE


def test_at_a_stop_the_workers_leave_before_the_hub() -> None:
    state = running()
    state.stop(5)
    assert due(state, 5) == [StopProcess(ONE), StopProcess(TWO)]
    assert due(state, 5) == []
    state.ended(ONE, 6)
    assert due(state, 6) == []
    state.ended(TWO, 7)
    assert due(state, 7) == [StopProcess(HUB)]
    state.ended(HUB, 8)
    assert due(state, 8) == []
    assert state.phase is Phase.GONE
    assert state.next_deadline() is None


def test_a_process_that_does_not_stop_is_killed() -> None:
    state = running(1)
    state.stop(5)
    assert due(state, 5) == [StopProcess(ONE)]
    late = 5 + state.drain_s + STOP_GRACE_S
    assert state.next_deadline() == late
    assert due(state, late) == [KillProcess(ONE)]
    assert due(state, late) == []
    state.ended(ONE, late)
    assert due(state, late) == [StopProcess(HUB)]
    assert due(state, late + STOP_GRACE_S) == [KillProcess(HUB)]


@pytest.mark.parametrize(
    ("hub", "one", "two", "reason"),
    [
        ("", "", "", ""),
        ("", "gone", "", ""),
        ("", "no etcd", "", ""),
        ("", "gone", "gone", "no worker is ready"),
        ("", "no etcd", "gone", "no etcd"),
        ("gone", "", "", "the hub is starting"),
        ("no etcd", "", "", "hub: no etcd"),
    ],
)
def test_the_whole_serves_while_the_hub_and_a_worker_do(hub: str, one: str, two: str, reason: str) -> None:
    state = running()
    for name, state_of in ((HUB, hub), (ONE, one), (TWO, two)):
        if state_of == "gone":
            state.ended(name, 1)
        else:
            state.reported(name, 1, problem=state_of)
    assert state.reason == reason
    state.stop(2)
    assert state.reason == "draining"


@pytest.mark.parametrize(
    ("hub", "one", "two", "hung"),
    [("", "", "", ""), ("", "h", "", ""), ("", "h", "h", "h"), ("h", "", "", "hub: h")],
)
def test_the_whole_hangs_if_the_hub_or_all_workers_do(hub: str, one: str, two: str, hung: str) -> None:
    state = running()
    for name, text in ((HUB, hub), (ONE, one), (TWO, two)):
        state.reported(name, 1, hung=text)
    assert state.hung == hung


@pytest.mark.parametrize(
    ("one", "two", "takers"),
    [
        ("", "", [ONE, TWO]),
        ("", "no etcd", [ONE]),
        ("silent", "", [TWO]),
        ("gone", "", [TWO]),
        ("no etcd", "silent", [ONE, TWO]),
        ("gone", "gone", []),
    ],
)
def test_workers_that_serve_get_connections(one: str, two: str, takers: list[str]) -> None:
    state = running()
    for name, state_of in ((ONE, one), (TWO, two)):
        if state_of == "gone":
            state.ended(name, 1)
        elif state_of != "silent":
            state.reported(name, 1 + LATE_S, problem=state_of)
    assert state.takers(1 + LATE_S) == takers
    state.stop(2)
    assert state.takers(2) == []


def test_connections_wait_at_the_start_for_all_workers() -> None:
    state = Supervision(2, lambda: 1.0)
    for name in (HUB, ONE, TWO):
        state.started(name, 0)
        state.reported(name, 0, problem="starting")
    state.reported(ONE, 1)
    assert state.takers(1) == []
    # But not for ever: of two workers one may fail again and again.
    assert state.takers(TOGETHER_S) == [ONE]
    state.reported(TWO, 2)
    assert state.takers(2) == [ONE, TWO]
    # Later a single one is enough.
    state.reported(TWO, 3, problem="no etcd")
    assert state.takers(3) == [ONE]
