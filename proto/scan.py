"""Decodes and encodes WatchResponses at byte level; `plain_request` does the same with WatchRequests.

A protobuf message is the concatenation of its fields. The parts of a response that all its watches share, the header
and the events, are cut out of it once as encoded fields, and a client's response is joined from these bytes and a few
of its own: nothing is built or serialised per client. Unknown fields inside a header, an event or a key-value are kept
with the bytes; unknown fields of the response itself are dropped.

Each message has two decoders. The fast one is an inlined loop for the fields that etcd sends, whose tags are one byte;
on anything else it passes the whole message to the general one, which is built on `fields` and complete. The fast ones
do not check bounds at each step: `pos` only grows, so a field that extends past the end of its message ends in pos !=
end, and one that extends past the data in an IndexError. A known field number with another wire type is an unknown
field; if a field occurs twice, the last number counts, and messages are merged.

Fields: etcd's api/etcdserverpb/rpc.proto and api/mvccpb/kv.proto. Encoding: protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from proto.fields import (
    VARINT_BYTES_MAX,
    ScanError,
    bytes_field,
    fields,
    long_number,
    long_size,
    number_field,
    signed,
    varint,
)

PUT: Final = 0
DELETE: Final = 1

# Tags, (field number << 3) | wire type. WatchResponse:
_HEADER: Final = 0x0A
_WATCH_ID: Final = 0x10
_CREATED: Final = 0x18
_IS_CREATED: Final = b"\x18\x01"
_CANCELED: Final = 0x20
_COMPACT_REVISION: Final = 0x28
_CANCEL_REASON: Final = 0x32
_FRAGMENT: Final = 0x38
_EVENTS: Final = 0x5A
# ResponseHeader:
_CLUSTER_ID: Final = 0x08
_MEMBER_ID: Final = 0x10
_REVISION: Final = 0x18
_RAFT_TERM: Final = 0x20
_REVISION_AND_TERM: Final = frozenset((_REVISION, _RAFT_TERM))
# Event:
_TYPE: Final = 0x08
_KV: Final = 0x12
_PREV_KV: Final = 0x1A
# KeyValue:
_KEY: Final = 0x0A
_CREATE_REVISION: Final = 0x10
_MOD_REVISION: Final = 0x18
_VERSION: Final = 0x20
_VALUE: Final = 0x2A
_LEASE: Final = 0x30
_KEY_AND_VALUE: Final = frozenset((_KEY, _VALUE))
_OTHER_NUMBERS: Final = frozenset((_CREATE_REVISION, _VERSION, _LEASE))


class Header:
    """A ResponseHeader: its four numbers, and its bytes as received. Immutable."""

    __slots__ = ("cluster_id", "encoded", "member_id", "raft_term", "revision")

    def __init__(self, encoded: bytes, cluster_id: int, member_id: int, revision: int, raft_term: int) -> None:
        # The whole field 1 of a response, with tag and length; b"" if the response has none.
        self.encoded = encoded
        self.cluster_id = cluster_id
        self.member_id = member_id
        # The store's revision when the response was made.
        self.revision = revision
        self.raft_term = raft_term

    @classmethod
    def make(cls, cluster_id: int, member_id: int, revision: int, raft_term: int) -> Header:
        """Return a header of these numbers, encoded as etcd encodes it."""
        body = (
            number_field(_CLUSTER_ID, cluster_id)
            + number_field(_MEMBER_ID, member_id)
            + number_field(_REVISION, revision)
            + number_field(_RAFT_TERM, raft_term)
        )
        return cls(bytes_field(_HEADER, body), cluster_id, member_id, revision, raft_term)

    def at(self, revision: int) -> Header:
        """Return this header with another revision; all other fields are kept, unknown ones too."""
        if revision == self.revision:
            return self
        # Before the term, as in etcd's encoding; the order does not matter to a decoder.
        before: list[bytes] = []
        after: list[bytes] = []
        for tag, start, _, end, _ in fields(self.encoded, _body_of(self.encoded), len(self.encoded)):
            if tag != _REVISION:
                (before if tag in (_CLUSTER_ID, _MEMBER_ID) else after).append(self.encoded[start:end])
        body = b"".join([*before, number_field(_REVISION, revision), *after])
        return Header(bytes_field(_HEADER, body), self.cluster_id, self.member_id, revision, self.raft_term)

    def __repr__(self) -> str:
        return (
            f"Header(cluster_id={self.cluster_id:x}, member_id={self.member_id:x}, "
            f"revision={self.revision}, raft_term={self.raft_term})"
        )


class Event:
    """One event of a response: the fields that the core uses, and the bytes that clients get. Immutable."""

    __slots__ = ("_bare", "encoded", "kind", "revision")

    def __init__(self, kind: int, revision: int, encoded: bytes, bare: bytes | None) -> None:
        # PUT or DELETE; an unknown type keeps its number.
        self.kind = kind
        # The revision of the change (kv.mod_revision); 0 if the event has no kv.
        self.revision = revision
        # The whole `events` field of the response, with tag and length.
        self.encoded = encoded
        # `encoded` without prev_kv. None = there is a prev_kv, which is removed on demand, so that a history does not
        # hold every value twice.
        self._bare = bare

    @property
    def bare(self) -> bytes:
        """`encoded` without prev_kv: the same object if it has none, else computed at each access."""
        bare = self._bare
        return _without_prev_kv(self.encoded) if bare is None else bare

    def __repr__(self) -> str:
        return f"Event(kind={self.kind}, revision={self.revision}, encoded={self.encoded!r})"


class WatchResponse:
    """A WatchResponse whose header and events stay encoded; the names are those of rpc.proto."""

    __slots__ = (
        "cancel_reason",
        "canceled",
        "compact_revision",
        "created",
        "events",
        "fragment",
        "header",
        "plain",
        "watch_id",
    )

    def __init__(
        self,
        header: Header,
        watch_id: int = 0,
        created: bool = False,
        canceled: bool = False,
        compact_revision: int = 0,
        cancel_reason: str = "",
        fragment: bool = False,
        events: list[Event] | None = None,
    ) -> None:
        self.header = header
        self.watch_id = watch_id
        self.created = created
        self.canceled = canceled
        self.compact_revision = compact_revision
        self.cancel_reason = cancel_reason
        # True for all but the last piece of a response that was split.
        self.fragment = fragment
        self.events: list[Event] = [] if events is None else events
        # It has events, and none of created, canceled and fragment.
        self.plain = not (created or canceled or fragment or not events)

    def __repr__(self) -> str:
        return (
            f"WatchResponse({self.header!r}, watch_id={self.watch_id}, created={self.created}, "
            f"canceled={self.canceled}, compact_revision={self.compact_revision}, "
            f"cancel_reason={self.cancel_reason!r}, fragment={self.fragment}, events={self.events!r})"
        )


_NO_HEADER: Final = Header(b"", 0, 0, 0, 0)


# Template of the last decoded header, since the headers of nearby revisions differ in one byte only: the bytes through
# the revision's tag; those after the revision's first byte, its lowest seven bits; the revision with these bits zero,
# and its size in bytes; cluster id, member id and term. A plain tuple, because it is unpacked for each event.
_near: tuple[bytes, bytes, int, int, int, int, int] = (b"\n", b"\n", 0, 0, 0, 0, 0)


def scan_watch_response(data: bytes) -> WatchResponse:
    """Decode a WatchResponse.

    Invalid UTF-8 in a cancel_reason is replaced by U+FFFD: etcd's Go code does not check it, and it is text for people.
    Raises ScanError where a protobuf library would reject the bytes, and for groups, which etcd does not use.
    """
    # The common case, a single put from a synced watch, is decoded inline: 1,780 ns instead of 2,930 (`python -m
    # tests.bench.lanes`). Any other layout falls through to the other decoders.
    begin, end, revision, revision_bytes, cluster_id, member_id, raft_term = _near
    at = len(begin)
    try:
        header_end = pos = at + 1 + len(end)
        if data[at] > 127 and data[:at] == begin and data[at + 1 : pos] == end:
            watch_id = 0
            if data[pos] == _WATCH_ID:
                watch_id = data[pos + 1]
                pos += 2
                if watch_id > 127 and data[pos] < 128:
                    watch_id += (data[pos] << 7) - 128
                    pos += 1
                elif watch_id > 127:
                    watch_id, pos = long_number(data, pos, watch_id)
                    watch_id = signed(watch_id)
            start = pos
            # The event is the response's last field, and its kv is the event's only field.
            size = data[pos + 1]
            body = pos + 2
            if size > 127:
                size, body = long_size(data, body, size)
            if data[pos] == _EVENTS and data[body] == _KV and body + size == len(data):
                size = data[body + 1]
                pos = body + 2
                if size > 127:
                    size, pos = long_size(data, pos, size)
                # mod_revision equals the header's revision byte for byte.
                if pos + size == len(data) and _is_put(data, pos, data[at : at + revision_bytes]):
                    event = data[start:]
                    revision += data[at] - 128
                    header = Header(data[:header_end], cluster_id, member_id, revision, raft_term)
                    events = [Event(PUT, revision, event, event)]
                    return WatchResponse(header, watch_id, False, False, 0, "", False, events)
    except (IndexError, ScanError):
        pass
    try:
        return _scan_response(data)
    except IndexError:
        raise ScanError("a watch response ends in the middle of a field") from None


def _is_put(data: bytes, pos: int, mod_revision: bytes) -> bool:
    """Return whether data[pos:] is a KeyValue of a put as etcd encodes it, with this encoded mod_revision."""
    size = data[pos + 1]
    if data[pos] != _KEY or size > 127:
        return False
    pos += 2 + size
    if data[pos] != _CREATE_REVISION:
        return False
    last = pos + VARINT_BYTES_MAX
    pos += 1
    while data[pos] > 127:
        pos += 1
    end = pos + 2 + len(mod_revision)
    if pos >= last or data[pos + 1] != _MOD_REVISION or data[pos + 2 : end] != mod_revision:
        return False
    pos = end
    if data[pos] != _VERSION:
        return False
    last = pos + VARINT_BYTES_MAX
    pos += 1
    while data[pos] > 127:
        pos += 1
    if pos >= last or data[pos + 1] != _VALUE:
        return False
    size = data[pos + 2]
    pos += 3
    if size > 127:
        size, pos = long_size(data, pos, size)
    pos += size
    if pos == len(data):
        return True
    if data[pos] != _LEASE:
        return False
    last = pos + VARINT_BYTES_MAX
    pos += 1
    while data[pos] > 127:
        pos += 1
    return pos < last and pos + 1 == len(data)


def _scan_response(data: bytes) -> WatchResponse:
    header = _NO_HEADER
    watch_id = 0
    events: list[Event] = []
    pos = 0
    end = len(data)
    while pos < end:
        tag = data[pos]
        value = data[pos + 1]
        body = pos + 2
        if tag == _EVENTS:
            if value > 127:
                value, body = long_size(data, body, value)
            stop = body + value
            events.append(_scan_event(data, pos, body, stop))
            pos = stop
        elif tag == _WATCH_ID:
            if value > 127:
                value, body = long_number(data, body, value)
            watch_id = value
            pos = body
        elif tag == _HEADER and header is _NO_HEADER:
            if value > 127:
                value, body = long_size(data, body, value)
            stop = body + value
            header = _scan_header(data[pos:stop], body - pos)
            pos = stop
        else:
            return _scan_any_response(data)
    if pos != end:
        raise ScanError("a field of a watch response extends past its end")
    return WatchResponse(header, signed(watch_id), False, False, 0, "", False, events)


def _scan_any_response(data: bytes) -> WatchResponse:
    response = WatchResponse(_NO_HEADER)
    for tag, start, body, end, value in fields(data, 0, len(data)):
        if tag == _HEADER:
            response.header = _scan_header(*_joined(response.header, data[start:end], body - start))
        elif tag == _WATCH_ID:
            response.watch_id = signed(value)
        elif tag == _CREATED:
            response.created = value != 0
        elif tag == _CANCELED:
            response.canceled = value != 0
        elif tag == _COMPACT_REVISION:
            response.compact_revision = signed(value)
        elif tag == _CANCEL_REASON:
            response.cancel_reason = data[body:end].decode("utf-8", "replace")
        elif tag == _FRAGMENT:
            response.fragment = value != 0
        elif tag == _EVENTS:
            response.events.append(_scan_event(data, start, body, end))
    return response


def _joined(earlier: Header, encoded: bytes, body: int) -> tuple[bytes, int]:
    """Merge an earlier header of the same response into `encoded`; return the result and the start of its body."""
    if earlier is not _NO_HEADER:
        encoded = bytes_field(_HEADER, earlier.encoded[_body_of(earlier.encoded) :] + encoded[body:])
        body = _body_of(encoded)
    return encoded, body


# Cluster and member id of the last header that began with these two: their bytes and their values. A cache: an upstream
# sends the same two ids in each response, as 20 bytes of varints that cost more than the rest of a small response.
_ids: tuple[bytes, int, int] = (b"", 0, 0)


def _scan_header(encoded: bytes, body: int) -> Header:
    """Decode the header whose whole field is `encoded` and whose own fields start at `body`."""
    ids, cluster_id, member_id = _ids
    if encoded[body : body + len(ids)] != ids:
        return _scan_any_header(encoded, body)
    revision = raft_term = 0
    pos = body + len(ids)
    end = len(encoded)
    while pos < end:
        tag = encoded[pos]
        value = encoded[pos + 1]
        pos += 2
        if tag not in _REVISION_AND_TERM:
            return _scan_any_header(encoded, body)
        if value > 127:
            value, pos = long_number(encoded, pos, value)
        if tag == _REVISION:
            revision = value
        else:
            raft_term = value
    if pos != end:
        raise ScanError("a field of a header extends past its end")
    _remember(encoded, body + len(ids), revision, cluster_id, member_id, raft_term)
    return Header(encoded, cluster_id, member_id, signed(revision), raft_term)


def _remember(encoded: bytes, start: int, revision: int, cluster_id: int, member_id: int, raft_term: int) -> None:
    """Make a header the template `_near`, if encoded[start:] is revision and term as etcd encodes them."""
    global _near
    if revision >> 7 == _near[2] >> 7 or not 128 <= revision < 1 << 63:
        return
    if encoded[start:] == number_field(_REVISION, revision) + number_field(_RAFT_TERM, raft_term):
        at = start + 1
        size = len(varint(revision))
        _near = (encoded[:at], encoded[at + 1 :], revision & ~127, size, cluster_id, member_id, raft_term)


def _scan_any_header(encoded: bytes, body: int) -> Header:
    global _ids
    numbers = {_CLUSTER_ID: 0, _MEMBER_ID: 0, _REVISION: 0, _RAFT_TERM: 0}
    tags: list[int] = []
    for tag, _, _, end, value in fields(encoded, body, len(encoded)):
        numbers[tag] = value
        tags.append(tag)
        if tags == [_CLUSTER_ID, _MEMBER_ID]:
            _ids = (encoded[body:end], numbers[_CLUSTER_ID], numbers[_MEMBER_ID])
    return Header(encoded, numbers[_CLUSTER_ID], numbers[_MEMBER_ID], signed(numbers[_REVISION]), numbers[_RAFT_TERM])


def _scan_event(data: bytes, start: int, body: int, end: int) -> Event:
    """Decode the event data[body:end], whose tag is at `start`."""
    kind = PUT
    revision = 0
    encoded = data[start:end]
    bare: bytes | None = encoded
    pos = body
    while pos < end:
        tag = data[pos]
        value = data[pos + 1]
        pos += 2
        if tag == _KV:
            if value > 127:
                value, pos = long_size(data, pos, value)
            stop = pos + value
            revision = _scan_key_value(data, pos, stop, revision)
            pos = stop
        elif tag == _TYPE and value < 128:
            kind = value
        elif tag == _PREV_KV:
            if value > 127:
                value, pos = long_size(data, pos, value)
            stop = pos + value
            _scan_key_value(data, pos, stop, 0)
            bare = None
            pos = stop
        else:
            return _scan_any_event(data, start, body, end)
    if pos != end:
        raise ScanError("a field of an event extends past its end")
    return Event(kind, revision, encoded, bare)


def _scan_any_event(data: bytes, start: int, body: int, end: int) -> Event:
    encoded = data[start:end]
    event = Event(PUT, 0, encoded, encoded)
    for tag, _, inner, stop, value in fields(data, body, end):
        if tag == _TYPE:
            # An enum is a signed 32-bit number; larger ones are truncated.
            event.kind = (value & 0xFFFF_FFFF ^ 0x8000_0000) - 0x8000_0000
        elif tag == _KV:
            event.revision = _scan_key_value(data, inner, stop, event.revision)
        elif tag == _PREV_KV:
            _scan_key_value(data, inner, stop, 0)
            event._bare = None
    return event


def _scan_key_value(data: bytes, pos: int, end: int, revision: int) -> int:
    """Return the mod_revision of the KeyValue data[pos:end], or `revision` if it has none."""
    start = pos
    found = revision
    while pos < end:
        tag = data[pos]
        value = data[pos + 1]
        pos += 2
        if tag == _MOD_REVISION:
            if value > 127:
                value, pos = long_number(data, pos, value)
            found = value
        elif tag in _KEY_AND_VALUE:
            if value > 127:
                value, pos = long_size(data, pos, value)
            pos += value
        elif tag in _OTHER_NUMBERS:
            last = pos + VARINT_BYTES_MAX - 1
            while value > 127:
                value = data[pos]
                pos += 1
            if pos > last:
                raise ScanError("a number of more than 64 bits")
        else:
            return _scan_any_key_value(data, start, end, revision)
    if pos != end:
        raise ScanError("a field of a key-value extends past its end")
    return signed(found)


def _scan_any_key_value(data: bytes, pos: int, end: int, revision: int) -> int:
    for tag, _, _, _, value in fields(data, pos, end):
        if tag == _MOD_REVISION:
            revision = signed(value)
    return revision


def _without_prev_kv(encoded: bytes) -> bytes:
    """Return an encoded event without its field prev_kv."""
    parts = fields(encoded, _body_of(encoded), len(encoded))
    return bytes_field(_EVENTS, b"".join([encoded[start:end] for tag, start, _, end, _ in parts if tag != _PREV_KV]))


def _body_of(encoded: bytes) -> int:
    """Return the start of an encoded field's body, after its tag and length; 0 if `encoded` is empty."""
    for _, _, body, _, _ in fields(encoded, 0, len(encoded)):
        return body
    return 0


def encode_watch_id(watch_id: int) -> bytes:
    """Encode the field watch_id of a WatchResponse, b"" for 0; a negative id takes 10 bytes."""
    return number_field(_WATCH_ID, watch_id)


def encode_response(
    header: Header,
    watch_id: int,
    *,
    created: bool = False,
    canceled: bool = False,
    compact_revision: int = 0,
    cancel_reason: str = "",
    fragment: bool = False,
    events: bytes = b"",
) -> bytes:
    """Encode a WatchResponse; `events` are the events' encoded fields, joined."""
    encoded = header.encoded
    if watch_id:
        encoded += number_field(_WATCH_ID, watch_id)
    if created:
        encoded += number_field(_CREATED, 1)
    if canceled:
        encoded += number_field(_CANCELED, 1)
    if compact_revision:
        encoded += number_field(_COMPACT_REVISION, compact_revision)
    if cancel_reason:
        encoded += bytes_field(_CANCEL_REASON, cancel_reason.encode())
    if fragment:
        encoded += number_field(_FRAGMENT, 1)
    return encoded + events


def encode_created(header: Header, watch_id: int) -> bytes:
    """Encode the WatchResponse that answers a create, as `encode_response` does."""
    return header.encoded + _created_id(watch_id)


@lru_cache(4096)
def _created_id(watch_id: int) -> bytes:
    """Encode what follows the header. Clients have the same ids: 0, 1, 2, ..."""
    return number_field(_WATCH_ID, watch_id) + _IS_CREATED
