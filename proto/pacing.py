"""Splits a byte stream into gRPC messages step by step, so that a server can bound the work of one turn.

`framing.MessageReader` returns all complete messages at once. A client may put two thousand messages into one frame, or
two megabytes of zeros into two kilobytes of gzip; here each message is read on request, and decompressed in bounded
steps.
"""

from __future__ import annotations

import zlib
from typing import Final, Literal

from proto.framing import CUT_GZIP, PREFIX_BYTES, FramingError, Status, check_prefix, inflate, oversize, unpack_prefix

INFLATE_STEP_BYTES: Final = 64 * 1024
"""Bytes decompressed in one step: a tenth of a millisecond."""

COMPACT_BYTES: Final = 16 * 1024
"""Used bytes at the start of the buffer are dropped once there are this many."""


class PacedMessageReader:
    """Splits the bytes of one direction of a call into messages, one for each `next`.

    max_message_bytes bounds one message, both on the wire and decompressed. `decompress` is the call's grpc-encoding;
    with None a message marked as compressed is an error.
    """

    __slots__ = ("_buffer", "_inflate", "_inflated", "_inflater", "_max", "_parts", "_start", "_tail", "worked_bytes")

    def __init__(self, max_message_bytes: int, decompress: Literal["gzip"] | None = None) -> None:
        self._max = max_message_bytes
        self._inflate = decompress == "gzip"
        self._buffer = bytearray()
        # Start of the next message in the buffer.
        self._start = 0
        # The message that is being decompressed: its decompressor (None = no message), its compressed bytes that are
        # left, its decompressed parts and their size.
        self._inflater: zlib._Decompress | None = None
        self._tail = b""
        self._parts: list[bytes] = []
        self._inflated = 0
        self.worked_bytes = 0
        """Bytes of messages read and decompressed so far; the caller accounts for this work."""

    def add(self, data: bytes) -> None:
        """Take the next bytes of the stream."""
        self._buffer += data

    @property
    def unread_bytes(self) -> int:
        """Bytes received that do not belong to a message returned or being decompressed."""
        return len(self._buffer) - self._start

    @property
    def held_bytes(self) -> int:
        """Bytes of memory held for pending data."""
        return len(self._buffer) + len(self._tail) + self._inflated

    @property
    def busy(self) -> bool:
        """True while a message is partly decompressed: `next` continues with it."""
        return self._inflater is not None

    @property
    def empty(self) -> bool:
        """True if no data is pending: a stream that ends now was not truncated."""
        return self._inflater is None and len(self._buffer) == self._start

    def next(self) -> bytes | None:
        """Return the next message. None: no complete one is buffered, or (`busy`) one more step of it was decompressed.

        Raises FramingError as `MessageReader.feed` does; do not call it again after that.
        """
        try:
            return self._step() if self._inflater is not None else self._next()
        except FramingError:
            self._drop()
            self._buffer.clear()
            self._start = 0
            raise

    def _next(self) -> bytes | None:
        buffer, body = self._buffer, self._start + PREFIX_BYTES
        size = len(buffer)
        if size < body:
            return None
        flag, length = unpack_prefix(buffer, self._start)
        if flag or length > self._max:
            check_prefix(flag, length, self._inflate, self._max)
        end = body + length
        if end > size:
            return None
        message = bytes(buffer[body:end])
        if end == size or end >= COMPACT_BYTES:
            del buffer[:end]
            end = 0
        self._start = end
        self.worked_bytes += length
        if not flag:
            return message
        self._inflater = zlib.decompressobj(wbits=31)
        self._tail = message
        return self._step()

    def _step(self) -> bytes | None:
        """Decompress a bounded part of the current message; return the message when it is complete."""
        inflater = self._inflater
        assert inflater is not None
        # One byte more than allowed is enough to detect an oversized message.
        step = min(INFLATE_STEP_BYTES, self._max + 1 - self._inflated)
        part = inflate(inflater, self._tail, step)
        self._tail = inflater.unconsumed_tail
        self._parts.append(part)
        self._inflated += len(part)
        self.worked_bytes += len(part)
        if self._inflated > self._max:
            raise oversize("inflated, more", self._max)
        if not inflater.eof and part:
            # Perhaps only the gzip trailer is left, which yields no bytes: the next step will show.
            return None
        if not inflater.eof or inflater.unused_data:
            raise FramingError(Status.INTERNAL, CUT_GZIP)
        parts = self._parts
        message = parts[0] if len(parts) == 1 else b"".join(parts)
        self._drop()
        return message

    def _drop(self) -> None:
        self._inflater = None
        self._tail = b""
        self._parts = []
        self._inflated = 0
