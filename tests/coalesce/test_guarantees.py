"""The guarantee checkers: each violation is found by its own checker only, and clean lives have no violations.

The truth below is one short history; the logs are written by hand against it. A checker that reports too much is as bad
as one that reports too little: it is soon ignored.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import pytest

from coalesce.guarantees.checkers import (
    DELETE,
    GUARANTEES,
    PUT,
    Bookmark,
    Canceled,
    Change,
    Created,
    Life,
    Opened,
    PreviousValue,
    Received,
    Reopened,
    Truth,
    WatchLog,
    WatchRecord,
    check,
    header_safe,
    in_range,
)
from coalesce.guarantees.truth import WatchedRange


def put(revision: int, key: bytes, value: bytes, created: int = 0, version: int = 1) -> Change:
    return Change(PUT, key, value, created or revision, revision, version, 0)


def delete(revision: int, key: bytes) -> Change:
    return Change(DELETE, key, b"", 0, revision, 0, 0)


STORY = [
    put(2, b"a", b"1"),
    put(3, b"b", b"1"),
    put(4, b"a", b"2", created=2, version=2),
    put(5, b"a", b"3", created=2, version=3),
    put(5, b"b", b"2", created=3, version=2),
    put(6, b"other", b"x"),
    delete(7, b"a"),
    put(8, b"a", b"4"),
    put(9, b"b", b"3", created=3, version=3),
]
TRUTH = Truth(STORY, compact_revisions=[5])
R = {revision: [c for c in STORY if c.mod_revision == revision] for revision in range(2, 10)}
A, B5 = R[5]


def events(*revisions: int) -> list[Change]:
    """Return the truth's changes of [a, c) at these revisions."""
    return [change for revision in revisions for change in R[revision] if change.key < b"c"]


def response(*revisions: int, fragment: bool = False) -> Received:
    """Return one response with these revisions, whose header has the revision of its last event."""
    return Received(revisions[-1], events(*revisions), fragment)


def life(*records: WatchRecord, start: int | None = 2, **asked: bool) -> WatchLog:
    """Return a log of a watch of [a, c), created at once."""
    return WatchLog(b"a", b"c", **asked, records=[Opened(start), Created(9), *records])


def broken(log: WatchLog, complete_through: int | None = None, truth: Truth = TRUTH) -> set[str]:
    return {violation.guarantee for violation in check(log, truth, complete_through, safe_headers=True)}


def without(changes: Iterable[Change], kind: int) -> list[Change]:
    return [change for change in changes if change.kind != kind]


CLEAN: dict[str, WatchLog] = {
    "everything one by one": life(*(response(r) for r in (2, 3, 4, 5, 7, 8, 9))),
    "joined": life(response(2, 3, 4), response(5, 7, 8, 9)),
    "fragments of one revision": life(
        response(2, 3, 4), Received(5, [A], True), Received(5, [B5]), response(7, 8), response(9)
    ),
    "a run of fragments cut by a reconnect": life(
        response(2, 3, 4), Received(5, [A], True), Reopened(5), Created(9), response(5, 7, 8, 9)
    ),
    "no puts": life(Received(9, [delete(7, b"a")]), no_put=True),
    "no deletes": life(Received(9, without(events(2, 3, 4, 5, 7, 8, 9), DELETE)), no_delete=True),
    "neither": life(no_put=True, no_delete=True),
    "from the middle": life(response(5, 7), response(8, 9), start=5),
    "from the future": life(Received(9, events(9)), start=9),
    "bookmarks": life(response(2, 3), Bookmark(3), Bookmark(3), response(4, 5), Bookmark(6), response(7, 8, 9)),
    "reconnect after an event": life(response(2, 3), Reopened(4), Created(9), response(4, 5, 7, 8, 9)),
    "reconnect after a bookmark": life(response(2, 3, 4, 5), Bookmark(6), Reopened(7), Created(9), response(7, 8, 9)),
    "reconnect short of the bookmark": life(
        response(2, 3, 4, 5), Bookmark(6), Reopened(6), Created(9), response(7, 8, 9)
    ),
    "reconnect before anything came": life(Reopened(2), Created(9), response(2, 3, 4, 5, 7, 8, 9)),
    "client asks again for what it had": life(
        response(2, 3, 4, 5, 7), Reopened(4), Created(9), response(4, 5, 7, 8, 9)
    ),
    "client skips what it does not want": life(response(2, 3), Reopened(8), Created(9), response(8, 9)),
    "compacted": life(Canceled(5, ""), start=3),
    "compacted, cancelled twice": life(Canceled(5, ""), Canceled(5, ""), start=3),
    "compacted, resumed above": life(response(2, 3), Canceled(5, ""), Reopened(5), Created(9), response(5, 7, 8, 9)),
    "cancelled by the client": life(response(2, 3), Canceled(0, "")),
    "cancelled with a reason": life(response(2, 3), Canceled(0, "watchmux: too slow")),
    "now, nothing after": WatchLog(b"a", b"c", records=[Opened(None), Created(9), Bookmark(9)]),
    "now": WatchLog(b"a", b"c", records=[Opened(None), Created(6), Bookmark(6), response(7), response(8, 9)]),
    "now, reopened": WatchLog(
        b"a", b"c", records=[Opened(None), Created(6), Reopened(7), Created(9), response(7, 8), response(9)]
    ),
    "now, asked again before created": WatchLog(
        b"a", b"c", records=[Opened(None), Reopened(None), Created(7), response(8, 9)]
    ),
    "a single key": WatchLog(b"b", records=[Opened(3), Created(9), Received(9, [*R[3], B5, *R[9]])]),
    "every key": WatchLog(
        b"", b"\0", records=[Opened(2), Created(9), Received(6, [*STORY[:6]]), Received(9, [*STORY[6:]])]
    ),
    "nothing in the range": WatchLog(b"zzz", records=[Opened(2), Created(9)]),
}


@pytest.mark.parametrize("name", CLEAN)
def test_a_clean_life_has_no_violations(name: str) -> None:
    """The quick check and each single checker report nothing."""
    assert check(CLEAN[name], TRUTH, 9, safe_headers=True) == []
    assert [v for checker in (*GUARANTEES, header_safe) for v in checker(Life(CLEAN[name], TRUTH, 9))] == []


def test_a_clean_life_passes_the_quick_check() -> None:
    """Every clean life above, including repeated cancels, passes without checking single events."""
    assert [name for name, log in CLEAN.items() if not Life(log, TRUTH, 9).faultless()] == []


ALL = (2, 3, 4, 5, 7, 8, 9)
BROKEN: list[tuple[str, str, WatchLog]] = [
    ("ordered", "swapped revisions", life(response(2, 3), Received(5, [*R[5], *R[4]]), response(7, 8, 9))),
    ("ordered", "an event before created", WatchLog(b"b", records=[Opened(9), Received(9, R[9]), Created(9)])),
    ("ordered", "an event after canceled", life(response(2, 3), Canceled(0, ""), response(4))),
    ("ordered", "a bookmark after canceled", life(response(2, 3), Canceled(0, ""), Bookmark(3))),
    ("unique", "a response twice", life(response(2, 3), response(3), response(4, 5, 7, 8, 9))),
    ("unique", "an event twice in a response", life(Received(3, [*R[2], *R[3], *R[3]]), response(4, 5, 7, 8, 9))),
    ("unique", "an event again after a reconnect", life(response(2), Reopened(3), Created(9), response(2, *ALL[1:]))),
    ("reliable", "a revision missing", life(response(2, 3), response(5, 7, 8, 9))),
    ("reliable", "half a revision missing", life(response(2, 3, 4), Received(5, [A]), response(7, 8, 9))),
    ("reliable", "a delete missing", life(response(2, 3, 4, 5), response(8, 9))),
    (
        "atomic",
        "a revision in two responses",
        life(response(2, 3, 4), Received(5, [A]), Received(9, [B5, *events(7, 8, 9)])),
    ),
    (
        "atomic",
        "a bookmark inside a run",
        life(response(2, 3, 4, 5), Received(7, R[7], True), Bookmark(6), Received(7, R[7]), response(8, 9)),
    ),
    ("atomic", "two headers in a run", life(Received(3, R[2], True), Received(4, events(3, 4)), response(5, 7, 8, 9))),
    ("resumable", "the first event missing", life(response(3, 4, 5, 7, 8, 9))),
    ("resumable", "nothing came", life()),
    ("resumable", "the end missing", life(response(*ALL[:-1]))),
    ("resumable", "lost at a reconnect", life(response(2, 3), Reopened(4), Created(9), response(5, 7, 8, 9))),
    (
        "resumable",
        "lost with a header above its events",
        life(Received(4, events(2, 3)), Reopened(5), Created(9), response(5, 7, 8, 9)),
    ),
    (
        "resumable",
        "now, the next one missing",
        WatchLog(b"a", b"c", records=[Opened(None), Created(6), response(8, 9)]),
    ),
    ("resumable", "cancelled at a revision never compacted", life(response(2, 3), Canceled(6, ""))),
    ("resumable", "cancelled though above the compaction", life(response(2, 3, 4), Canceled(5, ""))),
    ("resumable", "cancelled at its own start", life(Canceled(5, ""), start=5)),
    ("bookmarkable", "an event below a bookmark", life(response(2, 3), Bookmark(4), response(*ALL[2:]))),
    ("bookmarkable", "bookmarks go down", life(response(*ALL), Bookmark(10), Bookmark(9))),
    ("bookmarkable", "a bookmark below an event", life(response(*ALL), Bookmark(8))),
    ("bookmarkable", "a bookmark before a future start", life(Bookmark(8), response(9), start=9)),
    (
        "bookmarkable",
        "a bookmark below the created header",
        WatchLog(b"a", b"c", records=[Opened(None), Created(8), Bookmark(7), response(9)]),
    ),
    ("bookmarkable", "a bookmark over events that never came", life(response(*ALL[:-1]), Bookmark(9))),
    ("matching", "outside the range", life(response(2, 3, 4, 5), Received(6, R[6]), response(7, 8, 9))),
    ("matching", "through the filter", life(Received(9, events(*ALL)), no_delete=True)),
    ("matching", "before the start", life(response(4, 5, 7, 8, 9), start=5)),
    ("matching", "at the created header", WatchLog(b"a", b"c", records=[Opened(None), Created(8), response(8, 9)])),
    ("matching", "never made", life(response(*ALL), Received(10, [put(10, b"a", b"?", 8, 2)]))),
    ("matching", "another value", life(response(*ALL[:-1]), Received(9, [put(9, b"b", b"?", 3, 3)]))),
    ("matching", "another kind", life(response(*ALL[:-1]), Received(9, [delete(9, b"b")._replace(create_revision=3)]))),
    (
        "prev_kv_true",
        "not asked for",
        life(response(*ALL[:-1]), Received(9, [R[9][0]._replace(prev=PreviousValue(*B5[2:7]))])),
    ),
    ("create_flag", "a put as a create", life(response(*ALL[:-1]), Received(9, [put(9, b"b", b"3", 9, 3)]))),
    ("create_flag", "a create as a put", life(response(*ALL[:5]), Received(8, [put(8, b"a", b"4", 2)]), response(9))),
    ("header_safe", "the store's header while catching up", life(Received(9, events(2, 3)), response(4, 5, 7, 8, 9))),
    ("header_safe", "a header below its event", life(response(2, 3), Received(4, events(4, 5)), response(7, 8, 9))),
]


@pytest.mark.parametrize(("guarantee", "name", "log"), BROKEN, ids=[f"{g}: {n}" for g, n, _ in BROKEN])
def test_each_violation_is_found_by_its_checker_only(guarantee: str, name: str, log: WatchLog) -> None:
    assert broken(log, 9) == {guarantee}, name


def test_each_guarantee_has_a_history_that_breaks_it() -> None:
    checkers = {checker.__name__ for checker in (*GUARANTEES, header_safe)}
    assert {guarantee for guarantee, _, _ in BROKEN} == checkers


def prev(*, of: int, key: bytes = b"a") -> Change:
    """Return the truth's change at this revision with its true prev_kv."""
    change = TRUTH.find(of, key)
    assert change is not None
    return change


def test_prev_kv_is_the_value_before_or_absent_after_compaction() -> None:
    full = [prev(of=4), prev(of=5), prev(of=7), prev(of=8)]
    assert [each.prev and each.prev.value for each in full] == [b"1", b"2", b"3", None]
    watch = WatchLog(b"a", prev_kv=True, records=[Opened(4), Created(9), Received(9, full)])
    assert broken(watch, 9) == set()
    # Revision 3, which has the value before 4, is below the compaction at 5; revision 6 is not.
    watch.records[-1] = Received(9, [full[0]._replace(prev=None), *full[1:]])
    assert broken(watch, 9) == set()
    watch.records[-1] = Received(9, [*full[:2], full[2]._replace(prev=None), full[3]])
    assert broken(watch, 9) == {"prev_kv_true"}
    watch.records[-1] = Received(9, [full[0], full[1]._replace(prev=full[0].prev), *full[2:]])
    assert broken(watch, 9) == {"prev_kv_true"}
    watch.records[-1] = Received(9, [*full[:3], full[3]._replace(prev=full[0].prev)])
    assert broken(watch, 9) == {"prev_kv_true"}


def test_a_partial_truth_does_not_guess_previous_values() -> None:
    truth = Truth(STORY[3:])
    watch = WatchLog(
        b"a", prev_kv=True, records=[Opened(5), Created(9), Received(9, [prev(of=5), prev(of=7), prev(of=8)])]
    )
    assert broken(watch, 9, truth) == set()


def test_without_a_last_revision_only_the_received_is_checked() -> None:
    assert broken(life(response(2, 3))) == set()
    assert broken(life(response(2, 3)), 4) == {"resumable"}


def test_an_incomplete_run_at_the_end_is_ignored() -> None:
    watch = life(response(2, 3, 4), Received(5, [A], True))
    assert broken(watch) == set()
    assert broken(watch, 5) == {"resumable"}


def test_violations_are_limited_per_guarantee() -> None:
    changes = [put(revision, b"a", b"v") for revision in range(2, 200)]
    log = WatchLog(b"a", records=[Opened(2), Created(200)])
    assert 0 < len(check(log, Truth(changes), 200)) < 20


@pytest.mark.parametrize(
    ("key", "range_end", "inside", "outside"),
    [
        (b"a", b"", [b"a"], [b"", b"aa", b"b"]),
        (b"a", b"c", [b"a", b"b", b"bzz"], [b"c", b"A"]),
        (b"b", b"\0", [b"b", b"\xff\xff"], [b"a"]),
        (b"", b"\0", [b"\0", b"a"], []),
        (b"", b"", [b"\0"], [b"a"]),
    ],
)
def test_ranges_are_like_etcds(key: bytes, range_end: bytes, inside: list[bytes], outside: list[bytes]) -> None:
    assert all(in_range(each, key, range_end) for each in inside)
    assert not any(in_range(each, key, range_end) for each in outside)
    truth = Truth([put(number, each, b"") for number, each in enumerate([*inside, *outside], 2)])
    assert [change.key for change in truth.expected(WatchedRange(key, range_end), 0, 99)] == inside


def test_the_truth_must_be_ordered() -> None:
    with pytest.raises(ValueError, match="goes back from revision 3 to 2"):
        Truth([put(3, b"a", b""), put(2, b"b", b"")])


def test_the_quick_check_agrees_with_the_checkers() -> None:
    """A log that passes the quick check passes every checker; the converse holds except for order in a revision."""
    rng = random.Random(7)
    for _ in range(3000):
        log = _corrupted(rng)
        found = [v for checker in (*GUARANTEES, header_safe) for v in checker(Life(log, TRUTH, 9))]
        if Life(log, TRUTH, 9).faultless():
            assert found == [], log
        elif not found:
            # Only the order of the operations within one revision is not guaranteed.
            in_order = [
                r._replace(changes=sorted(r.changes, key=_place)) if isinstance(r, Received) else r for r in log.records
            ]
            log.records[:] = in_order
            assert Life(log, TRUTH, 9).faultless(), log.records


def _place(change: Change) -> tuple[int, bytes]:
    return change.mod_revision, change.key


def _corrupted(rng: random.Random) -> WatchLog:
    """Return one of the clean lives with a random small change (which may have no effect)."""
    model = CLEAN[rng.choice(list(CLEAN))]
    log = WatchLog(*model.asked, records=list(model.records))
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(1, len(log.records)) if len(log.records) > 1 else 0
        record = log.records[place]
        wound = rng.randrange(5)
        if wound == 0:
            del log.records[place]
        elif wound == 1:
            log.records.insert(place, rng.choice([Bookmark(rng.randint(1, 10)), Canceled(5, ""), record]))
        elif wound == 2 and isinstance(record, Received) and record.changes:
            changes = list(record.changes)
            rng.shuffle(changes)
            log.records[place] = record._replace(changes=changes[: rng.randint(1, len(changes))])
        elif wound == 3 and isinstance(record, Received):
            log.records[place] = record._replace(
                revision=record.revision + rng.randint(-2, 2), fragment=rng.random() < 0.3
            )
        elif wound == 4:
            log.records.insert(place, Reopened(rng.randint(1, 10)))
            log.records.insert(place + 1, Created(9))
    return log
