"""The comparison itself: it accepts the permitted differences, and no others."""

from __future__ import annotations

from typing import Any

import pytest

from proto.pb import kv_pb2, rpc_pb2
from tests.differential.freedoms import differences
from tests.differential.lawful import violations
from tests.differential.recording import Recording, StreamRecord
from tests.differential.steps import Create, Program

PLAIN = Program("plain", ())
IDS = (1, 2, 3)
Response = rpc_pb2.WatchResponse


def event(revision: int, key: bytes = b"k", **extra: Any) -> kv_pb2.Event:
    return kv_pb2.Event(kv=kv_pb2.KeyValue(key=key, mod_revision=revision, create_revision=revision), **extra)


def response(revision: int, *events: kv_pb2.Event, **extra: Any) -> Response:
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=2, raft_term=3, revision=revision)
    return Response(header=header, events=events, **extra)


def recording(*responses: Response, proxied: bool = True, creates: tuple[Create, ...] = (Create(),)) -> Recording:
    stream = StreamRecord("s", list(responses), "", 100, list(creates))
    return Recording(proxied, 0, 50, IDS, [stream])


CREATED = response(4, created=True)
TWO = (event(5), event(6))
GOOD = (CREATED, response(5, TWO[0]), response(6, TWO[1]), response(9, watch_id=-1), response(9, canceled=True))


def test_equal_recordings_have_no_differences() -> None:
    assert differences(PLAIN, recording(*GOOD, proxied=False), recording(*GOOD)) == []
    assert violations(PLAIN, recording(*GOOD)) == []


@pytest.mark.parametrize(
    "proxied",
    [
        (CREATED, response(6, *TWO), *GOOD[3:]),
        (*GOOD[:3], GOOD[3], GOOD[3], GOOD[4]),
        (*GOOD[:4], response(6, canceled=True)),
    ],
    ids=["grouped", "progress twice", "an older header of a cancel"],
)
def test_permitted_differences_are_accepted(proxied: tuple[Response, ...]) -> None:
    assert differences(PLAIN, recording(*GOOD, proxied=False), recording(*proxied)) == []


WRONG = {
    "another id": (response(4, created=True, watch_id=1), *GOOD[1:]),
    "another now": (response(5, created=True), *GOOD[1:]),
    "refused": (response(4, created=True, canceled=True, watch_id=-1), *GOOD[1:]),
    "an event less": (*GOOD[:2], *GOOD[3:]),
    "an event twice": (*GOOD[:2], *GOOD[1:]),
    "another key": (CREATED, response(5, event(5, b"l")), *GOOD[2:]),
    "a delete": (CREATED, response(5, event(5, type=kv_pb2.Event.DELETE)), *GOOD[2:]),
    "prev_kv unasked": (CREATED, response(5, event(5, prev_kv=kv_pb2.KeyValue(key=b"k"))), *GOOD[2:]),
    "no progress": (*GOOD[:3], GOOD[4]),
    "less progress": (*GOOD[:3], response(7, watch_id=-1), GOOD[4]),
    "no canceled": GOOD[:4],
    "a reason": (*GOOD[:4], response(9, canceled=True, cancel_reason="why")),
    "compacted": (*GOOD[:4], response(9, canceled=True, compact_revision=3)),
    "a later header": (*GOOD[:4], response(10, canceled=True)),
    "events after canceled": (*GOOD, response(10, event(10))),
}


@pytest.mark.parametrize("name", WRONG)
def test_other_differences_are_found(name: str) -> None:
    assert differences(PLAIN, recording(*GOOD, proxied=False), recording(*WRONG[name]))


FRAGMENT = response(5, event(5), fragment=True)
UNLAWFUL = {
    "an event before created": GOOD[1:],
    "one revision in two responses": (CREATED, response(5, event(5)), response(5, event(5, b"l"))),
    "revisions go down": (CREATED, response(6, event(6)), response(5, event(5))),
    "an event below progress": (CREATED, response(9, watch_id=-1), response(7, event(7))),
    "progress goes down": (CREATED, response(9, watch_id=-1), response(8, watch_id=-1)),
    "progress below an event": (CREATED, response(9, event(9)), response(8, watch_id=-1)),
    "the header is not the last event's": (CREATED, response(9, event(5))),
    "between fragments": (CREATED, response(4, created=True, watch_id=1), FRAGMENT, response(5, event(5), watch_id=1)),
    "fragments with two headers": (CREATED, FRAGMENT, response(6, event(5, b"l"))),
    "another member": (CREATED, Response(header=rpc_pb2.ResponseHeader(revision=5), events=[event(5)])),
    "a revision that never was": (response(51, created=True),),
    "an answer of the past": (CREATED, response(9, event(9)), response(5, canceled=True)),
    "an id twice": (CREATED, CREATED),
    "a compaction cancel without a revision": (CREATED, response(0, canceled=True, compact_revision=8)),
}


@pytest.mark.parametrize("name", UNLAWFUL)
def test_unlawful_streams_are_found(name: str) -> None:
    assert violations(PLAIN, recording(*UNLAWFUL[name]))
