"""How streams end: normally, by a reset, with the connection; and what is remembered about closed streams."""

from __future__ import annotations

import sys

import pytest

from proto.http2 import Connection, ErrorCode, GoingAway, HeadersReceived, Http2Limits, Role, StreamState
from tests.http2 import wire
from tests.http2.wire import INITIAL_WINDOW, Peer, client, data, rst, server, update


@pytest.mark.parametrize("peer_first", [True, False])
def test_a_stream_is_over_when_both_sides_have_ended(peer_first: bool) -> None:
    """RFC 9113 5.1, in the client role, where each side may be first."""
    connection, peer = client()
    stream = connection.open(wire.REQUEST)
    peer.receive(peer.headers(1, wire.RESPONSE))
    states = [stream.state]
    if peer_first:
        assert peer.receive(data(1, b"", "END_STREAM")) == ["data 1 0 END"]
        states.append(stream.state)
        connection.send(stream, [b"x"], 1, end_stream=True)
    else:
        connection.send(stream, [b"x"], 1, end_stream=True)
        states.append(stream.state)
        assert peer.receive(peer.headers(1, wire.TRAILERS, "END_STREAM")) == ["trailers 1 END"]
    half = StreamState.HALF_CLOSED_REMOTE if peer_first else StreamState.HALF_CLOSED_LOCAL
    assert [*states, stream.state] == [StreamState.OPEN, half, StreamState.CLOSED]
    assert not connection.streams


def test_a_reset_by_the_peer_drops_unsent_data() -> None:
    """http2 point 11 (5.4.2, 6.4): nothing more is sent, not even by code that still holds the stream."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    stream = connection.streams[1]
    connection.send_headers(stream, wire.RESPONSE)
    assert not connection.send(stream, [bytes(INITIAL_WINDOW + 10)], INITIAL_WINDOW + 10)
    connection.send_headers(stream, wire.TRAILERS, end_stream=True)
    peer.said()
    assert peer.receive(rst(1), update(1, 100), update(0, 100)) == ["reset 1 CANCEL by peer"]
    assert (stream.unsent, stream.queue, stream.trailers, stream.blocked) == (0, None, None, False)
    assert connection.send(stream, [b"x"], 1)
    connection.send_headers(stream, wire.TRAILERS, end_stream=True)
    connection.reset(stream, ErrorCode.CANCEL)
    assert peer.said() == []


def test_our_reset_ends_a_half_sent_message() -> None:
    """http2 point 11 (6.4): trailers would wait for the unsent data, a reset drops it."""
    connection, peer = server()
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    connection.send_headers(stream, wire.RESPONSE)
    assert not connection.send(stream, [bytes(INITIAL_WINDOW + 10)], INITIAL_WINDOW + 10)
    peer.said()
    connection.reset(stream, ErrorCode.INTERNAL_ERROR)
    assert peer.receive(update(1, 100), update(0, 100)) == []
    assert peer.said() == ["RST_STREAM 1 INTERNAL_ERROR"]
    assert stream.state is StreamState.CLOSED


def test_a_response_to_an_open_request_ends_with_reset_no_error() -> None:
    """http2 point 12 (8.1): trailers first, then RST_STREAM(NO_ERROR); later frames of the client are dropped."""
    connection, peer = server()
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    connection.send_headers(stream, wire.RESPONSE)
    connection.send_headers(stream, wire.TRAILERS, end_stream=True)
    assert peer.said()[1:] == ["HEADERS 1 grpc-status=0 END", "RST_STREAM 1 NO_ERROR"]
    assert peer.receive(data(1, b"late"), peer.headers(1, [(b"a", b"b")], "END_STREAM"), rst(1)) == []
    assert peer.said() == []


@pytest.mark.parametrize("ender", ["data", "data that waits for its window", "headers only"])
def test_every_kind_of_end_is_followed_by_reset_no_error(ender: str) -> None:
    """http2 point 12."""
    connection, peer = server()
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    if ender == "headers only":
        connection.send_headers(stream, wire.RESPONSE, end_stream=True)
    else:
        connection.send_headers(stream, wire.RESPONSE)
        stream.send_window = 1 if ender == "data that waits for its window" else 100
        connection.send(stream, [b"abc"], 3, end_stream=True)
        peer.receive(update(1, 2))
    assert peer.said()[-1] == "RST_STREAM 1 NO_ERROR"
    assert stream.state is StreamState.CLOSED


def test_no_reset_follows_if_the_request_is_complete() -> None:
    """http2 point 12."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    connection.send_headers(connection.streams[1], wire.RESPONSE, end_stream=True)
    assert peer.said() == ["HEADERS 1 :status=200 content-type=application/grpc END"]


def test_late_data_after_our_reset_credits_the_connection() -> None:
    """http2 point 8 (5.1, 6.9): otherwise the connection's window would shrink with every reset."""
    connection, peer = server(Http2Limits(connection_window=INITIAL_WINDOW))
    peer.receive(peer.request(1), peer.request(3))
    connection.reset(connection.streams[1], ErrorCode.CANCEL)
    peer.said()
    for _ in range(20):
        assert peer.receive(data(1, bytes(10_000), padding=9)) == []
        assert connection.receive_window + connection._unreturned == INITIAL_WINDOW
    assert {line.split()[0:2][1] for line in peer.said()} == {"0"}
    assert peer.receive(data(1, b"", "END_STREAM"), data(3, b"lives")) == ["data 3 5"]


def test_late_frames_of_a_forgotten_stream_are_reset_again() -> None:
    """http2 point 17: a bounded number of resets is remembered; a late frame for another is answered by RST_STREAM."""
    connection, peer = server(Http2Limits(resets_remembered=4))
    peer.receive(*[peer.request(2 * n + 1) for n in range(6)])
    for stream in list(connection.streams.values()):
        connection.reset(stream, ErrorCode.CANCEL)
    assert len(connection._reset_ids) <= 4
    peer.said()
    assert peer.receive(data(11, b"x")) == []
    assert peer.said() == []
    assert peer.receive(data(1, b"x"), peer.headers(3, [(b"a", b"b")], "END_STREAM")) == []
    assert peer.said() == ["RST_STREAM 1 STREAM_CLOSED", "RST_STREAM 3 STREAM_CLOSED"]


def test_memory_of_closed_streams_is_bounded() -> None:
    """http2 point 17: for any number of streams, and for any way they ended."""
    connection, peer = server()

    def live(first: int) -> None:
        for stream_id in range(first, first + 6_000, 6):
            peer.receive(
                peer.request(stream_id), peer.request(stream_id + 2, "END_STREAM"), peer.request(stream_id + 4)
            )
            connection.send_headers(connection.streams[stream_id], wire.RESPONSE, end_stream=True)
            connection.send_headers(connection.streams[stream_id + 2], wire.RESPONSE, end_stream=True)
            peer.receive(rst(stream_id + 4))
            connection.output()

    live(1)
    assert not connection.streams
    assert sys.getsizeof(connection._reset_ids) < 64 * 1024
    held = len(connection._reset_ids)
    live(6_001)
    assert len(connection._reset_ids) <= max(held, connection.limits.resets_remembered)
    assert not connection.closed


def test_goaway_from_the_client_leaves_its_streams_alone() -> None:
    """http2 point 13 (6.8)."""
    connection, peer = server()
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    assert peer.receive(wire.go_away(0, debug=b"bye")) == ["goaway 0 NO_ERROR bye"]
    connection.send_headers(stream, wire.RESPONSE)
    connection.send(stream, [b"event"], 5)
    assert peer.receive(data(1, b"x")) == ["data 1 1"]
    assert peer.said()[-1] == "DATA 1 5"
    assert not connection.closed


def test_going_away_in_two_steps() -> None:
    """http2 point 13 (6.8): requests on their way are accepted after the first step, refused after the second."""
    connection, peer = server()
    peer.receive(peer.request(1))
    connection.go_away()
    assert peer.said() == ["GOAWAY 2147483647 NO_ERROR"]
    assert peer.receive(peer.request(3, "END_STREAM")) == ["request 3 END"]
    connection.go_away(last=True, debug=b"restart")
    assert peer.said() == ["GOAWAY 3 NO_ERROR"]
    assert peer.receive(peer.request(5), data(5, b"x"), data(1, b"x")) == ["data 1 1"]
    assert peer.said() == ["RST_STREAM 5 REFUSED_STREAM"]
    connection.send_headers(connection.streams[3], wire.RESPONSE, end_stream=True)
    assert not connection.closed
    connection.send_headers(connection.streams[1], wire.RESPONSE)
    connection.send_headers(connection.streams[1], wire.TRAILERS, end_stream=True)
    assert connection.closed
    assert peer.said()[-2:] == ["HEADERS 1 grpc-status=0 END", "RST_STREAM 1 NO_ERROR"]


def test_going_away_from_an_idle_connection_closes_it() -> None:
    """http2 point 13: with the second step, and the GOAWAY is still to be written."""
    connection, peer = server()
    connection.go_away()
    assert not connection.closed
    connection.go_away(last=True)
    assert connection.closed
    assert peer.said() == ["GOAWAY 2147483647 NO_ERROR", "GOAWAY 0 NO_ERROR"]


@pytest.mark.parametrize("bytewise", [False, True])
def test_input_after_the_last_stream_is_ignored(bytewise: bool) -> None:
    """Input after the end of an ending connection is not parsed, in one piece or in bytes."""
    connection, peer = server()
    peer.receive(peer.request(1))
    connection.go_away(last=True)
    peer.said()
    behind = [wire.ping(), wire.ping(b"12345678", "ACK"), wire.raw(6, 0, 0, b"")]
    assert peer.receive(rst(1), *behind, bytewise=bytewise) == ["reset 1 CANCEL by peer"]
    assert peer.said() == []
    assert connection.closed


def test_the_last_id_never_grows() -> None:
    """6.8: a repeated second step, and a connection error after it, name the same last stream."""
    connection, peer = server()
    peer.receive(peer.request(1))
    connection.go_away(last=True)
    peer.receive(peer.request(7))
    connection.go_away(last=True)
    assert peer.said() == ["GOAWAY 1 NO_ERROR", "RST_STREAM 7 REFUSED_STREAM", "GOAWAY 1 NO_ERROR"]
    assert peer.receive(wire.raw(6, 0, 0, b"")) == ["failed FRAME_SIZE_ERROR"]
    assert peer.said() == ["GOAWAY 1 FRAME_SIZE_ERROR"]


def test_goaway_from_the_server_resets_streams_above_its_last_id() -> None:
    """http2 point 13, client role (6.8): streams above the last id may be retried elsewhere, the others continue."""
    connection, peer = client()
    streams = [connection.open(wire.REQUEST) for _ in range(3)]
    assert peer.receive(wire.go_away(2**31 - 1, debug=b"graceful_stop")) == ["goaway 2147483647 NO_ERROR graceful_stop"]
    with pytest.raises(GoingAway):
        connection.open(wire.REQUEST)
    assert peer.receive(wire.go_away(3)) == ["goaway 3 NO_ERROR", "reset 5 REFUSED_STREAM by peer"]
    assert connection.peer_last_id == 3
    assert connection.send(streams[0], [b"on"], 2)
    assert peer.receive(peer.headers(1, wire.RESPONSE), peer.headers(3, wire.RESPONSE, "END_STREAM")) == [
        "response 1",
        "response 3 END",
    ]
    connection.reset(streams[1], ErrorCode.NO_ERROR)
    assert not connection.closed
    assert peer.receive(rst(1)) == ["reset 1 CANCEL by peer"]
    assert connection.closed


def test_queued_output_survives_a_goaway_and_a_failure() -> None:
    """http2 point 13: earlier output is still written, in order."""
    connection, peer = server()
    peer.receive(peer.request(1))
    connection.send_headers(connection.streams[1], wire.RESPONSE)
    connection.send(connection.streams[1], [b"event"], 5)
    assert peer.receive(wire.go_away(0), wire.raw(0, 0, 0, b"x")) == ["goaway 0 NO_ERROR", "failed PROTOCOL_ERROR"]
    assert peer.said()[1:] == ["DATA 1 5", "GOAWAY 1 PROTOCOL_ERROR"]


def test_too_many_streams_are_refused_one_by_one() -> None:
    """http2 point 14 (5.1.2, 8.7, 4.3): the header list is decoded, so the table is correct for the next one."""
    connection, peer = server(Http2Limits(max_streams=2))
    assert peer.receive(peer.request(1), peer.request(3)) == ["request 1", "request 3"]
    # The refused list adds an entry to the table; the next request refers to it.
    assert peer.receive(peer.request(5, extra=[(b"new", b"field")])) == []
    assert peer.said() == ["RST_STREAM 5 REFUSED_STREAM"]
    assert peer.receive(data(5, b"late")) == []
    peer.receive(rst(1))
    events = connection.receive(peer.request(7, extra=[(b"new", b"field")]))
    assert wire.event_lines(events) == ["request 7"]
    assert isinstance(events[0], HeadersReceived)
    assert (b"new", b"field") in events[0].headers
    assert len(connection.streams) == 2


def test_the_stream_limit_is_announced() -> None:
    """http2 point 14 (6.5.2)."""
    connection = Connection(Role.SERVER, Http2Limits(max_streams=123))
    connection.start()
    assert "3: 123" in Peer(connection).said()[0]
