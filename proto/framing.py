"""gRPC's framing: messages in a byte stream, status codes, timeouts and the encodings of metadata values.

This is the part of the gRPC specification ("gRPC over HTTP2", PROTOCOL-HTTP2.md) above HTTP/2. The listener and the
upstream client share this code, and it checks every bound (message size, decompressed size) before it allocates memory.

Header values are `bytes` here, as `proto.http2` delivers them.
"""

from __future__ import annotations

import math
import re
import struct
import zlib
from enum import IntEnum
from typing import Final, Literal

PREFIX_BYTES: Final = 5
"""Length of each message's prefix: one byte "compressed", four bytes of length, big endian."""

TIMEOUT_DIGITS_MAX: Final = 8
"""A grpc-timeout value has at most this many digits."""


class Status(IntEnum):
    """gRPC's status codes (statuscodes.md), with their numbers on the wire."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class FramingError(ValueError):
    """The peer sent something that is not valid gRPC, or is too large: the call ends with `code` and `text`."""

    def __init__(self, code: Status, text: str) -> None:
        super().__init__(text)
        self.code = code
        self.text = text


_PREFIX: Final = struct.Struct(">BI")
pack_prefix: Final = _PREFIX.pack
"""Returns a message's prefix, from whether it is compressed and its length."""
unpack_prefix: Final = _PREFIX.unpack_from
"""Returns the flag and the length of the prefix at an offset of a buffer."""

CUT_GZIP: Final = "gRPC message with cut or trailing gzip data"
"""One member per message, as every gRPC library writes it: many tiny members would cost quadratic time."""


def check_prefix(flag: int, length: int, gzip: bool, bytes_max: int) -> None:
    """Check the prefix of a message in a call with or without gzip. Raises FramingError."""
    if flag > 1:
        raise FramingError(Status.INTERNAL, f"gRPC message with the unknown compression flag {flag}")
    if flag and not gzip:
        raise FramingError(Status.INTERNAL, "gRPC message marked as compressed in a call without grpc-encoding")
    if length > bytes_max:
        raise oversize(f"{length}", bytes_max)


def oversize(size: str, bytes_max: int) -> FramingError:
    """Return the error for a message above the bound."""
    return FramingError(
        Status.RESOURCE_EXHAUSTED, f"gRPC message larger than the maximum ({size} vs. {bytes_max} bytes)"
    )


def inflate(inflater: zlib._Decompress, data: bytes, bytes_max: int) -> bytes:
    """Decompress at most `bytes_max` bytes. Raises FramingError."""
    try:
        return inflater.decompress(data, bytes_max)
    except zlib.error as error:
        raise FramingError(Status.INTERNAL, f"gRPC message with broken gzip data: {error}") from None


def frame(message: bytes, compressed: bool = False) -> bytes:
    """Return `message` with its 5-byte prefix; set `compressed` if `message` is compressed already."""
    return pack_prefix(compressed, len(message)) + message


class MessageReader:
    """Splits the bytes of one direction of a call into messages.

    max_message_bytes bounds one message, both on the wire and decompressed. `decompress` is the call's grpc-encoding,
    None for "identity": then a message marked as compressed is an error.
    """

    __slots__ = ("_buffer", "_error", "_inflate", "_max", "_need")

    def __init__(self, max_message_bytes: int, decompress: Literal["gzip"] | None = None) -> None:
        self._max = max_message_bytes
        self._inflate = decompress == "gzip"
        # The start of an incomplete message; None between messages, which is the usual case.
        self._buffer: bytearray | None = None
        # Bytes that the buffer must hold before it is parsed again: a prefix, or a prefix and its message.
        self._need = PREFIX_BYTES
        # The first error, which is final: the position of the next prefix is unknown. Stored as a tuple, because an
        # exception's traceback would keep this object and the decompressed data alive.
        self._error: tuple[Status, str] | None = None

    @property
    def pending(self) -> bool:
        """True while an incomplete message is buffered; a stream that ends now was truncated."""
        return self._buffer is not None

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the stream and return the messages that they complete.

        Raises FramingError: RESOURCE_EXHAUSTED for a message above the bound, as soon as its prefix is known; INTERNAL
        for a bad prefix or bad compression. Messages before it in the same `data` are lost, and so is the rest of the
        stream: each later call raises the same error.
        """
        if self._error is not None:
            raise FramingError(*self._error)
        buffer = self._buffer
        if buffer is None:
            size = len(data) - PREFIX_BYTES
            if 0 <= size <= self._max and data.startswith(pack_prefix(0, size)):
                # Exactly one message, the usual case.
                return [data[PREFIX_BYTES:]]
        else:
            buffer += data
            if len(buffer) < self._need:
                return []
            data = bytes(buffer)
            self._buffer = None
        messages: list[bytes] = []
        size = len(data)
        start = 0
        self._need = PREFIX_BYTES
        try:
            while size - start >= PREFIX_BYTES:
                flag, length = unpack_prefix(data, start)
                if flag or length > self._max:
                    check_prefix(flag, length, self._inflate, self._max)
                end = start + PREFIX_BYTES + length
                if end > size:
                    self._need = PREFIX_BYTES + length
                    break
                message = data[start + PREFIX_BYTES : end]
                messages.append(self._inflated(message) if flag else message)
                start = end
        except FramingError as error:
            self._error = (error.code, error.text)
            raise
        if start < size:
            self._buffer = bytearray(memoryview(data)[start:])
        return messages

    def _inflated(self, message: bytes) -> bytes:
        """Decompress the gzip member `message`, up to the bound."""
        inflater = zlib.decompressobj(wbits=31)
        inflated = inflate(inflater, message, self._max + 1)
        if len(inflated) > self._max:
            raise oversize("inflated, more", self._max)
        if not inflater.eof or inflater.unused_data:
            raise FramingError(Status.INTERNAL, CUT_GZIP)
        return inflated


_UNITS_NS: Final = {b"n": 1, b"u": 10**3, b"m": 10**6, b"S": 10**9, b"M": 60 * 10**9, b"H": 3600 * 10**9}
_NS: Final = 10**9
_AMOUNT_MAX: Final = 10**TIMEOUT_DIGITS_MAX - 1


def encode_timeout(seconds: float) -> bytes:
    """Return the grpc-timeout value for `seconds`, in the finest unit whose number fits, rounded up.

    Zero or less becomes `0n`; more than the format can express becomes its maximum, 99999999 hours.
    Raises ValueError for NaN.
    """
    if math.isnan(seconds):
        raise ValueError("a timeout must be a number of seconds")
    if seconds <= 0:
        return b"0n"
    if seconds < _AMOUNT_MAX * 3600:
        nanoseconds = math.ceil(seconds * _NS)
        for unit, unit_ns in _UNITS_NS.items():
            amount = -(-nanoseconds // unit_ns)
            if amount <= _AMOUNT_MAX:
                return b"%d%b" % (amount, unit)
    return b"%dH" % _AMOUNT_MAX


def decode_timeout(value: bytes) -> float:
    """Return the seconds of a grpc-timeout value. Raises FramingError (INTERNAL) if it is malformed."""
    digits, unit_ns = value[:-1], _UNITS_NS.get(value[-1:])
    if unit_ns is None or not digits.isdigit() or len(digits) > TIMEOUT_DIGITS_MAX:
        raise FramingError(Status.INTERNAL, f"malformed grpc-timeout {value[:32]!r}")
    return int(digits) * unit_ns / _NS


_UNSAFE: Final = re.compile(rb"[^\x20-\x24\x26-\x7e]")
_ESCAPE: Final = re.compile(rb"%([0-9A-Fa-f]{2})")


def encode_message(text: str) -> bytes:
    """Return `text` as a grpc-message value: UTF-8, percent-encoded except for printable ASCII other than `%`."""
    return _UNSAFE.sub(lambda match: b"%%%02X" % match[0][0], text.encode("utf-8", "replace"))


def decode_message(value: bytes) -> str:
    """Return the text of a grpc-message value.

    Never fails, as the specification asks: an invalid escape is kept, invalid UTF-8 becomes U+FFFD.
    """
    return _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), value).decode("utf-8", "replace")


_HTTP_STATUS: Final = {
    400: Status.INTERNAL,
    401: Status.UNAUTHENTICATED,
    403: Status.PERMISSION_DENIED,
    404: Status.UNIMPLEMENTED,
    429: Status.UNAVAILABLE,
    502: Status.UNAVAILABLE,
    503: Status.UNAVAILABLE,
    504: Status.UNAVAILABLE,
}


def http_status_to_grpc(status: int) -> Status:
    """Return the code of a response that has an HTTP status but no grpc-status (http-grpc-status-mapping.md)."""
    return _HTTP_STATUS.get(status, Status.UNKNOWN)
