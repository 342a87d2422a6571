"""The messages of the proxy's own calls are those that protobuf reads and writes."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # the package has no type stubs

from proto.fields import ScanError
from proto.messages import (
    MemberStatus,
    decode_header,
    decode_health_request,
    decode_status,
    decode_token,
    encode_health,
    encode_health_list,
    encode_login,
    encode_reads_not_made,
)
from proto.pb import rpc_pb2
from proxy.admin import health

HEADER = rpc_pb2.ResponseHeader(cluster_id=2**64 - 1, member_id=7, revision=2**62, raft_term=300)


def numbers(header: Any) -> tuple[int, int, int, int]:
    """Return the four numbers of a header, of either kind."""
    return header.cluster_id, header.member_id, header.revision, header.raft_term


def status_of(message: bytes) -> tuple[object, ...]:
    """Read a status with protobuf, as a comparable value."""
    read = rpc_pb2.StatusResponse.FromString(message)
    rest = read.version, read.leader, read.raftIndex, read.raftAppliedIndex, read.isLearner
    return numbers(read.header), *rest


def own_status(message: bytes) -> tuple[object, ...]:
    """Read a status without protobuf, as a comparable value."""
    read: MemberStatus = decode_status(message)
    return numbers(read.header), *read[1:]


STATUS = rpc_pb2.StatusResponse(
    header=HEADER,
    version="3.5.30",
    dbSize=2**40,
    leader=2**64 - 1,
    raftIndex=300,
    raftTerm=9,
    raftAppliedIndex=299,
    errors=["NOSPACE"],
    dbSizeInUse=5,
    isLearner=True,
).SerializeToString()
TXN = rpc_pb2.TxnResponse(
    header=HEADER, succeeded=True, responses=[rpc_pb2.ResponseOp(response_range=rpc_pb2.RangeResponse(count=3))]
).SerializeToString()
TOKEN = rpc_pb2.AuthenticateResponse(header=HEADER, token="tök.7").SerializeToString()
CHECK = health_pb2.HealthCheckRequest(service="etcdserverpb.Watch").SerializeToString()

READERS: list[tuple[bytes, Callable[[bytes], object], Callable[[bytes], object]]] = [
    (STATUS, own_status, status_of),
    (TXN, lambda data: numbers(decode_header(data)), lambda data: numbers(rpc_pb2.TxnResponse.FromString(data).header)),
    (TOKEN, decode_token, lambda data: rpc_pb2.AuthenticateResponse.FromString(data).token.encode()),
    (CHECK, decode_health_request, lambda data: health_pb2.HealthCheckRequest.FromString(data).service),
]


@pytest.mark.parametrize(("message", "own", "protobuf"), READERS)
def test_a_message_is_read_as_protobuf_reads_it(
    message: bytes, own: Callable[[bytes], object], protobuf: Callable[[bytes], object]
) -> None:
    assert own(message) == protobuf(message)
    assert own(b"") == protobuf(b"")
    assert own(message + message) == protobuf(message + message)


@pytest.mark.parametrize(("message", "own", "protobuf"), READERS)
def test_a_damaged_message_is_read_alike_or_refused(
    message: bytes, own: Callable[[bytes], object], protobuf: Callable[[bytes], object]
) -> None:
    """It is never read where protobuf refuses it, except inside fields that are not read at all."""
    draw = random.Random(2)
    read = refused = 0
    for _ in range(3_000):
        damaged = bytearray(message)
        for _ in range(draw.randrange(1, 3)):
            damaged[draw.randrange(len(damaged))] = draw.choice((0, 1, 2, 8, 10, 16, 18, 24, 32, 80, 127, 128, 255))
        damaged = damaged[: draw.randrange(len(damaged)) if draw.random() < 0.2 else None]
        try:
            expected = protobuf(bytes(damaged))
        except DecodeError:
            expected = None
        try:
            value = own(bytes(damaged))
        except ScanError:
            refused += 1
            continue
        read += 1
        assert expected is None or value == expected, bytes(damaged)
    assert read > 300
    assert refused > 300


@pytest.mark.parametrize("serializable", [False, True])
def test_reads_that_are_not_made_are_a_txn(serializable: bool) -> None:
    ranges = [(b"", b"\0"), (b"k", b""), (b"k" * 200, b"l" * 300)]
    own = rpc_pb2.TxnRequest.FromString(encode_reads_not_made(ranges, serializable=serializable))
    wanted = rpc_pb2.TxnRequest()
    for key, range_end in ranges:
        wanted.failure.add().request_range.MergeFrom(
            rpc_pb2.RangeRequest(key=key, range_end=range_end, limit=1, keys_only=True, serializable=serializable)
        )
    assert own == wanted


def test_a_login_is_an_authenticate_request() -> None:
    own = rpc_pb2.AuthenticateRequest.FromString(encode_login("röot", "pass" * 100))
    assert own == rpc_pb2.AuthenticateRequest(name="röot", password="pass" * 100)


def test_health_answers_are_those_of_the_health_service() -> None:
    response = health_pb2.HealthCheckResponse
    for status, name in (
        (health.SERVING, "SERVING"),
        (health.NOT_SERVING, "NOT_SERVING"),
        (health.SERVICE_UNKNOWN, "SERVICE_UNKNOWN"),
    ):
        assert response.FromString(encode_health(status)) == response(status=name)
    wanted = {name: response(status="SERVING") for name in health.SERVICES}
    own = health_pb2.HealthListResponse.FromString(encode_health_list(health.SERVICES, health.SERVING))
    assert dict(own.statuses) == wanted
