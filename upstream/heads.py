"""The header lists of calls to etcd: request headers of the proxy's own calls, and the status in a response's headers.

Sources: gRPC over HTTP/2 (PROTOCOL-HTTP2.md); client/v3/ctx.go for `client-api-version`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, Protocol

from proto.framing import Status, decode_message, http_status_to_grpc
from proto.http2 import ErrorCode, Headers
from upstream.endpoints import Endpoint

# The version of etcd's API in use, sent as clientv3 sends it (client/v3/ctx.go, withVersion): etcd counts requests by
# it (etcd_server_client_requests_total), and requests without it as "unknown".
_API_VERSION: Final = (b"client-api-version", b"3.5")


HOPS: Final = b"watchmux-hops"
"""Metadata: the number of watchmux proxies that a call has passed through. etcd ignores it, as all unknown metadata."""

HOPS_MAX: Final = 8
"""A call that has passed through this many proxies is refused: the endpoints of one of them lead back to another one or
to itself, and each pass costs all of them work. Two levels of proxies are usual."""

FIRST_HOP: Final = (HOPS, b"1")

IN_A_LOOP: Final = "in a loop by way of"
"""Part of the text of each refusal in a loop of proxies."""


def next_hop(headers: Headers) -> tuple[int, Headers]:
    """Return the number of proxies that a call has passed through, and its headers for the next server.

    A value that is not a small number counts as HOPS_MAX: no proxy sends one.
    """
    for index, (name, value) in enumerate(headers):
        if name == HOPS:
            hops = int(value) if value.isdigit() and len(value) < 3 else HOPS_MAX
            return hops, [*headers[:index], (HOPS, b"%d" % (hops + 1)), *headers[index + 1 :]]
    return 0, [*headers, FIRST_HOP]


def loop_text(hops: int, endpoints: Iterable[str]) -> str:
    """Return the text of a refusal at HOPS_MAX; `endpoints`: those of the proxy that refuses."""
    there = ", ".join(endpoints)
    return f"the call has passed through {hops} proxies, {IN_A_LOOP} {there}: check their --endpoints"


class RequestConnection(Protocol):
    """The connection that a call is sent on."""

    @property
    def endpoint(self) -> Endpoint: ...

    @property
    def secure(self) -> bool: ...


def request_headers(
    connection: RequestConnection,
    path: bytes,
    metadata: Sequence[tuple[bytes, bytes]] = (),
    timeout: bytes | None = None,
) -> Headers:
    """Return the request headers of one of the proxy's own gRPC calls; `timeout` is a grpc-timeout value."""
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"https" if connection.secure else b"http"),
        (b":path", path),
        (b":authority", connection.endpoint.authority),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"user-agent", b"watchmux"),
        _API_VERSION,
        FIRST_HOP,
    ]
    if timeout is not None:
        headers.append((b"grpc-timeout", timeout))
    headers.extend(metadata)
    return headers


# gRPC's PROTOCOL-HTTP2.md, "Errors".
STATUS_OF_RESET: Final = {
    ErrorCode.REFUSED_STREAM: Status.UNAVAILABLE,
    ErrorCode.CANCEL: Status.CANCELLED,
    ErrorCode.ENHANCE_YOUR_CALM: Status.RESOURCE_EXHAUSTED,
    ErrorCode.INADEQUATE_SECURITY: Status.PERMISSION_DENIED,
}


def number(headers: Headers, name: bytes) -> int:
    """Return the number in a header; 0 if the header is missing."""
    for key, value in headers:
        if key == name and value.isdigit():
            return int(value)
    return 0


def status_of(trailers: Headers, http_status: int) -> tuple[int, str]:
    """Return a response's status code and text from its trailers, or from the HTTP status if it is not gRPC."""
    status: int | None = None
    message = ""
    for key, value in trailers:
        if key == b"grpc-status" and value.isdigit():
            status = int(value)
        elif key == b"grpc-message":
            message = decode_message(value)
    if status is not None:
        return status, message
    if http_status != 200:
        return http_status_to_grpc(http_status), f"the server answered with HTTP status {http_status}, not with gRPC"
    return Status.UNKNOWN, "the server ended the call without a status"
