"""Manual progress: which watches an answer of etcd proves complete, and what is asked of which stream."""

from __future__ import annotations

import pytest

from tests.upstream.stories import Opened, answer, connected, in_words, live, refusal, stream_of
from upstream.watching.effects import WriteMessage
from upstream.watching.state import WatchState


@pytest.fixture(name="state")
def connected_by_default() -> WatchState:
    return connected()


def test_progress_answer_proves_watches_live_at_the_request(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    stream = live(state, a, b)
    assert in_words(state.request_progress(1)) == ["progress?"]
    late = Opened(b"late")
    state.open(late)
    state.received(stream, answer(2, 10, created=True))
    assert in_words(state.received(stream, answer(-1, 10))) == ["a b complete through 10, after 1"]
    assert in_words(state.request_progress(2)) == ["progress?"]
    assert in_words(state.received(stream, answer(-1, 12))) == ["a b late complete through 12, after 2"]
    state.disconnect()
    assert in_words(state.connect(True, 20)) == [
        "open stream",
        "create a from 13",
        "open stream",
        "create b from 13",
        "open stream",
        "create late from 13",
    ]


def test_a_request_waits_for_the_creates_before_it(state: WatchState) -> None:
    a, b, c = Opened(b"a"), Opened(b"b"), Opened(b"c")
    state.open(a)
    state.open(b)
    stream = stream_of(state, a)
    assert state.request_progress(1) == []
    state.open(c)
    assert state.request_progress(2) == []
    assert in_words(state.received(stream, answer(0, 10, created=True))) == ["a created at 10"]
    # Creates that the listener opens while it is notified follow the request, as they are counted.
    assert in_words(state.received(stream, answer(1, 10, created=True))) == ["progress?", "b created at 10"]
    assert in_words(state.received(stream, answer(2, 10, created=True))) == ["c created at 10"]
    assert in_words(state.received(stream, answer(-1, 10))) == ["a b complete through 10, after 2"]


def test_an_answer_that_may_be_for_a_dropped_request_proves_less(state: WatchState) -> None:
    a = Opened(b"a")
    stream = live(state, a)
    state.request_progress(1)
    b = Opened(b"b")
    state.open(b)
    state.received(stream, answer(1, 10, created=True))
    state.request_progress(2)
    assert in_words(state.received(stream, refusal(10))) == ["at 10 after 2"]
    # The first or the second request? Without a write since b was created, this is unknown.
    assert in_words(state.received(stream, answer(-1, 10))) == ["a complete through 10, after 1"]
    # The second answer is not for the first request.
    assert in_words(state.received(stream, answer(-1, 10))) == ["a b complete through 10, after 2"]


def test_later_revision_identifies_the_answered_request(state: WatchState) -> None:
    a = Opened(b"a")
    stream = live(state, a)
    for number in range(1, 6):
        state.request_progress(number)
    for number in range(2, 6):
        assert in_words(state.received(stream, refusal(9))) == [f"at 9 after {number}"]
    b = Opened(b"b")
    state.open(b)
    state.received(stream, answer(1, 10, created=True))
    state.request_progress(6)
    # The store had revision 10 when b was created, so 11 is an answer to the sixth.
    assert in_words(state.received(stream, answer(-1, 11))) == ["a b complete through 11, after 6"]
    assert in_words(state.received(stream, refusal(11))) == ["at 11 after 6"]
    # No request is outstanding any more.
    assert in_words(state.request_progress(7)) == ["progress?"]


def test_request_after_an_unanswered_one_is_sent_with_a_probe(state: WatchState) -> None:
    """etcd may have dropped the first: then its revision identifies the answered request, not a count."""
    stream = live(state, Opened(b"a"))
    assert in_words(state.request_progress(1)) == ["progress?"]
    assert in_words(state.request_progress(4)) == ["probe", "progress?"]
    # A create in between is answered in order.
    b = Opened(b"b")
    state.open(b)
    assert in_words(state.received(stream, answer(-1, 10))) == ["a complete through 10, after 1"]
    assert in_words(state.received(stream, refusal(12))) == ["at 12 after 4"]
    assert in_words(state.received(stream, answer(1, 12, created=True))) == ["b created at 12"]
    # If a server accepts the probe as a watch, the client cancels it.
    state.request_progress(5)
    assert in_words(state.received(stream, answer(2, 13, created=True))) == ["cancel 2", "at 13 after 5"]


def test_a_proxy_answers_late_and_proves_nothing_newer(state: WatchState) -> None:
    """The proxy answers the first request after b's create and with a higher revision; the second was not there yet."""
    state.late_progress = True
    stream = live(state, Opened(b"a"))
    assert in_words(state.request_progress(1)) == ["probe", "progress?"]
    b = Opened(b"b")
    state.open(b)
    state.received(stream, refusal(10))
    state.received(stream, answer(1, 10, created=True))
    assert in_words(state.request_progress(2)) == ["probe", "progress?"]
    # Not "after 2": the store may have been at 20 by then. The refusal of the probe shows it.
    assert in_words(state.received(stream, answer(-1, 12))) == ["a b complete through 12"]
    assert in_words(state.received(stream, refusal(20))) == ["at 20 after 2"]


def test_more_answers_than_requests_prove_nothing(state: WatchState) -> None:
    stream = live(state, Opened(b"a"))
    assert in_words(state.received(stream, answer(-1, 11))) == ["at 11"]
    state.request_progress(1)
    assert in_words(state.received(stream, answer(-1, 11))) == ["a complete through 11, after 1"]
    assert in_words(state.received(stream, answer(-1, 11))) == ["at 11"]


def test_progress_is_requested_on_all_but_paused_streams(state: WatchState) -> None:
    a, mine = Opened(b"a"), Opened(b"mine", token=b"me")
    fill = Opened(b"fill", start_revision=2, is_backfill=True)
    live(state, a)
    live(state, mine)
    live(state, fill)
    assert in_words(state.request_progress(1)) == ["progress?"] * 3
    state.pause(fill)
    assert in_words(state.request_progress(2)) == ["probe", "progress?"] * 2


def test_progress_is_requested_only_on_streams_of_the_watches(state: WatchState) -> None:
    shared, also, mine, other = Opened(b"a"), Opened(b"b"), Opened(b"mine", token=b"me"), Opened(b"o", token=b"other")
    stream = live(state, shared, also)
    live(state, mine)
    live(state, other)
    gone = Opened(b"gone")
    effects = state.request_progress(1, (shared, mine, gone, also))
    assert in_words(effects) == ["progress?"] * 2
    assert {id(effect.stream) for effect in effects if isinstance(effect, WriteMessage)} == {
        id(stream),
        id(stream_of(state, mine)),
    }


def test_old_servers_are_asked_for_their_revision_only() -> None:
    state = WatchState()
    state.connect(False, 10)
    stream = live(state, Opened(b"a"))
    live(state, Opened(b"mine", token=b"me"))
    assert in_words(state.request_progress(1)) == ["probe"]
    assert in_words(state.received(stream, refusal(11))) == ["at 11 after 1"]
