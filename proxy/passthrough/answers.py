"""What may still be sent of an answer whose head the client has: no second head, and no end inside of a message."""

from __future__ import annotations

from proto.framing import PREFIX_BYTES
from proxy.listening.calls import Headers, status_trailers

_OF_HEADS = frozenset((b"content-type", b"content-length", b"grpc-encoding", b"grpc-accept-encoding"))
"""Fields that say something of a body, and have their place in a head."""


def trailers_of(headers: Headers, status: int, text: str) -> Headers:
    """Return what ended an answer as trailers: the head of an answer that is nothing but a head has fields too many.

    `status` and `text` are what it means; one that is not gRPC's does not say it itself.
    """
    if not headers[0][0].startswith(b":"):
        return headers
    trailers = [(name, value) for name, value in headers if name[:1] != b":" and name not in _OF_HEADS]
    return trailers if any(name == b"grpc-status" for name, _ in trailers) else status_trailers(status, text)


class MessageBoundary:
    """Knows whether the bytes that went by so far end inside a gRPC message."""

    __slots__ = ("_left", "_prefix")

    def __init__(self) -> None:
        # Bytes of the current message still to come, and the part of the next prefix that came.
        self._left = 0
        self._prefix = b""

    @property
    def inside(self) -> bool:
        """A message, or the prefix of one, has begun and not ended."""
        return self._left > 0 or bool(self._prefix)

    def feed(self, data: bytes) -> None:
        """Follow some more bytes."""
        if self._left >= len(data):
            self._left -= len(data)
            return
        offset, size = self._left, len(data)
        if self._prefix:
            data = self._prefix + data
            size = len(data)
        while size - offset >= PREFIX_BYTES:
            offset += PREFIX_BYTES + int.from_bytes(data[offset + 1 : offset + PREFIX_BYTES], "big")
        self._left = max(0, offset - size)
        self._prefix = data[offset:]
