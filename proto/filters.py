"""Shortens long lists of filters in a WatchRequest before the message is parsed.

`filters` is a repeated field in which two values have a meaning (rpc.proto, FilterType). etcd accepts a request with
2 MB of them, gzip compresses it to 2 KB, and parsing it takes 10 ms and 10 MB. This module looks for runs of bytes that
hold only filters, and leaves anything unusual to the parser, so that a message means the same before and after.
"""

from __future__ import annotations

import re
from typing import Final

from proto.fields import bytes_field

LONG_BYTES: Final = 16 * 1024
"""Only messages of at least this size are scanned for filters."""

RUN_BYTES: Final = 256
"""Only runs of at least this size are shortened."""

FIELDS_MAX: Final = 2_000
"""Maximum number of fields that are scanned (about 1 ms); the rest of the message is not changed."""

_CREATE: Final = 0x0A
_PACKED: Final = 0x2A
_SINGLE: Final = 0x28
# Unpacked filters, one after the other, each with a one-byte number.
_RUN: Final = re.compile(rb"(?:\x28[\x00-\x7f])+")
# Maps every byte of a varint except its last to 0xff.
_CONTINUED: Final = bytes(range(128)) + b"\xff" * 128


def shortened(message: bytes) -> bytes:
    """Return an equivalent WatchRequest in which long runs of filters are shortened."""
    if len(message) < LONG_BYTES or message[0] != _CREATE:
        return message
    found = _length(message, 1)
    if found is None:
        return message
    start, size = found
    if start + size != len(message):
        return message
    body = _shortened_create(message, start)
    return message if body is None else bytes_field(_CREATE, body)


def _shortened_create(message: bytes, at: int) -> bytes | None:
    """Shorten the create request in message[at:]; None if there is nothing to change."""
    end = len(message)
    kept: list[bytes] = []
    copied = at
    for _ in range(FIELDS_MAX):
        if at >= end:
            break
        tag = message[at]
        if tag == _SINGLE:
            run = _RUN.match(message, at)
            if run is None:
                break
            stop = run.end()
            values: bytes | None = message[at + 1 : stop : 2]
        elif tag & 7 == 2 and tag < 0x80:
            found = _length(message, at + 1)
            if found is None or sum(found) > end:
                break
            begin, stop = found[0], sum(found)
            values = message[begin:stop] if tag == _PACKED and stop - begin >= RUN_BYTES else None
        elif tag & 7 == 0 and tag < 0x80:
            found = _length(message, at + 1)
            if found is None:
                break
            stop, values = found[0], None
        else:
            break
        meaning = meaning_of(values) if values is not None and stop - at >= RUN_BYTES else None
        if meaning is not None:
            kept += (message[copied:at], bytes_field(_PACKED, meaning))
            copied = stop
        at = stop
    if not kept:
        return None
    kept.append(message[copied:])
    return b"".join(kept)


def meaning_of(packed: bytes) -> bytes | None:
    """Return which of 0 and 1 are among the varints in `packed`; None: leave it to the parser.

    The parser handles numbers of more than four bytes (it truncates them to 32 bits), overlong encodings, and an
    incomplete number.
    """
    if packed.isascii():
        zero, one = b"\x00" in packed, b"\x01" in packed
    else:
        looked_at = packed.translate(_CONTINUED)
        if looked_at[-1] == 0xFF or b"\xff\xff\xff\xff" in looked_at or b"\xff\x00" in looked_at:
            return None
        zero = b"\x00" in looked_at
        one = looked_at.count(b"\x01") > looked_at.count(b"\xff\x01")
    return b"\x00" * zero + b"\x01" * one


def _length(message: bytes, at: int) -> tuple[int, int] | None:
    """Return the end and the value of the varint at `at`; None: it is longer than four bytes, or incomplete."""
    value = shift = 0
    for place in range(at, min(at + 4, len(message))):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return place + 1, value
        shift += 7
    return None
