"""Programs about progress: requests, and progress_notify."""

from __future__ import annotations

from tests.differential.steps import (
    NOPUT,
    Ask,
    Cancel,
    Compact,
    Create,
    Delete,
    Program,
    Put,
    Wait,
)

ELSEWHERE = Put(b"elsewhere", times=3)
# Refused in order and without an id: once it is answered, etcd has decided on an earlier progress request.
TAKEN = Create(b"b", b"a")
NOTIFY = ("--experimental-watch-progress-notify-interval=200ms",)
DROPS = "etcd forgets a request while a watch of the stream catches up; we answer when it has"
FORGETS = "etcd forgets a request below the start; we answer it once that is reached"
SILENT_AT_COMPACTED = "etcd stays silent until a watch that compaction cancelled is cancelled by the client, too"

PROGRAMS = (
    # requests
    Program("progress without a watch", (Ask(answered=False), Create())),
    Program("progress after the last watch is gone", (Create(), Cancel(0), Ask(answered=False))),
    Program("progress of a quiet watch", (Create(), Ask(), ELSEWHERE, Ask(), Ask())),
    Program("progress after events", (Create(), Put(times=3), Wait(events=3), Ask(), Put(), Wait(events=4), Ask())),
    Program(
        "progress right after a put", (Create(), *(step for _ in range(10) for step in (Put(), Ask())), Wait(events=10))
    ),
    Program(
        "progress of all watches",
        (Create(), Create(b"a", b"c"), Create(b"", b"\x00"), ELSEWHERE, Wait(events=3), Ask()),
    ),
    Program(
        "progress of some filtered to nothing",
        (Create(filters=(NOPUT,)), Create(b"a", b"z"), Put(times=3), Wait(events=3), Ask()),
    ),
    Program("progress after a cancel", (Create(), Create(start=50), Cancel(1), ELSEWHERE, Ask())),
    Program(
        "progress is a stream's own",
        (Create(on="a"), Create(on="b"), ELSEWHERE, Ask(on="a"), ELSEWHERE, Ask(on="b"), Ask(on="a")),
    ),
    Program("progress after a refusal", (Create(), Create(raw_start=-1), Create(b"b", b"a"), ELSEWHERE, Ask())),
    Program(
        "progress before a future start",
        (
            Create(),
            Create(b"l", start=9),
            Put(),
            Wait(events=1),
            Ask(answered=False),
            TAKEN,
            Put(b"l", times=9),
            Wait(events=3),
        ),
        more_progress=FORGETS,
    ),
    Program(
        "progress once a future start has come",
        (Create(), Create(b"l", start=3), Put(times=2), Wait(events=2), ELSEWHERE, Ask(), Put(b"l"), Wait(events=3)),
    ),
    Program(
        "progress of a watch at the next revision",
        (Put(), Create(start=2), Ask(answered=False), TAKEN, ELSEWHERE, Ask(again=4)),
        more_progress=FORGETS,
    ),
    Program(
        "progress of a watch at the next revision comes with it", (Put(), Create(start=2), Put(), Wait(events=1), Ask())
    ),
    Program(
        "progress behind a pipelined create",
        (Create(pipelined=True), Ask(answered=False), Wait(controls=1), ELSEWHERE, Ask(again=3)),
        loaded_progress="the puts may come before the first request is answered",
    ),
    Program(
        "progress while catching up",
        (Put(times=50), Create(start=1), Ask(answered=False), Wait(events=50), Wait(progress=1, better=True)),
        more_progress=DROPS,
    ),
    Program(
        "progress after catching up",
        (Put(times=50), Create(start=1), Wait(events=50), ELSEWHERE, Ask(again=53), Put(), Wait(events=51), Ask()),
        loaded_progress="a request that was made again may be answered during the later puts",
    ),
    Program(
        "progress of a past start without events",
        (ELSEWHERE, Create(start=1), Ask(again=3), ELSEWHERE, Ask()),
        loaded_progress="a request that was made again may be answered during the later puts",
    ),
    Program(
        "progress next to a compacted watch",
        (
            *(Put(times=5), Compact(4), Create(b"k", b"l"), Create(start=1), Wait(compacted=1)),
            *(ELSEWHERE, Ask(answered=False), Wait(progress=1, better=True)),
            *(Cancel(1), Put(), Wait(events=1), Ask()),
        ),
        more_progress=SILENT_AT_COMPACTED,
        lonely=True,
    ),
    Program("progress after deletes elsewhere", (Put(b"elsewhere"), Create(), Delete(b"elsewhere"), Ask(), Ask())),
    Program(
        "progress under load",
        (
            Create(b"k", b"l"),
            *(step for n in range(30) for step in (Put(b"k%d" % n), Put(b"x"), Ask(answered=False))),
            Wait(events=30),
            Ask(again=60),
        ),
        loaded_progress="which request meets which revision depends on its way",
    ),
    # progress_notify
    Program(
        "notify of a quiet watch",
        (Create(progress_notify=True), ELSEWHERE, Wait(notified=3), ELSEWHERE, Wait(notified=6)),
        NOTIFY,
    ),
    Program(
        "notify only who asked",
        (Create(), Create(progress_notify=True), Create(b"l"), ELSEWHERE, Wait(notified=3)),
        NOTIFY,
    ),
    Program(
        "notify of a watch with events",
        (Create(progress_notify=True), Put(times=3), Wait(events=3, notified=3), Put(), Wait(events=4, notified=4)),
        NOTIFY,
    ),
    Program(
        "notify of a filtered watch",
        (Create(progress_notify=True, filters=(NOPUT,)), Put(times=3), Wait(notified=3)),
        NOTIFY,
    ),
    Program(
        "notify before a future start",
        (
            Create(progress_notify=True),
            Create(b"l", start=9, progress_notify=True),
            ELSEWHERE,
            Wait(notified=3),
            Put(b"l", times=7),
            Wait(events=2),
        ),
        NOTIFY,
    ),
    Program(
        "notify after catching up",
        (Put(times=9), Create(start=1, progress_notify=True), Wait(events=9), ELSEWHERE, Wait(notified=12)),
        NOTIFY,
    ),
    Program(
        "no notify after a cancel",
        (Create(progress_notify=True), Create(b"l", progress_notify=True), Cancel(0), ELSEWHERE, Wait(notified=3)),
        NOTIFY,
    ),
)
