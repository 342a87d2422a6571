"""Creates that are read without a parser mean what protobuf reads in them."""

from __future__ import annotations

import random

import pytest
from google.protobuf.message import DecodeError

from proto.pb import rpc_pb2
from proto.plain_create import plain_create


def encoded(**fields: object) -> bytes:
    """Return a request that creates a watch."""
    create = rpc_pb2.WatchCreateRequest(**fields)  # type: ignore[arg-type]  # of one call
    return rpc_pb2.WatchRequest(create_request=create).SerializeToString()


@pytest.mark.parametrize(
    ("fields", "read"),
    [
        ({"key": b"k"}, (b"k", b"")),
        ({"key": b"k" * 123}, (b"k" * 123, b"")),
        ({"key": b"k", "range_end": b"l"}, (b"k", b"l")),
        ({"key": b"k" * 60, "range_end": b"l" * 60}, (b"k" * 60, b"l" * 60)),
        ({"key": b"k" * 124}, (b"k" * 124, b"")),
        ({"key": b"k" * 126}, None),
        ({"key": b""}, None),
        ({"range_end": b"l"}, None),
        ({"key": b"k", "start_revision": 1}, None),
        ({"key": b"k", "range_end": b"l", "fragment": True}, None),
    ],
)
def test_a_create_of_only_a_range_is_read(fields: dict[str, object], read: tuple[bytes, bytes] | None) -> None:
    assert plain_create(encoded(**fields)) == read


def test_nothing_is_read_that_protobuf_reads_otherwise() -> None:
    draw = random.Random(1)
    seen = 0
    whole = [encoded(key=b"ab", range_end=b"\x12\x01"), encoded(key=b"\x12\x00"), encoded(key=b"a", watch_id=1)]
    for _ in range(20_000):
        message = bytearray(draw.choice(whole))
        for _ in range(draw.randrange(3)):
            message[draw.randrange(len(message))] = draw.choice((0, 1, 2, 3, 4, 6, 8, 10, 18, 24, 127, 128, 255))
        if draw.random() < 0.2:
            message += draw.randbytes(draw.randrange(4))
        read = plain_create(bytes(message))
        if read is None:
            continue
        seen += 1
        try:
            request = rpc_pb2.WatchRequest.FromString(bytes(message))
        except DecodeError:
            pytest.fail(f"protobuf does not read {bytes(message)!r}")
        expected = rpc_pb2.WatchCreateRequest(key=read[0], range_end=read[1])
        assert request.create_request == expected, message
    assert seen > 1000
