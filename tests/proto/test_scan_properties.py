"""Compares `proto.scan` with the protobuf library on random messages.

The messages are built field by field, so that they include messages that a library never sends but must accept: fields
in any order, repeated, mistyped or unknown, and overlong numbers and lengths, at every level. They are also truncated
and damaged. Two differences are intended: groups are refused, and a cancel_reason need not be UTF-8.
"""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError, Message
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from proto.fields import ScanError
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse, encode_response, scan_watch_response
from tests.proto.encoding import fixed32, fixed64, number, string

# Without the phase that explains failures, which takes minutes on inputs of this size.
settings.register_profile("scan", deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink])
SCAN = settings.get_profile("scan")

UINT64 = st.one_of(st.integers(0, 300), st.integers(0, (1 << 64) - 1))
TAG_SIZE = st.one_of(st.just(1), st.integers(1, 5))
NUMBER_SIZE = st.one_of(st.just(1), st.integers(1, 10))
BYTES = st.one_of(st.binary(max_size=8), st.binary(min_size=120, max_size=140))
ANY_FIELD = st.one_of(st.integers(1, 16), st.integers(1, (1 << 29) - 1))


def numbers(fields: st.SearchStrategy[int], values: st.SearchStrategy[int] = UINT64) -> st.SearchStrategy[bytes]:
    return st.builds(number, fields, values, TAG_SIZE, NUMBER_SIZE)


def strings(field: int, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.builds(string, st.just(field), content, TAG_SIZE, TAG_SIZE)


def any_fields(allowed: st.SearchStrategy[int]) -> st.SearchStrategy[bytes]:
    """Fields of any number and wire type: unknown ones and known ones with another type."""
    return st.one_of(
        numbers(allowed),
        st.builds(fixed64, allowed, st.binary(min_size=8, max_size=8)),
        st.builds(fixed32, allowed, st.binary(min_size=4, max_size=4)),
    )


def messages(*fields: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """Messages of these fields in any order and number, and a few others."""
    unknown = st.one_of(any_fields(ANY_FIELD), st.builds(string, st.integers(20, 1 << 28), BYTES, TAG_SIZE, TAG_SIZE))
    return st.lists(st.one_of(*fields, *fields, unknown), max_size=7).map(b"".join)


HEADERS = messages(numbers(st.integers(1, 4)))
KEY_VALUES = messages(
    numbers(st.sampled_from([2, 3, 3, 4, 6])),
    strings(1, BYTES),
    strings(5, BYTES),
)
EVENTS = messages(
    numbers(st.just(1), st.one_of(st.integers(0, 2), UINT64)),
    strings(2, KEY_VALUES),
    strings(3, KEY_VALUES),
)
RESPONSES = messages(
    strings(1, HEADERS),
    numbers(st.integers(2, 7)),
    strings(6, st.text(max_size=4).map(str.encode)),
    strings(11, EVENTS),
    strings(11, EVENTS),
)


def serialized(message: Message) -> bytes:
    """Return a message's bytes, unknown fields included, for comparison."""
    return message.SerializeToString(deterministic=True)


INT64 = st.one_of(st.integers(0, 1 << 21), st.integers(-(1 << 63), (1 << 63) - 1))
KEY_VALUE_MESSAGES = st.builds(
    kv_pb2.KeyValue,
    key=BYTES,
    create_revision=INT64,
    mod_revision=INT64,
    version=INT64,
    value=BYTES,
    lease=INT64,
)
EVENT_MESSAGES = st.builds(
    kv_pb2.Event,
    type=st.sampled_from([kv_pb2.Event.PUT, kv_pb2.Event.DELETE]),
    kv=KEY_VALUE_MESSAGES,
    prev_kv=st.one_of(st.none(), KEY_VALUE_MESSAGES),
)
PLAIN_RESPONSES = st.builds(
    rpc_pb2.WatchResponse,
    header=st.builds(
        rpc_pb2.ResponseHeader,
        cluster_id=st.sampled_from([0, 1, 0xCDF818194E3A8C32]),
        member_id=st.sampled_from([0, 1, 0x8E9E05C52164694D]),
        revision=INT64,
        raft_term=UINT64,
    ),
    watch_id=INT64,
    fragment=st.sampled_from([False, False, True]),
    events=st.lists(EVENT_MESSAGES, max_size=3),
).map(serialized)


def agree(response: WatchResponse, expected: rpc_pb2.WatchResponse) -> None:
    """Check that `response` equals what the library decoded."""
    header = response.header
    assert header.cluster_id == expected.header.cluster_id
    assert header.member_id == expected.header.member_id
    assert header.revision == expected.header.revision
    assert header.raft_term == expected.header.raft_term
    assert serialized(rpc_pb2.WatchResponse.FromString(header.encoded).header) == serialized(expected.header)
    assert bool(header.encoded) == expected.HasField("header")
    assert response.watch_id == expected.watch_id
    assert response.created == expected.created
    assert response.canceled == expected.canceled
    assert response.compact_revision == expected.compact_revision
    assert response.cancel_reason == expected.cancel_reason
    assert response.fragment == expected.fragment
    assert len(response.events) == len(expected.events)
    for event, like in zip(response.events, expected.events, strict=True):
        assert (event.kind, event.revision) == (like.type, like.kv.mod_revision)
        assert serialized(only_event(event.encoded)) == serialized(like)
        bare = kv_pb2.Event.FromString(serialized(like))
        bare.ClearField("prev_kv")
        assert serialized(only_event(event.bare)) == serialized(bare)
        assert (event.bare is event.encoded) == (not like.HasField("prev_kv"))


def only_event(encoded: bytes) -> kv_pb2.Event:
    (event,) = rpc_pb2.WatchResponse.FromString(encoded).events
    return event


def agree_on(data: bytes) -> None:
    """Check that both decode the same from `data`, or both refuse it."""
    try:
        expected: rpc_pb2.WatchResponse | None = rpc_pb2.WatchResponse.FromString(data)
    except DecodeError:
        expected = None
    try:
        response = scan_watch_response(data)
    except ScanError as error:
        if expected is not None and "group" not in str(error):
            raise
        return
    if expected is not None:
        agree(response, expected)
    else:
        # A cancel_reason with invalid UTF-8; its tag is plain or overlong.
        assert 0x32 in data or 0xB2 in data


@settings(SCAN, max_examples=150)
@given(RESPONSES)
def test_reads_what_the_library_reads(data: bytes) -> None:
    agree(scan_watch_response(data), rpc_pb2.WatchResponse.FromString(data))


@settings(SCAN, max_examples=200)
@given(PLAIN_RESPONSES)
def test_reads_what_the_library_writes(data: bytes) -> None:
    agree(scan_watch_response(data), rpc_pb2.WatchResponse.FromString(data))


@settings(SCAN, max_examples=100)
@given(RESPONSES, st.integers(-(1 << 63), (1 << 63) - 1))
def test_writes_what_it_has_read(data: bytes, revision: int) -> None:
    response = scan_watch_response(data)
    expected = rpc_pb2.WatchResponse.FromString(data)
    if revision != expected.header.revision:
        expected.header.revision = revision
    encoded = encode_response(
        response.header.at(revision),
        response.watch_id,
        created=response.created,
        canceled=response.canceled,
        compact_revision=response.compact_revision,
        cancel_reason=response.cancel_reason,
        fragment=response.fragment,
        events=b"".join(event.encoded for event in response.events),
    )
    agree(scan_watch_response(encoded), expected)
    agree(scan_watch_response(encoded), rpc_pb2.WatchResponse.FromString(encoded))


@settings(SCAN, max_examples=40)
@given(st.one_of(RESPONSES, PLAIN_RESPONSES))
def test_reads_every_truncation_as_the_library_does(data: bytes) -> None:
    for size in range(len(data)):
        agree_on(data[:size])


DAMAGES = st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=3)


def damage(data: bytes, damages: list[tuple[int, int]]) -> bytes:
    """Return `data` with a few bytes changed."""
    damaged = bytearray(data)
    for place, byte in damages:
        if damaged:
            damaged[place % len(damaged)] = byte
    return bytes(damaged)


@settings(SCAN, max_examples=200)
@given(st.one_of(RESPONSES, PLAIN_RESPONSES), DAMAGES)
def test_reads_damaged_messages_as_the_library_does(data: bytes, damages: list[tuple[int, int]]) -> None:
    agree_on(damage(data, damages))


@pytest.mark.long
@settings(SCAN, max_examples=2000)
@given(st.one_of(RESPONSES, PLAIN_RESPONSES), DAMAGES)
def test_reads_many_more_messages_as_the_library_does(data: bytes, damages: list[tuple[int, int]]) -> None:
    agree_on(data)
    agree_on(damage(data, damages))


@st.composite
def one_put_after_another(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """Return two responses of one member with one put each, a few revisions apart: what a synced watch receives."""
    header = rpc_pb2.ResponseHeader(cluster_id=0xCDF818194E3A8C32, member_id=5, raft_term=draw(st.integers(1, 300)))
    header.revision = draw(st.integers(100, 1 << 21))
    kv = kv_pb2.KeyValue(key=draw(BYTES) or b"k", create_revision=draw(st.integers(1, 1 << 21)), version=3)
    kv.value = draw(BYTES) or b"v"
    kv.lease = draw(st.sampled_from([0, 0, 7, 1 << 62]))
    put = rpc_pb2.WatchResponse(header=header, watch_id=draw(st.integers(0, 300)), events=[kv_pb2.Event(kv=kv)])
    both = []
    for step in (0, draw(st.integers(0, 200))):
        put.header.revision += step
        put.events[0].kv.mod_revision = put.header.revision - draw(st.sampled_from([0, 0, 1, 90]))
        both.append(serialized(put))
    return both[0], both[1]


@settings(SCAN, max_examples=150)
@given(one_put_after_another(), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=2))
def test_reads_one_put_after_another(puts: tuple[bytes, bytes], damages: list[tuple[int, int]]) -> None:
    first, second = puts
    agree_on(first)
    agree_on(second)
    agree_on(second + first)
    agree_on(damage(second, damages))
    for size in range(len(second) - 20, len(second)):
        agree_on(second[:size])


@settings(SCAN, max_examples=200)
@given(st.binary(max_size=40))
def test_reads_noise_as_the_library_does(data: bytes) -> None:
    agree_on(data)
