"""The key of an encoded event, compared with protobuf."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from proto.event_key import event_key
from proto.fields import bytes_field
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import scan_watch_response

KEYS = st.binary(min_size=0, max_size=300)


@given(
    KEYS,
    st.binary(max_size=300),
    st.sampled_from(kv_pb2.Event.EventType.values()),
    st.booleans(),
    st.integers(0, 2**62),
)
@example(b"k", b"v" * 20_000, kv_pb2.Event.DELETE, True, 7)
@example(b"k" * 128, b"", kv_pb2.Event.PUT, False, 1)
def test_the_key_is_the_one_that_protobuf_reads(
    key: bytes, value: bytes, kind: kv_pb2.Event.EventType.ValueType, prev: bool, number: int
) -> None:
    kv = kv_pb2.KeyValue(key=key, value=value, mod_revision=number, create_revision=number, version=1)
    event = kv_pb2.Event(type=kind, kv=kv, prev_kv=kv_pb2.KeyValue(key=b"other") if prev else None)
    message = rpc_pb2.WatchResponse(events=[event, event]).SerializeToString()
    assert [event_key(each.encoded) for each in scan_watch_response(message).events] == [key, key]


def test_the_key_is_found_in_any_order_of_fields() -> None:
    kv = bytes_field(0x2A, b"value") + bytes_field(0x0A, b"first") + bytes_field(0x0A, b"key")
    previous = bytes_field(0x1A, bytes_field(0x0A, b"other"))
    for event in (bytes_field(0x12, kv) + previous, previous + bytes_field(0x12, kv), bytes_field(0x7A, b"?") * 9):
        encoded = bytes_field(0x5A, event)
        assert event_key(encoded) == kv_pb2.Event.FromString(event).kv.key
        assert event_key(encoded) in (b"key", b"")


def test_an_event_without_a_key_value_has_no_key() -> None:
    assert event_key(bytes_field(0x5A, b"")) == b""
    assert event_key(bytes_field(0x5A, b"\x08\x01")) == b""
