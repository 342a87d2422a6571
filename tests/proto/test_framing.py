"""gRPC's framing: messages split at any byte, bounds, status codes, timeouts, metadata."""

from __future__ import annotations

import contextlib
import gc
import gzip
import math
import weakref
import zlib

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.framing import (
    FramingError,
    MessageReader,
    Status,
    decode_message,
    decode_timeout,
    encode_message,
    encode_timeout,
    frame,
    http_status_to_grpc,
)

MAX = 1000
MESSAGES = [
    pytest.param([], id="none"),
    pytest.param([b""], id="empty"),
    pytest.param([b"", b"", b""], id="empties"),
    pytest.param([b"a"], id="one byte"),
    pytest.param([b"\x00\x00\x00\x00\x01", b"\x01"], id="like prefixes"),
    pytest.param([b"x" * 300, b"", b"y" * MAX], id="up to the bound"),
]
# The start of one more message that is never completed.
TRAILING = [b"", b"\x00", b"\x00\x00\x00\x00", b"\x00\x00\x00\x00\x05", b"\x00\x00\x00\x00\x05half"]


def test_a_frame_has_flag_and_length_before_the_message() -> None:
    assert frame(b"") == b"\x00\x00\x00\x00\x00"
    assert frame(b"abc") == b"\x00\x00\x00\x00\x03abc"
    assert frame(b"abc", compressed=True) == b"\x01\x00\x00\x00\x03abc"
    assert frame(b"x" * 0x010203)[:5] == b"\x00\x00\x01\x02\x03"


@pytest.mark.parametrize("trailing", TRAILING)
@pytest.mark.parametrize("messages", MESSAGES)
def test_messages_that_arrive_at_once_are_split(messages: list[bytes], trailing: bytes) -> None:
    unframer = MessageReader(MAX)
    assert unframer.feed(b"".join(map(frame, messages)) + trailing) == messages
    assert unframer.pending == bool(trailing)


@pytest.mark.parametrize("trailing", TRAILING)
@pytest.mark.parametrize("messages", MESSAGES)
def test_messages_that_arrive_byte_by_byte_are_joined(messages: list[bytes], trailing: bytes) -> None:
    unframer = MessageReader(MAX)
    for message in messages:
        framed = frame(message)
        for place in range(len(framed) - 1):
            assert unframer.feed(framed[place : place + 1]) == []
            assert unframer.pending
        assert unframer.feed(framed[-1:]) == [message]
        assert not unframer.pending
    for byte in trailing:
        assert unframer.feed(bytes((byte,))) == []
    assert unframer.pending == bool(trailing)


@pytest.mark.parametrize("messages", [[b"ab", b"", b"\x00" * 7], [b"", b"c"]])
def test_cut_in_three_anywhere(messages: list[bytes]) -> None:
    data = b"".join(map(frame, messages))
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            unframer = MessageReader(MAX)
            pieces = [data[:first], data[first:second], data[second:]]
            assert [message for piece in pieces for message in unframer.feed(piece)] == messages
            assert not unframer.pending


@given(st.lists(st.binary(max_size=40)), st.lists(st.integers(0, 60)))
def test_cut_and_joined_at_random(messages: list[bytes], sizes: list[int]) -> None:
    data = b"".join(map(frame, messages))
    unframer = MessageReader(MAX)
    got: list[bytes] = []
    for size in sizes:
        got += unframer.feed(data[:size])
        data = data[size:]
    assert got + unframer.feed(data) == messages
    assert not unframer.pending


def test_empty_data_changes_nothing() -> None:
    unframer = MessageReader(MAX)
    assert unframer.feed(b"") == []
    assert not unframer.pending
    unframer.feed(b"\x00")
    assert unframer.feed(b"") == []
    assert unframer.pending


def refusal(unframer: MessageReader, data: bytes) -> FramingError:
    """Feed `data`, which must be refused, and return the error."""
    with pytest.raises(FramingError) as raised:
        unframer.feed(data)
    assert str(raised.value) == raised.value.text
    return raised.value


def test_oversize_is_refused_from_its_prefix() -> None:
    prefix = frame(b"x" * (MAX + 1))[:5]
    unframer = MessageReader(MAX)
    assert unframer.feed(prefix[:4]) == []
    error = refusal(unframer, prefix[4:])
    assert error.code is Status.RESOURCE_EXHAUSTED
    assert "1001 vs. 1000 bytes" in error.text
    assert not unframer.pending


def test_largest_length_is_refused() -> None:
    assert refusal(MessageReader(MAX), b"\x00\xff\xff\xff\xff").code is Status.RESOURCE_EXHAUSTED


def test_a_failed_stream_stays_failed() -> None:
    unframer = MessageReader(MAX)
    error = refusal(unframer, frame(b"fine") + frame(b"x" * (MAX + 1)))
    for data in (frame(b"fine"), b""):
        again = refusal(unframer, data)
        assert (again.code, again.text) == (error.code, error.text)
    assert not unframer.pending


@pytest.mark.parametrize("decompress", [None, "gzip"])
@pytest.mark.parametrize("flag", [2, 0x80, 0xFF])
def test_unknown_compression_flags_are_refused(flag: int, decompress: str | None) -> None:
    unframer = MessageReader(MAX, "gzip" if decompress else None)
    assert refusal(unframer, bytes((flag, 0, 0, 0, 0))).code is Status.INTERNAL


def test_compressed_without_an_encoding() -> None:
    error = refusal(MessageReader(MAX), b"\x01\x00\x00\x00\x05")
    assert error.code is Status.INTERNAL
    assert "without grpc-encoding" in error.text


def test_compressed_messages_are_inflated() -> None:
    messages = [b"plain", b"compressed" * 50, b"", b"z" * MAX]
    data = frame(messages[0]) + b"".join(frame(gzip.compress(message), compressed=True) for message in messages[1:])
    assert MessageReader(MAX, "gzip").feed(data) == messages
    unframer = MessageReader(MAX, "gzip")
    assert [message for byte in data for message in unframer.feed(bytes((byte,)))] == messages


@pytest.mark.parametrize("size", [MAX + 1, 50 * MAX, 100_000_000])
def test_inflated_size_is_bounded(size: int) -> None:
    # A hundred million zeros are 97 kB of gzip: the bound on the bytes on the wire does not help.
    packer = zlib.compressobj(9, wbits=31)
    packed = b"".join(packer.compress(bytes(1_000_000)) for _ in range(size // 1_000_000))
    packed += packer.compress(bytes(size % 1_000_000)) + packer.flush()
    limit = max(MAX, len(packed))
    error = refusal(MessageReader(limit, "gzip"), frame(packed, compressed=True))
    assert error.code is Status.RESOURCE_EXHAUSTED


@pytest.mark.parametrize(
    "packed",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"no gzip at all", id="garbage"),
        pytest.param(zlib.compress(b"abc"), id="zlib"),
        pytest.param(gzip.compress(b"abc")[:-1], id="cut"),
        pytest.param(gzip.compress(b"abc")[:-8] + bytes(8), id="wrong checksum"),
        pytest.param(gzip.compress(b"abc") + b"x", id="trailing"),
        pytest.param(gzip.compress(b"abc") * 2, id="two members"),
    ],
)
def test_broken_gzip_is_refused(packed: bytes) -> None:
    assert refusal(MessageReader(MAX, "gzip"), frame(packed, compressed=True)).code is Status.INTERNAL


def test_status_numbers_are_grpcs() -> None:
    assert {status.name: status.value for status in Status} == {code.name: code.value[0] for code in grpc.StatusCode}


@pytest.mark.parametrize(
    ("seconds", "value"),
    [
        (0, b"0n"),
        (-1, b"0n"),
        (-math.inf, b"0n"),
        (1e-12, b"1n"),
        (1e-9, b"1n"),
        (0.05, b"50000000n"),
        (0.099999999, b"99999999n"),
        (0.1, b"100000u"),
        (1.5, b"1500000u"),
        (7, b"7000000u"),
        (100, b"100000m"),
        (99_999.999, b"99999999m"),
        (100_000, b"100000S"),
        (99_999_999, b"99999999S"),
        (100_000_000, b"1666667M"),
        (6_000_000_000, b"1666667H"),
        (99_999_999 * 3600, b"99999999H"),
        (1e30, b"99999999H"),
        (math.inf, b"99999999H"),
    ],
)
def test_timeouts_are_encoded_in_the_unit_that_fits(seconds: float, value: bytes) -> None:
    assert encode_timeout(seconds) == value


def test_encode_timeout_refuses_nan() -> None:
    with pytest.raises(ValueError, match="number of seconds"):
        encode_timeout(math.nan)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (b"0n", 0),
        (b"1n", 1e-9),
        (b"1u", 1e-6),
        (b"20m", 0.02),
        (b"3S", 3),
        (b"2M", 120),
        (b"1H", 3600),
        (b"00000001S", 1),
        (b"99999999H", 99_999_999 * 3600),
    ],
)
def test_timeouts_are_decoded_in_all_units(value: bytes, seconds: float) -> None:
    assert decode_timeout(value) == seconds


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"S", id="no digits"),
        pytest.param(b"1", id="no unit"),
        pytest.param(b"1s", id="wrong case"),
        pytest.param(b"1d", id="unknown unit"),
        pytest.param(b"-1S", id="negative"),
        pytest.param(b"+1S", id="signed"),
        pytest.param(b" 1S", id="space before"),
        pytest.param(b"1 S", id="space inside"),
        pytest.param(b"1S ", id="space after"),
        pytest.param(b"1.5S", id="fraction"),
        pytest.param(b"1_0S", id="underscore"),
        pytest.param(b"\xef\xbc\x91S", id="digit that is not ASCII"),
        pytest.param(b"100000000n", id="9 digits"),
        pytest.param(b"9" * 5000 + b"S", id="5000 digits"),
    ],
)
def test_malformed_timeouts_are_refused_in_a_short_text(value: bytes) -> None:
    with pytest.raises(FramingError, match="malformed grpc-timeout") as raised:
        decode_timeout(value)
    assert raised.value.code is Status.INTERNAL
    assert len(raised.value.text) < 100


@given(st.floats(0, 3.5e11))
def test_timeouts_are_never_shortened(seconds: float) -> None:
    decoded = decode_timeout(encode_timeout(seconds))
    assert seconds <= decoded * (1 + 1e-12)
    assert decoded <= seconds * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", b""),
        ("etcdserver: no leader", b"etcdserver: no leader"),
        ("100%", b"100%25"),
        ("%41", b"%2541"),
        ("a\r\nb\tc\x00\x7f", b"a%0D%0Ab%09c%00%7F"),
        ("~ !", b"~ !"),
        ("é 好", b"%C3%A9 %E5%A5%BD"),
        ("\ud800", b"?"),
    ],
)
def test_status_texts_are_percent_encoded(text: str, value: bytes) -> None:
    assert encode_message(text) == value


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (b"%C3%A9 %e5%a5%bd", "é 好"),
        (b"plain %", "plain %"),
        (b"%4", "%4"),
        (b"%4g%41", "%4gA"),
        (b"%%41", "%A"),
        (b"%2541", "%41"),
        (b"%FF", "\ufffd"),
        (b"\xc3\xa9", "é"),
        (b"%00", "\x00"),
    ],
)
def test_status_texts_are_percent_decoded(value: bytes, text: str) -> None:
    assert decode_message(value) == text


@given(st.text())
def test_grpc_message_round_trip(text: str) -> None:
    value = encode_message(text)
    assert decode_message(value) == text
    assert all(0x20 <= byte <= 0x7E for byte in value)


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (400, Status.INTERNAL),
        (401, Status.UNAUTHENTICATED),
        (403, Status.PERMISSION_DENIED),
        (404, Status.UNIMPLEMENTED),
        (429, Status.UNAVAILABLE),
        (502, Status.UNAVAILABLE),
        (503, Status.UNAVAILABLE),
        (504, Status.UNAVAILABLE),
        (200, Status.UNKNOWN),
        (500, Status.UNKNOWN),
        (599, Status.UNKNOWN),
    ],
)
def test_http_statuses_become_the_grpc_codes_of_the_spec(status: int, code: Status) -> None:
    assert http_status_to_grpc(status) is code


def test_a_refused_message_is_not_kept() -> None:
    """No reference cycle through the traceback keeps it, or its decompressed data, until a garbage collection."""
    bomb = frame(gzip.compress(bytes(5000)), compressed=True)
    unframer = type("Unframer", (MessageReader,), {})(1000, "gzip")  # with slots only, nothing could refer to it weakly
    gone = weakref.ref(unframer)
    gc.disable()
    try:
        for _ in range(2):
            with contextlib.suppress(FramingError):
                unframer.feed(bomb)
        del unframer
        assert gone() is None
    finally:
        gc.enable()
