"""Programs about start revisions, compaction, ranges, filters, prev_kv and the fields of events."""

from __future__ import annotations

from tests.differential.steps import (
    NODELETE,
    NOPUT,
    Ask,
    Cancel,
    Compact,
    Create,
    Delete,
    Disconnect,
    Grant,
    Program,
    Put,
    Resume,
    Revoke,
    Step,
    Txn,
    Wait,
)

FIVE = Put(times=5)
SPREAD = tuple(Put(key) for key in (b"\x00", b"\x01", b"a", b"a/", b"a/1", b"a/2", b"a0", b"b", b"\x7e", b"\xff\xff"))
"""One put to each of several keys around the borders of ranges."""
DELETED = (b"a", b"b")
SPREAD_KEYS = [*(put.key for put in SPREAD), *(put.key for put in SPREAD if DELETED[0] <= put.key < DELETED[1])]
"""The key of each event of the puts and of the delete after them."""

FROM_HISTORY = "others watch the range, or did a moment ago"
ALL = (b"\x00", b"\x00")
RANGES = {
    "a single key": (b"a", b""),
    "a prefix": (b"a/", b"a0"),
    "from a key": (b"a/1", b"\x00"),
    "all keys": ALL,
    "the empty key": (b"", b""),
    "all keys from the empty one": (b"", b"\x00"),
    "the key 0": (b"\x00", b""),
    "a range from the smallest key": (b"\x00", b"a/1"),
    "a range of one key": (b"a", b"a\x00"),
    "a range without keys": (b"c", b"d"),
    "a range up to the highest keys": (b"b", b"\xff\xff\xff"),
}


def _events(key: bytes, end: bytes) -> int:
    """Return how many of the spread events a range has."""
    first = key or b"\x00"
    if not end:
        return SPREAD_KEYS.count(first)
    return sum(key >= first and (end == b"\x00" or key < end) for key in SPREAD_KEYS)


def _compacted(name: str, start: int, *then: Step) -> Program:
    """Compact at 3 of 5 revisions, then watch from `start`."""
    return Program(name, (FIVE, Compact(3), Create(start=start), *then), lonely=True)


PROGRAMS = (
    # start revisions
    Program("now", (FIVE, Create(), Put(), Wait(events=1))),
    Program("now, next to what others watch", (Create(), Put(), Create(), Put(), Create(), Put(), Wait(events=6))),
    Program(
        "now, on many streams",
        (FIVE, *(Create(on=f"c:{n}") for n in range(10)), Put(), *(Wait(on=f"c:{n}", events=1) for n in range(10))),
    ),
    Program("the first revision", (FIVE, Create(start=1), Wait(events=5), Put(), Wait(events=6))),
    Program("a past revision", (FIVE, Create(start=3), Wait(events=3), Put(), Wait(events=4))),
    Program("the current revision", (FIVE, Create(start=5), Wait(events=1), Put(), Wait(events=2))),
    Program("the next revision", (FIVE, Create(start=6), Put(), Wait(events=1))),
    Program("a future revision", (Create(start=4), FIVE, Wait(events=2))),
    Program("a future revision of another key", (Create(start=4), Put(b"l", times=5), Put(), Wait(events=1))),
    Program(
        "future revisions, several",
        (Create(start=6), Create(start=3), Create(start=4), Create(), FIVE, Put(), Wait(events=14)),
    ),
    Program("a far future", (Create(raw_start=2**62), FIVE)),
    Program("the absolute revision 1", (Put(), Create(raw_start=1), Wait(events=1), Put(), Wait(events=2)), fresh=True),
    Program(
        "past revisions, all of them",
        (FIVE, *(Create(start=n) for n in range(1, 7)), Wait(events=15), Put(), Wait(events=21)),
    ),
    Program("a past that was deleted", (Put(), Delete(), Put(), Delete(), Create(start=1), Wait(events=4))),
    Program("a past revision of a quiet key", (Put(), Put(b"l", times=20), Create(start=5), Put(), Wait(events=1))),
    # compaction
    _compacted("a compacted revision", 1, Wait(compacted=1)),
    _compacted("a compacted revision, then life goes on", 2, Wait(compacted=1), Create(), Put(), Wait(events=1)),
    _compacted("right below the compact revision", 2, Wait(compacted=1)),
    _compacted("equal to the compact revision", 3, Wait(events=3), Put(), Wait(events=4)),
    _compacted("right above the compact revision", 4, Wait(events=2)),
    _compacted("now, after a compaction", 6, Put(), Wait(events=1)),
    _compacted(
        "the id of a compacted watch stays taken", 1, Wait(compacted=1), Create(id=0), Create(), Cancel(0), Create()
    ),
    Program(
        "a chosen id after a compaction cancel",
        (
            FIVE,
            Compact(3),
            Create(start=1, id=8),
            Wait(compacted=1),
            Create(id=8),
            Cancel(8),
            Create(id=8),
            Put(),
            Wait(events=1),
        ),
        lonely=True,
    ),
    _compacted(
        "a second cancel of a compacted watch", 1, Wait(compacted=1), Cancel(0), Cancel(0, silent=True), Create()
    ),
    Program(
        "a compaction does not touch a live watch",
        (
            Create(),
            FIVE,
            Wait(events=5),
            Compact(5),
            Put(),
            Wait(events=6),
            Put(b"l", times=3),
            Compact(9),
            Put(),
            Wait(events=7),
        ),
    ),
    Program(
        "a compacted watch next to a live one",
        (
            *(Create(b"k", b"l"), FIVE, Wait(events=5), Compact(4)),
            *(Create(start=2), Wait(compacted=1), Put(), Wait(events=6)),
        ),
        lonely=True,
    ),
    Program(
        "a compacted start that a live watch keeps",
        (Create(), FIVE, Wait(events=5), Compact(4), Create(start=2), Wait(compacted=1), Put(), Wait(events=6)),
        from_history=FROM_HISTORY,
    ),
    Program(
        "a compaction beyond a future start",
        (
            *(Create(), Create(start=4), Put(), Wait(events=1)),
            *(Put(b"l", times=6), Compact(7), Put(), Wait(events=3)),
        ),
    ),
    Program(
        "a deleted key, compacted at its delete",
        (Put(), Delete(), Put(b"l"), Compact(2), Create(start=2), Create(b"k", b"m", start=2), Wait(events=3)),
        since=(3, 5, 18),
    ),
    Program(
        "a client resumes below the compact revision",
        (
            Create(),
            Put(times=2),
            Wait(events=2),
            Disconnect(),
            Put(times=5),
            Compact(6),
            Resume(),
            Wait(on="again", compacted=1),
        ),
        from_history=FROM_HISTORY,
    ),
    Program(
        "a client resumes at the compact revision",
        (Create(), Put(times=2), Wait(events=2), Disconnect(), Put(times=5), Compact(3), Resume(), Wait(events=7)),
    ),
    # ranges
    *(
        Program(f"range: {name}", (Create(*range_), *SPREAD, Delete(*DELETED), Wait(events=_events(*range_))))
        for name, range_ in RANGES.items()
    ),
    *(
        Program(
            f"past range: {name}", (*SPREAD, Delete(*DELETED), Create(*range_, start=1), Wait(events=_events(*range_)))
        )
        for name, range_ in RANGES.items()
    ),
    Program(
        "overlapping ranges on one stream",
        (
            *(Create(*range_) for range_ in RANGES.values()),
            *(*SPREAD, Delete(*DELETED)),
            Wait(events=sum(_events(*range_) for range_ in RANGES.values())),
        ),
    ),
    # fields of events
    Program("versions", (Create(), Put(times=3), Delete(), Put(), Delete(), Delete(), Wait(events=6))),
    Program("a lease", (Create(), Grant(4711), Put(lease=4711), Put(b"l", lease=4711), Revoke(4711), Wait(events=2))),
    Program(
        "a lease, with prev_kv", (Create(prev_kv=True), Grant(4712), Put(lease=4712), Revoke(4712), Wait(events=2))
    ),
    Program(
        "a transaction is one revision",
        (
            Create(b"k", b"l"),
            Txn([(b"k%d" % n, b"v") for n in range(9)]),
            Txn([(b"k3", None), (b"k1", b"w")]),
            Wait(events=11),
        ),
    ),
    Program(
        "a past transaction is one revision",
        (
            Txn([(b"k%d" % n, b"v") for n in range(9)]),
            Txn([(b"k3", None), (b"k1", b"w")]),
            Create(b"k", b"l", start=1),
            Wait(events=11),
        ),
    ),
    Program(
        "a transaction that deletes and misses",
        (Create(b"k", b"l"), Put(), Txn([(b"k", None), (b"kx", None)]), Txn([(b"ky", None)]), Wait(events=2)),
    ),
    Program("empty values", (Create(), Put(value=b""), Put(value=b""), Delete(), Wait(events=3))),
    Program(
        "binary keys",
        (Create(b"\x00\xff", b"\x01"), Put(b"\x00\xff\x00"), Put(b"\x00\xfe"), Put(b"\x00\xff"), Wait(events=2)),
    ),
    # filters
    Program("no puts", (Create(filters=(NOPUT,)), Put(times=3), Delete(), Put(), Delete(), Wait(events=2))),
    Program("no deletes", (Create(filters=(NODELETE,)), Put(times=3), Delete(), Put(), Wait(events=4))),
    Program("neither", (Create(filters=(NOPUT, NODELETE)), Put(times=3), Delete(), Create(), Put(), Wait(events=1))),
    Program("the same filter twice", (Create(filters=(NOPUT, NOPUT)), Put(), Delete(), Wait(events=1))),
    Program(
        "all filters side by side, with and without prev_kv",
        (
            *(
                Create(filters=each, prev_kv=prev)
                for each in ((), (NOPUT,), (NODELETE,), (NOPUT, NODELETE))
                for prev in (False, True)
            ),
            *(Put(times=2), Delete(), Put(), Delete()),
            Wait(events=2 * (5 + 2 + 3)),
        ),
    ),
    Program(
        "filters on the past",
        (
            Put(times=2),
            Delete(),
            Put(),
            Create(start=1, filters=(NOPUT,)),
            Create(start=1, filters=(NODELETE,)),
            Wait(events=4),
        ),
    ),
    Program(
        "a filter of a transaction",
        (Put(), Create(b"k", b"l", filters=(NODELETE,)), Txn([(b"k", None), (b"kk", b"v")]), Wait(events=1)),
    ),
    Program(
        "what a filter removed is progress all the same",
        (Create(filters=(NOPUT,)), Put(times=4), Ask(), Delete(), Wait(events=1)),
    ),
    # prev_kv
    Program(
        "prev_kv", (Put(value=b"0"), Create(prev_kv=True), Put(times=2), Delete(), Put(), Delete(), Wait(events=5))
    ),
    Program(
        "prev_kv of the past",
        (Put(times=3), Delete(), Put(), Create(prev_kv=True, start=1), Wait(events=5), Put(), Wait(events=6)),
    ),
    Program(
        "prev_kv only for who asked", (Put(), Create(), Create(prev_kv=True), Create(), Put(), Delete(), Wait(events=6))
    ),
    Program(
        "prev_kv comes later",
        (
            Put(),
            Create(),
            Put(),
            Wait(events=1),
            Create(prev_kv=True),
            Put(),
            Wait(events=3),
            Create(prev_kv=True, start=2),
            Wait(events=5),
            Put(),
            Wait(events=8),
        ),
    ),
    Program(
        "prev_kv that is compacted",
        (
            FIVE,
            Compact(4),
            Create(prev_kv=True, start=4),
            Create(prev_kv=True, start=5),
            Wait(events=3),
            Put(),
            Wait(events=5),
        ),
        lonely=True,
    ),
    Program(
        "prev_kv of a transaction",
        (
            Put(b"k1"),
            Put(b"k2"),
            Create(b"k", b"l", prev_kv=True),
            Txn([(b"k1", b"w"), (b"k2", None), (b"k3", b"n")]),
            Wait(events=3),
        ),
    ),
    Program(
        "prev_kv with a filter", (Put(), Create(prev_kv=True, filters=(NOPUT,)), Put(times=2), Delete(), Wait(events=1))
    ),
    Program("prev_kv from a future revision", (Put(), Create(prev_kv=True, start=4), Put(times=4), Wait(events=2))),
)
