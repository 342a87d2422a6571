"""New connections go to the worker that has the fewest."""

from __future__ import annotations

from collections import Counter

from proxy.process.balancing import BUSY, LeastConnections

WORKERS = ["worker-1", "worker-2", "worker-3", "worker-4"]


def balance() -> LeastConnections:
    made = LeastConnections()
    for name in WORKERS:
        made.started(name)
    return made


def test_connections_between_two_reports_are_even() -> None:
    one = balance()
    assert Counter(one.choose(WORKERS) for _ in range(20)) == dict.fromkeys(WORKERS, 5)
    # Of five, one worker has closed three, and has not taken two yet.
    one.reported("worker-2", 0, 3)
    assert [one.choose(WORKERS) for _ in range(3)] == ["worker-2"] * 3
    assert Counter(one.choose(WORKERS) for _ in range(4)) == dict.fromkeys(WORKERS, 1)


def test_a_restarted_worker_catches_up() -> None:
    one = balance()
    for _ in range(40):
        one.choose(WORKERS)
    one.started("worker-3")
    assert Counter(one.choose(WORKERS) for _ in range(10)) == {"worker-3": 10}
    assert Counter(one.choose(WORKERS) for _ in range(4)) == dict.fromkeys(WORKERS, 1)


def test_a_busy_worker_gets_connections_only_if_all_are_busy() -> None:
    """Also one that was restarted: its connections do not stay, and those of the others do."""
    one = balance()
    for name in WORKERS:
        one.reported(name, 1000, 0)
    one.started("worker-3")
    assert {one.choose(WORKERS) for _ in range(10)} == {"worker-3"}
    one.reported("worker-3", 0, 10, load=BUSY + 0.1)
    assert Counter(one.choose(WORKERS) for _ in range(9)) == {"worker-1": 3, "worker-2": 3, "worker-4": 3}
    for name in WORKERS:
        one.reported(name, 1000, 3, load=1.0)
    one.reported("worker-3", 0, 10, load=1.0)
    assert one.choose(WORKERS) == "worker-3"


def test_a_full_worker_gets_none_while_another_has_a_place() -> None:
    one = balance()
    two = WORKERS[:2]
    one.reported("worker-1", 8, 0, most=10)
    one.reported("worker-2", 8, 0, load=BUSY + 0.1, most=10)
    # Busy is better than full: a full worker refuses.
    assert [one.choose(two) for _ in range(4)] == ["worker-1", "worker-1", "worker-2", "worker-2"]
    # All are full: the client gets the refusal of one of them.
    assert one.choose(two) == "worker-1"


def test_only_takers_get_connections() -> None:
    one = balance()
    assert Counter(one.choose(WORKERS[:2]) for _ in range(4)) == {"worker-1": 2, "worker-2": 2}
    one.returned("worker-2", 2)
    assert one.choose(["worker-1", "worker-2"]) == "worker-2"
