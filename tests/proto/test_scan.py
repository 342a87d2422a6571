"""Watch messages at byte level: tables of decoded, encoded and refused messages."""

from __future__ import annotations

import pytest

from proto.fields import ScanError
from proto.pb import rpc_pb2
from proto.plain_request import PROGRESS, encode_cancel, encode_create
from proto.scan import DELETE, PUT, Header, WatchResponse, encode_response, encode_watch_id, scan_watch_response
from tests.proto.encoding import fixed32, fixed64, number, string

CLUSTER_ID = 0xCDF818194E3A8C32
MEMBER_ID = 0x8E9E05C52164694D
HEADER = Header.make(CLUSTER_ID, MEMBER_ID, revision=300, raft_term=5)
UNKNOWN = fixed64(90, b"12345678") + number(91, -1) + string(92, b"new") + fixed32(93, b"1234")

KV = string(1, b"a") + number(2, 250) + number(3, 300) + number(4, 2) + string(5, b"v" * 200) + number(6, 1 << 62)
PREV_KV = string(1, b"a") + number(2, 250) + number(3, 250) + number(4, 1) + string(5, b"before")

# A field that extends past its message: the error depends on the bytes after it.
CUT = "past the end|past its end|in the middle"


def event(content: bytes) -> bytes:
    """Return an event as a field of a response."""
    return string(11, content)


def scan_event(content: bytes) -> tuple[int, int, bytes, bytes]:
    """Scan a response of this event, with one before and one after it, and return the decoded fields."""
    other = event(string(2, number(3, 9)))
    before, read, after = scan_watch_response(other + event(content) + other).events
    assert (before.encoded, before.revision) == (after.encoded, after.revision) == (other, 9)
    return read.kind, read.revision, read.encoded, read.bare


def test_events_of_a_response_are_found_as_encoded() -> None:
    put, delete = event(string(2, KV)), event(number(1, DELETE) + string(2, string(1, b"b") + number(3, 301)))
    response = scan_watch_response(HEADER.encoded + number(2, 7) + put + delete)
    assert response.watch_id == 7
    assert (response.created, response.canceled, response.fragment) == (False, False, False)
    assert (response.compact_revision, response.cancel_reason) == (0, "")
    assert [(e.kind, e.revision, e.encoded) for e in response.events] == [(PUT, 300, put), (DELETE, 301, delete)]
    header = response.header
    assert header.encoded == HEADER.encoded
    assert (header.cluster_id, header.member_id) == (CLUSTER_ID, MEMBER_ID)
    assert (header.revision, header.raft_term) == (300, 5)


def test_all_fields_of_a_control_response_are_read() -> None:
    data = HEADER.encoded + number(2, -1) + number(3, 1) + number(4, 1) + number(5, 99) + string(6, b"no: \xc3\xa9")
    response = scan_watch_response(data + number(7, 1))
    assert response.watch_id == -1
    assert (response.created, response.canceled, response.fragment) == (True, True, True)
    assert (response.compact_revision, response.cancel_reason) == (99, "no: é")
    assert response.events == []


def test_an_empty_response_has_the_default_values() -> None:
    response = scan_watch_response(b"")
    assert (response.watch_id, response.events) == (0, [])
    assert (response.header.encoded, response.header.revision) == (b"", 0)


def test_responses_share_no_events() -> None:
    assert scan_watch_response(b"").events is not scan_watch_response(b"").events
    assert WatchResponse(HEADER).events is not WatchResponse(HEADER).events


def test_cancel_reason_with_invalid_utf8_is_readable() -> None:
    assert scan_watch_response(string(6, b"key \xff")).cancel_reason == "key \ufffd"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(UNKNOWN + HEADER.encoded + number(2, 7) + event(string(2, KV)), id="unknown first"),
        pytest.param(event(string(2, KV)) + number(2, 7) + HEADER.encoded, id="backwards"),
        pytest.param(HEADER.encoded + number(2, 3) + number(2, 7) + event(string(2, KV)), id="watch_id twice"),
        pytest.param(HEADER.encoded + number(2, 7, 3, 10) + event(string(2, KV)), id="watch_id overlong"),
        pytest.param(HEADER.encoded + string(2, b"") + number(2, 7) + event(string(2, KV)), id="watch_id mistyped too"),
        pytest.param(HEADER.encoded + number(2, 7) + number(11, 5) + event(string(2, KV)), id="events mistyped too"),
        pytest.param(HEADER.encoded + number(2, 7) + event(string(2, KV)) + UNKNOWN, id="unknown last"),
    ],
)
def test_odd_responses_read_the_same(data: bytes) -> None:
    response = scan_watch_response(data)
    assert (response.watch_id, response.header.encoded) == (7, HEADER.encoded)
    assert [(e.revision, e.encoded) for e in response.events] == [(300, event(string(2, KV)))]


@pytest.mark.parametrize(
    ("content", "kind", "revision"),
    [
        pytest.param(b"", PUT, 0, id="empty"),
        pytest.param(number(1, DELETE), DELETE, 0, id="no kv"),
        pytest.param(string(2, b""), PUT, 0, id="empty kv"),
        pytest.param(string(2, KV), PUT, 300, id="put"),
        pytest.param(number(1, DELETE) + string(2, KV), DELETE, 300, id="delete"),
        pytest.param(string(2, KV) + number(1, DELETE), DELETE, 300, id="type last"),
        pytest.param(number(1, PUT) + number(1, DELETE) + string(2, KV), DELETE, 300, id="type twice"),
        pytest.param(number(1, 2) + string(2, KV), 2, 300, id="type of the future"),
        pytest.param(number(1, -1) + string(2, KV), -1, 300, id="type negative"),
        pytest.param(number(1, 1 << 31) + string(2, KV), -(1 << 31), 300, id="type of more than 32 bits"),
        pytest.param(number(1, DELETE, 5, 10) + string(2, KV, 5, 5), DELETE, 300, id="overlong"),
        pytest.param(UNKNOWN + string(2, UNKNOWN + KV) + UNKNOWN, PUT, 300, id="unknown around"),
        pytest.param(string(2, KV + UNKNOWN), PUT, 300, id="unknown after mod_revision"),
        pytest.param(string(2, number(3, 4) + KV), PUT, 300, id="mod_revision twice"),
        pytest.param(string(2, KV) + string(2, string(1, b"b")), PUT, 300, id="kv twice, first revision stays"),
        pytest.param(string(2, KV) + string(2, number(3, 301)), PUT, 301, id="kv twice, second revision wins"),
        pytest.param(string(2, number(3, 7) + UNKNOWN) + string(2, b""), PUT, 7, id="kv twice, odd"),
        pytest.param(string(2, number(3, -1)), PUT, -1, id="mod_revision negative"),
        pytest.param(string(2, number(3, (1 << 63) - 1)), PUT, (1 << 63) - 1, id="mod_revision largest"),
        pytest.param(string(2, number(3, 5, size=10)), PUT, 5, id="mod_revision overlong"),
        pytest.param(string(2, number(4, 5, size=10) + number(3, 5)), PUT, 5, id="version overlong"),
        pytest.param(string(2, string(3, b"x") + number(3, 5)), PUT, 5, id="mod_revision mistyped too"),
        pytest.param(number(2, 1) + string(2, number(3, 5)), PUT, 5, id="kv mistyped too"),
        pytest.param(number(3, 1) + string(2, number(3, 5)), PUT, 5, id="prev_kv mistyped"),
    ],
)
def test_kind_and_revision_of_an_event_are_found(content: bytes, kind: int, revision: int) -> None:
    encoded = event(content)
    assert scan_event(content) == (kind, revision, encoded, encoded)


def test_bare_is_the_same_object_without_prev_kv() -> None:
    for content in (string(2, KV), UNKNOWN + string(2, KV)):
        (read,) = scan_watch_response(event(content)).events
        assert read.bare is read.encoded


@pytest.mark.parametrize(
    ("content", "bare"),
    [
        pytest.param(string(2, KV) + string(3, PREV_KV), string(2, KV), id="as etcd"),
        pytest.param(string(3, PREV_KV) + string(2, KV), string(2, KV), id="prev_kv first"),
        pytest.param(string(3, PREV_KV) * 2 + string(2, KV), string(2, KV), id="prev_kv twice"),
        pytest.param(string(2, KV) + string(3, b""), string(2, KV), id="prev_kv empty"),
        pytest.param(number(1, DELETE) + string(3, PREV_KV), number(1, DELETE), id="no kv"),
        pytest.param(
            UNKNOWN + string(2, KV) + string(3, UNKNOWN + PREV_KV) + UNKNOWN,
            UNKNOWN + string(2, KV) + UNKNOWN,
            id="unknown fields stay",
        ),
        pytest.param(number(3, 1) + string(2, KV) + string(3, b""), number(3, 1) + string(2, KV), id="mistyped stays"),
        pytest.param(string(2, KV, 3, 4) + string(3, PREV_KV, 5, 5), string(2, KV, 3, 4), id="overlong"),
    ],
)
def test_bare_removes_prev_kv_only(content: bytes, bare: bytes) -> None:
    kind, revision, encoded, without = scan_event(content)
    assert (encoded, without) == (event(content), event(bare))
    assert scan_event(bare) == (kind, revision, without, without)


def test_bare_of_an_event_with_an_overlong_tag() -> None:
    (read,) = scan_watch_response(string(11, string(2, KV) + string(3, PREV_KV), tag_size=2)).events
    assert read.bare == event(string(2, KV))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        pytest.param(number(0, 1), "not a field tag", id="field 0"),
        pytest.param(string(0, b""), "not a field tag", id="field 0, bytes"),
        pytest.param(b"\x7e\x00", "not a field tag", id="wire type 6"),
        pytest.param(b"\x7f\x00", "not a field tag", id="wire type 7"),
        pytest.param(b"\x7b\x7c", "group", id="group"),
        pytest.param(b"\x7c\x00", "group", id="end of a group"),
        pytest.param(event(b"\x7b\x7c"), "group", id="group in an event"),
        pytest.param(event(string(2, b"\x1b\x1c")), "group", id="group in a kv"),
        pytest.param(event(string(3, b"\x1b\x1c")), "group", id="group in a prev_kv"),
        pytest.param(string(1, b"\x1b\x1c"), "group", id="group in a header"),
        pytest.param(number(1 << 29, 1), "not a field tag", id="tag of more than 32 bits"),
        pytest.param(number(2, 1, tag_size=6), "more than 32 bits", id="tag of 6 bytes"),
        pytest.param(string(90, b"", size=6), "more than 32 bits", id="length of 6 bytes"),
        pytest.param(string(11, b"", size=6), "more than 32 bits", id="length of 6 bytes, events"),
        pytest.param(number(2, 1, size=11), "more than 64 bits", id="watch_id of 11 bytes"),
        pytest.param(number(90, 1, size=11), "more than 64 bits", id="unknown number of 11 bytes"),
        pytest.param(event(string(2, number(3, 1, size=11))), "more than 64 bits", id="mod_revision of 11 bytes"),
        pytest.param(event(string(2, number(4, 1, size=11))), "more than 64 bits", id="version of 11 bytes"),
        pytest.param(event(string(2, number(3, 5) + b"\x20")), CUT, id="kv ends in a number"),
        pytest.param(event(string(2, b"\x0a\x05ab") + number(1, 1)), CUT, id="key extends past its kv"),
        pytest.param(event(b"\x12\x05ab") + number(2, 1) * 9, CUT, id="kv extends past its event"),
        pytest.param(event(b"\x12\x02\x18") + b"\x05", CUT, id="kv extends past its event by one"),
        pytest.param(b"\x0a\x02\x18", CUT, id="header extends past the response"),
        pytest.param(b"\x0a\x03\x18\x05", CUT, id="header cut between fields"),
        pytest.param(string(1, b"\x18\xff") + b"\x00", CUT, id="number extends past the header"),
        pytest.param(b"\x5a\x10", CUT, id="event missing"),
        pytest.param(fixed64(90, b"1234"), CUT, id="fixed64 cut"),
        pytest.param(fixed32(90, b"123"), CUT, id="fixed32 cut"),
    ],
)
def test_malformed_responses_are_refused_with_the_reason(data: bytes, what: str) -> None:
    with pytest.raises(ScanError, match=what):
        scan_watch_response(data)


def test_every_truncation_is_refused_or_shorter() -> None:
    fields = [HEADER.encoded, number(2, 700), event(string(2, KV) + string(3, PREV_KV)), event(number(1, 1)), UNKNOWN]
    data = b"".join(fields)
    whole = {len(b"".join(fields[:count])): count for count in range(len(fields) + 1)}
    whole |= {len(data) - len(UNKNOWN) + size: 4 for size in (10, 22, 28)}
    for size in range(len(data)):
        if size in whole:
            assert len(scan_watch_response(data[:size]).events) == max(0, min(whole[size] - 2, 2))
        else:
            with pytest.raises(ScanError):
                scan_watch_response(data[:size])


@pytest.mark.parametrize(
    ("fields", "numbers"),
    [
        pytest.param(b"", (0, 0, 0, 0), id="empty"),
        pytest.param(number(3, 7), (0, 0, 7, 0), id="revision only"),
        pytest.param(number(1, 1) + number(2, 2) + number(3, 3) + number(4, 4), (1, 2, 3, 4), id="as etcd"),
        pytest.param(number(4, 4) + number(3, 3) + number(2, 2) + number(1, 1), (1, 2, 3, 4), id="backwards"),
        pytest.param(number(1, 1) + number(2, 2) + number(1, 8) + number(3, 3), (8, 2, 3, 0), id="cluster_id twice"),
        pytest.param(number(1, 1) + number(2, 2) + number(3, -3) + UNKNOWN, (1, 2, -3, 0), id="unknown, negative"),
        pytest.param(UNKNOWN + number(1, -1) + number(2, -2), ((1 << 64) - 1, (1 << 64) - 2, 0, 0), id="64 bits"),
        pytest.param(number(1, 1) + string(2, b"ab") + number(3, 3), (1, 0, 3, 0), id="member_id mistyped"),
        pytest.param(fixed64(1, b"\x80" * 8) + number(3, 3), (0, 0, 3, 0), id="cluster_id mistyped"),
    ],
)
def test_header_fields_are_read_after_any_other_header(fields: bytes, numbers: tuple[int, int, int, int]) -> None:
    # Earlier headers must not matter: the ids of the last one are cached.
    for _ in range(2):
        header = scan_watch_response(string(1, fields)).header
        assert (header.cluster_id, header.member_id, header.revision, header.raft_term) == numbers
        assert header.encoded == string(1, fields)
        assert scan_watch_response(HEADER.encoded).header.cluster_id == CLUSTER_ID


def test_header_given_twice_is_merged() -> None:
    data = string(1, number(1, 1) + number(3, 3) + UNKNOWN) + number(2, 7) + string(1, number(3, 4) + number(4, 4))
    header = scan_watch_response(data).header
    assert (header.cluster_id, header.member_id, header.revision, header.raft_term) == (1, 0, 4, 4)
    assert header.encoded == string(1, number(1, 1) + number(3, 3) + UNKNOWN + number(3, 4) + number(4, 4))


def test_header_given_twice_with_overlong_tags() -> None:
    data = string(1, number(1, 1), tag_size=3) + string(1, number(3, 4), tag_size=2, size=3)
    assert scan_watch_response(data).header.encoded == string(1, number(1, 1) + number(3, 4))


def test_header_at_another_revision() -> None:
    assert HEADER.at(300) is HEADER
    moved = HEADER.at(70_000)
    assert moved.encoded == Header.make(CLUSTER_ID, MEMBER_ID, 70_000, 5).encoded
    assert (moved.cluster_id, moved.member_id, moved.revision, moved.raft_term) == (CLUSTER_ID, MEMBER_ID, 70_000, 5)


@pytest.mark.parametrize(
    "encoded",
    [
        pytest.param(b"", id="none"),
        pytest.param(string(1, UNKNOWN + number(3, 3) + number(4, 1)), id="unknown"),
        pytest.param(string(1, number(3, 2) + number(1, 9) + number(3, 3)), id="revision twice"),
        pytest.param(string(1, number(3, 3) + string(3, b"x")), id="mistyped"),
    ],
)
def test_odd_header_at_another_revision(encoded: bytes) -> None:
    expected = rpc_pb2.WatchResponse.FromString(encoded)
    expected.header.revision = 12
    moved = scan_watch_response(encoded).header.at(12)
    assert moved.revision == 12
    assert rpc_pb2.WatchResponse.FromString(moved.encoded) == expected
    assert scan_watch_response(moved.encoded).header.revision == 12


@pytest.mark.parametrize("watch_id", [0, 1, 127, 128, 700, 1 << 40, (1 << 63) - 1, -1, -(1 << 63)])
def test_an_encoded_watch_id_is_what_protobuf_writes(watch_id: int) -> None:
    encoded = encode_watch_id(watch_id)
    assert encoded == rpc_pb2.WatchResponse(watch_id=watch_id).SerializeToString()
    assert scan_watch_response(encoded).watch_id == watch_id


def test_an_encoded_response_is_what_protobuf_writes() -> None:
    reason = "etcdserver: permission denied"
    encoded = encode_response(
        HEADER, -1, created=True, canceled=True, compact_revision=7, cancel_reason=reason, fragment=True
    )
    assert encoded == rpc_pb2.WatchResponse(
        header=rpc_pb2.ResponseHeader(cluster_id=CLUSTER_ID, member_id=MEMBER_ID, revision=300, raft_term=5),
        watch_id=-1,
        created=True,
        canceled=True,
        compact_revision=7,
        cancel_reason=reason,
        fragment=True,
    ).SerializeToString(deterministic=True)


def test_encode_response_of_events() -> None:
    put, delete = event(string(2, KV)), event(number(1, DELETE) + string(2, number(3, 301)))
    assert encode_response(HEADER, 0, events=put + delete) == HEADER.encoded + put + delete
    response = rpc_pb2.WatchResponse.FromString(encode_response(HEADER, 5, events=put + delete))
    assert [event.kv.mod_revision for event in response.events] == [300, 301]


def test_an_encoded_create_is_what_protobuf_writes() -> None:
    create = rpc_pb2.WatchCreateRequest(
        key=b"a",
        range_end=b"b",
        start_revision=1 << 40,
        progress_notify=True,
        filters=[rpc_pb2.WatchCreateRequest.NOPUT, rpc_pb2.WatchCreateRequest.NODELETE],
        prev_kv=True,
        watch_id=-9,
        fragment=True,
    )
    encoded = encode_create(
        b"a",
        b"b",
        1 << 40,
        watch_id=-9,
        progress_notify=True,
        no_put=True,
        no_delete=True,
        prev_kv=True,
        fragment=True,
    )
    assert encoded == rpc_pb2.WatchRequest(create_request=create).SerializeToString(deterministic=True)


def test_encode_create_omits_defaults() -> None:
    assert encode_create(b"") == rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest()).SerializeToString()


@pytest.mark.parametrize(("no_put", "no_delete"), [(False, False), (True, False), (False, True), (True, True)])
def test_an_encoded_create_has_its_filters(no_put: bool, no_delete: bool) -> None:
    request = rpc_pb2.WatchRequest.FromString(encode_create(b"a", no_put=no_put, no_delete=no_delete))
    filters = request.create_request.filters
    assert (rpc_pb2.WatchCreateRequest.NOPUT in filters) == no_put
    assert (rpc_pb2.WatchCreateRequest.NODELETE in filters) == no_delete


def test_encode_cancel_and_progress() -> None:
    for watch_id in (0, 5, -1):
        request = rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=watch_id))
        assert encode_cancel(watch_id) == request.SerializeToString()
    progress = rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest())
    assert progress.SerializeToString() == PROGRESS
