"""Requests that are read without protobuf mean what protobuf reads in them."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from coalesce.inputs import CreateRequest
from proto.pb import rpc_pb2
from proto.plain_request import FIELDS_MAX, PROGRESS, plain_cancel, plain_create
from proxy.watch.unusual import create_request


def encoded(**fields: object) -> bytes:
    """Return a request that creates a watch."""
    create = rpc_pb2.WatchCreateRequest(**fields)  # type: ignore[arg-type]  # of one call
    return rpc_pb2.WatchRequest(create_request=create).SerializeToString()


def cancel(watch_id: int) -> bytes:
    """Return a request that cancels a watch."""
    return rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=watch_id)).SerializeToString()


USUAL: list[dict[str, Any]] = [
    {},
    {"key": b"k"},
    {"key": b"k" * 124},
    {"key": b"k", "range_end": b"l"},
    {"key": b"k" * 60, "range_end": b"l" * 60},
    {"key": b"k" * 20_000, "range_end": b"l" * 200},
    {"range_end": b"l"},
    {"start_revision": -1},
    {"key": b"k", "start_revision": 2**62, "watch_id": -7},
    {"key": b"k", "range_end": b"l", "fragment": True},
    {"key": b"k", "filters": [0]},
    {"key": b"k", "filters": [1, 0, 2, 127]},
    {
        "key": b"k",
        "range_end": b"l",
        "start_revision": 300,
        "progress_notify": True,
        "filters": [1],
        "prev_kv": True,
        "watch_id": 5,
        "fragment": True,
    },
]


@pytest.mark.parametrize("fields", USUAL)
def test_a_usual_create_is_read(fields: dict[str, object]) -> None:
    read = plain_create(encoded(**fields))
    assert read is not None
    assert CreateRequest(*read) == create_request(rpc_pb2.WatchCreateRequest(**fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("watch_id", [0, 1, 127, 128, 2**62, -1])
def test_a_cancel_is_read(watch_id: int) -> None:
    assert plain_cancel(cancel(watch_id)) == watch_id
    assert plain_create(cancel(watch_id)) is None


def test_a_request_for_progress_is_compared_as_a_whole() -> None:
    request = rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest())
    assert request.SerializeToString() == PROGRESS


def test_the_fields_that_are_read_are_bounded() -> None:
    def repeated(times: int, field: bytes) -> bytes:
        return b"\x0a" + bytes((len(field) * times,)) + field * times

    assert plain_create(repeated(FIELDS_MAX, b"\x30\x01")) == (b"", b"", None, 0, False, False, False, True, False)
    assert plain_create(repeated(FIELDS_MAX + 1, b"\x30\x01")) is None
    assert plain_create(encoded(filters=[1] * FIELDS_MAX)) is not None
    assert plain_create(encoded(filters=[1] * (FIELDS_MAX + 1))) is None


def test_nothing_is_read_that_protobuf_reads_otherwise() -> None:
    draw = random.Random(1)
    creates = cancels = 0
    whole = [encoded(key=b"ab", range_end=b"\x12\x01"), *(encoded(**fields) for fields in USUAL[:2] + USUAL[6:])]
    whole += [cancel(0), cancel(1), cancel(200), encoded(start_revision=1) + encoded(key=b"a")]
    for _ in range(20_000):
        message = bytearray(draw.choice(whole))
        for _ in range(draw.randrange(3)):
            message[draw.randrange(len(message))] = draw.choice(
                (0, 1, 2, 3, 4, 6, 8, 10, 18, 24, 40, 42, 127, 128, 255)
            )
        if draw.random() < 0.2:
            message += draw.randbytes(draw.randrange(4))
        read, watch_id = plain_create(bytes(message)), plain_cancel(bytes(message))
        if read is None and watch_id is None:
            continue
        try:
            request = rpc_pb2.WatchRequest.FromString(bytes(message))
        except DecodeError:
            pytest.fail(f"protobuf does not read {bytes(message)!r}")
        if read is not None:
            creates += 1
            assert request.WhichOneof("request_union") == "create_request"
            assert create_request(request.create_request) == CreateRequest(*read), message
        else:
            cancels += 1
            assert request.WhichOneof("request_union") == "cancel_request"
            assert request.cancel_request.watch_id == watch_id, message
    assert creates > 4_000
    assert cancels > 1_000
