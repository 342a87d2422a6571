"""Watch responses: batches of events that many watchers share, and the messages in a stream's queue.

All watchers of a range get the same events of a commit. So the events are encoded once per batch (and once more for
watchers with prev_kv), and a watcher's own message adds a few bytes of header and id before them: a protobuf message
is the concatenation of its fields.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proto.pb import kv_pb2, rpc_pb2
from upstream.store.index import RevisionRecord
from upstream.store.mvcc import Mvcc
from upstream.store.txn import key_value

FRAGMENT_BYTES = 2 * 1024 * 1024
"""A response of this size or more is split if its watch has `fragment`: etcd's largest request (1.5 MiB) + 512 KiB."""

REMEMBERED_BYTES_MAX = 64 * 1024
REMEMBERED_MESSAGES_MAX = 16

INVALID_WATCH_ID = -1
"""The watch id of responses without a watch: refusals, and the answer to a progress request."""


class EventBatch:
    """Events of whole revisions for the watchers of one range. Immutable except for its caches."""

    __slots__ = ("_encoded", "_events", "_mvcc", "_remembered", "_variants", "records")

    def __init__(self, mvcc: Mvcc, records: Sequence[RevisionRecord]) -> None:
        # In order of revision; never empty.
        self.records = records
        self._mvcc = mvcc
        self._variants: dict[tuple[bool, bool], EventBatch | None] = {}
        # By prev_kv: each event as a WatchResponse with nothing else, and all of them joined.
        self._events: dict[bool, list[bytes]] = {}
        self._encoded: dict[bool, bytes] = {}
        # Whole messages by (watch id, header revision, prev_kv), since many streams use the same small ids.
        self._remembered: dict[tuple[int, int, bool], bytes] = {}

    def filtered(self, no_put: bool, no_delete: bool) -> EventBatch | None:
        """Return the batch without puts or deletes; None when nothing is left."""
        if not (no_put or no_delete):
            return self
        wanted = (no_put, no_delete)
        if wanted not in self._variants:
            records = [record for record in self.records if not (no_delete if record.deleted else no_put)]
            self._variants[wanted] = EventBatch(self._mvcc, records) if records else None
        return self._variants[wanted]

    def events(self, prev_kv: bool) -> list[bytes]:
        """Return each event encoded as field `events` of a WatchResponse."""
        if prev_kv not in self._events:
            self._events[prev_kv] = [
                rpc_pb2.WatchResponse(events=(self._event(record, prev_kv),)).SerializeToString()
                for record in self.records
            ]
        return self._events[prev_kv]

    def encoded(self, prev_kv: bool) -> bytes:
        """Return all events encoded."""
        if prev_kv not in self._encoded:
            self._encoded[prev_kv] = b"".join(self.events(prev_kv))
        return self._encoded[prev_kv]

    def _event(self, record: RevisionRecord, prev_kv: bool) -> kv_pb2.Event:
        if record.deleted:
            event = kv_pb2.Event(type=kv_pb2.Event.DELETE)
            event.kv.key = record.key
            event.kv.mod_revision = record.mod_revision
        else:
            event = kv_pb2.Event(kv=key_value(record))
        if prev_kv and not record.created and (before := self._mvcc.previous(record)) is not None:
            event.prev_kv.CopyFrom(key_value(before))
        return event

    def message(self, head: ResponseHead, message: WatchMessage) -> bytes:
        """Encode the message of a watch that gets the whole batch in one piece."""
        wanted = (message.watch_id, message.revision, message.prev_kv)
        if (known := self._remembered.get(wanted)) is not None:
            return known
        encoded = head.encode(message) + self.encoded(message.prev_kv)
        if len(encoded) <= REMEMBERED_BYTES_MAX and len(self._remembered) < REMEMBERED_MESSAGES_MAX:
            self._remembered[wanted] = encoded
        return encoded


@dataclass(slots=True, eq=False)
class WatchMessage:
    """A response in a stream's queue, not encoded yet."""

    watch_id: int
    # For the header: the store's revision when the message was made.
    revision: int
    batch: EventBatch | None = None
    prev_kv: bool = False
    fragment: bool = False
    created: bool = False
    canceled: bool = False
    compact_revision: int = 0
    cancel_reason: str = ""


class ResponseHead:
    """Encodes the part of a response before the events: header, id and control fields."""

    __slots__ = ("_header",)

    def __init__(self, cluster_id: int, member_id: int, raft_term: int) -> None:
        self._header = rpc_pb2.ResponseHeader(cluster_id=cluster_id, member_id=member_id, raft_term=raft_term)

    def encode(self, message: WatchMessage, more: bool = False) -> bytes:
        """Encode a message without its events; `more` marks a fragment that is not the last."""
        self._header.revision = message.revision
        return rpc_pb2.WatchResponse(
            header=self._header,
            watch_id=message.watch_id,
            created=message.created,
            canceled=message.canceled,
            compact_revision=message.compact_revision,
            cancel_reason=message.cancel_reason,
            fragment=more,
        ).SerializeToString()


def encode_message(head: ResponseHead, message: WatchMessage, fragment_bytes: int = FRAGMENT_BYTES) -> list[bytes]:
    """Encode a message; a large message of a watch with `fragment` gives more than one piece.

    No other message may be sent between the pieces on a stream (etcd v3rpc/watch.go, sendFragments).
    """
    batch = message.batch
    if batch is None:
        return [head.encode(message)]
    if not message.fragment or len(batch.records) < 2:
        return [batch.message(head, message)]
    whole = batch.message(head, message)
    if len(whole) < fragment_bytes:
        return [whole]
    room = fragment_bytes - len(head.encode(message, more=True))
    pieces: list[list[bytes]] = [[]]
    size = 0
    for event in batch.events(message.prev_kv):
        if pieces[-1] and size + len(event) >= room:
            pieces.append([])
            size = 0
        pieces[-1].append(event)
        size += len(event)
    last = len(pieces) - 1
    return [head.encode(message, more=at < last) + b"".join(events) for at, events in enumerate(pieces)]
