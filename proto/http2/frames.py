"""The frames of HTTP/2 as bytes (RFC 9113 sections 4 and 6).

Packed by hand, for speed: DATA, WINDOW_UPDATE and PING are frequent, and the other frames take two lines each.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_BYTES = 9

DATA = 0x0
HEADERS = 0x1
PRIORITY = 0x2
RST_STREAM = 0x3
SETTINGS = 0x4
PUSH_PROMISE = 0x5
PING = 0x6
GOAWAY = 0x7
WINDOW_UPDATE = 0x8
CONTINUATION = 0x9

END_STREAM = 0x1
ACK = 0x1
END_HEADERS = 0x4
PADDED = 0x8
PRIORITY_FLAG = 0x20

SETTING_HEADER_TABLE_SIZE = 0x1
SETTING_ENABLE_PUSH = 0x2
SETTING_MAX_CONCURRENT_STREAMS = 0x3
SETTING_INITIAL_WINDOW_SIZE = 0x4
SETTING_MAX_FRAME_SIZE = 0x5
SETTING_MAX_HEADER_LIST_SIZE = 0x6
SETTING_ENABLE_CONNECT_PROTOCOL = 0x8

# The 9 bytes before every payload: length (24 bits) and type (8 bits) as one number, flags, stream id. The type of
# DATA is zero, so its first number is the shifted length.
FRAME_HEADER = Struct(">IBI")
WORD = Struct(">I")
SETTING = Struct(">HI")
_FRAME_WITH_WORD = Struct(">IBII")
# A WINDOW_UPDATE and a PING: the header and the increment, the header and the payload.
UPDATE_AND_PING = Struct(">9sI9s8s")
UPDATE_AND_PING_BYTES = UPDATE_AND_PING.size
_GOAWAY_HEAD = Struct(">IBIII")

SETTINGS_ACK = FRAME_HEADER.pack(SETTINGS, ACK, 0)
UPDATE_HEADER = FRAME_HEADER.pack(4 << 8 | WINDOW_UPDATE, 0, 0)
PING_HEADER = FRAME_HEADER.pack(8 << 8 | PING, 0, 0)
# What grpc-go measures the bandwidth with (internal/transport/bdp_estimator.go); its keep-alives have other payloads.
BANDWIDTH_PING = bytes((2, 4, 16, 16, 9, 14, 7, 7))
PING_ACK_HEADER = FRAME_HEADER.pack(8 << 8 | PING, ACK, 0)


def rst_stream(stream_id: int, code: int) -> bytes:
    """Build RST_STREAM (6.4)."""
    return _FRAME_WITH_WORD.pack(4 << 8 | RST_STREAM, 0, stream_id, code)


def window_update(stream_id: int, increment: int) -> bytes:
    """Build WINDOW_UPDATE (6.9); stream 0 is the connection."""
    return _FRAME_WITH_WORD.pack(4 << 8 | WINDOW_UPDATE, 0, stream_id, increment)


def ping(payload: bytes, ack: bool = False) -> bytes:
    """Build PING (6.7); the payload is 8 bytes."""
    return FRAME_HEADER.pack(8 << 8 | PING, ACK if ack else 0, 0) + payload


def settings(entries: Iterable[tuple[int, int]]) -> bytes:
    """Build SETTINGS (6.5) of (identifier, value) pairs."""
    body = b"".join([SETTING.pack(identifier, value) for identifier, value in entries])
    return FRAME_HEADER.pack(len(body) << 8 | SETTINGS, 0, 0) + body


def go_away(last_id: int, code: int, debug: bytes) -> bytes:
    """Build GOAWAY (6.8)."""
    return _GOAWAY_HEAD.pack((8 + len(debug)) << 8 | GOAWAY, 0, 0, last_id, code) + debug


def header_block(stream_id: int, block: bytes, end_stream: bool, frame_bytes_max: int) -> list[bytes]:
    """Build HEADERS, and the CONTINUATIONs that a long block needs (4.3, 6.2, 6.10)."""
    flags = END_STREAM if end_stream else 0
    size = len(block)
    if size <= frame_bytes_max:
        return [FRAME_HEADER.pack(size << 8 | HEADERS, flags | END_HEADERS, stream_id) + block]
    pieces = [FRAME_HEADER.pack(frame_bytes_max << 8 | HEADERS, flags, stream_id) + block[:frame_bytes_max]]
    for start in range(frame_bytes_max, size, frame_bytes_max):
        part = block[start : start + frame_bytes_max]
        last = END_HEADERS if start + frame_bytes_max >= size else 0
        pieces.append(FRAME_HEADER.pack(len(part) << 8 | CONTINUATION, last, stream_id) + part)
    return pieces
