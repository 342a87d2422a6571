"""Protobuf's encoding: reads and writes numbers, lengths and fields.

The part of `proto.scan` that does not depend on etcd's messages. Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

# The one-byte varints; most tags, lengths and watch ids are one.
_BYTE: Final = tuple(bytes((value,)) for value in range(256))

VARINT_BYTES_MAX: Final = 10
"""A number has 64 bits, seven per byte."""
TAG_BYTES_MAX: Final = 5
"""Tags and lengths have 32 bits."""


class ScanError(ValueError):
    """The bytes are not a valid message."""


def fields(data: bytes, pos: int, end: int) -> Iterator[tuple[int, int, int, int, int]]:
    """Walk the fields of the message data[pos:end].

    Yields for each field its tag, its start, the start and end of its content (after tag and length), and its value as
    an unsigned 64-bit number if it is a varint, else 0. Raises ScanError, IndexError.
    """
    while pos < end:
        start = pos
        tag = data[pos]
        pos += 1
        if tag > 127:
            tag, pos = long_size(data, pos, tag)
        kind = tag & 7
        if tag < 8 or tag > 0xFFFF_FFFF or kind in (6, 7):
            raise ScanError(f"{tag} is not a field tag")
        if kind in (3, 4):
            raise ScanError(f"field {tag >> 3} is a group")
        body = pos
        value = 0
        if kind == 0:
            value = data[pos]
            pos += 1
            if value > 127:
                value, pos = long_number(data, pos, value)
        elif kind == 2:
            size = data[pos]
            body = pos = pos + 1
            if size > 127:
                size, body = long_size(data, pos, size)
            pos = body + size
        else:
            pos += 8 if kind == 1 else 4
        if pos > end:
            break
        yield tag, start, body, pos, value
    if pos != end:
        raise ScanError("a field extends past the end of its message")


def long_number(data: bytes, pos: int, value: int) -> tuple[int, int]:
    """Read the rest, from `pos` on, of a varint whose first byte is `value`.

    Returns it as an unsigned 64-bit number, and the position after it. The loop is unrolled for two to four bytes, the
    usual size of a revision.
    """
    byte = data[pos]
    value += (byte << 7) - 128
    if byte < 128:
        return value, pos + 1
    byte = data[pos + 1]
    value += (byte << 14) - (128 << 7)
    if byte < 128:
        return value, pos + 2
    byte = data[pos + 2]
    value += (byte << 21) - (128 << 14)
    if byte < 128:
        return value, pos + 3
    for count in range(4, VARINT_BYTES_MAX):
        byte = data[pos + count - 1]
        value += (byte << 7 * count) - (128 << 7 * (count - 1))
        if byte < 128:
            return value & 0xFFFF_FFFF_FFFF_FFFF, pos + count
    raise ScanError("a number of more than 64 bits")


def long_size(data: bytes, pos: int, value: int) -> tuple[int, int]:
    """Read the rest of a length or a tag, at most 32 bits; see `long_number`."""
    byte = data[pos]
    value += (byte << 7) - 128
    if byte < 128:
        return value, pos + 1
    for count in range(2, TAG_BYTES_MAX):
        byte = data[pos + count - 1]
        value += (byte << 7 * count) - (128 << 7 * (count - 1))
        if byte < 128:
            return value, pos + count
    raise ScanError("a length or a tag of more than 32 bits")


def signed(value: int) -> int:
    """Convert an unsigned 64-bit number to an int64."""
    return value if value < 1 << 63 else value - (1 << 64)


def number_field(tag: int, value: int) -> bytes:
    """Encode a number's field; b"" for 0 (proto3 omits defaults)."""
    return _BYTE[tag] + varint(value) if value else b""


def bytes_field(tag: int, value: bytes) -> bytes:
    """Encode a field of bytes, a string or a message."""
    return _BYTE[tag] + varint(len(value)) + value


def varint(value: int) -> bytes:
    """Encode a number as a varint; a negative one takes 10 bytes."""
    if 0 <= value < 128:
        return _BYTE[value]
    if 128 <= value < 16384:
        return _BYTE[value & 127 | 128] + _BYTE[value >> 7]
    value &= 0xFFFF_FFFF_FFFF_FFFF
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
