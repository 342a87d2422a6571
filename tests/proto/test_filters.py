"""Shortening long lists of filters does not change the meaning of the message to the parser."""

from __future__ import annotations

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from proto.filters import LONG_BYTES, RUN_BYTES, meaning_of, shortened
from proto.pb import rpc_pb2

Meaning = tuple[object, ...]


def varint(value: int, more: int = 0) -> bytes:
    """Return a varint with `more` extra bytes."""
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    for _ in range(more):
        parts[-1] |= 0x80
        parts.append(0)
    return bytes(parts)


def field(tag: int, content: bytes) -> bytes:
    """Return a field with a length."""
    return varint(tag) + varint(len(content)) + content


def meaning(message: bytes) -> Meaning:
    """Return what a WatchRequest asks for; "broken" if it cannot be parsed."""
    try:
        request = rpc_pb2.WatchRequest.FromString(message)
    except DecodeError:
        return ("broken",)
    create = request.create_request
    filters = (0 in create.filters, 1 in create.filters)
    del create.filters[:]
    return (filters, request.SerializeToString(deterministic=True))


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 127, 128, 129, 255, 16_384, 2**21, 2**28, 2**31 - 1, 2**32, 2**32 + 1, 2**64 - 1]),
    st.integers(0, 300),
)
PACKED = st.tuples(
    st.lists(st.builds(varint, NUMBERS, st.integers(0, 2)), min_size=1, max_size=4), st.integers(1, 20_000)
).map(lambda drawn: field(0x2A, b"".join(drawn[0]) * drawn[1]))
SINGLE = st.tuples(
    st.lists(st.builds(varint, NUMBERS, st.integers(0, 1)), min_size=1, max_size=4), st.integers(1, 9_000)
).map(lambda drawn: b"".join(b"\x28" + each for each in drawn[0]) * drawn[1])
OTHERS = st.one_of(
    st.binary(max_size=40).map(lambda key: field(0x0A, key)),
    st.binary(max_size=40).map(lambda end: field(0x12, end)),
    st.just(field(0x0A, b"\x28\x00" * 10_000)),
    st.integers(0, 2**40).map(lambda revision: b"\x18" + varint(revision)),
    st.sampled_from(
        [b"\x30\x01", b"\x38\x07", b"\x40\x01", b"\x55" + bytes(4), field(0x7A, b"unknown"), b"\x2a\x02\x80"]
    ),
)


@given(st.lists(st.one_of(PACKED, SINGLE, OTHERS), max_size=5), st.booleans(), st.integers(0, 3))
def test_shortening_keeps_the_meaning(fields: list[bytes], twice: bool, cut: int) -> None:
    message = field(0x0A, b"".join(fields)) * (1 + twice)
    message = message[: len(message) - cut]
    assert meaning(shortened(message)) == meaning(message)


@pytest.mark.parametrize(
    "filters", [b"\x2a\x80\x80\x04" + b"\x02" * 65_536, b"\x28\x02" * 65_536, b"\x28\x00\x28\x01" * 9_000]
)
def test_long_runs_are_shortened(filters: bytes) -> None:
    message = field(0x0A, field(0x0A, b"key") + filters + b"\x30\x01")
    assert len(shortened(message)) < 30
    assert meaning(shortened(message)) == meaning(message)


def test_short_messages_and_runs_are_not_changed() -> None:
    short = field(0x0A, field(0x2A, bytes(RUN_BYTES)))
    assert shortened(short) is short
    key = field(0x0A, b"k" * LONG_BYTES)
    few = field(0x0A, key + field(0x2A, bytes(RUN_BYTES - 1)))
    assert shortened(few) is few
    assert shortened(field(0x0A, key + field(0x2A, bytes(RUN_BYTES)))) == field(0x0A, key + field(0x2A, b"\0"))


@pytest.mark.parametrize("packed", [b"\x80\x00", b"\x81\x00\x05", b"\x81\x80\x80\x80\x10", b"\x05\x80"])
def test_unusual_numbers_are_left_to_the_parser(packed: bytes) -> None:
    assert meaning_of(packed) is None
