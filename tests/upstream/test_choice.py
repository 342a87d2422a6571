"""Which server carries the watches, and what to do when one of their streams ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from proto import etcd_errors
from proto.framing import Status
from upstream.watching.choice import EndpointPolicy, SearchGoal, on_stream_end
from upstream.watching.stream import StreamEndAction


@dataclass
class Watch:
    """A watch whose create was not answered."""

    ends: int = 0


@dataclass
class Stream:
    """A stream that ended."""

    answered: bool = True
    tested: bool = False
    unanswered: Sequence[Watch] = ()
    token: bytes | None = None
    creating: Sequence[Watch] = ()


@dataclass
class Endpoint:
    """The health of an endpoint."""

    tried: bool = False
    leaderless: bool = False
    unimplemented: bool = False


@pytest.mark.parametrize(
    ("status", "text", "answered", "moved", "healthy", "follows"),
    [
        (Status.UNAVAILABLE, "gone", True, False, True, StreamEndAction.HERE),
        (Status.UNAVAILABLE, "gone", False, False, True, StreamEndAction.ELSEWHERE),
        (Status.UNAVAILABLE, "the connection ended", False, True, True, StreamEndAction.MOVED),
        (Status.UNAVAILABLE, "gone", True, False, False, StreamEndAction.NOTHING),
        (Status.UNAVAILABLE, etcd_errors.NO_LEADER, True, False, True, StreamEndAction.ELSEWHERE),
        (Status.CANCELLED, "server stopped", True, False, True, StreamEndAction.HERE),
        (Status.UNIMPLEMENTED, "no such service", False, False, True, StreamEndAction.ELSEWHERE),
        (Status.PERMISSION_DENIED, "no", True, False, True, StreamEndAction.LOST),
        (Status.UNAUTHENTICATED, "no", False, False, False, StreamEndAction.LOST),
        (Status.INVALID_ARGUMENT, "etcdserver: user name is empty", True, False, True, StreamEndAction.LOST),
        (Status.INVALID_ARGUMENT, "no", True, False, True, StreamEndAction.HERE),
        (Status.RESOURCE_EXHAUSTED, "larger than max", False, False, False, StreamEndAction.NOTHING),
    ],
)
def test_action_after_the_end_of_a_stream(
    status: int, text: str, answered: bool, moved: bool, healthy: bool, follows: StreamEndAction
) -> None:
    here, other = Endpoint(), Endpoint()
    found = on_stream_end(
        Stream(answered), status, text, here, [here, other], moved=moved, healthy=healthy, works=answered, streams=[]
    )
    assert found is follows
    assert here.leaderless is (text == etcd_errors.NO_LEADER)


@pytest.mark.parametrize(
    ("status", "stream", "works", "follows"),
    [
        # Ends that a create can cause.
        (Status.RESOURCE_EXHAUSTED, Stream(True, False, [Watch()]), True, StreamEndAction.APART),
        (Status.INTERNAL, Stream(False, False, [Watch()]), False, StreamEndAction.APART),
        (Status.INVALID_ARGUMENT, Stream(False, False, [Watch()]), True, StreamEndAction.APART),
        (Status.INTERNAL, Stream(True, True, [Watch()]), True, StreamEndAction.APART),
        # The end by a server that shuts down, for the first time and repeated.
        (Status.UNAVAILABLE, Stream(True, False, [Watch()]), True, StreamEndAction.HERE),
        (Status.UNAVAILABLE, Stream(False, False, [Watch()]), True, StreamEndAction.HERE),
        (Status.UNAVAILABLE, Stream(False, False, [Watch(), Watch(1)]), True, StreamEndAction.APART),
        (Status.UNAVAILABLE, Stream(False, False, [Watch(1)]), False, StreamEndAction.ELSEWHERE),
        # Not even the probe was answered.
        (Status.INTERNAL, Stream(False, True, [Watch(1)]), False, StreamEndAction.ELSEWHERE),
        (Status.INTERNAL, Stream(False, True, [Watch(1)]), True, StreamEndAction.HERE),
        (Status.INTERNAL, Stream(False, True, [Watch(1)], b"token"), True, StreamEndAction.TOKEN),
        (Status.UNAVAILABLE, Stream(False, True, [Watch(1)], b"token"), True, StreamEndAction.HERE),
    ],
)
def test_action_depends_on_the_cause_of_the_end(
    status: int, stream: Stream, works: bool, follows: StreamEndAction
) -> None:
    here = Endpoint()
    found = on_stream_end(
        stream, status, "text", here, [here], moved=False, healthy=True, works=works, streams=[stream]
    )
    assert found is follows


@pytest.mark.parametrize(
    ("other", "follows"),
    [
        (Stream(token=b"other", creating=[Watch()]), StreamEndAction.HERE),
        (Stream(creating=[Watch()]), StreamEndAction.HERE),
        # These will not show whether the server works.
        (Stream(token=b"token", creating=[Watch()]), StreamEndAction.ELSEWHERE),
        (Stream(token=b"other"), StreamEndAction.ELSEWHERE),
    ],
)
def test_end_of_a_token_before_others_are_answered(other: Stream, follows: StreamEndAction) -> None:
    here, stream = Endpoint(), Stream(False, True, [Watch(1)], b"token", [Watch(1)])
    found = on_stream_end(
        stream, Status.INTERNAL, "", here, [here], moved=False, healthy=True, works=False, streams=[stream, other]
    )
    assert found is follows


def test_watches_are_lost_when_no_endpoint_has_the_service() -> None:
    here, other = Endpoint(), Endpoint(unimplemented=True)
    stream = Stream(answered=False)
    found = on_stream_end(
        stream, Status.UNIMPLEMENTED, "", here, [here, other], moved=False, healthy=True, works=False, streams=[]
    )
    assert found is StreamEndAction.LOST


def test_leaderless_when_all_failed_and_one_had_no_leader() -> None:
    choice = EndpointPolicy()
    some = [Endpoint(tried=True, leaderless=True), Endpoint()]
    assert not choice.failed(some, in_use=False)
    assert not choice.is_acceptable(False)
    some[1].tried = True
    assert not choice.failed(some, in_use=True)
    assert choice.failed(some, in_use=False)
    # It is reported once.
    assert not choice.failed(some, in_use=False)
    assert choice.is_acceptable(False)
    assert choice.wanted(True) is SearchGoal.LEADER
    assert not choice.is_better(SearchGoal.LEADER, False)
    choice.used(False)
    assert choice.leaderless
    choice.used(True)
    assert not choice.leaderless
    assert choice.wanted(True) is SearchGoal.NOTHING
    assert choice.wanted(False) is SearchGoal.ENDPOINT
