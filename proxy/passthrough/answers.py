"""Ending a response whose head the client already has: without a second head, and not inside a message."""

from __future__ import annotations

from proto.framing import PREFIX_BYTES
from proxy.listening.calls import Headers, status_trailers

_OF_HEADS = frozenset((b"content-type", b"content-length", b"grpc-encoding", b"grpc-accept-encoding"))
"""Fields that describe a body; they belong in a response head only."""


def trailers_of(headers: Headers, status: int, text: str) -> Headers:
    """Return the trailers of a response whose head was sent; a trailers-only head loses the fields of a head.

    `status` and `text` are used for a head without a gRPC status.
    """
    if not headers[0][0].startswith(b":"):
        return headers
    trailers = [(name, value) for name, value in headers if name[:1] != b":" and name not in _OF_HEADS]
    return trailers if any(name == b"grpc-status" for name, _ in trailers) else status_trailers(status, text)


class MessageBoundary:
    """Tracks whether the bytes forwarded so far end inside a gRPC message."""

    __slots__ = ("_left", "_prefix")

    def __init__(self) -> None:
        # Bytes missing from the current message, and the part of the next prefix received so far.
        self._left = 0
        self._prefix = b""

    @property
    def inside(self) -> bool:
        """A message, or its prefix, is incomplete."""
        return self._left > 0 or bool(self._prefix)

    def feed(self, data: bytes) -> None:
        """Track more bytes."""
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
