"""Histories: what they replay, and what they evict when."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from coalesce.batch import NO_DELETE, NO_PUT, Batch
from coalesce.history import History, HistoryBudget
from coalesce.limits import CoreLimits
from coalesce.stats import Stats
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event, scan_watch_response
from tests.coalesce.shell import delete, header, put, seen

ALL = CoreLimits()


def batch(*events: Event) -> Batch:
    return Batch(header(events[-1].revision), events, sum(len(event.encoded) for event in events))


def history(*batches: Batch, limits: CoreLimits = ALL, floor: int = 1, stats: Stats | None = None) -> History:
    made = History(HistoryBudget(limits, stats or Stats()), floor, False)
    for each in batches:
        made.append(each, 0.0)
    return made


def replayed(made: History, position: int, variant: int = 0, limits: CoreLimits = ALL) -> tuple[str | None, int | None]:
    payload, following, _ = made.replay(position, variant, limits)
    return None if payload is None else seen(payload.pieces(0)[0]), following


FILLED = (batch(put(3)), batch(put(5), put(6), delete(7)), batch(delete(10)))


@pytest.mark.parametrize(
    ("position", "variant", "line"),
    [
        (1, 0, "#0 @10 put 3 k=v put 5 k=v put 6 k=v delete 7 k delete 10 k"),
        (3, 0, "#0 @10 put 3 k=v put 5 k=v put 6 k=v delete 7 k delete 10 k"),
        (4, 0, "#0 @10 put 5 k=v put 6 k=v delete 7 k delete 10 k"),
        (6, 0, "#0 @10 put 6 k=v delete 7 k delete 10 k"),
        (8, 0, "#0 @10 delete 10 k"),
        (11, 0, None),
        (4, NO_DELETE, "#0 @6 put 5 k=v put 6 k=v"),
        (7, NO_DELETE, None),
        (6, NO_PUT, "#0 @10 delete 7 k delete 10 k"),
    ],
)
def test_a_replay_joins_the_missed_events(position: int, variant: int, line: str | None) -> None:
    assert replayed(history(*FILLED), position, variant) == (line, None)


def test_an_empty_history_replays_nothing() -> None:
    assert replayed(history(), 1) == (None, None)


def test_a_replay_is_split_between_revisions() -> None:
    made = history(batch(put(3, b"a"), put(3, b"b")), batch(put(4, b"c"), put(5, b"d")), batch(put(6, b"e")))
    each = len(put(3, b"a").encoded)

    def steps(replay_bytes_max: int) -> list[str | None]:
        found, position = [], 1
        while True:
            line, following = replayed(made, position, limits=CoreLimits(replay_bytes_max=replay_bytes_max))
            found.append(line)
            if following is None:
                return found
            position = following

    one, two, three, four = "put 3 a=v put 3 b=v", "put 4 c=v", "put 5 d=v", "put 6 e=v"
    assert steps(5 * each) == [f"#0 @6 {one} {two} {three} {four}"]
    assert steps(5 * each - 1) == [f"#0 @5 {one} {two} {three}", f"#0 @6 {four}"]
    assert steps(3 * each) == [f"#0 @4 {one} {two}", f"#0 @6 {three} {four}"]
    assert steps(2 * each) == [f"#0 @3 {one}", f"#0 @5 {two} {three}", f"#0 @6 {four}"]
    # A revision that exceeds the bound alone is sent whole.
    assert steps(1) == [f"#0 @3 {one}", f"#0 @4 {two}", f"#0 @5 {three}", f"#0 @6 {four}"]


def test_filtered_events_do_not_count_as_bytes() -> None:
    made = history(*[batch(delete(revision)) for revision in range(1, 50)], batch(put(50)))
    limits = CoreLimits(replay_bytes_max=len(put(50).encoded))
    assert replayed(made, 1, NO_DELETE, limits) == ("#0 @50 put 50 k=v", None)


def test_a_replay_examines_a_bounded_number_of_events() -> None:
    """Filters may drop all of them; a large batch is split, but a revision never is."""
    made = history(*[batch(put(revision)) for revision in range(1, 10)], batch(*[delete(10)] * 3, put(11), delete(12)))
    limits = CoreLimits(replay_events_max=4)

    def steps(variant: int) -> list[tuple[str | None, int | None, int]]:
        found: list[tuple[str | None, int | None, int]] = []
        position: int | None = 1
        while position is not None:
            payload, position, looked = made.replay(position, variant, limits)
            found.append((None if payload is None else seen(payload.pieces(0)[0]), position, looked))
        return found

    deletes = "#0 @10 delete 10 k delete 10 k delete 10 k"
    assert steps(NO_PUT) == [(None, 5, 4), (None, 9, 4), (deletes, 11, 4), ("#0 @12 delete 12 k", None, 2)]
    assert [looked for _, _, looked in steps(0)] == [4, 4, 4, 2]
    made = history(batch(*[delete(1)] * 9, put(2)))
    assert [looked for _, _, looked in steps(NO_DELETE)] == [9, 1]


def test_whole_batches_are_evicted_first_in_first_out() -> None:
    made = history(*FILLED)
    made.evict_oldest()
    assert (made.floor, len(made)) == (4, 2)
    made.evict_below(7)
    assert (made.floor, len(made)) == (4, 2)
    made.evict_below(8)
    assert (made.floor, len(made)) == (8, 1)
    made.evict_to(0)
    assert (made.floor, len(made), made.bytes) == (11, 0, 0)


def test_a_history_is_bounded_in_bytes_and_in_batches() -> None:
    cost = batch(put(1)).memory_bytes
    for limits in (CoreLimits(history_bytes_max=3 * cost), CoreLimits(history_revisions_max=3)):
        made = history(*[batch(put(revision)) for revision in range(1, 9)], limits=limits)
        assert [each.first_revision for each in made.batches()] == [6, 7, 8]
        assert made.floor == 6


def test_a_batch_larger_than_the_bound_is_not_kept() -> None:
    made = history(batch(put(4)), batch(put(5, value=b"x" * 1000)), limits=CoreLimits(history_bytes_max=1000))
    assert (len(made), made.floor, made.bytes) == (0, 6, 0)


def test_the_total_bound_evicts_the_oldest_batch_of_all() -> None:
    stats = Stats()
    cost = batch(put(1)).memory_bytes
    ledger = HistoryBudget(CoreLimits(history_bytes_total_max=3 * cost), stats)
    one, two = History(ledger, 1, False), History(ledger, 1, False)
    for made, revision in ((one, 1), (two, 2), (one, 3), (two, 4)):
        made.append(batch(put(revision)), 0.0)
    assert (one.floor, two.floor, stats.history_bytes, stats.history_batches) == (2, 1, 3 * cost, 3)
    one.append(batch(put(5)), 0.0)
    assert (one.floor, two.floor) == (2, 3)


def test_old_batches_are_evicted_by_age() -> None:
    ledger = HistoryBudget(CoreLimits(history_age_s=60), Stats())
    made = History(ledger, 1, False)
    for revision, now in ((1, 0.0), (2, 50.0), (3, 100.0)):
        made.append(batch(put(revision)), now)
    deadline = ledger.next_deadline()
    assert deadline is not None
    assert 60 <= deadline <= 70
    ledger.expire(59.9)
    assert made.floor == 1
    ledger.expire(60.0)
    assert made.floor == 2
    ledger.expire(1000.0)
    assert (made.floor, len(made), ledger.next_deadline()) == (4, 0, None)


def test_batches_are_evicted_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches of half a minute are due at once, and those of a source that has ended."""
    monkeypatch.setattr("coalesce.history.EVICTED_MAX", 3)
    stats = Stats()
    ledger = HistoryBudget(CoreLimits(history_age_s=60), stats)
    one, ended = History(ledger, 1, False), History(ledger, 1, False)
    for revision in range(1, 6):
        one.append(batch(put(revision)), 1.0)
    for revision in range(6, 11):
        ended.append(batch(put(revision)), 2.0)
    ended.discard()
    counts = []
    while (deadline := ledger.next_deadline()) is not None and deadline <= 61.5:
        ledger.expire(61.5)
        counts.append(stats.history_batches)
    assert counts == [7, 4, 1, 0]
    assert (len(one), len(ended), stats.history_bytes, *ledger.discarded) == (0, 0, 0)
    assert stats.evicted_at["history_age_s"] == 5


def test_entries_of_evicted_batches_are_removed_in_parts() -> None:
    stats = Stats()
    ledger = HistoryBudget(CoreLimits(history_revisions_max=3_000, history_age_s=1e9), stats)
    old, busy = History(ledger, 1, False), History(ledger, 1, False)
    old.append(batch(put(1)), 0.0)
    longest, before = 0, 0
    for revision in range(2, 25_000):
        busy.append(batch(put(revision)), float(revision))
        count = len(ledger.entries) + len(ledger._kept)
        assert count >= before - 1_024
        longest, before = max(longest, count), count
        assert ledger._oldest.history is old
    assert longest < 12_000
    old.drop(2)
    assert ledger._oldest.history is busy
    for revision in range(25_000, 32_000):
        busy.append(batch(put(revision)), float(revision))
    alive = [entry for entry in [*ledger._kept, *ledger.entries] if entry.history is not None]
    assert alive == busy.batches()


def test_the_budget_drops_entries_that_histories_evicted() -> None:
    stats = Stats()
    ledger = HistoryBudget(CoreLimits(history_revisions_max=2), stats)
    made = History(ledger, 1, False)
    for revision in range(1, 1000):
        made.append(batch(put(revision)), float(revision))
    assert (len(made), stats.history_batches) == (2, 2)
    deadline = ledger.next_deadline()
    assert deadline is not None
    # Of a thousand entries at most some dozens are left, so the oldest one is recent.
    assert deadline > 900


def test_the_lists_stay_short_over_time() -> None:
    made = history(limits=CoreLimits(history_revisions_max=10))
    for revision in range(1, 5000):
        made.append(batch(put(revision)), 0.0)
        assert len(made.batches()) == min(revision, 10)
    assert replayed(made, 4998) == ("#0 @4999 put 4998 k=v put 4999 k=v", None)


def test_a_dropped_history_starts_at_the_given_floor() -> None:
    made = history(*FILLED)
    made.drop(20)
    assert (len(made), made.bytes, made.floor, made.last_revision) == (0, 0, 20, 0)


@contextmanager
def held_bytes() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the bytes allocated since and not freed."""
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


LARGE = 200_000


def large(revision: int) -> Batch:
    return batch(put(revision, value=b"%d" % revision * (LARGE // len(b"%d" % revision))))


def test_evicted_batches_are_freed() -> None:
    with held_bytes() as held:
        limits = CoreLimits(history_bytes_max=3 * large(1).memory_bytes)
        made = history(*[large(revision) for revision in range(1, 60)], limits=limits)
        assert len(made) == 3
        assert held() < 4 * LARGE


def test_dropped_histories_are_freed() -> None:
    with held_bytes() as held:
        ledger = HistoryBudget(ALL, Stats())
        histories = [History(ledger, 1, False) for _ in range(3)]
        for revision in range(1, 30):
            histories[revision % 3].append(large(revision), 0.0)
        for made in histories:
            made.drop(60)
        assert held() < LARGE


def test_the_budget_drops_entries_of_dropped_histories() -> None:
    made = history(*[batch(put(revision)) for revision in range(1, 1000)])
    made.drop(2000)
    assert len(made._budget.entries) <= 64


@pytest.mark.parametrize(("events", "size"), [(1, 0), (1, 2000), (10, 20), (100, 0)])
def test_the_byte_count_of_a_history_is_its_memory(events: int, size: int) -> None:
    """Memory bounds apply to the counted bytes, so these must be right; events come from the wire, as in a trunk."""
    batches = 2000 // events
    with held_bytes() as held:
        made = history()
        for number in range(batches):
            revision = 1_000_000 + number
            encoded = rpc_pb2.WatchResponse(
                header=rpc_pb2.ResponseHeader(cluster_id=2**63, member_id=2**62, revision=revision, raft_term=3),
                events=[
                    kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"/a/%d" % place, value=bytes(size), mod_revision=revision))
                    for place in range(events)
                ],
            ).SerializeToString()
            response = scan_watch_response(encoded)
            size_of_all = sum(len(event.encoded) for event in response.events)
            made.append(Batch(response.header, response.events, size_of_all), float(number))
        del response, encoded
        assert 0.7 * made.bytes < held() < 1.1 * made.bytes
