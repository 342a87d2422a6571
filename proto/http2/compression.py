"""Header compression (HPACK, RFC 7541) at the price this proxy can pay, on the tables of the `hpack` library.

Encoding: a gRPC server says the same few fields ten thousand times. Each field's encoded form is remembered for as
long as it holds, that is until the dynamic table moves, and the table only moves for fields that are worth it; a
repeated header list is then a handful of dictionary look-ups. Values are not Huffman-coded: they are sent whole once
per connection, and decoding costs the peer more than the few bytes do.

Decoding: block by block as the frames come, so that a list that is too large is refused without ever being held, and
the table stays right for the next stream all the same. `hpack.Decoder` gives up in the middle of such a block, which
would cost the whole connection.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from hpack import Encoder, HPACKDecodingError, InvalidTableIndexError, InvalidTableSizeError, NeverIndexedHeaderTuple
from hpack.hpack import encode_integer
from hpack.huffman_table import decode_huffman
from hpack.table import HeaderTable

from proto.http2.limits import HEADER_TABLE_BYTES_DEFAULT

# Bytes RFC 7541 section 4.1 charges for each field beyond its text.
FIELD_OVERHEAD_BYTES = 32

# Fields with few different values: only these enter the dynamic table. Everything else would push them out.
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
# A longer value would push too much out of the table.
_INDEXED_VALUE_BYTES_MAX = 256
# Below this size entries do not live long enough to be worth their place.
_TABLE_BYTES_WORTH_IT = 1_024
# Encoded fields remembered per connection; when full it starts again, so fields that change each call do no harm.
_MEMO_FIELDS_MAX = 128
# Longer Huffman strings are not worth remembering.
_HUFFMAN_MEMO_BYTES_MAX = 64

_STATIC = HeaderTable.STATIC_TABLE
_STATIC_SIZE = len(_STATIC)


class TooManyFields(Exception):
    """A header block has more fields than are looked at."""


class HeaderEncoder:
    """Encodes header lists for one connection."""

    __slots__ = ("_encoder", "_memo")

    def __init__(self) -> None:
        self._encoder = Encoder()
        # Field -> its encoded form. Holds while the dynamic table stays as it is.
        self._memo: dict[tuple[bytes, bytes], bytes] = {}

    def resize(self, table_bytes: int) -> None:
        """Follow the peer's SETTINGS_HEADER_TABLE_SIZE; we never use more than the default 4,096."""
        size = min(table_bytes, HEADER_TABLE_BYTES_DEFAULT)
        # Setting the size it has already would make hpack forget that a change is still to be announced.
        if size != self._encoder.header_table_size:
            self._encoder.header_table_size = size
            # Of several changes the smallest and the last are to be announced, and no other: a size in between may be
            # more than the peer allows by then (RFC 7541 4.2).
            smallest = min(self._encoder.table_size_changes)
            self._encoder.table_size_changes = [size] if smallest == size else [smallest, size]
            # Empty, so that the next list takes the slow way, which announces the change.
            self._memo.clear()

    def encode(self, headers: Sequence[tuple[bytes, bytes]]) -> bytes:
        """Return the header block of a list, in its order."""
        memo = self._memo
        try:
            # A never-indexed field equals a plain one: only the class tells (RFC 7541 6.2.3 binds intermediaries).
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
            # Literally, also when a table happens to hold the same field, which hpack would refer to.
            return b"".join([b"\x10", encode_integer(len(name), 7), name, encode_integer(len(value), 7), value])
        indexed = (
            name in _INDEXED_NAMES and len(value) <= _INDEXED_VALUE_BYTES_MAX and table.maxsize >= _TABLE_BYTES_WORTH_IT
        )
        if indexed:
            match = table.search(name, value)
            if match is None or match[2] is None:
                encoded = self._encoder.add((name, value), False)
                # The table moved: every number in the memo that points into it is wrong now.
                self._memo.clear()
                return encoded
        encoded = self._encoder.add((name, value), True)
        if len(self._memo) >= _MEMO_FIELDS_MAX:
            self._memo.clear()
        self._memo[(name, value)] = encoded
        return encoded


class HeaderDecoder:
    """Decodes the header blocks of one connection, each in as many parts as it comes.

    Usage: `feed` each part, then `finish`.
    """

    __slots__ = (
        "_count",
        "_fields",
        "_list_bytes",
        "_rest",
        "_skip",
        "_string_bytes_max",
        "fields_max",
        "list_bytes_max",
        "oversized",
        "table",
        "table_bytes_max",
    )

    def __init__(self, list_bytes_max: int, table_bytes_max: int, fields_max: int) -> None:
        self.list_bytes_max = list_bytes_max
        # Fields of a block, those of a list that is too long included: each of them costs time.
        self.fields_max = fields_max
        # What the peer's encoder may set the table to. Lower it only when the peer has acknowledged our setting.
        self.table_bytes_max = table_bytes_max
        self.table = HeaderTable()
        # A string too long for this is skipped, not held. It cannot belong into the table either: Huffman coding makes
        # a string at most 30/8 times as long.
        self._string_bytes_max = max(list_bytes_max, 4 * max(table_bytes_max, HEADER_TABLE_BYTES_DEFAULT))
        self._fields: list[tuple[bytes, bytes]] = []
        # Fields of the block so far.
        self._count = 0
        # Decoded bytes of the block so far, overhead included (RFC 9113 6.5.2).
        self._list_bytes = 0
        # The block so far is longer than list_bytes_max; its fields are no longer kept.
        self.oversized = False
        # The beginning of a field whose end has not come yet.
        self._rest = b""
        # Bytes of an overlong value still to come.
        self._skip = 0

    def feed(self, data: bytes) -> None:
        """Decode a part of a block.

        Raises hpack.HPACKDecodingError or TooManyFields: the compression state is lost, and with it the connection (RFC
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
        """Return the fields of the block that was fed, or None if it was oversized; be ready for the next block.

        Raises hpack.HPACKDecodingError.
        """
        if self._rest or self._skip:
            raise HPACKDecodingError("header block ends inside a field")
        # A peer that was told to shrink the table has to say that it did (RFC 7541 4.2).
        if self.table.maxsize > self.table_bytes_max:
            raise InvalidTableSizeError("header table was not reduced as told")
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
                    # The whole field is in a table at an index below 127: what a busy connection mostly has.
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
        # IndexError and nothing changed: the field's end has not come yet.
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
        """Pass over a value that is longer than the whole list may be; what it would do to the table is done."""
        if mask == 0x3F:
            # An entry larger than the table empties it (RFC 7541 4.4).
            self.table.add(name, bytes(self.table.maxsize))
        self.oversized = True
        here = min(start + length, len(data))
        self._skip = start + length - here
        return (name, b""), here


def _integer(data: bytes, at: int, mask: int) -> tuple[int, int]:
    """Return an integer whose prefix is `mask` (RFC 7541 5.1), and the place behind it; IndexError if it is cut off."""
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


# Each new connection says the same things once (paths, user agents): shared by all of them.
_huffman_short = lru_cache(maxsize=4_096)(decode_huffman)
