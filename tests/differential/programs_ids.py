"""Programs about ids, cancels, refusals and the messages that a stream accepts."""

from __future__ import annotations

from tests.differential.steps import (
    Ask,
    Cancel,
    CancelStream,
    Create,
    Disconnect,
    HalfClose,
    Open,
    Program,
    Put,
    Raw,
    Resume,
    Wait,
)

FILTER_UNKNOWN = b"\x0a\x06\x0a\x01k\x2a\x01\x07"
"""A create of the key `k` with the filter 7, which does not exist."""

PROGRAMS = (
    # ids
    Program("automatic ids count up", (Create(), Create(), Create(), Put(), Wait(events=3))),
    Program("an automatic id is not used again", (Create(), Cancel(0), Create(), Put(), Wait(events=1))),
    Program(
        "automatic ids skip chosen ones",
        (Create(id=1), Create(id=2), Create(), Create(), Cancel(1), Create(), Put(), Wait(events=4)),
    ),
    Program("a chosen id is kept", (Create(id=7), Create(id=2**62), Put(), Wait(events=2))),
    Program("a chosen id is free after its cancel", (Create(id=7), Cancel(7), Create(id=7), Put(), Wait(events=1))),
    Program(
        "an automatic id chosen again after its cancel",
        (Create(), Create(), Cancel(1), Create(id=1), Create(), Put(), Wait(events=3)),
    ),
    Program("a duplicate id", (Create(id=7), Create(id=7, key=b"l"), Put(), Put(b"l"), Wait(events=1))),
    Program("a duplicate of an automatic id", (Create(), Create(), Create(id=1), Put(), Wait(events=2))),
    Program("a negative chosen id", (Create(id=-5), Put(), Wait(events=1), Cancel(-5), Put())),
    Program(
        "ids are a stream's own",
        (
            Create(id=7, on="c:a"),
            Create(id=7, on="c:b"),
            Cancel(7, on="c:a"),
            Put(),
            Wait(on="c:b", events=1),
        ),
    ),
    # cancels
    Program("a cancel ends the events", (Create(), Put(), Wait(events=1), Cancel(0), Put(times=3))),
    Program("a cancel of an unknown id", (Cancel(3, silent=True), Create(), Cancel(3, silent=True), Cancel(0))),
    Program("a second cancel", (Create(), Cancel(0), Cancel(0, silent=True), Create())),
    Program(
        "a cancel before its created",
        (Create(pipelined=True), Cancel(0, pipelined=True), Wait(controls=2), Put()),
    ),
    Program(
        "a cancel before its created, of a past start",
        (
            Put(times=3),
            Create(start=4, pipelined=True, id=3),
            Cancel(3, pipelined=True),
            Create(start=4, id=3, pipelined=True),
            Wait(controls=3),
            Put(),
            Wait(events=1),
        ),
    ),
    Program(
        "one watch of two is cancelled",
        (Create(), Create(), Put(), Wait(events=2), Cancel(0), Put(), Wait(events=3)),
    ),
    # order of answers
    Program(
        "pipelined creates are answered in order",
        (
            Put(times=3),
            Create(pipelined=True),
            Create(raw_start=-1, pipelined=True),
            Create(b"b", b"a", pipelined=True),
            Create(start=1, pipelined=True),
            Create(b"a", b"c", id=9, pipelined=True),
            Create(id=9, pipelined=True),
            Cancel(0, pipelined=True),
            Create(start=90, pipelined=True),
            Wait(controls=8, events=3),
            Put(b"b"),
            Wait(events=4),
        ),
    ),
    Program(
        "many creates at once",
        (
            *(Create(b"k%d" % (number % 7), pipelined=True) for number in range(60)),
            Wait(controls=60),
            *(Put(b"k%d" % number) for number in range(7)),
            Wait(events=60),
        ),
    ),
    # refusals and their order
    Program("a negative start", (Create(raw_start=-1), Create(raw_start=-(2**62)), Create())),
    Program(
        "a negative start comes before an empty range and a duplicate id",
        (Create(id=4), Create(b"b", b"a", raw_start=-1, id=4), Create(raw_start=-7, id=4)),
    ),
    Program("an empty range comes before a duplicate id", (Create(id=4), Create(b"b", b"a", id=4))),
    Program("a reversed range", (Create(b"b", b"a"), Create(), Put(), Wait(events=1))),
    Program("a range of equal ends", (Create(b"a", b"a"), Create(b"\x00", b"\x00"), Put(b"a"), Wait(events=1))),
    Program("a range that ends below the smallest key", (Create(b"", b"\x00\x00"), Create(b"\x01", b"\x00\xff"))),
    Program("a refused create takes no id", (Create(b"b", b"a"), Create(raw_start=-1), Create())),
    Program("a refusal on a fresh stream, then progress", (Create(raw_start=-1), Ask(answered=False), Create())),
    # messages that a stream accepts
    Program("an empty request", (Raw(), Create(), Raw(), Put(), Wait(events=1))),
    Program(
        "an unknown kind of request", (Raw(b"\xa2\x01\x00"), Create(), Raw(b"\xa2\x01\x00"), Put(), Wait(events=1))
    ),
    Program("an unknown filter", (Raw(FILTER_UNKNOWN, creates=True), Put(), Wait(events=1))),
    Program(
        "half-close does not end the events",
        (Create(), Create(b"a", b"z"), HalfClose(), Put(times=3), Wait(events=6)),
    ),
    Program(
        "half-close right after the create",
        (Create(pipelined=True), HalfClose(), Wait(controls=1), Put(), Wait(events=1)),
    ),
    Program("half-close without a watch", (Open(), HalfClose(), Put())),
    Program(
        "a stream is cancelled by its client",
        (Create(), Create(on="other"), CancelStream(), Put(), Wait(on="other", events=1)),
    ),
    Program(
        "a client drops its connection and resumes",
        (
            Create(),
            Put(times=3),
            Wait(events=3),
            Disconnect(),
            Put(times=3),
            Resume(),
            Wait(events=6),
            Put(),
            Wait(events=7),
        ),
    ),
    Program(
        "a client comes back again and again",
        (
            Create(b"k", b"l", prev_kv=True),
            Put(times=2),
            Wait(events=2),
            Disconnect(),
            Put(times=2),
            Resume(on="b"),
            Wait(events=4),
            Disconnect("b"),
            Resume(of="b", on="c"),
            Put(times=2),
            Wait(events=6),
            Disconnect("c"),
            Put(b"unrelated", times=5),
            Resume(of="c", on="d"),
            Put(),
            Wait(events=7),
        ),
    ),
    Program("metadata hasleader while there is a leader", (Open(has_leader=True), Create(), Put(), Wait(events=1))),
)
