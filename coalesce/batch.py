"""Batches, made of upstream responses, and payloads, made of batches for the watches.

A batch is parsed once and never changes: whole revisions, each event as its encoded bytes. Which part of it a watch
gets depends on its variant: the filters, prev_kv and fragment it asked for. Watches of one variant get one payload, and
their messages differ only in a few bytes of watch id. So the work per batch is that of its few variants; the work per
watch is a lookup of finished bytes.

The header of a payload carries the revision of the payload's last event, never the store's: clients resume from it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from proto.framing import PREFIX_BYTES
from proto.scan import DELETE, PUT, Event, Header, WatchResponse
from proto.shared_response import SharedResponse

# A variant is a combination of these flags.
NO_PUT: Final = 1
NO_DELETE: Final = 2
PREV_KV: Final = 4
FRAGMENT: Final = 8

# Memory of an Event in addition to its bytes: the Event, its list entry and its bytes object.
EVENT_OVERHEAD_BYTES: Final = 150
# Memory of a kept response in addition to its events: the batch, its header and list, and its entries in history and
# ledger. Most responses carry one small event, so it is the larger part of most histories.
BATCH_OVERHEAD_BYTES: Final = 500
# Bytes of a WatchResponse besides header and events: watch_id (11 bytes at most) and the fragment flag.
_ENVELOPE_BYTES: Final = 13


def variant_of(no_put: bool, no_delete: bool, prev_kv: bool, fragment: bool) -> int:
    """Return the variant for these options of a create."""
    return NO_PUT * no_put | NO_DELETE * no_delete | PREV_KV * prev_kv | FRAGMENT * fragment


class Payload(SharedResponse):
    """The response to all watches of one variant for some revisions."""

    __slots__ = ()

    @property
    def last_revision(self) -> int:
        """The revision of the last event."""
        return self.header.revision


def notification_payload(header: Header) -> Payload:
    """Return progress: a message without events, for watches that are complete through the header's revision."""
    # If it is returned undelivered, the watch's position does not move back.
    return Payload(header, (b"",), header.revision + 1, 0)


class Batch:
    """Events of whole revisions, in order. Never empty and never changed, until its history evicts it."""

    __slots__ = ("arrived_at", "events", "first_revision", "header", "history", "last_revision", "memory_bytes", "size")

    def __init__(self, header: Header, events: Sequence[Event], size: int) -> None:
        self.events = events
        self.first_revision = events[0].revision
        self.last_revision = last_revision = events[len(events) - 1].revision
        # Ids and term are etcd's; the revision is that of the last event.
        self.header = header if header.revision == last_revision else header.at(last_revision)
        # Bytes of the encoded events.
        self.size = size
        # The memory it takes in a history.
        self.memory_bytes = size + EVENT_OVERHEAD_BYTES * len(events) + BATCH_OVERHEAD_BYTES
        # The history that holds it, and since when, in seconds; None before and after. Set by `History.append`.
        self.history: object = None
        self.arrived_at = 0.0

    def since(self, revision: int) -> Batch | None:
        """Return the part at and after `revision`: itself, a new batch, or None when nothing is left."""
        if revision <= self.first_revision:
            return self
        if revision > self.last_revision:
            return None
        events = [event for event in self.events if event.revision >= revision]
        return Batch(self.header, events, sum(len(event.encoded) for event in events))


class Variants:
    """The payloads of some events, each made when first needed. Used for one delivery only."""

    __slots__ = ("_all_bare", "_events", "_fragment_bytes", "_header", "_made")

    def __init__(self, header: Header, events: Sequence[Event], fragment_bytes: int, has_prev_kv: bool) -> None:
        """`has_prev_kv`: some event may carry a prev_kv; if not, variants with and without PREV_KV are the same."""
        self._header = header
        self._events = events
        self._fragment_bytes = fragment_bytes
        self._all_bare = not has_prev_kv
        self._made: dict[int, Payload | None] = {}

    def payload(self, variant: int) -> Payload | None:
        """Return the payload for watches of this variant; None if the filters drop all events."""
        if self._all_bare:
            variant |= PREV_KV
        made = self._made
        if variant in made:
            return made[variant]
        if variant & FRAGMENT:
            payload = self.payload(variant & ~FRAGMENT)
            if payload is not None and payload.event_count > 1 and payload.size - PREFIX_BYTES >= self._fragment_bytes:
                payload = self._make(variant)
        else:
            payload = self._make(variant)
        made[variant] = payload
        return payload

    def _make(self, variant: int) -> Payload | None:
        events = filtered(self._events, variant) if variant & (NO_PUT | NO_DELETE) else self._events
        if not events:
            return None
        header = self._header.at(events[-1].revision)
        encoded = [event.encoded if variant & PREV_KV else event.bare for event in events]
        if variant & FRAGMENT:
            joined = tuple(split(encoded, self._fragment_bytes, len(header.encoded)))
        else:
            joined = (b"".join(encoded),)
        return Payload(header, joined, events[0].revision, len(events))


def payload_of_one(batch: Batch, variant: int, has_prev_kv: bool) -> Payload | None:
    """Return the payload of a batch with one event, equal to that of `Variants`; None if the filters drop it."""
    events = filtered(batch.events, variant) if variant & (NO_PUT | NO_DELETE) else batch.events
    if not events:
        return None
    event = events[0]
    # One event needs neither joining nor splitting.
    encoded = event.encoded if variant & PREV_KV or not has_prev_kv else event.bare
    return Payload(batch.header, (encoded,), batch.first_revision, 1)


def filtered(events: Sequence[Event], variant: int) -> Sequence[Event]:
    """Return the events that pass the variant's filters."""
    if not variant & (NO_PUT | NO_DELETE):
        return events
    return [
        event
        for event in events
        if not (variant & NO_PUT and event.kind == PUT) and not (variant & NO_DELETE and event.kind == DELETE)
    ]


def split(encoded: Sequence[bytes], fragment_bytes: int, header_bytes: int) -> Iterator[bytes]:
    """Join encoded events into fragments whose messages stay below `fragment_bytes`, at least one event in each.

    It splits as etcd's sendFragments does (api/v3rpc/watch.go).
    """
    room = fragment_bytes - header_bytes - _ENVELOPE_BYTES
    piece: list[bytes] = []
    size = 0
    for event in encoded:
        if piece and size + len(event) > room:
            yield b"".join(piece)
            piece = []
            size = 0
        piece.append(event)
        size += len(event)
    yield b"".join(piece)


def batches_of(response: WatchResponse, bytes_max: int) -> Iterator[Batch]:
    """Split a response into batches of at most `bytes_max` bytes, between revisions only.

    A single revision is never split, however large. A catch-up response may carry a thousand revisions.
    """
    events = response.events
    header = response.header
    size = sum([len(event.encoded) for event in events])
    if size <= bytes_max or events[0].revision == events[-1].revision:
        yield Batch(header, events, size)
        return
    start = 0
    taken = 0
    for first, end, size in revisions_of(events):
        if taken and taken + size > bytes_max:
            yield Batch(header, events[start:first], taken)
            start = first
            taken = 0
        taken += size
        if end == len(events):
            yield Batch(header, events[start:], taken)


def revisions_of(events: Sequence[Event]) -> Iterator[tuple[int, int, int]]:
    """Yield for each revision the slice of its events, [first, end), and their encoded bytes."""
    first = 0
    size = 0
    revision = events[0].revision
    for place, event in enumerate(events):
        if event.revision != revision:
            yield first, place, size
            first = place
            size = 0
            revision = event.revision
        size += len(event.encoded)
    yield first, len(events), size
