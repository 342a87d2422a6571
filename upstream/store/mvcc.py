"""The multi-version store: revisions of keys, readable at any revision that is not compacted.

Pure: no I/O, no clock, no leases, no watches. Every write runs in a `WriteTxn`, which takes exactly one revision
however many keys it changes; its changes share the revision and are numbered by sub-revision. `_log` has the changes
by revision, for watches; the key index has them by key, for reads. The semantics are those of etcd's
server/storage/mvcc (kvstore.go, kvstore_txn.go), including oddities: an empty store is at revision 1, and its compact
revision is -1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.index import KeyIndex, RevisionRecord

FIRST_REVISION = 1
"""The revision of an empty store (etcd counts the state before the first write)."""

NEVER_COMPACTED = -1

# Approximate size of a record without its key and value: the Python objects around them. For the size in Status.
RECORD_OVERHEAD_BYTES = 250


@dataclass(slots=True)
class RangeResult:
    """The result of a read."""

    # In order of keys.
    records: list[RevisionRecord]
    # The revision of the store, not the one that was read.
    revision: int


Changes = tuple[RevisionRecord, ...]
"""The changes of one revision, in order of sub-revision."""


class Mvcc:
    """The store itself. `revision` is the newest; reads below `compact_revision` are refused."""

    def __init__(self) -> None:
        # Called with the records that a compaction step has removed.
        self.on_drop: Callable[[list[RevisionRecord]], None] = lambda _: None
        self.index = KeyIndex()
        self.revision = FIRST_REVISION
        self.compact_revision = NEVER_COMPACTED
        # Approximate bytes of all records held.
        self.size_bytes = 0
        # _log[i] has the changes of revision _log_start + i; every revision has one entry.
        self._log: list[Changes] = []
        self._log_start = FIRST_REVISION + 1
        # (revision, keys changed up to it that may have records to drop): the physical part of compactions, which is
        # done in slices so that a large one does not delay calls.
        self._compaction_queue: deque[tuple[int, list[bytes]]] = deque()

    # Reading

    def range(self, key: bytes, range_end: bytes = b"", revision: int = 0, *, now: int | None = None) -> RangeResult:
        """Read the records of [key, range_end) at a revision; 0 or below = the newest.

        range_end b"" = the key alone, FROM_KEY = without end. `now` is the newest revision as the reader sees it: in a
        write transaction, one more than the store's once the transaction has changed something.

        Raises StoreError: COMPACTED, FUTURE_REVISION.
        """
        newest = self.revision if now is None else now
        if revision > newest:
            raise StoreError(errors.FUTURE_REVISION)
        at = revision if revision > 0 else newest
        if at < self.compact_revision:
            raise StoreError(errors.COMPACTED)
        return RangeResult(self.index.range(key, range_end, at), newest)

    def check_readable(self, revision: int) -> None:
        """Refuse a revision that a transaction's range may not read (etcd txn/range.go, checkRange).

        Stricter than `range`: a negative revision counts as compacted, but only once the store was compacted.

        Raises StoreError: COMPACTED, FUTURE_REVISION.
        """
        if revision == 0:
            return
        if revision > self.revision:
            raise StoreError(errors.FUTURE_REVISION)
        if revision < self.compact_revision:
            raise StoreError(errors.COMPACTED)

    def previous(self, record: RevisionRecord) -> RevisionRecord | None:
        """Return the key's record before this change's revision; None when there was none or it is compacted."""
        before = record.mod_revision - 1
        if before < self.compact_revision:
            return None
        return self.index.get(record.key, before)

    def changes(self, first: int, last: int) -> Sequence[Changes]:
        """Return the changes of revisions first..last, one entry each; `first` must not be below `log_floor`."""
        start = first - self._log_start
        assert start >= 0, "the log does not reach back that far"
        return self._log[start : last - self._log_start + 1]

    @property
    def log_floor(self) -> int:
        """The lowest revision whose changes are still in the log."""
        return self._log_start

    # Writing

    def write(self) -> WriteTxn:
        """Begin a write transaction. Only one at a time; commit it before the next read or write."""
        return WriteTxn(self)

    # Compaction

    def compact(self, revision: int) -> None:
        """Refuse reads below `revision` from now on; `compact_step` frees the space.

        Raises StoreError: COMPACTED when the revision is compacted already, FUTURE_REVISION.
        """
        if revision <= self.compact_revision:
            raise StoreError(errors.COMPACTED)
        if revision > self.revision:
            raise StoreError(errors.FUTURE_REVISION)
        self.compact_revision = revision
        # Only keys that changed since the last compaction can have records to drop. The log's entry at the compact
        # revision itself stays (a watch may start there), so the next compaction visits its tombstones again.
        passed = self._log[: max(0, revision - self._log_start + 1)]
        keys = list({record.key: None for changes in passed for record in changes})
        if revision > self._log_start:
            del self._log[: revision - self._log_start]
            self._log_start = revision
        self._compaction_queue.append((revision, keys))

    def compact_step(self, keys_max: int) -> bool:
        """Drop superseded records of at most `keys_max` keys; return whether all compactions are complete."""
        while self._compaction_queue and keys_max > 0:
            revision, keys = self._compaction_queue[0]
            batch = keys[-keys_max:]
            del keys[-keys_max:]
            keys_max -= len(batch)
            for key in batch:
                if dropped := self.index.compact(key, revision):
                    self.size_bytes -= sum(map(weight, dropped))
                    self.on_drop(dropped)
            if not keys:
                self._compaction_queue.popleft()
        return not self._compaction_queue

    # Restoring

    def load(self, records: Iterable[RevisionRecord], revision: int, compact_revision: int) -> None:
        """Fill an empty store with records in order of (mod_revision, sub_revision), as read from a durable log."""
        assert self.revision == FIRST_REVISION
        assert not len(self.index)
        held = list(records)
        self.index.load(held)
        self.size_bytes = sum(map(weight, held))
        self.revision = revision
        self.compact_revision = compact_revision
        self._log_start = max(compact_revision, FIRST_REVISION + 1)
        log: list[list[RevisionRecord]] = [[] for _ in range(revision - self._log_start + 1)]
        for record in held:
            if record.mod_revision >= self._log_start:
                log[record.mod_revision - self._log_start].append(record)
        self._log = [tuple(changes) for changes in log]
        if compact_revision > NEVER_COMPACTED:
            # The physical part of the compaction may not have been complete when the log was last written.
            self._compaction_queue.append((compact_revision, list({record.key: None for record in held})))

    def _commit(self, changes: Changes) -> None:
        self.revision += 1
        self._log.append(changes)
        self.size_bytes += sum(map(weight, changes))


def weight(record: RevisionRecord) -> int:
    """Return the approximate size of a record in memory, in bytes."""
    return RECORD_OVERHEAD_BYTES + len(record.key) + len(record.value)


class WriteTxn:
    """Changes that become visible together, as one revision.

    Its reads see its own changes. It cannot be rolled back: callers make all checks before it begins.
    """

    __slots__ = ("_changes", "_mvcc", "_next")

    def __init__(self, mvcc: Mvcc) -> None:
        self._mvcc = mvcc
        self._next = mvcc.revision + 1
        self._changes: list[RevisionRecord] = []

    @property
    def revision(self) -> int:
        """The revision as seen inside: the store's, or the transaction's own once it has changed something."""
        return self._next if self._changes else self._next - 1

    def range(self, key: bytes, range_end: bytes = b"", revision: int = 0) -> RangeResult:
        """Read as `Mvcc.range` does, including the transaction's own changes."""
        return self._mvcc.range(key, range_end, revision, now=self.revision)

    def newest(self, key: bytes) -> RevisionRecord | None:
        """Return a key's newest record, including the transaction's own changes."""
        return self._mvcc.index.newest(key)

    def put(self, key: bytes, value: bytes, lease: int = 0) -> RevisionRecord:
        """Set a key's value and lease (0 = none)."""
        before = self._mvcc.index.newest(key)
        record = RevisionRecord(
            # One bytes object per key for all revisions.
            key if before is None else before.key,
            value,
            self._next if before is None else before.create_revision,
            self._next,
            len(self._changes),
            1 if before is None else before.version + 1,
            lease,
        )
        self._add(record)
        return record

    def delete_range(self, key: bytes, range_end: bytes = b"") -> int:
        """Delete the keys of [key, range_end); return how many were deleted."""
        found = self._mvcc.index.range(key, range_end, self._next)
        for before in found:
            self._add(RevisionRecord(before.key, b"", 0, self._next, len(self._changes), 0, 0, deleted=True))
        return len(found)

    def commit(self) -> Changes:
        """Make the changes the store's newest revision, and return them; does nothing without changes."""
        changes = tuple(self._changes)
        if changes:
            self._mvcc._commit(changes)
        return changes

    def _add(self, record: RevisionRecord) -> None:
        self._mvcc.index.append(record)
        self._changes.append(record)
