"""Reads the most common WatchRequest, a create of only a key or a range, without a parser of protobuf."""

from __future__ import annotations

_CREATE_REQUEST = 0x0A
_KEY = 0x0A
_RANGE_END = 0x12


def plain_create(message: bytes) -> tuple[bytes, bytes] | None:
    """Return key and range_end of a create that has no other field; None: leave it to the parser.

    Only lengths of one byte are read, so for keys of more than a hundred bytes it returns None as well.
    """
    size = len(message)
    if not 4 <= size <= 129 or message[0] != _CREATE_REQUEST or message[1] != size - 2 or message[2] != _KEY:
        return None
    end = 4 + message[3]
    if end == size:
        return message[4:], b""
    if end + 2 > size or message[end] != _RANGE_END or message[end + 1] != size - end - 2:
        return None
    return message[4:end], message[end + 2 :]
