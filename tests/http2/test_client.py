"""The client role: opening streams, the answers that a server may send, and the limits that it sets."""

from __future__ import annotations

import pytest

from proto.http2 import Connection, ErrorCode, GoingAway, Role, StreamState, TooManyStreams
from proto.http2.limits import STREAM_ID_MAX
from tests.http2 import wire
from tests.http2.wire import MAX_CONCURRENT_STREAMS, Peer, client, data, raw, rst, settings, update


def test_streams_get_odd_ids_that_grow() -> None:
    """http2 point 17 (RFC 9113 5.1.1)."""
    connection, peer = client()
    assert [connection.open(wire.REQUEST).id for _ in range(3)] == [1, 3, 5]
    connection.reset(connection.streams[5], ErrorCode.CANCEL)
    assert connection.open(wire.REQUEST).id == 7
    assert [line.split()[1] for line in peer.said()] == ["1", "3", "5", "5", "7"]


def test_a_call_from_beginning_to_end() -> None:
    """Request and data out; informational, response, data and trailers in (8.1)."""
    connection, peer = client()
    stream = connection.open(wire.REQUEST)
    stream.owner = "the shell's"
    assert connection.send(stream, [b"half", b"close"], 9, end_stream=True)
    assert peer.said()[1:] == ["DATA 1 9 END"]
    assert peer.receive(
        peer.headers(1, [(b":status", b"100")]),
        peer.headers(1, [(b":status", b"103"), (b"link", b"x")]),
        peer.headers(1, wire.RESPONSE),
        data(1, b"message"),
        peer.headers(1, wire.TRAILERS, "END_STREAM"),
    ) == ["informational 1", "informational 1", "response 1", "data 1 7", "trailers 1 END"]
    assert stream.state is StreamState.CLOSED
    assert not connection.streams
    assert not connection.closed


def test_a_trailers_only_answer() -> None:
    """The first header list of the response ends the stream; the request is still open, and the server resets it."""
    connection, peer = client()
    stream = connection.open(wire.REQUEST)
    answer = peer.headers(1, [*wire.RESPONSE, *wire.TRAILERS], "END_STREAM")
    assert peer.receive(answer) == ["response 1 END"]
    assert stream.state is StreamState.HALF_CLOSED_REMOTE
    assert peer.receive(rst(1, ErrorCode.NO_ERROR)) == ["reset 1 NO_ERROR by peer"]
    assert connection.send(stream, [b"late"], 4)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([data(1, b"x")], ["reset 1 PROTOCOL_ERROR"]),
        ([data(3, b"x")], ["failed PROTOCOL_ERROR"]),
        ([data(2, b"x")], ["failed PROTOCOL_ERROR"]),
        ([wire.push_promise(1)], ["failed PROTOCOL_ERROR"]),
        ([update(3, 1)], ["failed PROTOCOL_ERROR"]),
        ([rst(2)], ["failed PROTOCOL_ERROR"]),
        ([raw(1, 4, 3, b"\x88")], ["failed PROTOCOL_ERROR"]),
        ([raw(1, 4, 2, b"\x88")], ["failed PROTOCOL_ERROR"]),
        ([raw(1, 5, 1, b"\x88"), data(1, b"x")], ["response 1 END", "reset 1 STREAM_CLOSED"]),
    ],
)
def test_forbidden_frames_of_a_server_are_faults(frames: list[bytes], expected: list[str]) -> None:
    """5.1, 6.1, 8.1, 8.4; 0x88 is `:status: 200`."""
    connection, peer = client()
    connection.open(wire.REQUEST)
    assert peer.receive(*frames) == expected


def test_an_informational_response_must_not_end_the_stream() -> None:
    """8.1."""
    connection, peer = client()
    connection.open(wire.REQUEST)
    assert peer.receive(peer.headers(1, [(b":status", b"100")], "END_STREAM")) == ["reset 1 PROTOCOL_ERROR"]


def test_late_answers_to_a_cancelled_call_are_dropped() -> None:
    """Their header lists still move the compression state."""
    connection, peer = client()
    connection.reset(connection.open(wire.REQUEST), ErrorCode.CANCEL)
    connection.open(wire.REQUEST)
    peer.said()
    late = [peer.headers(1, wire.RESPONSE), data(1, b"x"), peer.headers(1, wire.TRAILERS, "END_STREAM")]
    assert peer.receive(*late, peer.headers(3, wire.RESPONSE)) == ["response 3"]
    assert peer.said() == []


def test_the_servers_stream_limit_is_respected() -> None:
    """5.1.2: at the limit `open` raises; the end of a stream or a higher limit makes room."""
    connection, peer = client(peer_settings={MAX_CONCURRENT_STREAMS: 2})
    streams = [connection.open(wire.REQUEST, end_stream=True) for _ in range(2)]
    with pytest.raises(TooManyStreams):
        connection.open(wire.REQUEST)
    assert peer.receive(peer.headers(1, wire.RESPONSE, "END_STREAM")) == ["response 1 END"]
    assert connection.open(wire.REQUEST).id == 5
    with pytest.raises(TooManyStreams):
        connection.open(wire.REQUEST)
    assert connection.peer_max_streams == 2
    peer.receive(settings({MAX_CONCURRENT_STREAMS: 3}))
    assert connection.open(wire.REQUEST).id == 7
    peer.receive(settings({MAX_CONCURRENT_STREAMS: 0}))
    connection.reset(streams[1], ErrorCode.CANCEL)
    with pytest.raises(TooManyStreams):
        connection.open(wire.REQUEST)


def test_streams_may_be_opened_before_the_servers_settings() -> None:
    """3.4: a client does not have to wait."""
    connection = Connection(Role.CLIENT)
    connection.start()
    stream = connection.open(wire.REQUEST)
    assert connection.send(stream, [b"x"], 1)
    peer = Peer(connection)
    assert [line.split()[0] for line in peer.said()] == ["SETTINGS", "WINDOW_UPDATE", "HEADERS", "DATA"]
    assert peer.receive(settings({wire.INITIAL_WINDOW_SIZE: 5})) == ["settings"]
    assert stream.send_window == 4


def test_no_stream_is_opened_on_an_ending_connection() -> None:
    """6.8: after our GOAWAY or the server's, and when the ids are used up (5.1.1)."""
    connection, peer = client()
    connection.open(wire.REQUEST)
    connection.go_away()
    with pytest.raises(GoingAway):
        connection.open(wire.REQUEST)
    connection, peer = client()
    peer.receive(raw(6, 0, 0, b""))
    with pytest.raises(GoingAway):
        connection.open(wire.REQUEST)
    connection, peer = client()
    connection._last_id = STREAM_ID_MAX - 2
    assert connection.open(wire.REQUEST).id == STREAM_ID_MAX
    with pytest.raises(GoingAway):
        connection.open(wire.REQUEST)


def test_a_client_that_goes_away_finishes_its_calls() -> None:
    connection, peer = client()
    stream = connection.open(wire.REQUEST, end_stream=True)
    connection.go_away(last=True)
    assert peer.said()[-1] == "GOAWAY 0 NO_ERROR"
    assert not connection.closed
    assert peer.receive(peer.headers(stream.id, wire.RESPONSE, "END_STREAM")) == ["response 1 END"]
    assert connection.closed


def test_ping_carries_eight_bytes() -> None:
    """6.7."""
    connection, peer = client()
    connection.ping(b"abcdefgh")
    assert peer.said() == ["PING abcdefgh"]
    assert peer.receive(wire.ping(b"abcdefgh", "ACK")) == ["pong abcdefgh"]
    with pytest.raises(ValueError, match="8 bytes"):
        connection.ping(b"short")
