"""Error codes and exceptions of the HTTP/2 connection.

A peer's error never leaves the connection as an exception: the two faults below are raised and caught inside it, and
result in events and in frames to the peer. Errors in the use of the connection by *our own* code (no stream available,
a call on a finished stream) are raised.
"""

from __future__ import annotations

from enum import IntEnum


class ErrorCode(IntEnum):
    """Why a stream or a connection ended (RFC 9113 section 7)."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    SETTINGS_TIMEOUT = 0x4
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    CONNECT_ERROR = 0xA
    ENHANCE_YOUR_CALM = 0xB
    INADEQUATE_SECURITY = 0xC
    HTTP_1_1_REQUIRED = 0xD


def error_code(value: int) -> ErrorCode:
    """Return the code of a number from the wire; unknown ones count as INTERNAL_ERROR (RFC 9113 section 7)."""
    try:
        return ErrorCode(value)
    except ValueError:
        return ErrorCode.INTERNAL_ERROR


class TooManyStreams(Exception):
    """The peer's MAX_CONCURRENT_STREAMS is reached: retry after a stream has ended."""


class GoingAway(Exception):
    """No more streams can be opened on this connection: use another one."""


class StreamMisuse(Exception):
    """Our own code sent on a stream whose sending side it had already ended."""


class ConnectionFault(Exception):
    """The peer caused a connection error (RFC 9113 5.4.1); caught inside `Connection.receive`."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamError(Exception):
    """The peer caused a stream error (RFC 9113 5.4.2); caught inside `Connection.receive`, other streams continue.

    `limit`: the name in `Limits` of the limit that it exceeded; "" for another reason.
    """

    def __init__(self, stream_id: int, code: ErrorCode, reason: str, limit: str = "") -> None:
        super().__init__(reason)
        self.stream_id = stream_id
        self.code = code
        self.reason = reason
        self.limit = limit
