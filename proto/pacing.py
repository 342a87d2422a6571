"""Splits a byte stream into gRPC messages step by step, so that a server can bound the work of one turn.

`framing.MessageReader` returns all complete messages at once. A client may put two thousand messages into one frame, or
two megabytes of zeros into two kilobytes of gzip; here each message is read on request, and decompressed in bounded
steps.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, Literal, NoReturn

from proto.framing import PREFIX_BYTES, FramingError, Status

INFLATE_STEP_BYTES: Final = 64 * 1024
"""Bytes decompressed in one step: a tenth of a millisecond."""

COMPACT_BYTES: Final = 16 * 1024
"""Used bytes at the start of the buffer are dropped once there are this many."""

_PREFIX: Final = struct.Struct(">BI")


class PacedMessageReader:
    """
    Splits the bytes of one direction of a call into messages, one for each `next`.

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
        """
        Return the next message. None: no complete one is buffered, or (`busy`) one more step of it was decompressed.

        Raises FramingError as `MessageReader.feed` does; do not call it again after that.
        """
        if self._inflater is not None:
            return self._step()
        start = self._start
        buffer = self._buffer
        size = len(buffer) - start
        if size < PREFIX_BYTES:
            return None
        flag, length = _PREFIX.unpack_from(buffer, start)
        if flag or length > self._max:
            self._check_prefix(flag, length)
        end = start + PREFIX_BYTES + length
        if end > len(buffer):
            return None
        message = bytes(memoryview(buffer)[start + PREFIX_BYTES : end])
        self._start = end
        if end == len(buffer):
            buffer.clear()
            self._start = 0
        elif end >= COMPACT_BYTES:
            del buffer[:end]
            self._start = 0
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
        try:
            part = inflater.decompress(self._tail, step)
        except zlib.error as error:
            self._fail(Status.INTERNAL, f"gRPC message with broken gzip data: {error}")
        self._tail = inflater.unconsumed_tail
        self._parts.append(part)
        self._inflated += len(part)
        self.worked_bytes += len(part)
        if self._inflated > self._max:
            self._fail_oversize("inflated, more")
        if not inflater.eof and part:
            # Perhaps only the gzip trailer is left, which yields no bytes: the next step will show.
            return None
        # One member per message, as every gRPC library writes it: many tiny members would cost quadratic time.
        if not inflater.eof or inflater.unused_data:
            self._fail(Status.INTERNAL, "gRPC message with cut or trailing gzip data")
        parts = self._parts
        message = parts[0] if len(parts) == 1 else b"".join(parts)
        self._drop()
        return message

    def _drop(self) -> None:
        self._inflater = None
        self._tail = b""
        self._parts = []
        self._inflated = 0

    def _check_prefix(self, flag: int, length: int) -> None:
        if flag > 1:
            self._fail(Status.INTERNAL, f"gRPC message with the unknown compression flag {flag}")
        if flag and not self._inflate:
            self._fail(Status.INTERNAL, "gRPC message marked as compressed in a call without grpc-encoding")
        if length > self._max:
            self._fail_oversize(f"{length}")

    def _fail_oversize(self, size: str) -> NoReturn:
        self._fail(Status.RESOURCE_EXHAUSTED, f"gRPC message larger than the maximum ({size} vs. {self._max} bytes)")

    def _fail(self, code: Status, text: str) -> NoReturn:
        self._drop()
        self._buffer.clear()
        self._start = 0
        raise FramingError(code, text)
