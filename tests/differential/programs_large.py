"""Programs about large data: fragments, backlogs, slow readers."""

from __future__ import annotations

from tests.differential.steps import (
    Ask,
    Cancel,
    Create,
    Delete,
    Open,
    Program,
    Put,
    ReadOn,
    Restart,
    StopReading,
    Txn,
    Wait,
)

MB = 1024 * 1024
SIX_MB = tuple((b"k%d" % number, bytes([65 + number]) * MB) for number in range(6))
SMALL = tuple((b"k%d" % number, bytes([65 + number]) * 200_000) for number in range(7))
LARGE_REQUESTS = ("--max-request-bytes=8388608",)
LARGE_REQUEST_BYTES = 8 * MB + 512 * 1024
"""etcd's bound with `LARGE_REQUESTS`: of requests, and of fragments."""
PUT_SIX_MB = tuple(Put(key, value) for key, value in SIX_MB)
RANGE = (b"k", b"l")

PROGRAMS = (
    # one revision of 6 MB: the deletes carry it in their prev_kv
    Program(
        "six megabytes in one revision, in fragments",
        (*PUT_SIX_MB, Create(*RANGE, prev_kv=True, fragment=True), Delete(*RANGE), Wait(events=6)),
    ),
    Program(
        "six megabytes in one revision, whole",
        (*PUT_SIX_MB, Create(*RANGE, prev_kv=True), Delete(*RANGE), Wait(events=6)),
    ),
    Program(
        "six megabytes in one revision, to watches of all kinds",
        (
            *PUT_SIX_MB,
            *(
                Create(*RANGE, prev_kv=prev_kv, fragment=fragment)
                for prev_kv in (False, True)
                for fragment in (False, True)
            ),
            Create(b"k2", fragment=True, prev_kv=True),
            Delete(*RANGE),
            Wait(events=25),
            Put(b"k2"),
            Wait(events=30),
        ),
    ),
    Program(
        "six megabytes in one revision of the past, in fragments",
        (*PUT_SIX_MB, Delete(*RANGE), Create(*RANGE, prev_kv=True, fragment=True, start=7), Wait(events=6)),
    ),
    # one transaction of 6 MB: etcd accepts it with a flag, and sends fragments of 2 MiB once it runs without it again
    Program(
        "a transaction of six megabytes, fragmented from the past",
        (
            *(Txn(SIX_MB), Restart(flags=()), Create(*RANGE, fragment=True, start=1), Wait(events=6)),
            *(Create(*RANGE, start=1), Wait(events=12), Put(b"k1"), Wait(events=14)),
        ),
        LARGE_REQUESTS,
        fresh=True,
    ),
    Program(
        "a transaction of six megabytes, live, below a larger limit",
        (Create(*RANGE, fragment=True), Create(*RANGE), Txn(SIX_MB), Wait(events=12), Put(b"k1"), Wait(events=14)),
        LARGE_REQUESTS,
        request_bytes_max=LARGE_REQUEST_BYTES,
        long=True,
    ),
    Program(
        "nine megabytes above a larger limit",
        (
            *PUT_SIX_MB,
            *(Put(b"k%d" % number, b"x" * MB) for number in (6, 7, 8)),
            *(Create(*RANGE, prev_kv=True, fragment=True), Delete(*RANGE), Wait(events=9)),
        ),
        LARGE_REQUESTS,
        request_bytes_max=LARGE_REQUEST_BYTES,
    ),
    # what is not fragmented
    Program("a small transaction is not fragmented", (Create(*RANGE, fragment=True), Txn(SMALL[:5]), Wait(events=5))),
    Program(
        "one large event is never cut",
        (Create(fragment=True, prev_kv=True), Put(value=b"a" * MB), Put(value=b"b" * MB), Wait(events=2)),
    ),
    Program(
        "progress and cancels around fragments",
        (
            *(*PUT_SIX_MB, Create(*RANGE, prev_kv=True, fragment=True), Create(b"x")),
            *(
                Delete(*RANGE),
                Ask(),
                Wait(events=6),
                Put(b"x"),
                Wait(events=7),
                Cancel(0),
                Put(b"x"),
                Wait(events=8),
                Ask(),
            ),
        ),
    ),
    # many revisions
    Program(
        "a backlog of 1200 revisions",
        (Put(times=1200, pipelined=True), Create(start=1), Wait(events=1200), Put(), Wait(events=1201)),
    ),
    Program(
        "a backlog of 12 MB, in fragments",
        (
            *(Put(b"k%d" % number, b"%d" % number * (MB // 2)) for number in range(24)),
            *(Create(*RANGE, fragment=True, start=1), Wait(events=24), Put(b"k"), Wait(events=25)),
        ),
    ),
    Program(
        "a backlog of 12 MB, whole",
        (
            *(Put(b"k%d" % number, b"%d" % number * (MB // 2)) for number in range(24)),
            *(Create(*RANGE, start=1), Wait(events=24), Put(b"k"), Wait(events=25)),
        ),
        long=True,
    ),
    # slow readers
    Program(
        "a slow reader gets everything",
        (
            *(Open("slow", window=65_535), Create(*RANGE, on="slow"), Create(*RANGE), StopReading("slow")),
            *(Put(b"k%d" % number, b"%d" % number * 50_000) for number in range(20)),
            *(
                Wait(events=20),
                Put(),
                ReadOn("slow"),
                Wait("slow", events=21),
                Put(),
                Wait("slow", events=22),
                Ask("slow", again=22),
            ),
        ),
        loaded_progress="etcd drops requests until the watch has caught up",
    ),
    Program(
        "a slow reader of fragments",
        (
            *(*PUT_SIX_MB, Open("slow", window=65_535), Create(*RANGE, prev_kv=True, fragment=True, on="slow")),
            *(StopReading("slow"), Delete(*RANGE), Put(b"k1"), Put(b"k2"), ReadOn("slow"), Wait("slow", events=8)),
        ),
    ),
)
