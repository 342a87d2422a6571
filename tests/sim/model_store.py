"""A pure model of etcd's storage: the log of all changes, and members that apply it at different speeds.

It follows server/storage/mvcc/watchable_store.go closely where that matters to a proxy: a watcher is synced, unsynced
or a victim; unsynced ones get bounded batches under the store's revision; compaction cancels watchers strictly below.
The model has no time: its driver decides when a member applies, syncs or retries its victims.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

from coalesce.guarantees.checkers import DELETE, PUT, Change, PreviousValue, Truth, in_range
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event, scan_watch_response

if TYPE_CHECKING:
    from tests.sim.model_stream import ServerStream

Operation = tuple[bytes, bytes | None]
"""A key and the value to put; None deletes it."""

LEASE = 7
"""The one lease there is."""

EVENTS_TAG = b"\x5a"
"""Field 11 of WatchResponse, length-delimited."""


@dataclass(frozen=True)
class Applied:
    """One entry of the replicated log: the changes of one revision, the end of the lease, or a compaction."""

    # The store's revision once it is applied.
    revision: int
    changes: tuple[Change, ...] = ()
    compact_revision: int = 0
    revokes: bool = False

    @cached_property
    def request(self) -> rpc_pb2.TxnRequest:
        """The call that makes these changes."""
        request = rpc_pb2.TxnRequest()
        for change in self.changes:
            if change.kind == PUT:
                put = request.success.add().request_put
                put.key, put.value, put.lease = change.key, change.value, change.lease
            else:
                request.success.add().request_delete_range.key = change.key
        return request


class Store:
    """The state that the cluster has agreed on."""

    def __init__(self) -> None:
        # etcd's first revision; the first write makes 2.
        self.revision = 1
        self.compact_revision = 0
        self.compact_revisions: list[int] = []
        # Including compactions that a restore has undone: what they removed from a response stays removed.
        self.compacted_ever: list[int] = []
        self.changes: list[Change] = []
        self.log: list[Applied] = []
        # The index of the entry before the log's first: earlier entries, without revisions, and fewer after a
        # restore, since the new log does not contain the snapshot's revisions.
        self.index_base = 1000
        # Without a quorum nothing is written.
        self.has_quorum = True
        self._latest: dict[bytes, Change] = {}
        self._events: dict[tuple[int, bytes, bool], Event] = {}

    def write(self, operations: Iterable[Operation], lease: int = 0) -> int:
        """Apply one transaction, a key at most once in it; return the revision, unchanged if nothing was written."""
        if changes := self._change(operations, lease):
            self.log.append(Applied(self.revision, changes))
        return self.revision

    def revoke(self) -> None:
        """End the lease: its keys are deleted in one revision, in order; it is granted again at once."""
        if not self.has_quorum:
            return
        keys = sorted(key for key, change in self._latest.items() if change.lease)
        changes = self._change([(key, None) for key in keys], 0)
        self.log.append(Applied(self.revision, changes, revokes=True))

    def _change(self, operations: Iterable[Operation], lease: int) -> tuple[Change, ...]:
        if not self.has_quorum:
            return ()
        revision = self.revision + 1
        changes = []
        for key, value in operations:
            before = self._latest.get(key)
            prev = None if before is None else PreviousValue(*before[2:7])
            if value is not None:
                created, version = (revision, 1) if prev is None else (prev.create_revision, prev.version + 1)
                change = Change(PUT, key, value, created, revision, version, lease, prev)
                self._latest[key] = change
            elif prev is not None:
                change = Change(DELETE, key, b"", 0, revision, 0, 0, prev)
                del self._latest[key]
            else:
                continue
            changes.append(change)
        if changes:
            self.revision = revision
            self.changes.extend(changes)
        return tuple(changes)

    def compact(self, revision: int) -> bool:
        """Remove everything below `revision`; False if that is not above the last compaction or in the future."""
        if not self.has_quorum or not self.compact_revision < revision <= self.revision:
            return False
        self.compact_revision = revision
        self.compact_revisions.append(revision)
        self.compacted_ever.append(revision)
        self.log.append(Applied(self.revision, compact_revision=revision))
        return True

    def restore(self, revision: int) -> None:
        """Go back to `revision`, as from a snapshot taken then; later writes are undone."""
        self.revision = revision
        self.changes = [change for change in self.changes if change.mod_revision <= revision]
        self.log = [entry for entry in self.log if entry.revision <= revision]
        self.index_base = 3 - len(self.log)
        self.compact_revisions = [entry.compact_revision for entry in self.log if entry.compact_revision]
        self.compact_revision = max(self.compact_revisions, default=0)
        self._latest = {change.key: change for change in self.changes if change.kind == PUT}
        for change in self.changes:
            latest = self._latest.get(change.key)
            if change.kind == DELETE and latest is not None and latest.mod_revision < change.mod_revision:
                del self._latest[change.key]
        self._events.clear()

    def truth(self) -> Truth:
        """Return the whole history, for the checkers."""
        return Truth(self.changes, self.compacted_ever)

    def live_keys(self) -> list[bytes]:
        """Return the existing keys."""
        return sorted(self._latest)

    def live(self) -> list[Change]:
        """Return the put that set the value of each existing key, in order of keys."""
        return [self._latest[key] for key in sorted(self._latest)]

    def event(self, change: Change, prev: bool) -> Event:
        """Return the change as the scanner reads it from the wire."""
        identity = (change.mod_revision, change.key, prev)
        event = self._events.get(identity)
        if event is None:
            body = encode_event(change, prev)
            event = scan_watch_response(EVENTS_TAG + _varint(len(body)) + body).events[0]
            self._events[identity] = event
        return event


def encode_event(change: Change, prev: bool) -> bytes:
    """Return the change as an encoded mvccpb.Event, with or without the value before it."""
    message = kv_pb2.Event(
        type=kv_pb2.Event.PUT if change.kind == PUT else kv_pb2.Event.DELETE,
        kv=kv_pb2.KeyValue(
            key=change.key,
            value=change.value,
            create_revision=change.create_revision,
            mod_revision=change.mod_revision,
            version=change.version,
            lease=change.lease,
        ),
    )
    if prev and change.prev is not None:
        value, created, modified, version, lease = change.prev
        message.prev_kv.CopyFrom(
            kv_pb2.KeyValue(
                key=change.key,
                value=value,
                create_revision=created,
                mod_revision=modified,
                version=version,
                lease=lease,
            )
        )
    return bytes(message.SerializeToString())


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


@dataclass(slots=True, eq=False)
class Watcher:
    """A watch at a member."""

    stream: ServerStream
    watch_id: int
    key: bytes
    range_end: bytes
    # As requested; 0 is now.
    start_revision: int
    # The first revision it may still get.
    min_revision: int
    # Events that did not fit in the stream's channel: (changes, header revision); it is a victim meanwhile.
    held: tuple[Sequence[Change], int] | None = None
    # Where a victim's catch-up continues once its events are sent; 0: it is complete.
    more_revision: int = 0
    compacted: bool = False

    def matches(self, change: Change) -> bool:
        """Return whether the watch gets this change."""
        return change.mod_revision >= self.min_revision and in_range(change.key, self.key, self.range_end)


@dataclass(slots=True)
class Member:
    """One etcd server: its applied entries, and its watchers."""

    # It frees compacted revisions at once.
    compacting: ClassVar[bool] = False
    # Only a proxy in its place may have none.
    has_server: ClassVar[bool] = True

    store: Store
    member_id: int
    # Revisions of events in one catch-up response (etcd: watchBatchMaxRevs, 1000).
    batch_revisions_max: int = 1000
    # From 3.4.25/3.5.8 on manual progress is ordered with events; older servers answer past them.
    ordered_progress: bool = True
    revision: int = 1
    compact_revision: int = 0
    position: int = 0
    # Dicts, not sets: their order is that of registration, so runs are the same each time.
    synced: dict[Watcher, None] = field(default_factory=dict)
    unsynced: dict[Watcher, None] = field(default_factory=dict)
    victims: dict[Watcher, None] = field(default_factory=dict)

    @property
    def behind(self) -> int:
        """How many log entries it has not applied."""
        return len(self.store.log) - self.position

    @property
    def index(self) -> int:
        """The index of the entry it applied last."""
        return self.store.index_base + self.position

    def apply_some(self, rng: random.Random) -> None:
        """Apply a few entries of the log."""
        self.apply(rng.randint(1, 4))

    def apply(self, count: int) -> None:
        """Apply the next entries of the log, and notify the synced watchers of each."""
        for entry in self.store.log[self.position : self.position + count]:
            self.position += 1
            if entry.compact_revision:
                self.compact_revision = entry.compact_revision
                continue
            self.revision = entry.revision
            for watcher in list(self.synced):
                changes = [change for change in entry.changes if watcher.matches(change)]
                if not changes:
                    continue
                watcher.min_revision = entry.revision + 1
                if not watcher.stream.offer(watcher, changes, entry.revision):
                    del self.synced[watcher]
                    watcher.held, watcher.more_revision = (changes, entry.revision), 0
                    self.victims[watcher] = None

    def compact_step(self, _: random.Random | None = None) -> None:
        """Compaction takes no time here."""

    def restart(self) -> None:
        """Restart with its applied entries, without connections."""

    def check(self) -> None:
        """Do nothing: the model has no state that could be wrong."""

    def restore(self) -> None:
        """Restart from the restored store, without connections."""
        self.revision = self.store.revision
        self.compact_revision = self.store.compact_revision
        self.position = len(self.store.log)
        for group in (self.synced, self.unsynced, self.victims):
            group.clear()

    def add(self, watcher: Watcher) -> None:
        """Register a watcher: in the future and now are synced, the past is unsynced."""
        if watcher.start_revision == 0 or watcher.start_revision > self.revision:
            watcher.min_revision = max(self.revision + 1, watcher.start_revision)
            self.synced[watcher] = None
        else:
            watcher.min_revision = watcher.start_revision
            self.unsynced[watcher] = None

    def remove(self, watcher: Watcher) -> None:
        """Cancel a watcher in any state."""
        for group in (self.synced, self.unsynced, self.victims):
            group.pop(watcher, None)

    def sync(self, rng: random.Random) -> None:
        """Run one round of the loop that serves unsynced watchers (etcd: every 100 ms), for some of them."""
        chosen = [watcher for watcher in self.unsynced if rng.random() < 0.8]
        for watcher in chosen:
            if watcher.min_revision < self.compact_revision:
                if watcher.stream.offer_compacted(watcher, self.compact_revision):
                    watcher.compacted = True
                    del self.unsynced[watcher]
                continue
            self._catch_up(watcher)

    def _catch_up(self, watcher: Watcher) -> None:
        changes, more_revision = self._batch(watcher)
        watcher.min_revision = more_revision or max(self.revision + 1, watcher.min_revision)
        if changes and not watcher.stream.offer(watcher, changes, self.revision):
            watcher.held, watcher.more_revision = (changes, self.revision), more_revision
            del self.unsynced[watcher]
            self.victims[watcher] = None
        elif not more_revision:
            del self.unsynced[watcher]
            self.synced[watcher] = None

    def _batch(self, watcher: Watcher) -> tuple[list[Change], int]:
        """Return the next changes of an unsynced watcher, and where the rest begins (0: there is none)."""
        changes: list[Change] = []
        revisions = 0
        for change in self.store.changes:
            if change.mod_revision > self.revision:
                break
            if not watcher.matches(change):
                continue
            if not changes or changes[-1].mod_revision != change.mod_revision:
                if revisions == self.batch_revisions_max:
                    return changes, change.mod_revision
                revisions += 1
            changes.append(change)
        return changes, 0

    def retry_victims(self, _: random.Random | None = None) -> None:
        """Retry the victims' events (etcd: every 10 ms); the header is then the last revision they saw."""
        for watcher in list(self.victims):
            assert watcher.held is not None
            changes = watcher.held[0]
            if not watcher.stream.offer(watcher, changes, watcher.min_revision - 1):
                continue
            del self.victims[watcher]
            watcher.held = None
            watcher.min_revision = watcher.more_revision or watcher.min_revision
            group = self.unsynced if watcher.min_revision <= self.revision else self.synced
            group[watcher] = None
