"""Error codes and exceptions of the HTTP/2 connection.

What a peer does wrong never leaves the connection as an exception: the two faults below travel only inside it, and come
out as events and as frames to the peer. What *our own* code may run into (no stream to be had, a call on a finished
stream) is raised.
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
    """The peer's MAX_CONCURRENT_STREAMS is reached: try again when a stream has ended."""


class GoingAway(Exception):
    """No stream can be opened on this connection any more: use another one."""


class StreamMisuse(Exception):
    """Our own code sent on a stream whose sending side it had already ended."""


class ConnectionFault(Exception):
    """The peer broke the connection as a whole; caught inside `Connection.receive`."""

    def __init__(self, code: ErrorCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class StreamFault(Exception):
    """
    The peer broke one stream; caught inside `Connection.receive`, the other streams live on.

    `limit`: the name, in `Limits`, of the bound it went over; "" when it was another reason.
    """

    def __init__(self, stream_id: int, code: ErrorCode, reason: str, limit: str = "") -> None:
        super().__init__(reason)
        self.stream_id = stream_id
        self.code = code
        self.reason = reason
        self.limit = limit
