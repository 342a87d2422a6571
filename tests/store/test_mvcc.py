"""The multi-version store, beyond the comparison with etcd (test_conformance.py)."""

from __future__ import annotations

from random import Random

import pytest

from upstream.store import errors
from upstream.store.errors import StoreError, StoreRefusal
from upstream.store.mvcc import Mvcc


def put(store: Mvcc, key: bytes, value: bytes = b"v", lease: int = 0) -> int:
    txn = store.write()
    txn.put(key, value, lease)
    txn.commit()
    return store.revision


def delete(store: Mvcc, key: bytes, range_end: bytes = b"") -> int:
    txn = store.write()
    count = txn.delete_range(key, range_end)
    txn.commit()
    return count


def compact(store: Mvcc, revision: int) -> None:
    store.compact(revision)
    while not store.compact_step(2):
        pass


def refusal_of(store: Mvcc, revision: int) -> StoreRefusal | None:
    try:
        store.range(b"a", b"", revision)
    except StoreError as error:
        return error.refusal
    return None


def test_an_empty_store_is_at_revision_1() -> None:
    store = Mvcc()
    assert store.revision == 1
    assert store.range(b"\x00", b"\x00").records == []


def test_a_transaction_is_one_revision_and_numbers_its_changes() -> None:
    store = Mvcc()
    put(store, b"c")
    txn = store.write()
    txn.put(b"a", b"1")
    txn.put(b"b", b"2")
    assert txn.delete_range(b"c") == 1
    assert txn.revision == 3
    changes = txn.commit()
    assert store.revision == 3
    assert [(r.key, r.mod_revision, r.sub_revision, r.deleted) for r in changes] == [
        (b"a", 3, 0, False),
        (b"b", 3, 1, False),
        (b"c", 3, 2, True),
    ]
    assert store.changes(2, 3)[1] == changes


def test_a_transaction_without_changes_takes_no_revision() -> None:
    store = Mvcc()
    txn = store.write()
    assert txn.delete_range(b"a", b"z") == 0
    assert txn.revision == 1
    assert txn.commit() == ()
    assert store.revision == 1


def test_versions_count_from_each_creation() -> None:
    store = Mvcc()
    for _ in range(3):
        put(store, b"a")
    delete(store, b"a")
    put(store, b"a")
    (now,) = store.range(b"a").records
    (then,) = store.range(b"a", b"", 4).records
    assert (now.create_revision, now.mod_revision, now.version) == (6, 6, 1)
    assert (then.create_revision, then.mod_revision, then.version) == (2, 4, 3)


def test_readable_revisions_after_a_compaction() -> None:
    store = Mvcc()
    for _ in range(5):
        put(store, b"a")
    compact(store, 4)
    assert [refusal_of(store, revision) for revision in (3, 4, 6, 7, 0, -1)] == [
        errors.COMPACTED,
        None,
        None,
        errors.FUTURE_REVISION,
        None,
        None,
    ]
    with pytest.raises(StoreError) as again:
        store.compact(4)
    assert again.value.refusal == errors.COMPACTED
    with pytest.raises(StoreError) as future:
        store.compact(7)
    assert future.value.refusal == errors.FUTURE_REVISION


def test_the_changes_at_the_compact_revision_stay_in_the_log() -> None:
    store = Mvcc()
    put(store, b"a")
    delete(store, b"a")
    put(store, b"b")
    compact(store, 3)
    assert store.log_floor == 3
    assert [record.deleted for record in store.changes(3, 3)[0]] == [True]
    assert len(store.index) == 2
    compact(store, 4)
    assert len(store.index) == 1


def test_a_compacted_previous_value_is_not_returned() -> None:
    store = Mvcc()
    put(store, b"a", b"1")
    put(store, b"a", b"2")
    put(store, b"b")
    ((record,),) = store.changes(3, 3)
    before = store.previous(record)
    assert before is not None
    assert before.value == b"1"
    compact(store, 3)
    assert store.previous(record) is None


@pytest.mark.parametrize("seed", range(20))
def test_compaction_does_not_change_allowed_reads(seed: int) -> None:
    rng = Random(seed)
    store, untouched = Mvcc(), Mvcc()
    for _ in range(200):
        key = bytes([rng.choice(b"abcdef")])
        kind = rng.random()
        if kind < 0.6:
            assert put(store, key) == put(untouched, key)
        elif kind < 0.9:
            assert delete(store, key) == delete(untouched, key)
        elif store.revision > max(store.compact_revision, 1):
            store.compact(rng.randint(max(store.compact_revision + 1, 1), store.revision))
        store.compact_step(rng.randrange(4))
        revision = rng.randint(max(store.compact_revision, 1), store.revision)
        ours, theirs = (s.range(b"\x00", b"\x00", revision).records for s in (store, untouched))
        assert [(r.key, r.mod_revision, r.version) for r in ours] == [
            (r.key, r.mod_revision, r.version) for r in theirs
        ]
    while not store.compact_step(1000):
        pass
    held = list(store.index.records())
    live = {r.key for r in store.range(b"\x00", b"\x00", max(store.compact_revision, 1)).records}
    assert sum(r.mod_revision < store.compact_revision for r in held) <= len(live)


def test_a_store_loaded_from_its_records_is_the_same() -> None:
    store = Mvcc()
    for key in (b"a", b"b", b"a"):
        put(store, key)
    delete(store, b"b")
    compact(store, 3)
    put(store, b"c")
    copy = Mvcc()
    records = sorted(store.index.records(), key=lambda record: (record.mod_revision, record.sub_revision))
    copy.load(records, store.revision, store.compact_revision)
    assert list(copy.index.records()) == list(store.index.records())
    assert copy.changes(3, 6) == store.changes(3, 6)
    assert copy.size_bytes == store.size_bytes
    assert put(copy, b"d") == put(store, b"d")
