"""SETTINGS both ways: they are checked, applied and then acknowledged; unknown ones are ignored."""

from __future__ import annotations

import pytest

from proto.http2 import Connection, Http2Limits, Role
from tests.http2 import wire
from tests.http2.wire import (
    ENABLE_PUSH,
    HEADER_TABLE_SIZE,
    INITIAL_WINDOW_SIZE,
    MAX_CONCURRENT_STREAMS,
    MAX_FRAME_SIZE,
    MAX_HEADER_LIST_SIZE,
    Peer,
    client,
    raw,
    server,
    settings,
)

# (identifier, value) -> the event
VALUES: list[tuple[int, int, str]] = [
    (INITIAL_WINDOW_SIZE, 0, "settings"),
    (INITIAL_WINDOW_SIZE, 2**31 - 1, "settings"),
    (INITIAL_WINDOW_SIZE, 2**31, "failed FLOW_CONTROL_ERROR"),
    (MAX_FRAME_SIZE, 16_384, "settings"),
    (MAX_FRAME_SIZE, 16_383, "failed PROTOCOL_ERROR"),
    (MAX_FRAME_SIZE, 2**24 - 1, "settings"),
    (MAX_FRAME_SIZE, 2**24, "failed PROTOCOL_ERROR"),
    (ENABLE_PUSH, 0, "settings"),
    (ENABLE_PUSH, 1, "settings"),
    (ENABLE_PUSH, 2, "failed PROTOCOL_ERROR"),
    (HEADER_TABLE_SIZE, 0, "settings"),
    (HEADER_TABLE_SIZE, 2**32 - 1, "settings"),
    (MAX_HEADER_LIST_SIZE, 0, "settings"),
    (MAX_CONCURRENT_STREAMS, 0, "settings"),
    (0x8, 1, "settings"),
    (0x8, 2, "failed PROTOCOL_ERROR"),
    (0x4711, 2**32 - 1, "settings"),
]


def bytes_of(*pairs: tuple[int, int]) -> bytes:
    body = b"".join(identifier.to_bytes(2, "big") + value.to_bytes(4, "big") for identifier, value in pairs)
    return raw(4, 0, 0, body)


@pytest.mark.parametrize(("identifier", "value", "expected"), VALUES)
def test_settings_out_of_range_fail_the_connection(identifier: int, value: int, expected: str) -> None:
    """http2 point 15 (RFC 9113 6.5.2, 5.5)."""
    connection, peer = server()
    assert peer.receive(bytes_of((identifier, value))) == [expected]
    assert peer.said() == (["SETTINGS ack"] if expected == "settings" else [expected.replace("failed", "GOAWAY 0")])
    assert connection.closed == (expected != "settings")


def test_a_server_must_not_enable_push() -> None:
    """http2 point 15 (6.5.2), in the client role."""
    _, peer = client()
    assert peer.receive(bytes_of((ENABLE_PUSH, 0))) == ["settings"]
    assert peer.receive(bytes_of((ENABLE_PUSH, 1))) == ["failed PROTOCOL_ERROR"]


@pytest.mark.parametrize(
    ("frame", "expected"),
    [
        (raw(4, 0, 1), "PROTOCOL_ERROR"),
        (raw(4, 1, 1), "PROTOCOL_ERROR"),
        (raw(4, 0, 0, bytes(5)), "FRAME_SIZE_ERROR"),
        (raw(4, 1, 0, bytes(6)), "FRAME_SIZE_ERROR"),
    ],
)
def test_malformed_settings_frames_fail_the_connection(frame: bytes, expected: str) -> None:
    """6.5."""
    _, peer = server()
    assert peer.receive(frame) == [f"failed {expected}"]


def test_settings_are_applied_in_order_before_the_ack() -> None:
    """http2 point 15 (6.5.3): data that a setting releases is sent after its acknowledgement."""
    connection, peer = server(peer_settings={INITIAL_WINDOW_SIZE: 0})
    peer.receive(peer.request(1, "END_STREAM"))
    connection.send(connection.streams[1], [b"abc"], 3)
    sent = bytes_of((INITIAL_WINDOW_SIZE, 1), (INITIAL_WINDOW_SIZE, 2))
    assert peer.receive(sent) == ["settings"]
    assert peer.said() == ["SETTINGS ack", "DATA 1 2"]


def test_unanswered_settings_are_visible() -> None:
    """http2 point 15 (6.5.3): the shell's timer checks `settings_pending`."""
    connection = Connection(Role.SERVER)
    assert connection.settings_pending == 0
    connection.start()
    assert connection.settings_pending == 1
    peer = Peer(connection)
    peer.receive(wire.PREFACE, settings())
    assert connection.settings_pending == 1
    peer.receive(settings(None, "ACK"))
    assert connection.settings_pending == 0
    # One too many is ignored.
    assert peer.receive(settings(None, "ACK")) == []
    assert (connection.settings_pending, connection.closed) == (0, False)


def test_settings_of_a_server() -> None:
    """6.5.2: all the limits that it enforces."""
    limits = Http2Limits(
        max_streams=7,
        initial_window=70_000,
        connection_window=80_000,
        max_frame_bytes=17_000,
        header_list_bytes_max=9_000,
        header_table_bytes=512,
    )
    connection = Connection(Role.SERVER, limits)
    connection.start()
    frame, more = Peer(connection).frames()
    assert frame.settings == {1: 512, 3: 7, 4: 70_000, 5: 17_000, 6: 9_000}
    assert more.window_increment == 80_000 - 65_535


def test_settings_of_a_client() -> None:
    """3.4, 8.4: the preface, and ENABLE_PUSH 0."""
    connection = Connection(Role.CLIENT, Http2Limits(connection_window=1))
    connection.start()
    output = b"".join(connection.output())
    assert output.startswith(wire.PREFACE)
    peer = Peer(connection)
    peer.unread = output
    (frame,) = peer.frames()
    assert frame.settings[ENABLE_PUSH] == 0
    assert MAX_CONCURRENT_STREAMS not in frame.settings


def test_the_peers_header_table_size_binds_our_encoder() -> None:
    """http2 point 15 (RFC 7541 4.2): the change is announced in the next block; 0 and back again too."""
    connection, peer = server()
    peer.receive(*[peer.request(stream_id) for stream_id in (1, 3, 5, 7)])
    connection.send_headers(connection.streams[1], wire.RESPONSE)
    assert peer.said() == ["HEADERS 1 :status=200 content-type=application/grpc"]
    peer.receive(settings({HEADER_TABLE_SIZE: 0}))
    peer.decoder.max_allowed_table_size = 0
    connection.send_headers(connection.streams[3], wire.RESPONSE)
    assert peer.said() == ["SETTINGS ack", "HEADERS 3 :status=200 content-type=application/grpc"]
    assert peer.decoder.header_table_size == 0
    peer.receive(settings({HEADER_TABLE_SIZE: 0}), settings({HEADER_TABLE_SIZE: 2_000}))
    peer.decoder.max_allowed_table_size = 2_000
    for stream_id in (5, 7):
        connection.send_headers(connection.streams[stream_id], wire.RESPONSE)
    assert len(peer.said()) == 4
    assert peer.decoder.header_table_size == 2_000
    assert len(peer.decoder.header_table.dynamic_entries) == 1


def test_our_header_table_size_applies_once_acknowledged() -> None:
    """http2 point 15 (RFC 7541 4.2)."""
    connection = Connection(Role.SERVER, Http2Limits(header_table_bytes=100))
    connection.start()
    peer = Peer(connection)
    assert peer.receive(wire.PREFACE, settings(), peer.request(1)) == ["settings", "request 1"]
    peer.receive(settings(None, "ACK"))
    other = peer.request(3)
    # The peer acknowledged but did not shrink its table.
    assert peer.receive(other) == ["failed COMPRESSION_ERROR"]


def test_a_peer_that_shrinks_its_table_is_understood() -> None:
    connection = Connection(Role.SERVER, Http2Limits(header_table_bytes=100))
    connection.start()
    peer = Peer(connection)
    peer.receive(wire.PREFACE, settings(), peer.request(1), settings(None, "ACK"))
    peer.encoder.header_table_size = 100
    assert peer.receive(peer.request(3), peer.request(5)) == ["request 3", "request 5"]
    peer.encoder.header_table_size = 101
    assert peer.receive(peer.request(7)) == ["failed COMPRESSION_ERROR"]
