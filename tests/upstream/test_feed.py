"""From bytes to responses: however the bytes are split, each watch gets its responses in order."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from proto.fields import ScanError
from proto.framing import FramingError, frame
from proto.large import STEP_BYTES, EventTooLarge, LargeResponse
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse, scan_watch_response
from upstream.watching.feed import JOINED_BYTES_MAX, JOINED_DELIVERIES_BYTES_MAX, LARGE_BYTES, ResponseOrder, joined


def message(watch_id: int, revisions: Sequence[int], value_bytes: int = 10, *, created: bool = False) -> bytes:
    """Return an encoded response; each event has a value of its own."""
    return rpc_pb2.WatchResponse(
        header=rpc_pb2.ResponseHeader(cluster_id=7, member_id=8, revision=max(revisions, default=5), raft_term=2),
        watch_id=watch_id,
        created=created,
        events=[
            kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k%d" % place, mod_revision=revision, value=bytes(value_bytes)))
            for place, revision in enumerate(revisions)
        ],
    ).SerializeToString()


def in_parts(rng: random.Random, data: bytes, part_max: int) -> list[bytes]:
    """Cut bytes in parts of random sizes."""
    parts = []
    while data:
        size = rng.randint(1, part_max)
        parts.append(data[:size])
        data = data[size:]
    return parts


def read_all(feed: ResponseOrder, data: bytes) -> list[WatchResponse]:
    """Return the responses in some bytes."""
    got = feed.feed(data)
    while feed.behind:
        got += feed.step()
    return got


def events(responses: Sequence[WatchResponse], watch_id: int) -> list[bytes]:
    """Return the encoded events of a watch."""
    return [event.encoded for each in responses if each.watch_id == watch_id for event in each.events]


@pytest.mark.parametrize("seed", range(10))
def test_each_watch_gets_its_responses_in_order(seed: int) -> None:
    rng = random.Random(seed)
    sent = [
        message(rng.randrange(3), range(1, rng.choice((1, 2, 3000, 5000))), rng.choice((0, 20)))
        if rng.random() < 0.9
        else message(rng.randrange(3), [1, 2, 3], rng.choice((LARGE_BYTES // 2, 2 * LARGE_BYTES)))
        for _ in range(12)
    ]
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    got: list[WatchResponse] = []
    for part in in_parts(rng, b"".join(map(frame, sent)), rng.choice((100, 20_000, 1 << 20))):
        got += feed.feed(part)
        while feed.behind and rng.random() < 0.5:
            got += feed.step()
    while feed.behind:
        got += feed.step()
    assert feed.unread == 0
    whole = [scan_watch_response(each) for each in sent]
    for watch_id in range(3):
        assert events(got, watch_id) == events(whole, watch_id)
        # A run of pieces ends with one that is not a fragment, with no other response of the same watch inside.
        runs = [each for each in got if each.watch_id == watch_id]
        assert sum(not each.fragment for each in runs) == sum(each.watch_id == watch_id for each in whole)
    assert all(each.plain is (bool(each.events) and not each.fragment) for each in got)


def test_responses_of_other_watches_overtake_a_large_one() -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    large = message(1, range(1, 20_000))
    assert feed.feed(frame(large)) == []
    [other] = feed.feed(frame(message(2, [7])))
    assert (other.watch_id, other.events[0].revision) == (2, 7)
    [created] = feed.feed(frame(message(-1, [], created=True)))
    assert created.created
    # An answer to a progress request concerns all watches.
    assert feed.feed(frame(message(-1, []))) == []
    assert feed.feed(frame(message(1, [20_000]))) == []
    steps = []
    while feed.behind:
        steps.append(feed.step())
    assert len(steps) > 5
    assert [len(step) for step in steps] == [1] * len(steps)
    last, progress, after = (step[0] for step in steps[-3:])
    assert (last.fragment, progress.watch_id, after.events[0].revision) == (False, -1, 20_000)


def test_a_response_held_back_is_overtaken_by_other_watches() -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    got = feed.feed(frame(message(1, [7])))
    assert list(feed.pass_on(got, lambda _: True)) == []
    assert feed.unread == len(got[0].events[0].encoded)
    sent = [message(1, [8]), message(2, [9]), message(-1, []), message(1, [10])]
    assert [each.watch_id for each in feed.feed(b"".join(map(frame, sent)))] == [2]
    got = []
    while feed.has_next:
        got += feed.step()
    assert [each.watch_id for each in got] == [1, 1, -1, 1]
    assert (feed.unread, feed.behind) == (0, False)
    assert len(feed.feed(frame(message(1, [11])))) == 1


def test_what_follows_in_the_same_bytes_does_not_overtake() -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    sent = [message(1, [6]), message(2, [7]), message(1, [7]), message(-1, []), message(3, [7]), message(4, [7])]
    large = message(1, range(8, 3_000), 20)
    got = feed.feed(b"".join(map(frame, [*sent, large])))
    assert [each.watch_id for each in got] == [1, 2, 1, -1, 3, 4]
    late = iter((False, False, True, False, True))
    assert [each.watch_id for each in feed.pass_on(got, lambda _: next(late))] == [1, 2, 3]
    # What is held back in a later read waits behind it.
    assert list(feed.pass_on(feed.feed(frame(message(5, [9]))), lambda _: True)) == []
    steps = []
    while feed.behind:
        steps += feed.step()
    assert [each.watch_id for each in steps] == [1, -1, 4, 1, 1, 5]
    assert [each.events[0].revision for each in steps if each.watch_id == 1][:2] == [7, 8]


def test_answers_to_creates_keep_their_order() -> None:
    """A create has no other mark in its answer: the first answer is that of the first create, refused or not."""
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    refused, created = message(-1, [], created=True), message(2, [], created=True)
    got = feed.feed(b"".join(map(frame, [message(1, [7]), message(-1, []), refused, created])))
    held = iter((True, False, False))
    assert [(each.watch_id, each.created) for each in feed.pass_on(got, lambda _: next(held))] == [
        (-1, True),
        (2, True),
    ]
    # While a backfill is paused, everything is held back.
    assert list(feed.pass_on(feed.feed(frame(message(3, [], created=True))), lambda _: True)) == []
    assert feed.feed(frame(refused) + frame(message(4, [], created=True))) == []
    steps = []
    while feed.behind:
        steps += feed.step()
    assert [(each.watch_id, each.created) for each in steps] == [
        (1, False),
        (-1, False),
        (3, True),
        (-1, True),
        (4, True),
    ]
    assert len(feed.feed(frame(created))) == 1


def test_a_piece_is_read_in_a_bounded_turn() -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    feed.feed(frame(message(1, range(1, 20_000))))
    while feed.behind:
        for piece in feed.step():
            assert sum(len(event.encoded) for event in piece.events) <= STEP_BYTES


def test_an_event_above_the_limit_ends_its_watch_and_no_other() -> None:
    feed = ResponseOrder(scan_watch_response, LARGE_BYTES)
    sent = frame(message(1, [5, 6, 7], LARGE_BYTES + 1)) + frame(message(2, [8]))
    got: list[WatchResponse] = []
    for start in range(0, len(sent), 16_384):
        got += read_all(feed, sent[start : start + 16_384])
    assert [(each.watch_id, each.canceled) for each in got] == [(1, True), (2, False)]
    assert "larger than the maximum" in got[0].cancel_reason
    assert feed.unread == 0


@pytest.mark.parametrize(
    "data",
    [
        b"\x5a\x05" + bytes(5) + b"\x10\x07" + bytes(LARGE_BYTES),
        bytes(LARGE_BYTES),
        b"\x10\x07" * LARGE_BYTES,
        b"\x10\x07" + b"\x5a\xff\xff\x7f" + bytes(LARGE_BYTES),
    ],
    ids=["watch id behind events", "no tag", "no events", "an event that is cut off"],
)
def test_invalid_watch_response_is_an_error(data: bytes) -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    with pytest.raises(ScanError):
        read_all(feed, frame(data))


def test_unknown_fields_behind_the_events_are_left_behind() -> None:
    unknown = b"\x62\x03abc"
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    got = read_all(feed, frame(message(1, range(1, 9000)) + unknown))
    assert len(events(got, 1)) == 8999
    assert not got[-1].fragment


def test_compressed_messages_are_an_error() -> None:
    with pytest.raises(FramingError, match="compressed"):
        ResponseOrder(scan_watch_response, 1).feed(frame(b"x", compressed=True))


def test_a_cut_waits_for_the_rest_of_its_event() -> None:
    data = message(1, [1], 3 * STEP_BYTES)
    large = LargeResponse(len(data), 1 << 30)
    large.add(data[:-1])
    assert large.cut() is None
    assert not large.readable
    large.add(data[-1:])
    assert large.cut() == data
    assert large.done
    large = LargeResponse(len(data), STEP_BYTES)
    large.add(data[:-1])
    with pytest.raises(EventTooLarge):
        large.cut()


def in_a_read(*responses: tuple[int, Sequence[int]], value_bytes: int = 10) -> list[WatchResponse]:
    """Return small responses, (watch id, revisions) each."""
    return [scan_watch_response(message(watch_id, revisions, value_bytes)) for watch_id, revisions in responses]


def shown(responses: Sequence[WatchResponse]) -> list[tuple[int, list[int]]]:
    """Return the same of responses."""
    return [(each.watch_id, [event.revision for event in each.events]) for each in responses]


def test_events_of_a_watch_that_follow_each_other_are_joined() -> None:
    got = joined(in_a_read((1, [7]), (1, [8, 8]), (2, [9]), (1, [10]), (-1, []), (1, [11]), (1, [12])), lambda _: 1)
    assert shown(got) == [(1, [7, 8, 8]), (2, [9]), (1, [10]), (-1, []), (1, [11, 12])]
    assert [each.header.revision for each in got] == [8, 9, 10, 5, 12]


def test_responses_that_wait_are_joined_when_they_are_taken() -> None:
    feed = ResponseOrder(scan_watch_response, 1 << 30)
    feed.feed(b"")
    read = in_a_read((1, [7]), (1, [8]), (2, [9]), (1, [10]), (-1, []), (1, [11]), (1, [12]))
    assert not list(feed.pass_on(read, lambda _: True))
    got: list[WatchResponse] = []
    while feed.has_next:
        got += feed.step(lambda _: 1)
    assert shown(got) == [(1, [7, 8]), (2, [9]), (1, [10]), (-1, []), (1, [11, 12])]
    assert feed.unread == 0
    assert not list(feed.pass_on(in_a_read((1, [7]), (1, [8]), value_bytes=JOINED_BYTES_MAX // 2), lambda _: True))
    assert shown(feed.step(lambda _: 1)) == [(1, [7])]


def test_only_events_that_follow_whole_revisions_are_joined() -> None:
    # The same revision again, and an older one; then a watch that is not known.
    again = in_a_read((1, [7]), (1, [7]), (1, [6]))
    assert shown(joined(again, lambda _: 1)) == [(1, [7]), (1, [7]), (1, [6])]
    assert len(joined(in_a_read((1, [7]), (1, [8])), lambda _: 0)) == 2
    run = in_a_read((1, [7]), (1, [7]), (1, [8]))
    run[0].fragment, run[0].plain = True, False
    assert joined(run, lambda _: 1) is run


@pytest.mark.parametrize(("clients", "bytes_max"), [(1, JOINED_BYTES_MAX), (4000, JOINED_DELIVERIES_BYTES_MAX // 4000)])
def test_joined_events_are_bounded(clients: int, bytes_max: int) -> None:
    [bare] = in_a_read((1, [7]), value_bytes=bytes_max // 4)
    head = len(bare.events[0].encoded) - bytes_max // 4
    for more, count in ((0, 1), (1, 2)):
        read = in_a_read((1, [7]), (1, [8]), value_bytes=bytes_max // 2 - head)
        read[1].events[0].encoded += bytes(bytes_max - sum(len(each.events[0].encoded) for each in read) + more)
        assert len(joined(read, lambda _: clients)) == count
    # One event may be larger; then nothing is joined to it.
    assert len(joined(in_a_read((1, [7]), (1, [8]), value_bytes=bytes_max), lambda _: clients)) == 2
