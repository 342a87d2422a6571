"""Messages of one direction of a call: cut, decompressed and translated in bounded steps, from pieces of any size."""

from __future__ import annotations

import gzip
from itertools import pairwise

import pytest
from google.protobuf.message import DecodeError

from proto.framing import FramingError, MessageReader, Status, frame
from proto.pb import kv_pb2, rpc_pb2
from proxy.passthrough.message_work import INFLATE_BYTES, MessageWork
from proxy.passthrough.namespaced_calls import rules
from proxy.passthrough.rewriting import PIECE_BYTES
from upstream.namespace import Namespace

TRANSLATION = rules(Namespace(b"/ns/")).translations[b"/etcdserverpb.KV/Range"]
MAX = 4 * 1024 * 1024


def answer(count: int, size: int) -> bytes:
    kvs = [kv_pb2.KeyValue(key=b"/ns/%d" % place, value=bytes(size)) for place in range(count)]
    return rpc_pb2.RangeResponse(kvs=kvs, count=count).SerializeToString()


def packed(message: bytes) -> bytes:
    """Return a message framed and compressed."""
    data = gzip.compress(message, mtime=0)
    return b"\1" + len(data).to_bytes(4, "big") + data


def work(message_bytes_max: int = MAX) -> MessageWork:
    assert TRANSLATION.inward is not None
    return MessageWork(TRANSLATION.response, TRANSLATION.inward, message_bytes_max, True)


def drive(made: MessageWork, data: bytes) -> bytes:
    """Feed some bytes and do all possible steps; return the messages they complete."""
    made.feed(data)
    out: list[bytes] = []
    while made.busy:
        before = made.held
        out.extend(made.step() or ())
        assert made.held - before <= max(INFLATE_BYTES, 2 * PIECE_BYTES, len(data))
    return b"".join(out)


SMALL, LARGE, EMPTY = answer(3, 5), answer(300, 100), b""


@pytest.mark.parametrize("size", [1, 3, 7, 1000, 1 << 20])
def test_messages_in_pieces_of_any_size(size: int) -> None:
    data = frame(SMALL) + packed(LARGE) + frame(EMPTY) + frame(LARGE) + packed(EMPTY)
    made, unframer = work(), MessageReader(MAX)
    messages = []
    for start in range(0, len(data), size):
        messages += unframer.feed(drive(made, data[start : start + size]))
    expected = [TRANSLATION.to_client(message) for message in (SMALL, LARGE, EMPTY, LARGE, EMPTY)]
    assert messages == expected
    assert (made.held, made.pending, made.busy) == (0, False, False)


def test_decompression_is_bounded_in_each_step() -> None:
    """2 KiB that decompress to 2 MiB take more than thirty steps, and are counted as they grow."""
    made = work()
    made.feed(packed(rpc_pb2.RangeResponse(kvs=[kv_pb2.KeyValue(value=bytes(2 << 20))]).SerializeToString()))
    assert made.held < 10_000
    sizes = []
    while made.busy and not made.step():
        sizes.append(made.held)
    assert all(after - before <= INFLATE_BYTES for before, after in pairwise(sizes[:-1]))
    assert len(sizes) > 30
    assert max(sizes) > 2 << 20
    assert made.held == 0


@pytest.mark.parametrize(
    ("data", "code", "text"),
    [
        (frame(bytes(2001))[:5], Status.RESOURCE_EXHAUSTED, "larger than the maximum (2001 vs. 2000 bytes)"),
        (packed(bytes(2001)), Status.RESOURCE_EXHAUSTED, "larger than the maximum (inflated, more vs. 2000 bytes)"),
        (packed(bytes(100 << 20)), Status.RESOURCE_EXHAUSTED, "larger than the maximum"),
        (b"\1\0\0\0\3abc", Status.INTERNAL, "broken gzip data"),
        (b"\1\0\0\0\0", Status.INTERNAL, "cut or trailing gzip data"),
        (b"\2\0\0\0\0", Status.INTERNAL, "the unknown compression flag 2"),
    ],
    ids=("too large", "inflates too far", "a bomb", "broken", "empty", "unknown flag"),
)
def test_malformed_message_ends_the_call(data: bytes, code: Status, text: str) -> None:
    made = work(200_000 if len(data) > 10_000 else 2000)
    with pytest.raises(FramingError) as error:
        drive(made, data)
    assert error.value.code is code
    assert text in error.value.text
    assert made.held < 1 << 20


def test_cut_and_trailing_gzip_data_end_the_call() -> None:
    data = gzip.compress(SMALL)
    for wrong in (data[:-1], data + b"x", data + data):
        with pytest.raises(FramingError, match="cut or trailing gzip data"):
            drive(work(), b"\1" + len(wrong).to_bytes(4, "big") + wrong)


def test_gzip_without_its_header_is_refused() -> None:
    assert TRANSLATION.inward is not None
    made = MessageWork(TRANSLATION.response, TRANSLATION.inward, MAX, False)
    with pytest.raises(FramingError, match="marked as compressed in a call without grpc-encoding"):
        drive(made, packed(SMALL))


def test_a_message_of_another_type_ends_the_call() -> None:
    with pytest.raises(DecodeError):
        drive(work(), frame(b"\xff" * 20))
    with pytest.raises(DecodeError):
        drive(work(), frame(b"\xff" * 20_000))
