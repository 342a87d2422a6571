"""Fast header compression (HPACK, RFC 7541), built on the tables of the `hpack` library.

Encoding: a gRPC server sends the same few fields thousands of times. Each field's encoded form is cached until the
dynamic table changes, and the table changes only for fields that are worth an entry; a repeated header list is then a
few dictionary look-ups. Values are not Huffman-coded: each is sent in full once per connection, and decoding would cost
the peer more than the saved bytes are worth.

Decoding: part by part as the frames arrive, so that an oversized list is refused without being held, and the table
stays correct for the next stream. `hpack.Decoder` fails in the middle of such a block, which would end the whole
connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from hpack import Encoder, HPACKDecodingError, InvalidTableIndexError, InvalidTableSizeError, NeverIndexedHeaderTuple
from hpack.hpack import encode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from proto.http2.limits import HEADER_TABLE_BYTES_DEFAULT

# Bytes that each field counts in addition to its text (RFC 7541 section 4.1).
FIELD_OVERHEAD_BYTES = 32

# Fields with few different values. Only these enter the dynamic table; others would evict them.
_INDEXED_NAMES = frozenset(
    {
        b":authority",
        b":path",
        b":scheme",
        b":status",
        b"accept-encoding",
        b"client-api-version",
        b"content-type",
        b"grpc-accept-encoding",
        b"grpc-encoding",
        b"grpc-status",
        b"hasleader",
        b"te",
        b"user-agent",
    }
)
# A longer value would evict too much from the table.
_INDEXED_VALUE_BYTES_MAX = 256
# In a smaller table, entries are evicted too soon to be useful.
_TABLE_BYTES_WORTH_IT = 1_024
# Encoded fields cached per connection. A full cache is cleared, so that fields that differ in each call cannot fill it.
_MEMO_FIELDS_MAX = 128
# Longer Huffman strings are not cached.
_HUFFMAN_MEMO_BYTES_MAX = 64

_STATIC = HeaderTable.STATIC_TABLE
_STATIC_SIZE = len(_STATIC)


class TooManyFields(Exception):
    """A header block has more fields than the maximum."""


class HeaderEncoder:
    """Encodes header lists for one connection."""

    def __init__(self) -> None:
        self._encoder = Encoder()
        # Field -> its encoded form; valid until the dynamic table changes.
        self._memo: dict[tuple[bytes, bytes], bytes] = {}

    def resize(self, table_bytes: int) -> None:
        """Apply the peer's SETTINGS_HEADER_TABLE_SIZE; we never use more than the default of 4,096 bytes."""
        size = min(table_bytes, HEADER_TABLE_BYTES_DEFAULT)
        # Setting the same size again would make hpack forget a change that it has not announced yet.
        if size != self._encoder.header_table_size:
            self._encoder.header_table_size = size
            # Of several changes, announce only the smallest and the last: a size in between may be more than the peer
            # allows by then (RFC 7541 4.2).
            smallest = min(self._encoder.table_size_changes)
            self._encoder.table_size_changes = [size] if smallest == size else [smallest, size]
            # So that the next list takes the slow path, which announces the change.
            self._memo.clear()

    def encode(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Return the header block of a list, in its order."""
        memo = self._memo
        try:
            # A never-indexed field compares equal to a plain one and differs in its class only. An intermediary must
            # keep it never-indexed (RFC 7541 6.2.3).
            return b"".join([memo[field] if field.__class__ is tuple else self._add(field) for field in headers])
        except KeyError:
            return self._encode_new(headers)

    def _encode_new(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        # An empty list encodes to the announcement of a table size change, if there is one.
        parts = [self._encoder.encode([])]
        for field in headers:
            encoded = self._memo.get(field) if field.__class__ is tuple else None
            parts.append(self._add(field) if encoded is None else encoded)
        return b"".join(parts)

    def _add(self, field: tuple[bytes, bytes]) -> bytes:
        name, value = field
        table = self._encoder.header_table
        if isinstance(field, NeverIndexedHeaderTuple):
            # As a literal even if a table holds the same field, which hpack would refer to.
            return b"".join([b"\x10", encode_integer(len(name), 7), name, encode_integer(len(value), 7), value])
        indexed = (
            name in _INDEXED_NAMES and len(value) <= _INDEXED_VALUE_BYTES_MAX and table.maxsize >= _TABLE_BYTES_WORTH_IT
        )
        if indexed:
            match = table.search(name, value)
            if match is None or match[2] is None:
                encoded = self._encoder.add((name, value), False)
                # The table changed, so every index into it in the memo is wrong now.
                self._memo.clear()
                return encoded
        encoded = self._encoder.add((name, value), True)
        if len(self._memo) >= _MEMO_FIELDS_MAX:
            self._memo.clear()
        self._memo[(name, value)] = encoded
        return encoded


class HeaderDecoder:
    """Decodes the header blocks of one connection, each in any number of parts.

    Usage: `feed` each part, then `finish`.
    """

    def __init__(self, list_bytes_max: int, table_bytes_max: int, fields_max: int) -> None:
        self.list_bytes_max = list_bytes_max
        # Maximum number of fields of a block, those of an oversized list included: each of them costs time.
        self.fields_max = fields_max
        # Maximum table size that the peer's encoder may set. Lower it only after the peer has acknowledged our setting.
        self.table_bytes_max = table_bytes_max
        self.table = HeaderTable()
        # A longer string is skipped, not held. It does not fit into the table either: Huffman coding makes a string at
        # most 30/8 times as long.
        self._string_bytes_max = max(list_bytes_max, 4 * max(table_bytes_max, HEADER_TABLE_BYTES_DEFAULT))
        self._fields: list[tuple[bytes, bytes]] = []
        # Fields of the block so far.
        self._count = 0
        # Decoded bytes of the block so far, overhead included (RFC 9113 6.5.2).
        self._list_bytes = 0
        # The block so far is longer than list_bytes_max; its fields are dropped.
        self.oversized = False
        # The beginning of an incomplete field.
        self._rest = b""
        # Bytes of an overlong value still to come.
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Decode a part of a block.

        Raises hpack.HPACKDecodingError or TooManyFields: the compression state is lost, so the connection must end (RFC
        9113 4.3).
        """
        start = 0
        if self._skip:
            start = min(self._skip, len(data))
            self._skip -= start
        elif self._rest:
            data = self._rest + data
            self._rest = b""
        self._decode(data, start)

    def finish(self) -> list[tuple[bytes, bytes]] | None:
        """End the block: return its fields, or None if it was oversized.

        Raises hpack.HPACKDecodingError.
        """
        if self._rest or self._skip:
            raise HPACKDecodingError("header block ends inside a field")
        # The peer must announce that it reduced its table to our limit (RFC 7541 4.2).
        if self.table.maxsize > self.table_bytes_max:
            raise InvalidTableSizeError("header table was not reduced to the announced limit")
        fields, oversized = self._fields, self.oversized
        self._fields = []
        self._count = 0
        self._list_bytes = 0
        self.oversized = False
        return None if oversized else fields

    def _decode(self, data: bytes, at: int) -> None:
        fields = self._fields
        dynamic = self.table.dynamic_entries
        size = self._list_bytes
        end = len(data)
        left = self.fields_max - self._count
        try:
            while at < end:
                first = data[at]
                if first > 0x80 and first < 0xFF:
                    # A field that is in a table, at an index below 127: the usual case on a busy connection.
                    index = first - 0x81
                    if index < _STATIC_SIZE:
                        field = _STATIC[index]
                    elif index - _STATIC_SIZE < len(dynamic):
                        field = dynamic[index - _STATIC_SIZE]
                    else:
                        raise InvalidTableIndexError(f"no entry {index + 1} in the header table")
                    at += 1
                elif first >= 0x80:
                    index, after = _integer(data, at, 0x7F)
                    field = self._entry(index)
                    at = after
                elif first >= 0x40:
                    field, at = self._literal(data, at, 0x3F)
                elif first >= 0x20:
                    at = self._resize_table(data, at)
                    continue
                else:
                    field, at = self._literal(data, at, 0x0F)
                left -= 1
                if left < 0:
                    raise TooManyFields
                size += FIELD_OVERHEAD_BYTES + len(field[0]) + len(field[1])
                if size > self.list_bytes_max:
                    self.oversized = True
                    fields.clear()
                else:
                    fields.append(field)
                self._list_bytes = size
        except IndexError:
            self._rest = data[at:]
        self._count = self.fields_max - left

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if 0 < index <= _STATIC_SIZE:
            return _STATIC[index - 1]
        place = index - _STATIC_SIZE - 1
        if place < 0 or place >= len(self.table.dynamic_entries):
            raise InvalidTableIndexError(f"no entry {index} in the header table")
        return self.table.dynamic_entries[place]

    def _resize_table(self, data: bytes, at: int) -> int:
        size, after = _integer(data, at, 0x1F)
        if self._list_bytes:
            raise HPACKDecodingError("header table resized inside a block")
        if size > self.table_bytes_max:
            raise InvalidTableSizeError(f"header table of {size} bytes, allowed are {self.table_bytes_max}")
        self.table.maxsize = size
        return after

    def _literal(self, data: bytes, at: int, mask: int) -> tuple[tuple[bytes, bytes], int]:
        # Raises IndexError if the field is incomplete; then nothing has changed.
        index, here = _integer(data, at, mask)
        if index:
            name = self._entry(index)[0]
        else:
            length, start = _integer(data, here, 0x7F)
            if length > self._string_bytes_max:
                raise HPACKDecodingError(f"header name of {length} bytes")
            name, here = _string(data, here, start, length)
        length, start = _integer(data, here, 0x7F)
        if length > self._string_bytes_max:
            return self._skip_value(data, name, start, length, mask)
        value, here = _string(data, here, start, length)
        if mask == 0x3F:
            field = (name, value)
            self.table.add(name, value)
        elif data[at] & 0x10:
            field = NeverIndexedHeaderTuple(name, value)
        else:
            field = (name, value)
        return field, here

    def _skip_value(
        self, data: bytes, name: bytes, start: int, length: int, mask: int
    ) -> tuple[tuple[bytes, bytes], int]:
        """Skip a value that is longer than a whole list may be, but apply its effect on the table."""
        if mask == 0x3F:
            # An entry larger than the table empties it (RFC 7541 4.4).
            self.table.add(name, bytes(self.table.maxsize))
        self.oversized = True
        here = min(start + length, len(data))
        self._skip = start + length - here
        return (name, b""), here


def _integer(data: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return an integer with the prefix `mask` (RFC 7541 5.1) and the position after it. IndexError: incomplete."""
    value = data[at] & mask
    at += 1
    if value < mask:
        return value, at
    shift = 0
    while True:
        octet = data[at]
        at += 1
        value += (octet & 0x7F) << shift
        if octet < 0x80:
            return value, at
        shift += 7
        if shift > 28:
            raise HPACKDecodingError("overlong integer in a header block")


def _string(data: bytes, head: int, start: int, length: int) -> tuple[bytes, int]:
    stop = start + length
    if stop > len(data):
        raise IndexError
    text = data[start:stop]
    if data[head] & 0x80:
        text = _huffman_short(text) if length <= _HUFFMAN_MEMO_BYTES_MAX else decode_huffman(text)
    return text, stop


# Shared by all connections: each new one sends the same strings once (paths, user agents).
_huffman_short = lru_cache(maxsize=4_096)(decode_huffman)
