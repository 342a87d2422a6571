"""What happened on an HTTP/2 connection: the return values of `Connection.receive` and `Connection.resume`.

One slotted class per event, so that the shell dispatches by class and a test compares lists of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from proto.http2.errors import ErrorCode
from proto.http2.streams import Stream

Headers: TypeAlias = list[tuple[bytes, bytes]]


class HeadersKind(StrEnum):
    """Which of a stream's header lists it is (RFC 9113 section 8.1)."""

    REQUEST = "request"
    INFORMATIONAL = "informational"
    RESPONSE = "response"
    TRAILERS = "trailers"


@dataclass(slots=True)
class HeadersReceived:
    """A whole, valid header list arrived. In the server role `request` is how a stream begins."""

    stream: Stream
    # In the order of the wire; pseudo-header fields first.
    headers: Headers
    # The peer sends nothing more on this stream.
    end_stream: bool
    kind: HeadersKind


@dataclass(slots=True)
class DataReceived:
    """Bytes of a body arrived."""

    stream: Stream
    # Without padding; empty only together with end_stream.
    data: bytes
    # Bytes to give to `Connection.consumed` when they are used up (padding is given back already).
    flow_size: int
    # The peer sends nothing more on this stream.
    end_stream: bool


@dataclass(slots=True)
class StreamReset:
    """A stream that the shell knew is over at once; what waited to be sent on it is dropped."""

    stream: Stream
    code: ErrorCode
    # True: the peer sent RST_STREAM, or GOAWAY below this stream. False: the connection reset it for the peer's fault.
    by_peer: bool
    # For logs; "" when the peer gave none.
    reason: str = ""


@dataclass(slots=True)
class StreamDrained:
    """A stream that was blocked has been sent whole: `Stream.blocked` is False again."""

    stream: Stream


@dataclass(slots=True)
class PingReceived:
    """The peer sent a PING, which is answered; for whoever wants to know how often it does."""


@dataclass(slots=True)
class LimitReached:
    """A request was refused or a stream reset at one of our limits, which the peer is told; for whoever counts them."""

    # Its name in `Limits`.
    limit: str


@dataclass(slots=True)
class PingAcknowledged:
    """The peer answered a PING of ours."""

    # The 8 bytes that were sent with it.
    payload: bytes


@dataclass(slots=True)
class PeerSettings:
    """Settings of the peer were applied (and acknowledged)."""


@dataclass(slots=True)
class GoAwayReceived:
    """The peer ends the connection in good order: streams up to last_id go on, new ones need another connection."""

    last_id: int
    code: ErrorCode
    # Opaque bytes for logs.
    debug: bytes


@dataclass(slots=True)
class ConnectionFailed:
    """The connection is over for a fault of the peer; GOAWAY is in the output. Always the last event."""

    code: ErrorCode
    reason: str


Event: TypeAlias = (
    HeadersReceived
    | DataReceived
    | StreamReset
    | StreamDrained
    | PingReceived
    | LimitReached
    | PingAcknowledged
    | PeerSettings
    | GoAwayReceived
    | ConnectionFailed
)
