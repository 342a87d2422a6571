"""Long lists of filters in a WatchRequest, made short before the message is parsed.

`filters` is a repeated field of which two values mean something (rpc.proto, FilterType). Two megabytes of them are a
request that etcd takes, gzip makes 2 KB of it, and parsing it takes ten milliseconds and as many megabytes. What is
looked for here are runs of bytes that hold nothing else; anything unusual is left to the parser, so that a message
means the same before and after.
"""

from __future__ import annotations

import re
from typing import Final

LONG_BYTES: Final = 16 * 1024
"""Messages from here on are looked at; shorter ones are parsed at once."""

RUN_BYTES: Final = 256
"""Runs from here on are made short."""

FIELDS_MAX: Final = 2_000
"""Fields looked at; what comes behind them stays as it is. A millisecond."""

_CREATE: Final = 0x0A
_PACKED: Final = 0x2A
_SINGLE: Final = 0x28
# A filter of its own, whose number fits into a byte, again and again.
_RUN: Final = re.compile(rb"(?:\x28[\x00-\x7f])+")
# All bytes of a number but its last look the same.
_CONTINUED: Final = bytes(range(128)) + b"\xff" * 128


def shortened(message: bytes) -> bytes:
    """Return a message that means the same as this WatchRequest, with long runs of filters made short."""
    if len(message) < LONG_BYTES or message[0] != _CREATE:
        return message
    found = _length(message, 1)
    if found is None:
        return message
    start, size = found
    if start + size != len(message):
        return message
    body = _shortened_create(message, start)
    return message if body is None else b"\x0a" + _varint(len(body)) + body


def _shortened_create(message: bytes, at: int) -> bytes | None:
    """Return the create request that begins at `at` and ends with the message; None: nothing in it is to be changed."""
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
            kept += (message[copied:at], b"\x2a" + bytes((len(meaning),)) + meaning)
            copied = stop
        at = stop
    if not kept:
        return None
    kept.append(message[copied:])
    return b"".join(kept)


def meaning_of(packed: bytes) -> bytes | None:
    """Return those of 0 and 1 that are among the varints in `packed`; None: only a parser can tell.

    Left to the parser are numbers of more than four bytes, which are cut to 32 bits, those written longer than they
    have to be, and a number that is not whole.
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
    """Return where the varint at `at` ends and what it is; None: it is longer than four bytes, or not whole."""
    value = shift = 0
    for place in range(at, min(at + 4, len(message))):
        byte = message[place]
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return place + 1, value
        shift += 7
    return None


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
