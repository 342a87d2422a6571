"""The proxy's own user watches the trunks; a watch refused to it uses the watch's own token."""

from __future__ import annotations

import pytest

from proto.framing import Status
from proto.scan import WatchResponse
from tests.upstream.stories import Opened, answer, in_words, stream_of
from upstream.watching.state import WatchState

INVALID = "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token"
OUTDATED = "rpc error: code = InvalidArgument desc = etcdserver: revision of auth store is old"
DENIED = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"


def with_own(token: bytes | None = b"own") -> WatchState:
    state = WatchState()
    state.own_token = token
    state.connect(True, 10)
    return state


def refusal(reason: str) -> WatchResponse:
    return answer(-1, 10, created=True, canceled=True, cancel_reason=reason)


def test_trunks_of_all_tokens_share_a_stream_backfills_do_not() -> None:
    state = with_own()
    a, b = Opened(b"a", token=b"u1"), Opened(b"b", token=b"u2")
    backfill = Opened(b"c", start_revision=5, token=b"u3", is_backfill=True)
    assert in_words(state.open(a)) == ["open stream for own", "create a from 0"]
    assert in_words(state.open(b)) == ["create b from 0"]
    assert in_words(state.open(backfill)) == ["open stream for u3", "create c from 5"]


@pytest.mark.parametrize("reason", [INVALID, OUTDATED])
def test_refused_token_is_renewed(reason: str) -> None:
    state = with_own()
    a, b = Opened(b"a", token=b"u1"), Opened(b"b", token=b"u2")
    state.open(a)
    state.open(b)
    stream = stream_of(state, a)
    assert in_words(state.received(stream, refusal(reason))) == ["at 10", "own is refused"]
    last = state.received(stream, refusal(reason))
    assert in_words(last) == ["at 10", "close stream", "own is refused"]
    assert in_words(state.logged_in(b"new")) == ["open stream for new", "create a from 0", "create b from 0"]
    assert in_words(state.received(stream_of(state, a), answer(0, 11, created=True))) == ["a created at 11"]


def test_without_a_new_token_each_watches_with_its_own() -> None:
    state = with_own()
    a = Opened(b"a", token=b"u1")
    state.open(a)
    state.received(stream_of(state, a), refusal(INVALID))
    assert in_words(state.logged_in(None)) == ["open stream for u1", "create a from 0"]
    lost = in_words(state.received(stream_of(state, a), refusal(INVALID)))
    assert lost == ["at 10", "close stream", "a lost: 16 etcdserver: invalid auth token"]


def test_two_refusals_in_a_row_are_enough() -> None:
    state = with_own()
    a = Opened(b"a", token=b"u1")
    state.open(a)
    state.received(stream_of(state, a), refusal(OUTDATED))
    state.logged_in(b"new")
    effects = in_words(state.received(stream_of(state, a), refusal(OUTDATED)))
    assert effects == ["at 10", "close stream", "open stream for u1", "create a from 0"]


def test_watch_refused_to_our_user_uses_its_own_token() -> None:
    state = with_own()
    a, b = Opened(b"a", token=b"u1"), Opened(b"b", token=b"u2")
    state.open(a)
    state.open(b)
    own = stream_of(state, a)
    assert in_words(state.received(own, refusal(DENIED))) == [
        "at 10",
        "open stream for u1",
        "create a from 0",
    ]
    assert in_words(state.received(own, answer(0, 11, created=True))) == ["b created at 11"]
    assert in_words(state.received(stream_of(state, a), answer(0, 12, created=True))) == ["a created at 12"]


def test_a_stream_of_our_user_that_is_refused_whole() -> None:
    state = with_own()
    a = Opened(b"a", token=b"u1")
    state.open(a)
    effects = state.refused(stream_of(state, a), Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert in_words(effects) == ["own is refused"]
    assert in_words(state.logged_in(b"new")) == ["open stream for new", "create a from 0"]
