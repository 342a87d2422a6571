"""The key index: keys in order, reads at revisions, records kept by a compaction."""

from __future__ import annotations

from random import Random

import pytest

from proto.spans import FROM_KEY
from upstream.store import index as index_module
from upstream.store.index import KeyIndex, RevisionRecord, SortedKeys


def put(key: bytes, revision: int, created: int = 0, sub: int = 0) -> RevisionRecord:
    return RevisionRecord(key, b"v%d" % revision, created or revision, revision, sub, 1, 0)


def tombstone(key: bytes, revision: int, sub: int = 0) -> RevisionRecord:
    return RevisionRecord(key, b"", 0, revision, sub, 0, 0, deleted=True)


@pytest.mark.parametrize("seed", range(20))
def test_sorted_keys_are_a_sorted_set(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "CHUNK_KEYS_MAX", 4)
    rng = Random(seed)
    plain: set[bytes] = {bytes([rng.randrange(256)]) for _ in range(rng.randrange(20))}
    keys = SortedKeys(plain)
    for _ in range(400):
        key = bytes([rng.randrange(256)])
        if key in plain:
            plain.remove(key)
            keys.remove(key)
        else:
            plain.add(key)
            keys.add(key)
        start, end = bytes([rng.randrange(256)]), bytes([rng.randrange(1, 256)])
        assert [k for part in keys.slices(start, end) for k in part] == sorted(k for k in plain if start <= k < end)
        assert [k for part in keys.slices(start, FROM_KEY) for k in part] == sorted(k for k in plain if k >= start)
        assert len(keys) == len(plain)


HISTORY = (put(b"k", 2), put(b"k", 4, 2), tombstone(b"k", 6), put(b"k", 8), tombstone(b"k", 9))


@pytest.mark.parametrize(
    ("revision", "found"), [(1, 0), (2, 2), (3, 2), (4, 4), (5, 4), (6, 0), (7, 0), (8, 8), (9, 0), (99, 0)]
)
def test_reads_at_a_revision(revision: int, found: int) -> None:
    index = KeyIndex()
    for record in HISTORY:
        index.append(record)
    seen = index.get(b"k", revision)
    assert (seen.mod_revision if seen else 0) == found
    assert index.range(b"a", b"z", revision) == ([seen] if seen else [])


@pytest.mark.parametrize(
    ("revision", "kept"),
    [
        (1, [2, 4, 6, 8, 9]),
        (2, [2, 4, 6, 8, 9]),
        (3, [2, 4, 6, 8, 9]),
        (4, [4, 6, 8, 9]),
        (5, [4, 6, 8, 9]),
        # The tombstone at the compact revision itself stays, for watches that start there.
        (6, [6, 8, 9]),
        (7, [8, 9]),
        (8, [8, 9]),
        (9, [9]),
        (10, []),
    ],
)
def test_compaction_keeps_readable_records(revision: int, kept: list[int]) -> None:
    index = KeyIndex()
    for record in HISTORY:
        index.append(record)
    dropped = index.compact(b"k", revision)
    assert [record.mod_revision for record in index.records()] == kept
    assert sorted([record.mod_revision for record in dropped] + kept) == [2, 4, 6, 8, 9]
    assert len(index) == bool(kept)


def test_the_last_change_of_a_key_in_a_revision_wins() -> None:
    index = KeyIndex()
    for record in (put(b"k", 2), tombstone(b"k", 2, sub=1)):
        index.append(record)
    assert index.get(b"k", 2) is None
    index.append(put(b"k", 2, sub=2))
    found = index.get(b"k", 2)
    assert found is not None
    assert found.sub_revision == 2
