"""The rules of the watch client, one story each: etcd's messages, and the effects that must follow."""

from __future__ import annotations

from itertools import chain

import pytest

from tests.upstream.stories import Opened, answer, connected, in_words, live, stream_of
from upstream.watching.state import WatchState
from upstream.watching.stream import StreamEndAction

GO_PERMISSION = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"


@pytest.fixture(name="state")
def connected_by_default() -> WatchState:
    return connected()


def test_a_watch_from_now_lives(state: WatchState) -> None:
    a = Opened(b"a")
    assert in_words(state.open(a)) == ["open stream", "create a from 0"]
    stream = stream_of(state, a)
    assert in_words(state.received(stream, answer(0, 11, created=True))) == ["a created at 11"]
    assert in_words(state.received(stream, answer(0, 12, [12]))) == ["a got 12"]
    assert in_words(state.close(a)) == ["close stream"]
    assert in_words(state.received(stream, answer(0, 13, [13]))) == ["cancel 0", "at 13"]
    assert len(state) == 0


def test_a_stream_carries_a_bounded_number_of_watches(state: WatchState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.watching.streams.WATCHES_PER_STREAM_MAX", 2)
    watches = [Opened(b"%d" % number) for number in range(5)]
    live(state, *watches)
    streams = [stream_of(state, watch) for watch in watches]
    assert [streams.index(stream) for stream in streams] == [0, 0, 2, 2, 4]
    # An answer to a progress request is about the watches of its stream only, so it is a bounded step.
    assert len(state.request_progress(1)) == 3
    assert in_words(state.received(streams[2], answer(-1, 10))) == ["2 3 complete through 10, after 1"]
    # A stream with room again takes watches, and one without watches is closed.
    state.close(watches[0])
    later = Opened(b"later"), Opened(b"last"), Opened(b"new")
    for watch in later:
        state.open(watch)
    assert [streams.index(stream_of(state, watch)) for watch in later[:2]] == [4, 0]
    assert stream_of(state, later[2]) not in streams
    assert "close stream" in in_words(state.close(later[2]))


def test_watches_opened_before_the_connection_register_with_it() -> None:
    state = WatchState()
    a, b = Opened(b"a"), Opened(b"b", start_revision=5, prev_kv=True)
    assert state.open(a) == []
    assert state.open(b) == []
    assert in_words(state.connect(True, 10)) == [
        "open stream",
        "create a from 0",
        # It has to catch up.
        "open stream",
        "create b from 5 prev_kv",
    ]


def test_opening_twice_is_refused(state: WatchState) -> None:
    a = Opened()
    state.open(a)
    with pytest.raises(ValueError, match="open already"):
        state.open(a)


def test_created_belongs_to_the_oldest_create_for_any_id(state: WatchState) -> None:
    a, b, c = Opened(b"a"), Opened(b"b"), Opened(b"c")
    for watch in (a, b, c):
        state.open(watch)
    stream = stream_of(state, a)
    assert in_words(state.received(stream, answer(7, 10, created=True))) == ["a created at 10"]
    refused = answer(-1, 10, created=True, canceled=True, cancel_reason=GO_PERMISSION)
    assert in_words(state.received(stream, refused)) == ["at 10", "b lost: 7 etcdserver: permission denied"]
    assert in_words(state.received(stream, answer(3, 10, created=True))) == ["c created at 10"]
    assert in_words(state.received(stream, answer(3, 11, [11]))) == ["c got 11"]
    assert state.registration(b) is None


@pytest.mark.parametrize(
    ("reason", "status", "text"),
    [
        (GO_PERMISSION, 7, "etcdserver: permission denied"),
        (
            "rpc error: code = Unauthenticated desc = etcdserver: invalid auth token",
            16,
            "etcdserver: invalid auth token",
        ),
        (
            "rpc error: code = InvalidArgument desc = etcdserver: user name is empty",
            3,
            "etcdserver: user name is empty",
        ),
        ("rpc error: code = Canceled desc = x", 1, "x"),
        ("rpc error: code = Newfangled desc = x: y = z", 2, "x: y = z"),
        ("etcdserver: mvcc: required revision has been compacted", 11, None),
        ("mvcc: watcher range is empty", 3, None),
    ],
)
def test_a_refusal_carries_status_and_text(reason: str, status: int, text: str | None, state: WatchState) -> None:
    a = Opened(b"a")
    state.open(a)
    stream = stream_of(state, a)
    effects = state.received(stream, answer(-1, 10, created=True, canceled=True, cancel_reason=reason))
    # It was the only watch on its stream.
    assert in_words(effects) == ["at 10", "close stream", f"a lost: {status} {text or reason}"]


def test_watch_closed_before_created_is_cancelled_by_its_id(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    state.open(a)
    state.open(b)
    stream = stream_of(state, a)
    assert state.close(a) == []
    assert in_words(state.received(stream, answer(0, 10, created=True))) == ["cancel 0"]
    assert in_words(state.received(stream, answer(1, 10, created=True))) == ["b created at 10"]
    assert in_words(state.received(stream, answer(0, 11, [11]))) == ["at 11"]
    assert in_words(state.received(stream, answer(0, 11, canceled=True))) == ["at 11"]
    assert stream.canceled_ids == set()


def test_refusal_of_a_closed_watch_is_not_reported(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    state.open(a)
    state.open(b)
    stream = stream_of(state, a)
    state.close(a)
    assert state.received(stream, answer(-1, 10, created=True, canceled=True, cancel_reason=GO_PERMISSION)) == []


def test_events_of_cancelled_ids_are_dropped_until_the_answer(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    stream = live(state, a, b)
    assert in_words(state.close(a)) == ["cancel 0"]
    assert state.close(a) == []
    assert in_words(state.received(stream, answer(0, 11, [11]))) == ["at 11"]
    # A compaction cancel is not the answer to our cancel.
    assert in_words(state.received(stream, answer(0, 0, canceled=True, compact_revision=5))) == ["at 0"]
    assert stream.canceled_ids == {0}
    assert in_words(state.received(stream, answer(0, 12, canceled=True))) == ["at 12"]
    assert stream.canceled_ids == set()
    assert in_words(state.received(stream, answer(1, 12, [12]))) == ["b got 12"]


def test_unknown_id_is_cancelled_once(state: WatchState) -> None:
    stream = live(state, Opened(b"a"))
    assert in_words(state.received(stream, answer(99, 11, [11]))) == ["cancel 99", "at 11"]
    assert in_words(state.received(stream, answer(99, 12, [12]))) == ["at 12"]
    assert in_words(state.received(stream, answer(50, 12, canceled=True))) == ["at 12"]


def test_a_break_resumes_each_from_its_position(state: WatchState) -> None:
    fresh, quiet, busy = Opened(b"fresh"), Opened(b"quiet"), Opened(b"busy", start_revision=3)
    stream = live(state, fresh, quiet, busy)
    state.received(stream_of(state, busy), answer(2, 10, [4, 6]))
    state.received(stream, answer(0, 11, [11]))
    waiting = Opened(b"waiting")
    state.open(waiting)
    state.disconnect()
    assert state.received(stream, answer(0, 12, [12])) != []
    assert in_words(state.connect(True, 20)) == [
        "open stream",
        "create fresh from 12",
        # Inclusive: an event at the revision of its `created` may have been in flight.
        "open stream",
        "create quiet from 10",
        "open stream",
        "create busy from 7",
        "open stream",
        "create waiting from 0",
    ]
    for watch in (fresh, quiet, busy):
        assert in_words(state.received(stream_of(state, watch), answer(0, 20, created=True))) == ["at 20"]
    assert in_words(state.received(stream_of(state, waiting), answer(0, 20, created=True))) == ["waiting created at 20"]


def test_resume_above_newest_revision_starts_from_now() -> None:
    state = connected(revision=0)
    a = Opened(b"a", start_revision=9)
    stream = live(state, a, at=9)
    assert in_words(state.received(stream, answer(0, 9, [9]))) == ["a got 9"]
    state.disconnect()
    assert in_words(state.connect(True, 9)) == ["open stream", "create a from 0"]
    stream = stream_of(state, a)
    # A lagging member, or a read of the revision before the watch was registered: no event was missed.
    state.received(stream, answer(0, 8, created=True))
    assert in_words(state.received(stream, answer(0, 9, [9]))) == ["at 9"]
    assert in_words(state.received(stream, answer(0, 12, [10, 12]))) == ["a got 10 12"]


def test_write_before_a_create_from_now_causes_a_new_create() -> None:
    state = connected(10)
    a = Opened(b"a", start_revision=11)
    assert in_words(state.open(a)) == ["open stream", "create a from 0"]
    stream = stream_of(state, a)
    assert in_words(state.received(stream, answer(0, 11, created=True))) == ["at 11", "cancel 0", "create a from 11"]
    assert in_words(state.received(stream, answer(0, 12, [12]))) == ["at 12"]
    assert in_words(state.received(stream, answer(1, 12, created=True))) == ["a created at 12"]
    assert in_words(state.received(stream, answer(0, 12, canceled=True))) == ["at 12"]
    assert in_words(state.received(stream, answer(1, 12, [11, 12]))) == ["a got 11 12"]


def test_a_start_in_the_future_is_asked_from_now() -> None:
    """With the real start etcd would drop all progress requests until that revision, or catch up for 100 ms."""
    state = connected(10)
    a = Opened(b"a", start_revision=14)
    assert in_words(state.open(a)) == ["open stream", "create a from 0"]
    stream = stream_of(state, a)
    assert in_words(state.received(stream, answer(0, 12, created=True))) == ["a created at 12"]
    assert in_words(state.received(stream, answer(0, 12, [10, 12]))) == ["at 12"]
    assert in_words(state.received(stream, answer(0, 14, [13, 14]))) == ["a got 14"]


@pytest.mark.parametrize("announced", [False, True])
def test_a_watch_from_now_stays_at_now_until_created(announced: bool) -> None:
    state = connected(10)
    a = Opened(b"a")
    state.open(a)
    if announced:
        state.received(stream_of(state, a), answer(0, 10, created=True))
    state.disconnect()
    assert in_words(state.connect(True, 30)) == ["open stream", f"create a from {10 if announced else 0}"]


def test_an_event_at_the_revision_of_created_is_passed_on() -> None:
    state = connected(10)
    stream = live(state, a := Opened(b"a"), at=11)
    assert in_words(state.received(stream, answer(0, 11, [11]))) == ["a got 11"]
    registration = state.registration(a)
    assert registration is not None
    assert registration.next_revision == 12


def test_fragments_become_whole_revisions(state: WatchState) -> None:
    stream = live(state, Opened(b"a", start_revision=1))
    run = [([1, 2], True), ([2, 3, 3], True), ([3], True), ([3], True), ([3, 4], True), ([5], False)]
    got = [in_words(state.received(stream, answer(0, 10, events, fragment=more))) for events, more in run]
    assert got == [["a got 1 and more"], ["a got 2 2 and more"], [], [], ["a got 3 3 3 3 3 and more"], ["a got 4 5"]]
    assert in_words(state.received(stream, answer(0, 11, [11]))) == ["a got 11"]


def test_a_revision_in_fragments_is_one_response(state: WatchState) -> None:
    stream = live(state, Opened(b"a"), Opened(b"b"))
    assert state.received(stream, answer(0, 11, [11, 11], fragment=True)) == []
    assert state.received(stream, answer(0, 11, [11], fragment=True)) == []
    # etcd sends no other response in between; if it did, the run would not be affected.
    assert in_words(state.received(stream, answer(1, 11, [11]))) == ["b got 11"]
    assert in_words(state.received(stream, answer(0, 11, [11], fragment=False))) == ["a got 11 11 11 11"]


def test_half_a_run_is_dropped_at_a_break(state: WatchState) -> None:
    a = Opened(b"a", start_revision=1)
    stream = live(state, a)
    assert in_words(state.received(stream, answer(0, 10, [1, 2, 2], fragment=True))) == ["a got 1 and more"]
    state.disconnect()
    assert in_words(state.connect(True, 10)) == ["open stream", "create a from 2"]
    stream = stream_of(state, a)
    state.received(stream, answer(0, 10, created=True))
    assert in_words(state.received(stream, answer(0, 10, [2, 2, 2]))) == ["a got 2 2 2"]


def test_half_a_run_of_a_closed_watch_leaves_nothing(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    stream = live(state, a, b)
    state.received(stream, answer(0, 11, [11, 11], fragment=True))
    state.close(a)
    assert stream.held == {}
    assert in_words(state.received(stream, answer(0, 11, [11]))) == ["at 11"]


def test_compaction_ends_a_watch_and_frees_its_id_upstream(state: WatchState) -> None:
    a, b = Opened(b"a"), Opened(b"b")
    stream = live(state, a, b)
    cancel = answer(0, 0, canceled=True, compact_revision=12)
    assert in_words(state.received(stream, cancel)) == ["cancel 0", "a compacted 12"]
    # etcd may repeat it, and then answers our cancel.
    assert in_words(state.received(stream, cancel)) == ["at 0"]
    assert in_words(state.received(stream, answer(0, 10, canceled=True))) == ["at 10"]
    assert state.close(a) == []
    assert state.registration(a) is None
    assert state.registration(b) is not None


def test_compaction_of_unneeded_revisions_is_not_passed_on() -> None:
    """A watch from now resumes at that same revision, which may have been compacted when the create arrives."""
    state = connected(10)
    a = Opened(b"a")
    live(state, a, at=49)
    state.disconnect()
    assert in_words(state.connect(True, 55)) == ["open stream", "create a from 49"]
    stream = stream_of(state, a)
    state.received(stream, answer(0, 55, created=True))
    cancel = answer(0, 0, canceled=True, compact_revision=50)
    assert in_words(state.received(stream, cancel)) == ["cancel 0", "create a from 50"]
    assert in_words(state.received(stream, cancel)) == ["at 0"]
    assert in_words(state.received(stream, answer(0, 55, canceled=True))) == ["at 55"]
    assert in_words(state.received(stream, answer(1, 55, created=True))) == ["at 55"]
    assert in_words(state.received(stream, answer(1, 61, [60, 61]))) == ["a got 60 61"]


def test_a_cancel_without_a_reason_is_a_loss(state: WatchState) -> None:
    stream = live(state, Opened(b"a"), Opened(b"b"))
    assert in_words(state.received(stream, answer(0, 11, canceled=True))) == [
        "at 11",
        "a lost: 14 the upstream server cancelled the watch",
    ]


def test_bookmarks_never_move_the_position_back(state: WatchState) -> None:
    a = Opened(b"a")
    stream = live(state, a)
    assert in_words(state.received(stream, answer(0, 15))) == ["a bookmark 15"]
    assert in_words(state.received(stream, answer(0, 15))) == ["a bookmark 15"]
    assert in_words(state.received(stream, answer(0, 14))) == ["at 14"]
    state.disconnect()
    assert in_words(state.connect(True, 20)) == ["open stream", "create a from 16"]


def test_streams_by_token_and_a_stream_for_each_backfill(state: WatchState) -> None:
    plain, other, mine = Opened(b"plain"), Opened(b"other"), Opened(b"mine", token=b"me")
    fill = Opened(b"fill", start_revision=2, is_backfill=True)
    assert in_words(state.open(plain)) == ["open stream", "create plain from 0"]
    assert in_words(state.open(mine)) == ["open stream for me", "create mine from 0"]
    assert in_words(state.open(other)) == ["create other from 0"]
    assert in_words(state.open(fill)) == ["open stream", "create fill from 2"]
    assert len({id(stream_of(state, watch)) for watch in (plain, other, mine, fill)}) == 3
    # The token is read again at each registration.
    mine.token = b"you"
    state.disconnect()
    assert "open stream for you" in in_words(state.connect(True, 10))


def test_a_paused_backfill_stays_paused_over_a_break(state: WatchState) -> None:
    fill = Opened(b"fill", start_revision=2, is_backfill=True)
    state.open(fill)
    state.pause(fill)
    assert stream_of(state, fill).paused
    state.disconnect()
    state.connect(True, 10)
    stream = stream_of(state, fill)
    assert stream.paused
    assert state.resume(fill) is stream
    assert not stream.paused
    with pytest.raises(ValueError, match="only backfills"):
        state.pause(Opened())


def test_a_stream_that_ended_is_registered_again_alone(state: WatchState) -> None:
    a, mine = Opened(b"a"), Opened(b"mine", token=b"me")
    live(state, a)
    state.open(mine)
    assert state.over(stream_of(state, mine), StreamEndAction.HERE, 14, "gone") == []
    assert in_words(state.register()) == ["open stream for me", "create mine from 0"]
    assert state.register() == []


def test_a_stream_that_was_refused_loses_its_watches(state: WatchState) -> None:
    a, b, mine = Opened(b"a"), Opened(b"b"), Opened(b"mine", token=b"me")
    stream = live(state, a, b)
    state.open(mine)
    assert in_words(state.refused(stream, 12, "unknown service")) == [
        "a lost: 12 unknown service",
        "b lost: 12 unknown service",
    ]
    assert len(state) == 1
    assert state.register() == []


def test_many_watches_register_in_bounded_steps(state: WatchState, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a break others are served meanwhile; what was closed before its turn does not register."""
    monkeypatch.setattr("upstream.watching.registrations.REGISTERED_MAX", 10)
    watches = [Opened(b"%d" % number, start_revision=11) for number in range(45)]
    stream = live(state, *watches)
    state.disconnect()
    assert state.registration(watches[0]).stream is None  # type: ignore[union-attr]
    assert state.close(watches[0]) == []
    first = in_words(state.connect(True, 10))
    assert first == ["open stream", *(f"create {number} from 0" for number in range(1, 11))]
    assert state.close(watches[5]) == state.close(watches[15]) == []
    new = Opened(b"new")
    assert in_words(state.open(new)) == ["create new from 0"]
    steps = []
    while state.goes_on:
        steps.append(in_words(state.go_on()))
    assert [len(step) for step in steps] == [9, 10, 10, 4]
    assert list(chain(*steps)) == [f"create {number} from 0" for number in range(11, 45) if number != 15]
    assert stream.ended
    assert stream_of(state, watches[44]) is stream_of(state, new)
    assert state.go_on() == []


def test_a_break_ends_registering_until_the_next_one(state: WatchState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.watching.registrations.REGISTERED_MAX", 1)
    a, b = Opened(b"a"), Opened(b"b")
    live(state, a, b)
    state.disconnect()
    state.connect(True, 10)
    state.disconnect()
    assert not state.goes_on
    assert in_words(state.connect(True, 10))[-1:] == ["create a from 10"]
    assert in_words(state.go_on())[-1:] == ["create b from 10"]


def test_many_watches_are_lost_in_bounded_steps(state: WatchState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.watching.state.LOST_MAX", 2)
    watches = [Opened(b"%d" % number) for number in range(5)]
    steps = [in_words(state.refused(live(state, *watches), 12, "unknown"))]
    assert len(state) == 0
    assert state.close(watches[4]) == []
    while state.goes_on:
        steps.append(in_words(state.go_on()))
    assert [len(step) for step in steps] == [2, 2, 1]
    assert list(chain(*steps)) == [f"{number} lost: 12 unknown" for number in range(5)]
