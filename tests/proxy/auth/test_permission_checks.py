"""Permission checks of tokens: which ranges one call checks, which checks share it, and which its answer decides."""

from __future__ import annotations

from typing import Any

import pytest

from coalesce.inputs import CreateRefusal, Granted, Identity
from proto.etcd_errors import OLD_AUTH_REVISION, TOO_MANY_OPS
from proto.scan import Header
from proxy.auth.model import AnswerCheck, AuthCall, PermissionCheck, QueryEffect, RefuseSession, SendCall
from proxy.auth.permission_checks import (
    CALLS_PER_TOKEN_MAX,
    RANGE_BYTES_MAX,
    RANGES_MAX,
    TRIES_MAX,
    CheckBatch,
    Checks,
)
from proxy.auth.restore import AuthScope

HEADER = Header.make(1, 2, 7, 3)
DENIED = (7, "etcdserver: permission denied")
INVALID = (16, "etcdserver: invalid auth token")
GONE = (14, "connection refused")
LATE = (4, "no answer in 5 s")
BROKEN = (13, "the stream was reset")
TOO_LARGE = (8, "grpc: received message larger than max (2 vs. 1)")


class Session:
    """A session that has a token and may end."""

    def __init__(self, token: bytes = b"t") -> None:
        self.identity = Identity(token)
        self.ended = False


class Create:
    """The part of a create that a check uses."""

    def __init__(self, session: Session) -> None:
        self.session = session


class Rig:
    """Checks, the calls in flight, and the answers."""

    def __init__(self, in_flight_max: int = 32) -> None:
        self.checks = Checks(in_flight_max)
        self.calls: list[AuthCall] = []
        self.later: list[AuthCall] = []
        self.told: list[tuple[bytes, str]] = []
        self.ended: list[Any] = []
        self.sent = 0

    def ask(self, key: bytes, session: Session | None = None, token: bytes = b"t") -> None:
        """Add a check of a session for a key."""
        create: Any = Create(session or Session(token))
        self.do(self.checks.add(PermissionCheck(AuthScope(create.session.identity.token, key), create)))

    def granted(self) -> AuthCall:
        """Grant the oldest call in flight."""
        call = self.calls.pop(0)
        self.do(self.checks.granted(self.batch(call), HEADER))
        return call

    def failed(self, failure: tuple[int, str]) -> AuthCall:
        """Let the oldest call in flight fail."""
        call = self.calls.pop(0)
        self.do(self.checks.failed(self.batch(call), *failure))
        return call

    def again(self) -> None:
        """End the delay after a failure."""
        self.do(self.checks.again(self.batch(self.later.pop(0))))

    @staticmethod
    def batch(call: AuthCall) -> CheckBatch:
        assert isinstance(call.query, CheckBatch)
        return call.query

    def do(self, effects: list[QueryEffect]) -> None:
        for effect in effects:
            if isinstance(effect, SendCall):
                (self.later if effect.later else self.calls).append(effect.call)
                if not effect.later:
                    self.sent += 1
                    self.checks.sent(self.batch(effect.call))
            elif isinstance(effect, AnswerCheck):
                kind = "yes" if isinstance(effect.outcome, Granted) else "no"
                self.told.append((effect.check.asked.key, kind))
            else:
                assert isinstance(effect, RefuseSession)
                self.ended.append((effect.session, effect.status))

    def asked(self) -> list[list[bytes]]:
        """The keys that the calls in flight check."""
        return [[key for key, _ in call.ranges] for call in self.calls]


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_equal_checks_before_the_call_share_it(rig: Rig) -> None:
    rig.ask(b"first")
    for _ in range(3):
        rig.ask(b"k")
    rig.granted()
    assert rig.asked() == [[b"k"]]
    rig.granted()
    assert rig.told == [(b"first", "yes"), *[(b"k", "yes")] * 3]
    assert (rig.sent, rig.checks.waiting) == (2, 0)


def test_an_equal_check_after_the_call_waits_for_the_next(rig: Rig) -> None:
    rig.ask(b"k")
    rig.ask(b"k")
    assert rig.asked() == [[b"k"]]
    rig.granted()
    assert rig.told == [(b"k", "yes")]
    assert rig.asked() == [[b"k"]]
    rig.granted()
    assert rig.told == [(b"k", "yes")] * 2


def test_one_call_checks_many_ranges_of_a_token(rig: Rig) -> None:
    for number in range(1 + RANGES_MAX + 1):
        rig.ask(b"%d" % number)
    rig.granted()
    assert [len(keys) for keys in rig.asked()] == [RANGES_MAX]
    rig.granted()
    assert [len(keys) for keys in rig.asked()] == [1]
    rig.granted()
    assert len(rig.told) == RANGES_MAX + 2
    assert rig.sent == 3


def test_many_checks_of_a_granted_token_use_several_calls(rig: Rig) -> None:
    rig.ask(b"first")
    for number in range(10 * RANGES_MAX):
        rig.ask(b"%d" % number)
    assert len(rig.calls) == 1
    rig.granted()
    most = 0
    while rig.calls:
        most = max(most, len(rig.calls))
        assert len(rig.calls) == 1 or all(len(keys) == RANGES_MAX for keys in rig.asked()[:-1])
        rig.granted()
    assert most == CALLS_PER_TOKEN_MAX
    assert len(rig.told) == 1 + 10 * RANGES_MAX
    assert rig.checks.waiting == 0
    assert not rig.checks._lines


def test_sessions_of_one_token_take_turns(rig: Rig) -> None:
    greedy, modest = Session(), Session()
    rig.ask(b"first", greedy)
    for number in range(1000):
        rig.ask(b"%d" % number, greedy)
    rig.ask(b"modest", modest)
    rig.granted()
    assert b"modest" in rig.asked()[0][:2]


def test_a_large_range_is_checked_alone(rig: Rig) -> None:
    rig.ask(b"first")
    rig.ask(b"small")
    rig.ask(b"x" * RANGE_BYTES_MAX)
    rig.ask(b"other")
    seen = []
    while rig.calls:
        seen += rig.asked()
        rig.granted()
    assert [len(keys) for keys in seen] == [1, 1, 1, 1] or [len(keys) for keys in seen] == [1, 2, 1]
    assert [b"x" * RANGE_BYTES_MAX] in seen


def test_calls_in_flight_are_bounded_and_tokens_take_turns() -> None:
    rig = Rig(8)
    for number in range(20):
        rig.ask(b"k", token=b"token %d" % number)
    # Unknown tokens have three of eight slots.
    assert len(rig.calls) == 3
    assert rig.checks.waiting == 20
    while rig.calls:
        assert len(rig.calls) <= 8
        rig.granted()
    assert len(rig.told) == 20
    assert rig.checks.waiting == 0


def test_made_up_tokens_leave_slots_for_granted_tokens() -> None:
    rig = Rig(8)
    rig.ask(b"k", token=b"good")
    rig.granted()
    for number in range(1000):
        rig.ask(b"k", token=b"made up %d" % number)
    rig.ask(b"other", token=b"good")
    assert [b"other"] in rig.asked()
    # Refused tokens that are tried again have one slot together, even if all others are free.
    rig = Rig(8)
    for number in range(8):
        rig.ask(b"k", token=b"bad %d" % number)
    while rig.calls:
        rig.failed(INVALID)
    for number in range(8):
        rig.ask(b"k", token=b"bad %d" % number)
    assert len(rig.calls) == 1
    rig.ask(b"k", token=b"new")
    assert len(rig.calls) == 2


def test_an_invalid_token_refuses_all_earlier_checks(rig: Rig) -> None:
    rig.ask(b"first")
    rig.failed((14, "connection refused"))
    for number in range(1000):
        rig.ask(b"%d" % number)
    rig.again()
    rig.ask(b"late")
    rig.failed(INVALID)
    # All but the check that arrived after the call was sent.
    assert len(rig.told) == 1001
    assert [answer for _, answer in rig.told] == ["no"] * 1001
    assert rig.asked() == [[b"late"]]
    assert rig.checks.waiting == 1


@pytest.mark.parametrize("bad", [1, 3])
def test_a_refused_range_is_found_among_the_others(bad: int, rig: Rig) -> None:
    rig.ask(b"first")
    for number in range(RANGES_MAX):
        rig.ask(b"%d" % number)
    rig.granted()
    refused = {b"%d" % (number * 40) for number in range(bad)}
    while rig.calls:
        if refused & {key for key, _ in rig.calls[0].ranges}:
            rig.failed(DENIED)
        else:
            rig.granted()
    assert {key for key, answer in rig.told if answer == "no"} == refused
    assert len(rig.told) == RANGES_MAX + 1
    assert rig.sent <= 2 + bad * 14


def test_a_key_too_large_ends_its_own_session(rig: Rig) -> None:
    culprit = Session()
    rig.ask(b"first")
    rig.ask(b"small")
    rig.ask(b"poison", culprit)
    rig.granted()
    while rig.calls:
        if (b"poison", b"") in rig.calls[0].ranges:
            rig.failed(TOO_LARGE)
        else:
            rig.granted()
    assert rig.ended == [(culprit, 8)]
    assert rig.told == [(b"first", "yes"), (b"small", "yes")]


def test_unclear_failures_are_split_and_given_up(rig: Rig) -> None:
    culprit = Session()
    rig.ask(b"first")
    rig.ask(b"poison", culprit)
    rig.ask(b"small")
    rig.granted()
    tries = 0
    while rig.calls or rig.later:
        if not rig.calls:
            rig.again()
        elif (b"poison", b"") in rig.calls[0].ranges:
            tries += 1
            rig.failed(BROKEN)
            # The other creates of the token do not wait for it.
            if tries > 2:
                assert rig.told == [(b"first", "yes"), (b"small", "yes")]
        else:
            rig.granted()
    assert rig.ended == [(culprit, 13)]
    assert tries == TRIES_MAX + 1


def test_checks_that_etcd_cannot_answer_are_retried() -> None:
    rig = Rig(8)
    for number in range(5):
        rig.ask(b"k", token=b"token %d" % number)
    waiting = [rig.failed(GONE) for _ in range(3)]
    # Their slots are free meanwhile.
    assert len(rig.calls) == 2
    assert rig.later == waiting
    rig.again()
    assert waiting[0] in rig.calls
    while rig.calls or rig.later:
        if rig.later:
            rig.again()
        else:
            rig.granted()
    assert len(rig.told) == 5


def test_a_token_whose_checks_time_out_loses_its_slot() -> None:
    rig = Rig(8)
    for number in range(3):
        rig.ask(b"k", token=b"from the future %d" % number)
    for _ in range(3):
        rig.failed(LATE)
    for _ in range(3):
        rig.again()
    assert len(rig.calls) == 1
    rig.ask(b"k", token=b"good")
    assert len(rig.calls) == 2


def test_a_change_of_users_during_a_call_is_retried_once(rig: Rig) -> None:
    rig.ask(b"k")
    rig.failed((3, OLD_AUTH_REVISION))
    assert rig.told == []
    rig.granted()
    assert rig.told == [(b"k", "yes")]
    rig.ask(b"k")
    rig.failed((3, OLD_AUTH_REVISION))
    rig.failed((3, OLD_AUTH_REVISION))
    assert rig.told == [(b"k", "yes"), (b"k", "no")]


def test_calls_shrink_to_etcds_limit_of_operations(rig: Rig) -> None:
    rig.ask(b"first")
    for number in range(200):
        rig.ask(b"%d" % number)
    rig.granted()
    sizes = []
    while rig.calls:
        sizes.append(len(rig.calls[0].ranges))
        if sizes[-1] > 32:
            rig.failed((3, TOO_MANY_OPS))
        else:
            rig.granted()
    assert len(rig.told) == 201
    assert sizes.count(128) == 1
    assert sizes.count(64) == 2


def test_checks_of_closed_sessions_are_dropped(rig: Rig) -> None:
    session = Session()
    rig.ask(b"first")
    for number in range(10):
        rig.ask(b"%d" % number, session)
    session.ended = True
    rig.granted()
    assert rig.calls == []
    assert rig.checks.waiting == 0
    rig.ask(b"k")
    assert rig.asked() == [[b"k"]]


def test_refusals_use_etcds_wording(rig: Rig) -> None:
    rig.ask(b"k")
    (effect,) = rig.checks.failed(rig.batch(rig.calls.pop()), *DENIED)
    assert isinstance(effect, AnswerCheck)
    assert effect.outcome == CreateRefusal("rpc error: code = PermissionDenied desc = etcdserver: permission denied")
