"""The key of an encoded event. Only covers need it, so `proto.scan` does not look for it."""

from __future__ import annotations

from typing import Final

from proto.fields import fields

# Tags of an Event and of a KeyValue, see `proto.scan`.
_TYPE: Final = 0x08
_KV: Final = 0x12
_KEY: Final = 0x0A


def event_key(encoded: bytes) -> bytes:
    """Return the key of an event, given its whole `events` field as `Event.encoded` holds it; b"" if it has none.

    `proto.scan` has accepted the bytes before.
    """
    # What etcd sends is decoded inline: [type,] kv, whose first field is the key.
    try:
        pos = 2
        if encoded[1] > 127:
            while encoded[pos] > 127:
                pos += 1
            pos += 1
        if encoded[pos] == _TYPE and encoded[pos + 1] < 128:
            pos += 2
        if encoded[pos] == _KV:
            size = encoded[pos + 1]
            pos += 2
            if size > 127:
                while encoded[pos] > 127:
                    pos += 1
                pos += 1
            if size and encoded[pos] == _KEY and encoded[pos + 1] < 128:
                return encoded[pos + 2 : pos + 2 + encoded[pos + 1]]
    except IndexError:
        pass
    return _any_key(encoded)


def _any_key(encoded: bytes) -> bytes:
    """Return the key of an event in any layout: the last one counts, as for any field that occurs twice."""
    key = b""
    for _, _, body, end, _ in fields(encoded, 0, len(encoded)):
        for tag, _, inner, stop, _ in fields(encoded, body, end):
            if tag == _KV:
                for field, _, start, past, _ in fields(encoded, inner, stop):
                    if field == _KEY:
                        key = encoded[start:past]
    return key
