"""Which server the watches are on, and what follows when a stream of theirs ends."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from proto.framing import Status
from upstream.errors import NO_LEADER_TEXT
from upstream.watching.choice import Choice, Next, Wanted, after_end


@dataclass
class Endpoint:
    """What is known of one."""

    tried: bool = False
    leaderless: bool = False
    unimplemented: bool = False


@pytest.mark.parametrize(
    ("status", "text", "answered", "opened", "healthy", "follows"),
    [
        (Status.UNAVAILABLE, "gone", True, True, True, Next.HERE),
        (Status.UNAVAILABLE, "gone", False, True, True, Next.ELSEWHERE),
        (Status.UNAVAILABLE, "no stream to be had", False, False, True, Next.HERE),
        (Status.UNAVAILABLE, "gone", True, True, False, Next.NOTHING),
        (Status.UNAVAILABLE, NO_LEADER_TEXT, True, True, True, Next.ELSEWHERE),
        (Status.CANCELLED, "server stopped", True, True, True, Next.HERE),
        (Status.UNIMPLEMENTED, "no such service", False, True, True, Next.ELSEWHERE),
        (Status.PERMISSION_DENIED, "no", True, True, True, Next.LOST),
        (Status.UNAUTHENTICATED, "no", False, True, False, Next.LOST),
        (Status.INVALID_ARGUMENT, "no", True, True, True, Next.LOST),
    ],
)
def test_what_follows_the_end_of_a_stream(
    status: int, text: str, answered: bool, opened: bool, healthy: bool, follows: Next
) -> None:
    here, other = Endpoint(), Endpoint()
    found = after_end(status, text, here, [here, other], answered=answered, opened=opened, healthy=healthy)
    assert found is follows
    assert here.leaderless is (text == NO_LEADER_TEXT)


def test_a_service_that_nobody_has_is_the_end() -> None:
    here, other = Endpoint(), Endpoint(unimplemented=True)
    found = after_end(Status.UNIMPLEMENTED, "", here, [here, other], answered=False, opened=True, healthy=True)
    assert found is Next.LOST


def test_nobody_has_a_leader_when_all_were_asked_and_one_said_so() -> None:
    choice = Choice()
    some = [Endpoint(tried=True, leaderless=True), Endpoint()]
    assert not choice.failed(some, in_use=False)
    assert not choice.is_acceptable(False)
    some[1].tried = True
    assert not choice.failed(some, in_use=True)
    assert choice.failed(some, in_use=False)
    # It is told once.
    assert not choice.failed(some, in_use=False)
    assert choice.is_acceptable(False)
    assert choice.wanted(True) is Wanted.LEADER
    assert not choice.is_better(Wanted.LEADER, False)
    choice.used(False)
    assert choice.leaderless
    choice.used(True)
    assert not choice.leaderless
    assert choice.wanted(True) is Wanted.NOTHING
    assert choice.wanted(False) is Wanted.ENDPOINT
