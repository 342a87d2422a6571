"""One direction of a translated call: bytes in, complete translated messages out, in bounded steps.

A step cuts the next message out of the received bytes, decompresses a part of it, or translates a piece of it
(proxy/passthrough/rewriting.py). So neither a large message nor a small one that decompresses to a large one blocks the
event loop for long; the caller runs other work between steps. Kept bytes are counted by their current size, not by the
size received.
"""

from __future__ import annotations

import zlib
from typing import Final

from google.protobuf.message import Message

from proto.framing import (
    CUT_GZIP,
    PREFIX_BYTES,
    FramingError,
    Status,
    check_prefix,
    frame,
    inflate,
    oversize,
    pack_prefix,
    unpack_prefix,
)
from proxy.passthrough.rewriting import PIECE_BYTES, Changes, Rewriting, changed

INFLATE_BYTES: Final = 64 * 1024
"""Maximum bytes that one step decompresses: a fraction of a millisecond."""


class MessageWork:
    """The messages of one direction of a call."""

    __slots__ = (
        "_changes",
        "_data",
        "_gzip",
        "_inflated",
        "_inflater",
        "_kind",
        "_max",
        "_packed",
        "_rewriting",
        "_source",
    )

    def __init__(self, kind: type[Message], changes: Changes, message_bytes_max: int, gzip: bool) -> None:
        """`message_bytes_max` bounds each message, both as received and decompressed."""
        self._kind = kind
        self._changes = changes
        self._max = message_bytes_max
        self._gzip = gzip
        # Received bytes, not cut into messages yet.
        self._data = bytearray()
        # The message that is being decompressed: its remaining input and its output so far.
        self._inflater: zlib._Decompress | None = None
        self._packed = b""
        self._inflated = bytearray()
        # The message that is being translated, and its original size.
        self._rewriting: Rewriting | None = None
        self._source = 0

    @property
    def held(self) -> int:
        """Bytes kept here; a message that is being translated counts with both its source and its result."""
        changed_bytes = 0 if self._rewriting is None else self._rewriting.size
        return len(self._data) + len(self._packed) + len(self._inflated) + self._source + changed_bytes

    @property
    def busy(self) -> bool:
        """A step can be done without further bytes."""
        if self._rewriting is not None or self._inflater is not None:
            return True
        data = self._data
        if len(data) < PREFIX_BYTES:
            return False
        flag: int
        length: int
        flag, length = unpack_prefix(data)
        return flag > self._gzip or length > self._max or len(data) >= PREFIX_BYTES + length

    @property
    def pending(self) -> bool:
        """An incomplete message is kept: a stream that ends now was truncated."""
        return bool(self._data)

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._data += data

    def step(self) -> list[bytes] | None:
        """Do one step. Return the pieces of a message, with its gRPC prefix, if the step completed one.

        Raises FramingError (RESOURCE_EXHAUSTED for a message above the bound) and DecodeError.
        """
        rewriting = self._rewriting
        if rewriting is not None:
            if not rewriting.step():
                return None
            self._rewriting = None
            self._source = 0
            return [pack_prefix(0, rewriting.size), *rewriting.pieces]
        if self._inflater is not None:
            self._inflate(self._inflater)
            return None
        return self._next()

    def _next(self) -> list[bytes] | None:
        """Start the next message, if it is complete; return it if it is small enough to be translated at once."""
        data = self._data
        if len(data) < PREFIX_BYTES:
            return None
        flag, length = unpack_prefix(data)
        check_prefix(flag, length, self._gzip, self._max)
        end = PREFIX_BYTES + length
        if len(data) < end:
            return None
        message = bytes(memoryview(data)[PREFIX_BYTES:end])
        del data[:end]
        if flag:
            self._inflater = zlib.decompressobj(wbits=31)
            self._packed = message
        elif length <= PIECE_BYTES:
            return [frame(changed(self._kind, self._changes[self._kind.DESCRIPTOR.full_name], message))]
        else:
            self._begin(message)
        return None

    def _inflate(self, inflater: zlib._Decompress) -> None:
        got = inflate(inflater, self._packed, INFLATE_BYTES)
        self._packed = inflater.unconsumed_tail
        self._inflated += got
        if len(self._inflated) > self._max:
            raise oversize("inflated, more", self._max)
        if inflater.eof:
            if inflater.unused_data:
                raise FramingError(Status.INTERNAL, CUT_GZIP)
            message = bytes(self._inflated)
            self._inflater, self._inflated = None, bytearray()
            self._begin(message)
        elif len(got) < INFLATE_BYTES and not self._packed:
            raise FramingError(Status.INTERNAL, CUT_GZIP)

    def _begin(self, message: bytes) -> None:
        self._rewriting = Rewriting(self._kind, self._changes, message)
        self._source = len(message)
