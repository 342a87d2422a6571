"""Request heads and refusals, table-driven."""

from __future__ import annotations

import pytest

from proto.framing import Status
from proxy.listening.calls import CallRefusal, Headers, RequestHead, is_grpc, status_trailers

GOOD: Headers = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/etcdserverpb.Watch/Watch"),
    (b":authority", b"etcd:2379"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]


def changed(name: bytes, value: bytes) -> Headers:
    """GOOD with one header replaced or added."""
    rest = [pair for pair in GOOD if pair[0] != name]
    return [*rest, (name, value)]


def test_valid_head_is_parsed() -> None:
    head = RequestHead.parse([*GOOD, (b"grpc-timeout", b"1500m"), (b"grpc-encoding", b"gzip"), (b"hasleader", b"true")])
    assert head.path == b"/etcdserverpb.Watch/Watch"
    assert head.timeout_s == 1.5
    assert head.decompress == "gzip"
    assert head.metadata[b"hasleader"] == b"true"
    assert b":authority" not in head.metadata


def test_the_first_of_repeated_metadata_counts() -> None:
    head = RequestHead.parse([*GOOD, (b"token", b"first"), (b"token", b"second")])
    assert head.metadata[b"token"] == b"first"


def test_head_without_deadline_and_encoding() -> None:
    head = RequestHead.parse(GOOD)
    assert head.timeout_s is None
    assert head.decompress is None


@pytest.mark.parametrize(
    ("name", "value", "http_status", "status"),
    [
        (b":method", b"GET", 405, Status.INTERNAL),
        (b"content-type", b"text/html", 415, Status.INVALID_ARGUMENT),
        (b"content-type", b"", 415, Status.INVALID_ARGUMENT),
        (b"content-type", b"application/grpc-web", 415, Status.INVALID_ARGUMENT),
        (b"grpc-timeout", b"soon", 400, Status.INTERNAL),
        (b"grpc-timeout", b"", 400, Status.INTERNAL),
        (b"grpc-encoding", b"snappy", 200, Status.UNIMPLEMENTED),
    ],
)
def test_invalid_head_is_refused(name: bytes, value: bytes, http_status: int, status: Status) -> None:
    with pytest.raises(CallRefusal) as caught:
        RequestHead.parse(changed(name, value))
    assert (caught.value.http_status, caught.value.status) == (http_status, status)


def test_refusal_text_truncates_the_clients_bytes() -> None:
    with pytest.raises(CallRefusal) as caught:
        RequestHead.parse(changed(b"content-type", b"\xff" * 10_000))
    assert len(caught.value.text) < 400


@pytest.mark.parametrize(
    ("content_type", "expected"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"application/grpc;charset=utf-8", True),
        (b"Application/GRPC", True),
        (b"application/grpcx", False),
        (b"application/json", False),
    ],
)
def test_content_types_of_grpc_are_recognised(content_type: bytes, expected: bool) -> None:
    assert is_grpc(content_type) is expected


def test_status_trailers_have_an_encoded_text() -> None:
    assert status_trailers(Status.OK, "") == [(b"grpc-status", b"0")]
    assert status_trailers(14, "50 % off") == [(b"grpc-status", b"14"), (b"grpc-message", b"50 %25 off")]
