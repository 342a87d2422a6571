"""A simple protobuf encoder, with which tests build messages that no library would send.

Numbers and lengths can be overlong, fields can be in any order and repeated, and there can be unknown fields.
"""

from __future__ import annotations


def varint(value: int, size: int = 1) -> bytes:
    """Return `value` as a varint of at least `size` bytes; negative values as 64 bits."""
    value &= (1 << 64) - 1
    encoded = bytearray()
    while value > 127 or len(encoded) + 1 < size:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def number(field: int, value: int, tag_size: int = 1, size: int = 1) -> bytes:
    """Return a field of wire type 0."""
    return varint(field << 3, tag_size) + varint(value, size)


def fixed64(field: int, content: bytes) -> bytes:
    """Return a field of wire type 1."""
    return varint(field << 3 | 1) + content


def string(field: int, content: bytes, tag_size: int = 1, size: int = 1) -> bytes:
    """Return a field of wire type 2."""
    return varint(field << 3 | 2, tag_size) + varint(len(content), size) + content


def fixed32(field: int, content: bytes) -> bytes:
    """Return a field of wire type 5."""
    return varint(field << 3 | 5) + content
