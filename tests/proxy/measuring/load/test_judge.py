"""The verdict on recorded responses: a correct record is faultless, and each kind of fault is detected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from coalesce.guarantees.checkers import DELETE, PUT, Change, Truth
from proto.pb import kv_pb2, rpc_pb2
from proxy.measuring.load.client import EventRecorder, read_record
from proxy.measuring.load.judge import RunVerdict, judge, percentile_ms
from proxy.measuring.load.plan import ClientPlan, LoadRange, PlannedStream, PlannedWatch
from proxy.measuring.load.target import LoadTarget
from proxy.measuring.load.writer import read_stamp, stamp

SPAN = LoadRange(b"/r/", b"/r0")
TRUTH = Truth(
    [
        Change(PUT, b"/r/a", b"1", 2, 2, 1, 0),
        Change(PUT, b"/r/b", b"2", 3, 3, 1, 0),
        Change(DELETE, b"/r/a", b"", 0, 4, 0, 0),
        Change(PUT, b"/r/b", b"3", 3, 5, 2, 0),
    ]
)
Response = rpc_pb2.WatchResponse


def put(key: bytes, value: bytes, created: int, revision: int, version: int) -> kv_pb2.Event:
    kv = kv_pb2.KeyValue(key=key, value=value, create_revision=created, mod_revision=revision, version=version)
    return kv_pb2.Event(type=kv_pb2.Event.PUT, kv=kv)


def delete(key: bytes, revision: int) -> kv_pb2.Event:
    return kv_pb2.Event(type=kv_pb2.Event.DELETE, kv=kv_pb2.KeyValue(key=key, mod_revision=revision))


def events(revision: int, *sent: kv_pb2.Event, watch_id: int = 0) -> Response:
    return Response(header=rpc_pb2.ResponseHeader(revision=revision), watch_id=watch_id, events=sent)


def created(watch_id: int = 0, revision: int = 1) -> Response:
    return Response(header=rpc_pb2.ResponseHeader(revision=revision), watch_id=watch_id, created=True)


def correct() -> list[Response]:
    """Return the correct responses to a watch from revision 2."""
    return [
        created(),
        events(2, put(b"/r/a", b"1", 2, 2, 1)),
        events(4, put(b"/r/b", b"2", 3, 3, 1), delete(b"/r/a", 4)),
        events(5, put(b"/r/b", b"3", 3, 5, 2)),
    ]


def verdict_on(directory: Path, responses: list[Response], watch: PlannedWatch | None = None) -> RunVerdict:
    path = str(directory / "record")
    recorder = EventRecorder(path)
    for response in responses:
        recorder.add(0, response.SerializeToString())
    recorder.close()
    plan = ClientPlan(LoadTarget(address=""), [SPAN], [PlannedStream(0, [watch or PlannedWatch(0, 2)])], path)
    return judge([plan], TRUTH, 5, safe_headers=True)


def faults(verdict: RunVerdict) -> set[str]:
    return {name for name in ("lost", "duplicated", "out_of_order", "wrong") if getattr(verdict, name)}


def test_a_correct_record_is_faultless(tmp_path: Path) -> None:
    verdict = verdict_on(tmp_path, correct())
    assert verdict.faultless
    assert (verdict.watches, verdict.messages, verdict.events) == (1, 4, 4)


def test_filters_and_prev_kv_are_judged_by_the_request(tmp_path: Path) -> None:
    only_deletes = [created(), events(4, delete(b"/r/a", 4))]
    assert verdict_on(tmp_path, only_deletes, PlannedWatch(0, 2, no_put=True)).faultless
    assert faults(verdict_on(tmp_path, correct(), PlannedWatch(0, 2, no_put=True))) == {"wrong"}
    assert faults(verdict_on(tmp_path, correct(), PlannedWatch(0, 2, prev_kv=True))) == {"wrong"}


def drop_one(responses: list[Response]) -> None:
    del responses[1]


def drop_the_last(responses: list[Response]) -> None:
    del responses[-1]


def double_one(responses: list[Response]) -> None:
    responses.insert(2, responses[1])


def swap_two(responses: list[Response]) -> None:
    responses[1], responses[2] = responses[2], responses[1]


def change_a_value(responses: list[Response]) -> None:
    responses[1].events[0].kv.value = b"other"


def leave_the_range(responses: list[Response]) -> None:
    responses[1].events[0].kv.key = b"/s/a"


def use_an_unknown_watch_id(responses: list[Response]) -> None:
    responses.append(events(9, watch_id=77))


def raise_the_header_revision(responses: list[Response]) -> None:
    responses[1].header.revision = 5


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (drop_one, {"lost"}),
        (drop_the_last, {"lost"}),
        (double_one, {"duplicated"}),
        (change_a_value, {"wrong"}),
        (leave_the_range, {"lost", "wrong"}),
        (use_an_unknown_watch_id, {"wrong"}),
        (raise_the_header_revision, {"out_of_order"}),
    ],
)
def test_each_fault_is_found(tmp_path: Path, spoil: Callable[[list[Response]], None], found: set[str]) -> None:
    responses = correct()
    spoil(responses)
    verdict = verdict_on(tmp_path, responses)
    assert not verdict.faultless
    assert faults(verdict) == found
    assert verdict.examples


def test_wrong_order_is_found(tmp_path: Path) -> None:
    responses = correct()
    swap_two(responses)
    assert "out_of_order" in faults(verdict_on(tmp_path, responses))


def test_a_watch_without_responses_has_lost_all_events(tmp_path: Path) -> None:
    assert faults(verdict_on(tmp_path, [])) == {"lost"}


def test_a_truncated_record_gives_its_complete_blocks(tmp_path: Path) -> None:
    path = tmp_path / "record"
    recorder = EventRecorder(str(path))
    for number in range(1000):
        recorder.add(0, b"%d" % number)
    recorder.close()
    assert [record.message for record in read_record(str(path))] == [b"%d" % number for number in range(1000)]
    path.write_bytes(path.read_bytes()[:-1])
    assert len(read_record(str(path))) == 512


def test_values_contain_the_time_of_their_write() -> None:
    value = stamp(100)
    assert len(value) == 100
    assert read_stamp(value) > 0
    assert read_stamp(b"something else") == 0
    assert read_stamp(b"something else that is longer") == 0


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentile_ms([], 50) == 0
    assert percentile_ms([3_000_000], 99) == 3.0
    assert percentile_ms([number * 1_000_000 for number in range(1, 101)], 50) == 51.0
    assert percentile_ms([number * 1_000_000 for number in range(1, 101)], 99) == 100.0
