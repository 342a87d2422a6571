"""Waiting calls: their order, and when each wait expires."""

from __future__ import annotations

import random

from proxy.passthrough.waiting import WaitingCalls, check_again, wait_until


def test_calls_are_served_oldest_first() -> None:
    calls: WaitingCalls[str] = WaitingCalls()
    for name, until in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        calls.add(name, until)
    assert calls.oldest() == "a"
    assert calls.expired(0.9) is None
    assert calls.expired(1.0) == "b"
    # A call that is added again keeps its place in the order.
    calls.add("a", 9.0)
    assert calls.oldest() == "a"
    assert calls.remove("b")
    assert not calls.remove("b")
    assert calls.next_expiry == 2.0
    assert calls.remove("a")
    assert (calls.oldest(), len(calls), "c" in calls) == ("c", 1, True)
    assert calls.remove("c")
    assert calls.oldest() is None
    assert calls.next_expiry is None


def test_removed_calls_are_not_kept_in_memory() -> None:
    calls: WaitingCalls[int] = WaitingCalls()
    calls.add(-1, 0.5)
    for number in range(10_000):
        calls.add(number, float(number))
        assert calls.remove(number)
        assert len(calls._by_time) < 100
    assert len(calls) == 1


def test_random_calls_expire_in_the_order_of_their_times() -> None:
    choose = random.Random(7)
    calls: WaitingCalls[int] = WaitingCalls()
    until: dict[int, float] = {}
    for number in range(2_000):
        if until and choose.random() < 0.3:
            gone = choose.choice(list(until))
            del until[gone]
            assert calls.remove(gone)
        until[number] = choose.random()
        calls.add(number, until[number])
        assert calls.next_expiry == min(until.values())
        assert calls.oldest() == next(iter(until))
    for _, number in sorted((time, number) for number, time in until.items()):
        assert calls.expired(1.0) == number
        assert calls.remove(number)


def test_wait_leaves_time_for_the_next_endpoint() -> None:
    assert wait_until(100.0, None, 5.0, repeated=True) == 105.0
    assert wait_until(100.0, 160.0, 5.0, repeated=True) == 105.0
    assert wait_until(100.0, 103.0, 5.0, repeated=True) == 101.0
    # A client that does not retry at the next endpoint needs no time for it.
    assert wait_until(100.0, 103.0, 5.0) == 103.0
    assert wait_until(100.0, None, 5.0) == wait_until(100.0, 106.0, 5.0) == 105.0


def test_call_that_waits_for_a_stream_is_checked_in_time() -> None:
    """The etcd that is connected may be lost meanwhile: then the call still has time for the next endpoint."""
    assert check_again(100.0, 103.0, 5.0, repeated=True) == 101.0
    assert check_again(100.0, 102.0, 5.0) == 102.0
    # Not all the time.
    assert check_again(100.0, None, 0.0) == check_again(100.0, 100.3, 5.0, repeated=True) == 100.2
    assert check_again(100.0, 100.1, 5.0, repeated=True) == 100.1
