"""Reads and writes the usual WatchRequests without a library for protobuf, which a serving process does not load.

When they are read, anything unusual is left to the library: fields that etcd 3.5 does not have, filters one by one (all
clients pack them), and more fields than FIELDS_MAX.
"""

from __future__ import annotations

from typing import Final

from proto.fields import ScanError, bytes_field, long_number, long_size, number_field, signed

_CREATE_REQUEST: Final = 0x0A
_CANCEL_REQUEST: Final = 0x12
# WatchCreateRequest:
_KEY: Final = 0x0A
_RANGE_END: Final = 0x12
_START_REVISION: Final = 0x18
_PROGRESS_NOTIFY: Final = 0x20
_FILTERS: Final = 0x2A
_PREV_KV: Final = 0x30
_WATCH_ID: Final = 0x38
_FRAGMENT: Final = 0x40
_LENGTHS: Final = frozenset((_KEY, _RANGE_END, _FILTERS))
# WatchCancelRequest:
_CANCEL_WATCH_ID: Final = 0x08
_CANCEL_FIRST: Final = b"\x12\x00"
"""The WatchRequest that cancels watch 0."""

PROGRESS: Final = b"\x1a\x00"
"""The WatchRequest that asks for a progress response."""

FIELDS_MAX: Final = 16
"""Fields of a create that are read here, and filters in it; clients send up to eight fields."""

PlainCreate = tuple[bytes, bytes] | tuple[bytes, bytes, int | None, int, bool, bool, bool, bool, bool]


def plain_create(message: bytes) -> PlainCreate | None:
    """Return the arguments of a `CreateRequest`; None: leave the message to the library."""
    size = len(message)
    if size < 2 or message[0] != _CREATE_REQUEST:
        return None
    # Fast path for only a key or a range: 550 ns instead of 2,100 (`python -m tests.bench.lanes`).
    if 4 <= size <= 129 and message[1] == size - 2 and message[2] == _KEY:
        end = 4 + message[3]
        if end == size:
            return message[4:], b""
        if end + 2 <= size and message[end] == _RANGE_END and message[end + 1] == size - end - 2:
            return message[4:end], message[end + 2 :]
    try:
        inner, pos = message[1], 2
        if inner > 127:
            inner, pos = long_size(message, pos, inner)
        return _create(message, pos) if pos + inner == size else None
    except (IndexError, ScanError):
        return None


def _create(message: bytes, pos: int) -> PlainCreate | None:
    """Read the fields of a create from `pos` on."""
    size = len(message)
    key = range_end = filters = b""
    start_revision = watch_id = progress_notify = prev_kv = fragment = 0
    for _ in range(FIELDS_MAX):
        if pos >= size:
            break
        tag = message[pos]
        value = message[pos + 1]
        pos += 2
        if tag in _LENGTHS:
            if value > 127:
                value, pos = long_size(message, pos, value)
            start, pos = pos, pos + value
            if tag == _KEY:
                key = message[start:pos]
            elif tag == _RANGE_END:
                range_end = message[start:pos]
            else:
                filters += message[start:pos]
        else:
            if value > 127:
                value, pos = long_number(message, pos, value)
            if tag == _START_REVISION:
                start_revision = signed(value)
            elif tag == _PROGRESS_NOTIFY:
                progress_notify = value
            elif tag == _PREV_KV:
                prev_kv = value
            elif tag == _WATCH_ID:
                watch_id = signed(value)
            elif tag == _FRAGMENT:
                fragment = value
            else:
                return None
    if pos != size or not filters.isascii() or len(filters) > FIELDS_MAX:
        # Too many fields, or one that ends after the message; filters above 127 take several bytes each.
        return None
    no_put, no_delete = 0 in filters, 1 in filters
    numbers = (start_revision or None, watch_id, progress_notify != 0, no_put, no_delete, prev_kv != 0, fragment != 0)
    return key, range_end, *numbers


def plain_cancel(message: bytes) -> int | None:
    """Return the id of the watch that a request cancels; None: leave the message to the library."""
    size = len(message)
    if message == _CANCEL_FIRST:
        return 0
    if size < 4 or message[0] != _CANCEL_REQUEST or message[1] != size - 2 or message[2] != _CANCEL_WATCH_ID:
        return None
    value, pos = message[3], 4
    try:
        if value > 127:
            value, pos = long_number(message, pos, value)
    except (IndexError, ScanError):
        return None
    return signed(value) if pos == size else None


def encode_create(
    key: bytes,
    range_end: bytes = b"",
    start_revision: int | None = None,
    *,
    watch_id: int = 0,
    progress_notify: bool = False,
    no_put: bool = False,
    no_delete: bool = False,
    prev_kv: bool = False,
    fragment: bool = False,
) -> bytes:
    """Encode a WatchRequest that creates a watch; start_revision None means now, watch_id 0 any id."""
    filters = (b"\x00" if no_put else b"") + (b"\x01" if no_delete else b"")
    return bytes_field(
        _CREATE_REQUEST,
        b"".join(
            (
                bytes_field(_KEY, key) if key else b"",
                bytes_field(_RANGE_END, range_end) if range_end else b"",
                number_field(_START_REVISION, start_revision or 0),
                number_field(_PROGRESS_NOTIFY, progress_notify),
                bytes_field(_FILTERS, filters) if filters else b"",
                number_field(_PREV_KV, prev_kv),
                number_field(_WATCH_ID, watch_id),
                number_field(_FRAGMENT, fragment),
            )
        ),
    )


def encode_cancel(watch_id: int) -> bytes:
    """Encode a WatchRequest that cancels a watch."""
    return bytes_field(_CANCEL_REQUEST, number_field(_CANCEL_WATCH_ID, watch_id))
