"""HTTP/2 (RFC 9113), sans-I/O, in the server and the client role.

Why not `h2`: with h2 4.4.1 as a server, every request scanned all streams of its connection (a unary call took 160 us
of CPU, 934 us with 5,000 streams open), a GOAWAY in either direction ended the connection and dropped queued output,
and one malformed header or one stream too many ended every watch on the connection. Most of what a fan-out proxy writes
is DATA; here that is one packed frame header before shared bytes.

Read `connection` first, then its halves `sending` and `receiving`. They use `streams`, `frames`, `headers` (validity),
`compression` and `limits`; `events` and `errors` are what they return and raise.
"""

from proto.http2.connection import Connection
from proto.http2.errors import ErrorCode, GoingAway, StreamMisuse, TooManyStreams
from proto.http2.events import (
    ConnectionFailed,
    DataReceived,
    Event,
    GoAwayReceived,
    Headers,
    HeadersKind,
    HeadersReceived,
    LimitReached,
    PeerSettings,
    PingAcknowledged,
    PingReceived,
    StreamDrained,
    StreamReset,
)
from proto.http2.frames import UPDATE_AND_PING_BYTES
from proto.http2.limits import JOINED_DATA_BYTES_MAX, LATE_ACK_S_MAX, Http2Limits
from proto.http2.sending import Piece, Role, StreamBatch
from proto.http2.streams import Stream, StreamState

__all__ = [
    "JOINED_DATA_BYTES_MAX",
    "LATE_ACK_S_MAX",
    "UPDATE_AND_PING_BYTES",
    "Connection",
    "ConnectionFailed",
    "DataReceived",
    "ErrorCode",
    "Event",
    "GoAwayReceived",
    "GoingAway",
    "Headers",
    "HeadersKind",
    "HeadersReceived",
    "Http2Limits",
    "LimitReached",
    "PeerSettings",
    "Piece",
    "PingAcknowledged",
    "PingReceived",
    "Role",
    "Stream",
    "StreamBatch",
    "StreamDrained",
    "StreamMisuse",
    "StreamReset",
    "StreamState",
    "TooManyStreams",
]
