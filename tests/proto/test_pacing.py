"""`PacedMessageReader` returns the same messages as `MessageReader`, in bounded steps and with bounded memory."""

from __future__ import annotations

import gzip
import random
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.framing import FramingError, MessageReader, Status, frame
from proto.pacing import INFLATE_STEP_BYTES, PacedMessageReader

MAX = 1_000


def taken(unframer: PacedMessageReader) -> Iterator[bytes]:
    """Take all complete messages."""
    while True:
        message = unframer.next()
        if message is not None:
            yield message
        elif not unframer.busy:
            return


@given(
    st.lists(st.tuples(st.binary(max_size=MAX), st.booleans()), max_size=8),
    st.lists(st.integers(min_value=1, max_value=200), min_size=1),
    st.binary(max_size=4),
)
def test_messages_are_those_of_the_unframer(
    messages: list[tuple[bytes, bool]], cuts: list[int], trailing: bytes
) -> None:
    framed = [frame(gzip.compress(text), True) if zipped else frame(text) for text, zipped in messages]
    data = b"".join(framed) + trailing
    # Compression may add some bytes.
    bound = MAX + 100
    expected = MessageReader(bound, "gzip").feed(data)
    unframer = PacedMessageReader(bound, "gzip")
    found: list[bytes] = []
    at = number = 0
    while at < len(data):
        size = cuts[number % len(cuts)]
        unframer.add(data[at : at + size])
        found += taken(unframer)
        at, number = at + size, number + 1
    assert expected == found == [text for text, _ in messages]
    assert unframer.empty == (not trailing)
    assert unframer.unread_bytes == len(trailing)


def test_a_message_is_decompressed_in_bounded_steps() -> None:
    size = 10 * INFLATE_STEP_BYTES + 7
    unframer = PacedMessageReader(size, "gzip")
    unframer.add(frame(gzip.compress(bytes(size)), True) + frame(b"next"))
    steps = 0
    worked = 0
    while (message := unframer.next()) is None:
        assert unframer.busy
        assert unframer.worked_bytes - worked <= INFLATE_STEP_BYTES + 2_000
        worked = unframer.worked_bytes
        steps += 1
    assert message == bytes(size)
    assert steps >= 10
    assert unframer.next() == b"next"
    assert unframer.empty
    assert unframer.held_bytes == 0


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (frame(bytes(MAX + 1)), Status.RESOURCE_EXHAUSTED),
        (b"\0\xff\xff\xff\xff", Status.RESOURCE_EXHAUSTED),
        (frame(gzip.compress(bytes(MAX + 1)), True), Status.RESOURCE_EXHAUSTED),
        (b"\2\0\0\0\0", Status.INTERNAL),
        (frame(b"no gzip", True), Status.INTERNAL),
        (frame(gzip.compress(b"cut")[:-3], True), Status.INTERNAL),
        (frame(gzip.compress(b"x") + b"more", True), Status.INTERNAL),
        (frame(gzip.compress(b"x") * 2, True), Status.INTERNAL),
        (frame(b"", True), Status.INTERNAL),
    ],
    ids=["large", "4 GiB", "inflated", "flag", "no gzip", "cut", "trailing", "two members", "empty"],
)
def test_bad_messages_are_refused_after_good_ones(data: bytes, code: Status) -> None:
    unframer = PacedMessageReader(MAX, "gzip")
    unframer.add(frame(b"good") + data)
    assert unframer.next() == b"good"
    with pytest.raises(FramingError) as raised:
        list(taken(unframer))
    assert raised.value.code is code
    assert unframer.held_bytes == 0


def test_compression_must_be_announced() -> None:
    unframer = PacedMessageReader(MAX)
    unframer.add(frame(gzip.compress(b"x"), True))
    with pytest.raises(FramingError, match="without grpc-encoding"):
        unframer.next()


def test_gzip_of_many_empty_blocks_is_one_step() -> None:
    """Empty blocks produce no output that could be bounded; the size of the input bounds the work."""
    deflate = zlib.compressobj(wbits=31)
    data = b"".join(deflate.flush(zlib.Z_FULL_FLUSH) for _ in range(100)) + deflate.compress(b"x") + deflate.flush()
    unframer = PacedMessageReader(100_000, "gzip")
    unframer.add(frame(data, True))
    assert list(taken(unframer)) == [b"x"]


def test_many_small_messages_take_linear_time_and_space() -> None:
    """Used bytes are dropped: the buffer does not grow with the number of messages."""
    unframer = PacedMessageReader(MAX)
    chance = random.Random(1)
    sent = received = 0
    for _ in range(200):
        count = chance.randrange(1, 500)
        unframer.add(frame(b"small") * count + frame(b"half")[:6])
        sent += count
        received += len(list(taken(unframer)))
        assert unframer.held_bytes < 40_000
        unframer.add(frame(b"half")[6:])
    assert received == sent + 199
