"""Events of an HTTP/2 connection: the return values of `Connection.receive` and `Connection.resume`.

One slotted class per event, so that the shell can dispatch by class and tests can compare lists of events.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from proto.http2.errors import ErrorCode
from proto.http2.streams import Stream

Headers: TypeAlias = list[tuple[bytes, bytes]]


class HeadersKind(StrEnum):
    """The kind of a header list (RFC 9113 section 8.1)."""

    REQUEST = "request"
    INFORMATIONAL = "informational"
    RESPONSE = "response"
    TRAILERS = "trailers"


@dataclass(slots=True)
class HeadersReceived:
    """A complete, valid header list arrived. In the server role, a stream begins with a `request`."""

    stream: Stream
    # In the order received; pseudo-header fields first.
    headers: Headers
    # The peer sends nothing more on this stream.
    end_stream: bool
    kind: HeadersKind


@dataclass(slots=True)
class DataReceived:
    """Bytes of a body arrived."""

    stream: Stream
    # Without padding; empty only with end_stream.
    data: bytes
    # Bytes to pass to `Connection.consumed` once they are processed (padding is returned to the peer already).
    flow_size: int
    # The peer sends nothing more on this stream.
    end_stream: bool


@dataclass(slots=True)
class StreamReset:
    """A stream that is known to the shell has ended at once; its unsent data is dropped."""

    stream: Stream
    code: ErrorCode
    # True: the peer sent RST_STREAM, or GOAWAY with a lower last id. False: we reset it because of a stream error.
    by_peer: bool
    # For logs; "" when the peer gave none.
    reason: str = ""


@dataclass(slots=True)
class StreamDrained:
    """All data of a blocked stream is in the output: `Stream.blocked` is False again."""

    stream: Stream


@dataclass(slots=True)
class PingReceived:
    """The peer sent a PING, which is already answered; for checks of its rate."""


@dataclass(slots=True)
class LimitReached:
    """A request was refused or a stream reset because of one of our limits; the peer is informed. For metrics."""

    # The limit's name in `Limits`.
    limit: str


@dataclass(slots=True)
class PingAcknowledged:
    """The peer acknowledged a PING of ours."""

    # The PING's 8 bytes.
    payload: bytes


@dataclass(slots=True)
class PeerSettings:
    """Settings of the peer were applied (and acknowledged)."""


@dataclass(slots=True)
class GoAwayReceived:
    """The peer shuts the connection down: streams up to last_id continue, new ones need another connection."""

    last_id: int
    code: ErrorCode
    # Opaque bytes for logs.
    debug: bytes


@dataclass(slots=True)
class ConnectionFailed:
    """The connection has ended because of a connection error; GOAWAY is in the output. Always the last event."""

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
