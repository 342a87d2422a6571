"""Which endpoints a call is sent to, and when it has failed."""

from __future__ import annotations

import pytest

from proto import etcd_errors
from upstream.attempts import Attempts, Failure

NO_LEADER = (14, etcd_errors.NO_LEADER)
GONE = (14, "gone")
LATE = (4, "no answer")
BROKEN = (13, "stream reset")
DENIED = (7, "etcdserver: permission denied")
TOO_LARGE = (8, "grpc: received message larger than max (2 vs. 1)")
BUSY = (8, "etcdserver: too many requests")


def test_each_endpoint_gets_the_call_once_in_order() -> None:
    attempts = Attempts(["a", "b", "a", "c"])
    assert [attempts.next() for _ in range(4)] == ["a", "b", "c", None]
    assert attempts.open == {"a", "b", "c"}
    assert not attempts.left


def test_call_fails_when_no_attempt_is_left() -> None:
    attempts = Attempts(["a", "b"])
    attempts.next()
    assert attempts.failed("a", *GONE) is None
    attempts.next()
    assert attempts.failed("b", *GONE) == Failure(*GONE)


def test_late_answer_is_still_accepted() -> None:
    attempts = Attempts(["a", "b"])
    attempts.next()
    attempts.next()
    assert attempts.failed("b", *GONE) is None
    assert attempts.failed("a", *LATE) == Failure(*LATE)


@pytest.mark.parametrize("failure", [DENIED, TOO_LARGE, (3, "user name is empty"), (16, "invalid auth token")])
def test_a_failure_of_the_request_itself_is_final(failure: tuple[int, str]) -> None:
    attempts = Attempts(["a", "b"])
    attempts.next()
    assert attempts.failed("a", *failure) == Failure(*failure)


@pytest.mark.parametrize(
    ("failures", "status", "text"),
    [
        ([NO_LEADER, NO_LEADER], 14, etcd_errors.NO_LEADER),
        # The endpoint that failed may have a leader.
        ([NO_LEADER, GONE], *GONE),
        ([GONE, NO_LEADER], *GONE),
        ([LATE, NO_LEADER], *LATE),
        ([NO_LEADER, BROKEN], 14, "some endpoints have no leader, one failed: stream reset"),
        ([NO_LEADER, (9, etcd_errors.LEARNER)], 14, etcd_errors.NO_LEADER),
        ([(14, etcd_errors.LEARNER)], 14, etcd_errors.LEARNER),
        ([BROKEN, GONE], *GONE),
        ([BROKEN, BUSY], *BUSY),
    ],
)
def test_failures_of_all_endpoints_are_combined(failures: list[tuple[int, str]], status: int, text: str) -> None:
    attempts = Attempts(map(str, range(len(failures))))
    while attempts.next() is not None:
        pass
    outcomes = [attempts.failed(str(number), *failure) for number, failure in enumerate(failures)]
    assert outcomes == [None] * (len(failures) - 1) + [Failure(status, text)]
