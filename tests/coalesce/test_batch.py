"""Batches, variants, fragments: the bytes that a watch of each kind gets."""

from __future__ import annotations

import pytest

from coalesce.batch import (
    FRAGMENT,
    NO_DELETE,
    NO_PUT,
    PREV_KV,
    Payload,
    Variants,
    batches_of,
    revisions_of,
    split,
    variant_of,
)
from proto.pb import rpc_pb2
from proto.scan import Event, WatchResponse, encode_watch_id
from proto.shared_response import COPIED_BYTES_MAX
from tests.coalesce.shell import delete, header, messages_of, put, seen

EVERYTHING = 1 << 30


def payload_of(variant: int, *events: Event, fragment_bytes: int = EVERYTHING, at: int = 99) -> Payload | None:
    return Variants(header(at), events, fragment_bytes, True).payload(variant)


def lines(payload: Payload | None, watch_id: int = 0) -> list[str]:
    return [] if payload is None else [seen(message) for message in messages_of(payload, watch_id)]


@pytest.mark.parametrize(
    ("variant", "line"),
    [
        (0, "#0 @9 put 7 a=1 delete 8 b put 9 c=3"),
        (PREV_KV, "#0 @9 put 7 a=1 (was 0) delete 8 b (was 2) put 9 c=3"),
        (NO_DELETE, "#0 @9 put 7 a=1 put 9 c=3"),
        (NO_PUT, "#0 @8 delete 8 b"),
        (NO_PUT | PREV_KV, "#0 @8 delete 8 b (was 2)"),
        (NO_DELETE | PREV_KV | FRAGMENT, "#0 @9 put 7 a=1 (was 0) put 9 c=3"),
        (NO_PUT | NO_DELETE, None),
    ],
)
def test_each_variant_gets_its_own_events(variant: int, line: str | None) -> None:
    payload = payload_of(variant, put(7, b"a", b"1", b"0"), delete(8, b"b", b"2"), put(9, b"c", b"3"))
    assert lines(payload) == ([] if line is None else [line])
    if payload is not None:
        assert payload.header.revision == payload.last_revision


def test_the_header_has_the_revision_of_its_last_event() -> None:
    assert lines(payload_of(NO_DELETE, put(7), delete(8), at=500)) == ["#0 @7 put 7 k=v"]
    payload = Variants(header(8), [put(8)], EVERYTHING, False).payload(0)
    assert payload is not None
    assert payload.header.encoded == header(8).encoded


def test_equal_ids_share_the_same_bytes_object() -> None:
    payload = payload_of(0, put(7))
    assert payload is not None
    assert payload.pieces(3)[0] is payload.pieces(3)[0]
    assert lines(payload, 3) == ["#3 @7 put 7 k=v"]
    assert lines(payload, -5) == ["#-5 @7 put 7 k=v"]


@pytest.mark.parametrize("watch_id", [0, 3, 300, -5])
def test_a_single_message_equals_the_pieces(watch_id: int) -> None:
    payload = payload_of(0, put(7), delete(8))
    assert payload is not None
    assert (payload.message(watch_id),) == payload.pieces(watch_id)
    assert payload.message(watch_id) is not payload.pieces(watch_id)[0]


def test_fragments_are_not_a_single_message() -> None:
    payload = payload_of(FRAGMENT, put(7), put(8), fragment_bytes=1)
    assert payload is not None
    assert len(payload.pieces(0)) == 2
    assert payload.message(0) is None


def test_the_first_id_is_always_cached_but_not_many_ids() -> None:
    payload = payload_of(FRAGMENT, put(7, value=b"x" * 3_000_000), put(8), fragment_bytes=1)
    assert payload is not None
    first = payload.pieces(1)[0]
    assert payload.pieces(1)[0] is first
    assert payload.pieces(2)[0] is not payload.pieces(2)[0]


@pytest.mark.parametrize("more", [0, 1])
def test_large_events_are_shared_by_all_ids(more: int) -> None:
    """From one byte above the bound on they are a separate piece."""
    around = len(put(7, value=bytes(4000)).encoded) - 4000
    payload = payload_of(0, put(7, value=bytes(COPIED_BYTES_MAX - around + more)))
    assert payload is not None
    one, other = payload.pieces(0), payload.pieces(300)
    assert len(one) == len(other) == 1 + more
    assert (one[-1] is other[-1]) == bool(more)
    assert messages_of(payload, 300)[0] == b"".join(other) == payload.message(300)


@pytest.mark.parametrize("ids", [(0,), (3, 5, 7), (300, 301)])
@pytest.mark.parametrize("size", [1, 2 * COPIED_BYTES_MAX])
@pytest.mark.parametrize("variant", [0, FRAGMENT])
def test_columns_equal_the_pieces_of_many_watches(ids: tuple[int, ...], size: int, variant: int) -> None:
    """Ids of one length, several watches per id; the result does not depend on earlier calls."""
    events = [put(7, value=b"x" * size), put(8)]
    wanted = [(watch_id, encode_watch_id(watch_id), count) for count, watch_id in enumerate(ids, 1)]
    for asked_before in (False, True):
        payload = payload_of(variant, *events, fragment_bytes=size)
        assert payload is not None
        rows = [payload.pieces(watch_id) for count, watch_id in enumerate(ids, 1) for _ in range(count)]
        if not asked_before:
            payload = payload_of(variant, *events, fragment_bytes=size)
            assert payload is not None
        columns = payload.columns(wanted)
        assert list(zip(*columns, strict=True)) == rows


def test_variants_with_equal_results_share_one_payload() -> None:
    variants = Variants(header(7), [put(7)], EVERYTHING, False)
    assert variants.payload(0) is variants.payload(PREV_KV)
    assert variants.payload(0) is variants.payload(FRAGMENT)
    assert variants.payload(0) is not variants.payload(NO_DELETE)


def test_the_size_is_that_of_the_bytes_sent() -> None:
    for variant in (0, FRAGMENT):
        payload = payload_of(variant, *[put(7, b"%d" % n, b"x" * 50) for n in range(9)], fragment_bytes=200)
        assert payload is not None
        assert payload.size == sum(len(message) for message in payload.pieces(0))


@pytest.mark.parametrize(
    ("sizes", "fragment_bytes", "pieces"),
    [
        ([10], 5, 1),
        ([10, 10], 400, 1),
        ([100, 100, 100], 200, 3),
        ([100, 100, 100, 100], 290, 2),
        ([10, 300, 10], 200, 3),
        ([300, 300], 200, 2),
    ],
)
def test_fragments(sizes: list[int], fragment_bytes: int, pieces: int) -> None:
    events = [put(7, b"%d" % place, b"x" * size) for place, size in enumerate(sizes)]
    payload = payload_of(FRAGMENT, *events, fragment_bytes=fragment_bytes)
    assert payload is not None
    messages = [rpc_pb2.WatchResponse.FromString(message[5:]) for message in messages_of(payload, 4)]
    assert len(messages) == pieces
    assert [message.fragment for message in messages] == [True] * (pieces - 1) + [False]
    assert [event.kv.key for message in messages for event in message.events] == [b"%d" % n for n in range(len(sizes))]
    assert all(message.header == messages[0].header and message.watch_id == 4 for message in messages)
    for message in messages:
        assert len(message.events) == 1 or message.ByteSize() < fragment_bytes


def test_large_fragments_are_not_copied_for_each_watch() -> None:
    events = [put(7, b"%d" % n, b"x" * 2 * COPIED_BYTES_MAX) for n in range(3)]
    payload = payload_of(FRAGMENT, *events, fragment_bytes=COPIED_BYTES_MAX)
    assert payload is not None
    one, other = payload.pieces(0), payload.pieces(300)
    assert len(one) == len(other) == 6
    assert all(mine is yours for mine, yours in zip(one[1::2], other[1::2], strict=True))


def test_a_response_is_split_from_the_limit_on() -> None:
    events = [put(7, b"a", b"x" * 100), put(7, b"b", b"x" * 100)]
    whole = payload_of(0, *events)
    assert whole is not None
    size = len(whole.pieces(0)[0]) - 5
    for fragment_bytes, pieces in ((size + 1, 1), (size, 2)):
        payload = payload_of(FRAGMENT, *events, fragment_bytes=fragment_bytes)
        assert payload is not None
        assert len(payload.pieces(0)) == pieces
    unasked = payload_of(0, *events, fragment_bytes=size)
    assert unasked is not None
    assert len(unasked.pieces(0)) == 1


def test_a_batch_is_split_between_revisions_only() -> None:
    events = [put(7, b"a"), put(7, b"b"), put(8, b"c"), put(9, b"d"), put(9, b"e")]
    each = len(events[0].encoded)
    response = WatchResponse(header(50), events=events)

    def revisions(bytes_max: int) -> list[list[int]]:
        return [[event.revision for event in batch.events] for batch in batches_of(response, bytes_max)]

    assert revisions(100 * each) == [[7, 7, 8, 9, 9]]
    assert revisions(5 * each) == [[7, 7, 8, 9, 9]]
    assert revisions(5 * each - 1) == [[7, 7, 8], [9, 9]]
    assert revisions(3 * each - 1) == [[7, 7], [8], [9, 9]]
    assert revisions(1) == [[7, 7], [8], [9, 9]]
    for batch in batches_of(response, 1):
        assert batch.header.revision == batch.last_revision
        assert batch.size == sum(len(event.encoded) for event in batch.events)


def test_the_rest_of_a_batch() -> None:
    (batch,) = batches_of(WatchResponse(header(9), events=[put(7), put(8), put(9)]), EVERYTHING)
    assert batch.since(7) is batch
    assert batch.since(1) is batch
    assert batch.since(10) is None
    rest = batch.since(8)
    assert rest is not None
    assert (rest.first_revision, rest.last_revision, rest.header.revision) == (8, 9, 9)
    assert rest.size == sum(len(event.encoded) for event in rest.events)


def test_revisions_of_events() -> None:
    events = [put(7), put(8), put(8), put(9)]
    sizes = [len(event.encoded) for event in events]
    assert list(revisions_of(events)) == [(0, 1, sizes[0]), (1, 3, sizes[1] + sizes[2]), (3, 4, sizes[3])]


def test_split_keeps_every_byte() -> None:
    pieces = [b"%d" % n * n for n in range(1, 9)]
    for room in range(30, 60):
        assert b"".join(split(pieces, room, 10)) == b"".join(pieces)


def test_variants_are_distinct() -> None:
    combinations = [
        (no_put, no_delete, prev_kv, fragment)
        for no_put in (False, True)
        for no_delete in (False, True)
        for prev_kv in (False, True)
        for fragment in (False, True)
    ]
    assert len({variant_of(*each) for each in combinations}) == 16
