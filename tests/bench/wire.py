"""The minimum of HTTP/2 and gRPC for a load generator, which must cost less than its subject.

Nothing here is general: requests are encoded once and sent repeatedly, header blocks of answers are not decoded, and
values are found by a marker instead of being parsed. What a client sends while it receives is that of a profile.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Iterator
from typing import cast

import hpack

from tests.bench.profiles import ACK, DATA, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS, Wide, frame

MARKER = b"@wm@"
"""Precedes the time of the write in each value."""
STAMP_DIGITS = 20
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
END_STREAM = 1

_pack_head = struct.Struct(">IBI").pack
unpack_head = struct.Struct(">IBI").unpack_from


def frame_head(kind: int, flags: int, stream: int, length: int) -> bytes:
    """Make the head of one HTTP/2 frame."""
    return _pack_head(length << 8 | kind, flags, stream)


def message_frame(stream: int, message: bytes, flags: int = 0) -> bytes:
    """Make one DATA frame with one gRPC message."""
    return frame(DATA, flags, stream, b"\0" + struct.pack(">I", len(message)) + message)


def frames(data: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Yield (kind, flags, stream, start, end of the payload) of each whole frame."""
    offset, size = 0, len(data)
    while size - offset >= 9:
        word, flags, stream = unpack_head(data, offset)
        end = offset + 9 + (word >> 8)
        if end > size:
            return
        yield word & 0xFF, flags, stream, offset + 9, end
        offset = end


class RequestBlocks:
    """Header blocks of one method on one connection: the first one fills the table, the others only refer to it."""

    def __init__(self, path: str, authority: str, scheme: str = "http") -> None:
        encoder = hpack.Encoder()
        headers = [
            (":method", "POST"),
            (":scheme", scheme),
            (":path", path),
            (":authority", authority),
            ("content-type", "application/grpc"),
            ("user-agent", "grpc-go/1.71.1"),
            ("te", "trailers"),
        ]
        self._first: bytes | None = encoder.encode(headers)
        self._again = encoder.encode(headers)

    def take(self) -> bytes:
        """Return the block of the next request."""
        first, self._first = self._first, None
        return first or self._again


NO_ERROR = bytes(4)
"""A server may reset the stream of a call that it answered before it read the request's end (RFC 9113 8.1)."""


class RawClient(asyncio.Protocol):
    """One connection to a server: PINGs and SETTINGS answered, whole frames passed to `on_frame`."""

    def __init__(self, profile: Wide | None = None) -> None:
        self.profile = profile or Wide()
        self.used: dict[int, int] = {}
        """Bytes of DATA of each stream in this read, if the profile counts them."""
        self.rest = b""
        self.broken = ""
        """How the server reset a stream, sent GOAWAY or closed the connection; empty if it did not."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(PREFACE + self.profile.opening)

    def data_received(self, data: bytes) -> None:
        if self.rest:
            data = self.rest + data
        done = 0
        used = self.used if self.profile.counts else None
        for kind, flags, stream, start, end in frames(data):
            done = end
            if kind in (DATA, HEADERS):
                if used is not None and kind == DATA:
                    used[stream] = used.get(stream, 0) + end - start
                self.on_frame(kind, flags, stream, data, start, end)
            else:
                self.control(kind, flags, data[start:end])
        self.rest = data[done:]
        self.answer()

    def control(self, kind: int, flags: int, payload: bytes) -> None:
        """Handle a frame that is neither DATA nor HEADERS."""
        if kind == PING:
            answer = self.profile.acknowledged() if flags & ACK else frame(PING, ACK, 0, payload)
            if answer:
                self.transport.write(answer)
        elif kind == SETTINGS and not flags & ACK:
            self.transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == GOAWAY or (kind == RST_STREAM and payload != NO_ERROR):
            self.broken = f"frame {kind}: {payload!r}"

    def answer(self) -> None:
        """Send what the profile sends after a read with DATA."""
        if self.used and (answer := self.profile.received(self.used)):
            self.transport.write(answer)

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        """Handle a frame of a stream, data[start:end]."""

    def connection_lost(self, exc: Exception | None) -> None:
        self.broken = self.broken or f"connection lost: {exc}"


def range_of(index: int) -> tuple[bytes, bytes]:
    """Return (key, range_end) of a range."""
    return b"bench/%06d/" % index, b"bench/%06d0" % index


def key_of(index: int) -> bytes:
    """Return the key of a range that is written."""
    return range_of(index)[0] + b"k"
