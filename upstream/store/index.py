"""The key index: the revisions of every key, and the keys in order.

etcd has a B-tree of key indexes, each a list of generations of revisions (server/storage/mvcc/key_index.go). Here a
key's history is one flat list of records in order of revision: a tombstone ends a generation and the next put starts
another, so generations need no structure of their own. The index holds the records themselves, so that a read of the
newest value is one dict lookup.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from proto.spans import FROM_KEY

# Keys per chunk before it is split. An insertion moves half a chunk on average, a range touches len/chunk chunks: with
# a few thousand both take microseconds at millions of keys.
CHUNK_KEYS_MAX = 2000


@dataclass(slots=True, eq=False)
class RevisionRecord:
    """One change of one key. Immutable; shared by the index, the log and the events.

    A tombstone has only key, mod_revision and sub_revision, as etcd's delete events do.
    """

    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    # Place within the revision: a transaction's changes share mod_revision.
    sub_revision: int
    version: int
    # Lease id, 0 = none, as on the wire.
    lease: int
    deleted: bool = False

    @property
    def created(self) -> bool:
        """Return whether this put created its key (clientv3's IsCreate)."""
        return self.create_revision == self.mod_revision


class SortedKeys:
    """The keys in order: a list of sorted chunks, each at most CHUNK_KEYS_MAX long."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        """Start with the given keys, in any order, without duplicates."""
        ordered = sorted(keys)
        half = CHUNK_KEYS_MAX // 2
        self._chunks = [ordered[start : start + half] for start in range(0, len(ordered), half)]
        self._lasts = [chunk[-1] for chunk in self._chunks]

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def add(self, key: bytes) -> None:
        """Add a key that is not present."""
        if not self._chunks:
            self._chunks.append([key])
            self._lasts.append(key)
            return
        at = min(bisect_left(self._lasts, key), len(self._lasts) - 1)
        chunk = self._chunks[at]
        insort(chunk, key)
        if len(chunk) > CHUNK_KEYS_MAX:
            # Keys often arrive in order: splitting off a short tail then leaves the chunk nearly full.
            middle = CHUNK_KEYS_MAX - 1 if chunk[-1] is key else CHUNK_KEYS_MAX // 2
            self._chunks.insert(at + 1, chunk[middle:])
            self._lasts.insert(at + 1, chunk[-1])
            del chunk[middle:]
        self._lasts[at] = self._chunks[at][-1]

    def remove(self, key: bytes) -> None:
        """Remove a key that is present."""
        at = bisect_left(self._lasts, key)
        chunk = self._chunks[at]
        place = bisect_left(chunk, key)
        assert chunk[place] == key
        del chunk[place]
        if chunk:
            self._lasts[at] = chunk[-1]
        else:
            del self._chunks[at], self._lasts[at]

    def slices(self, key: bytes, range_end: bytes) -> Iterator[list[bytes]]:
        """Yield the keys of [key, range_end) in order, chunk by chunk; range_end FROM_KEY = without end."""
        first = bisect_left(self._lasts, key)
        for at in range(first, len(self._chunks)):
            chunk = self._chunks[at]
            start = bisect_left(chunk, key) if at == first else 0
            if range_end != FROM_KEY and self._lasts[at] >= range_end:
                yield chunk[start : bisect_left(chunk, range_end)]
                return
            yield chunk[start:] if start else chunk


def _mod_revision(record: RevisionRecord) -> int:
    return record.mod_revision


def record_at(history: list[RevisionRecord], revision: int) -> RevisionRecord | None:
    """Return a key's record at a revision, None when the key did not exist then."""
    if history[-1].mod_revision <= revision:
        record = history[-1]
    else:
        place = bisect_right(history, revision, key=_mod_revision)
        if place == 0:
            return None
        record = history[place - 1]
    return None if record.deleted else record


def _first_kept(history: list[RevisionRecord], revision: int) -> int:
    """Return the index of the first record that a compaction at a revision keeps; see KeyIndex.compact."""
    place = bisect_right(history, revision, key=_mod_revision) - 1
    if place < 0:
        return 0
    return place + 1 if history[place].deleted and history[place].mod_revision < revision else place


class KeyIndex:
    """Every key's history, by key and in order of keys."""

    __slots__ = ("_histories", "_keys")

    def __init__(self) -> None:
        self._histories: dict[bytes, list[RevisionRecord]] = {}
        self._keys = SortedKeys()

    def __len__(self) -> int:
        """Count the keys that have a history, including deleted keys."""
        return len(self._histories)

    def append(self, record: RevisionRecord) -> None:
        """Add a key's newest record."""
        history = self._histories.get(record.key)
        if history is None:
            self._histories[record.key] = [record]
            self._keys.add(record.key)
        else:
            history.append(record)

    def load(self, records: Iterable[RevisionRecord]) -> None:
        """Fill an empty index with records in order of revision."""
        assert not self._histories
        for record in records:
            history = self._histories.setdefault(record.key, [])
            if history:
                # One bytes object per key for all revisions.
                record.key = history[0].key
            history.append(record)
        self._keys = SortedKeys(self._histories)

    def newest(self, key: bytes) -> RevisionRecord | None:
        """Return a key's newest record, None when the key does not exist now."""
        history = self._histories.get(key)
        if history is None or history[-1].deleted:
            return None
        return history[-1]

    def get(self, key: bytes, revision: int) -> RevisionRecord | None:
        """Return a key's record at a revision, None when the key did not exist then."""
        history = self._histories.get(key)
        return None if history is None else record_at(history, revision)

    def range(self, key: bytes, range_end: bytes, revision: int) -> list[RevisionRecord]:
        """Return the records of [key, range_end) at a revision, in order of keys; range_end b"" = the key alone."""
        if not range_end:
            record = self.get(key, revision)
            return [] if record is None else [record]
        found: list[RevisionRecord] = []
        histories = self._histories
        for keys in self._keys.slices(key, range_end):
            for name in keys:
                history = histories[name]
                newest = history[-1]
                # The common case of record_at, inlined: nearly all reads are of the newest revision.
                if newest.mod_revision <= revision:
                    if not newest.deleted:
                        found.append(newest)
                elif (record := record_at(history, revision)) is not None:
                    found.append(record)
        return found

    def compact(self, key: bytes, revision: int) -> list[RevisionRecord]:
        """Drop a key's records that no read at `revision` or later can see; return the dropped ones.

        The newest record at or below `revision` stays, except a tombstone below it. A tombstone exactly at it stays: a
        watch from the compact revision still gets the DELETE (etcd 3.5.18, keyIndex.compact).
        """
        history = self._histories.get(key)
        if history is None:
            return []
        keep = _first_kept(history, revision)
        dropped = history[:keep]
        del history[:keep]
        if not history:
            del self._histories[key]
            self._keys.remove(key)
        return dropped

    def newest_records(self) -> Iterator[RevisionRecord]:
        """Yield the newest record of every key that exists now."""
        for history in self._histories.values():
            if not history[-1].deleted:
                yield history[-1]

    def records(self, compact_revision: int = 0) -> Iterator[RevisionRecord]:
        """Yield every record that a compaction would keep, in order of keys and revisions."""
        for keys in self._keys.slices(b"", FROM_KEY):
            for key in keys:
                history = self._histories[key]
                yield from history[_first_kept(history, compact_revision) :]
