"""One create that ends its whole stream: only this watch is lost, and live watches only register again."""

from __future__ import annotations

import pytest

from tests.upstream.stories import Opened, answer, connected, in_words, refusal, stream_of
from upstream.watching.effects import CloseStream, OpenStream, WatchEffect, WatchLost
from upstream.watching.state import WatchState
from upstream.watching.stream import StreamEndAction, StreamKind, WatchStream
from upstream.watching.streams import LARGE_CREATE_BYTES, STREAMS_MAX

TOO_LARGE = (8, "grpc: received message larger than max (2097200 vs. 2097152)")


class Etcd:
    """The server's side of some streams: it answers creates in order, and ends a stream at a poisoned create."""

    def __init__(self, state: WatchState, poisoned: set[bytes]) -> None:
        self.state = state
        self.poisoned = poisoned
        self.lost: list[bytes] = []
        # Streams ended, and the maximum of open streams.
        self.ends = 0
        self.open = self.open_max = 0

    def run(self, effects: list[WatchEffect]) -> None:
        """Carry out effects until none is left."""
        self._take(effects)
        while self._step():
            pass

    def _take(self, effects: list[WatchEffect]) -> None:
        for effect in effects:
            if isinstance(effect, WatchLost):
                assert (effect.status, effect.text) == TOO_LARGE
                self.lost.append(effect.watch.key)
            self.open += isinstance(effect, OpenStream) - isinstance(effect, CloseStream)
            self.open_max = max(self.open_max, self.open)

    def _step(self) -> bool:
        for stream in list(self.state.streams()):
            if stream.creating:
                self._answer(stream)
                return True
        effects = self.state.register()
        self._take(effects)
        return bool(effects)

    def _answer(self, stream: WatchStream) -> None:
        registration = stream.creating[0].registration
        if registration is not None and registration.watch.key in self.poisoned:
            self.ends += 1
            self.open -= 1
            self._take(self.state.over(stream, StreamEndAction.APART, *TOO_LARGE))
        elif registration is None:
            self._take(self.state.received(stream, refusal(10)))
        else:
            self._take(self.state.received(stream, answer(len(stream.by_id), 10, created=True)))


@pytest.fixture
def state() -> WatchState:
    """A connected watch client."""
    return connected()


def test_create_that_ends_its_stream_is_lost_at_the_second_try(state: WatchState) -> None:
    live, bad = Opened(b"live"), Opened(b"bad")
    state.open(live)
    stream = stream_of(state, live)
    state.received(stream, answer(0, 10, created=True))
    state.received(stream, answer(0, 12, [12]))
    assert in_words(state.open(bad)) == ["create bad from 0"]
    assert state.over(stream, StreamEndAction.APART, *TOO_LARGE) == []
    # Live watches do not wait for the suspects, which wait for the answer to a probe.
    assert in_words(state.register()) == ["open stream", "create live from 0", "open stream", "probe"]
    trial = stream_of(state, bad)
    assert trial is not stream_of(state, live)
    assert in_words(state.received(trial, refusal(12))) == ["at 12", "create bad from 0"]
    assert in_words(state.over(trial, StreamEndAction.APART, *TOO_LARGE)) == [
        f"bad lost: {TOO_LARGE[0]} {TOO_LARGE[1]}"
    ]
    assert state.register() == []
    assert len(state) == 1


def test_suspects_that_are_answered_go_back_to_the_shared_stream(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    state.open(a)
    state.open(b)
    state.over(stream_of(state, a), StreamEndAction.APART, 13, "reset")
    assert in_words(state.register()) == ["open stream", "probe"]
    trial = stream_of(state, a)
    assert in_words(state.received(trial, refusal(10))) == ["at 10", "create a from 0", "create b from 0"]
    assert in_words(state.received(trial, answer(0, 10, created=True))) == ["a created at 10"]
    assert in_words(state.received(trial, answer(1, 10, created=True))) == [
        "close stream",
        # From their positions, and before the creates that the listener opens while it is notified.
        "open stream",
        "create a from 10",
        "open stream",
        "create b from 10",
        "b created at 10",
    ]
    assert trial not in state.streams()


def test_an_answered_suspect_registers_once(state: WatchState, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is answered while all watches are registering again, in parts."""
    monkeypatch.setattr("upstream.watching.registrations.REGISTERED_MAX", 2)
    live, suspect = [Opened(b"a"), Opened(b"b")], Opened(b"suspect")
    for watch_id, watch in enumerate(live):
        state.open(watch)
        state.received(stream_of(state, watch), answer(watch_id, 10, created=True))
    state.open(suspect)
    state.over(stream_of(state, suspect), StreamEndAction.APART, 13, "reset")
    assert in_words(state.register() + state.go_on())[-2:] == ["open stream", "probe"]
    trial = stream_of(state, suspect)
    state.received(trial, refusal(10))
    assert state.register() == []
    assert state.goes_on
    effects = state.received(trial, answer(0, 10, created=True))
    while state.goes_on:
        effects += state.go_on()
    assert in_words(effects).count("create suspect from 10") == 1
    assert stream_of(state, suspect).live == 1


@pytest.mark.parametrize("bad", [[0], [7], [19], [3, 4], [0, 10, 19], list(range(20))], ids=str)
def test_among_many_only_those_that_end_their_streams_are_lost(bad: list[int], state: WatchState) -> None:
    live = Opened(b"live")
    etcd = Etcd(state, {b"w%d" % number for number in bad})
    etcd.run(state.open(live))
    watches = [Opened(b"w%d" % number) for number in range(20)]
    etcd.run([effect for watch in watches for effect in state.open(watch)])
    assert sorted(etcd.lost) == sorted(etcd.poisoned)
    assert len(state) == 21 - len(bad)
    # Each is tried alone, and so is each half that holds one.
    assert etcd.ends <= 2 + 6 * len(bad)
    assert etcd.open_max <= 1 + STREAMS_MAX[StreamKind.SUSPECT] + STREAMS_MAX[StreamKind.CATCH_UP]
    assert all(stream.group is None for stream in state.streams())


def test_a_backfill_that_ends_its_stream_is_lost_alone(state: WatchState) -> None:
    etcd = Etcd(state, {b"bad"})
    etcd.run(state.open(Opened(b"good", start_revision=2, is_backfill=True)))
    etcd.run(state.open(Opened(b"bad", start_revision=2, is_backfill=True)))
    assert etcd.lost == [b"bad"]
    assert etcd.ends == 2


def test_a_suspect_that_is_closed_may_have_been_the_one(state: WatchState) -> None:
    good, bad = Opened(b"good"), Opened(b"bad")
    etcd = Etcd(state, {b"bad"})
    state.open(bad)
    state.open(good)
    etcd.run(state.over(stream_of(state, bad), StreamEndAction.APART, *TOO_LARGE))
    assert etcd.lost == [b"bad"]
    bad = Opened(b"bad")
    state.open(bad)
    state.over(stream_of(state, bad), StreamEndAction.APART, *TOO_LARGE)
    other = Opened(b"other")
    state.open(other)
    state.over(stream_of(state, other), StreamEndAction.APART, *TOO_LARGE)
    state.register()
    trial = stream_of(state, bad)
    state.received(trial, refusal(10))
    state.close(bad)
    etcd.run([])
    assert etcd.lost == [b"bad"]
    assert state.registration(other) is not None


def test_large_creates_have_streams_apart_from_the_start(state: WatchState) -> None:
    live = Opened(b"live")
    state.open(live)
    large = [Opened(b"k" * LARGE_CREATE_BYTES + b"%d" % number) for number in range(STREAMS_MAX[StreamKind.LARGE] + 1)]
    for watch in large:
        state.open(watch)
    streams = [stream_of(state, watch) for watch in large]
    assert stream_of(state, live) not in streams
    assert len(set(map(id, streams))) == STREAMS_MAX[StreamKind.LARGE]
    assert {stream.kind for stream in streams} == {StreamKind.LARGE}


def test_watches_that_catch_up_have_separate_streams(state: WatchState) -> None:
    live = Opened(b"live")
    state.open(live)
    past = [Opened(b"%d" % number, start_revision=3) for number in range(2 * STREAMS_MAX[StreamKind.CATCH_UP])]
    for watch in past:
        state.open(watch)
    streams = [stream_of(state, watch) for watch in past]
    assert stream_of(state, live) not in streams
    assert {stream.live for stream in streams} == {2}
    assert len(set(map(id, streams))) == STREAMS_MAX[StreamKind.CATCH_UP]


def test_a_token_that_ends_its_stream_is_given_up_for_others(state: WatchState) -> None:
    mine = Opened(b"mine", token=b"me")
    state.open(mine)
    state.over(stream_of(state, mine), StreamEndAction.APART, 13, "reset")
    state.register()
    effects = state.over(stream_of(state, mine), StreamEndAction.TOKEN, 13, "reset")
    assert in_words(effects) == ["mine lost: 16 etcd ended the stream of this token: reset"]
