"""The order of the output: everything in call order, header blocks in one run, data before later trailers."""

from __future__ import annotations

import pytest

from proto.http2 import StreamMisuse
from tests.http2 import wire
from tests.http2.wire import INITIAL_WINDOW, client, ping, rst, server, settings, update

ANSWER = "HEADERS 1 :status=200 content-type=application/grpc"
END = "HEADERS 1 grpc-status=0 END"


def test_frames_are_sent_in_call_order() -> None:
    """http2 point 1 (RFC 9113 4.3, 5.1)."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"), peer.request(3))
    one, three = connection.streams[1], connection.streams[3]
    connection.send_headers(one, wire.RESPONSE)
    assert connection.send(one, [b"abc", b"de"], 5)
    connection.ping(b"12345678")
    connection.send_headers(three, wire.RESPONSE)
    assert connection.send(one, [b"f"], 1)
    connection.send_headers(one, wire.TRAILERS, end_stream=True)
    assert peer.said() == [
        ANSWER,
        "DATA 1 5",
        "PING 12345678",
        "HEADERS 3 :status=200 content-type=application/grpc",
        "DATA 1 1",
        END,
    ]
    assert peer.said() == []


def test_pieces_are_joined_on_the_wire_and_not_copied() -> None:
    """The fast path puts the given pieces into the output."""
    connection, peer = server()
    peer.receive(peer.request(1))
    shared = b"shared by a thousand streams"
    assert connection.send(connection.streams[1], [b"12345", shared], 5 + len(shared))
    output = connection.output()
    assert output[-1] is shared
    assert b"".join(output)[9:] == b"12345" + shared


def test_nothing_is_sent_between_the_parts_of_a_header_block() -> None:
    """http2 point 1 (6.2, 6.10): a block larger than the peer's frames is sent in one run."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    connection.ping(b"12345678")
    long = [*wire.RESPONSE, (b"long", b"x" * 40_000)]
    connection.send_headers(connection.streams[1], long)
    connection.ping(b"abcdefgh")
    frames = peer.frames()
    assert [type(frame).__name__ for frame in frames] == [
        "PingFrame",
        "HeadersFrame",
        "ContinuationFrame",
        "ContinuationFrame",
        "PingFrame",
    ]
    assert [len(frame.data) for frame in frames[1:4]][:2] == [16_384, 16_384]
    assert peer.decoder.decode(b"".join(frame.data for frame in frames[1:4]), True) == long
    assert ["END_HEADERS" in frame.flags for frame in frames[1:4]] == [False, False, True]


def test_trailers_wait_for_the_data_before_them() -> None:
    """http2 point 1; they are encoded with the compression state at the time they are sent (4.3)."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"), peer.request(3, "END_STREAM"))
    one, three = connection.streams[1], connection.streams[3]
    connection.send_headers(one, wire.RESPONSE)
    assert not connection.send(one, [bytes(70_000)], 70_000)
    connection.send_headers(one, wire.TRAILERS, end_stream=True)
    assert one.unsent == 70_000 - INITIAL_WINDOW
    # This header list changes the table, and is sent before the trailers that were passed earlier.
    connection.send_headers(three, [*wire.RESPONSE, (b"user-agent", b"new")])
    assert peer.said()[-1] == "HEADERS 3 :status=200 content-type=application/grpc user-agent=new"
    assert peer.receive(update(0, 10_000), update(1, 10_000)) == ["drained 1"]
    assert peer.said() == ["DATA 1 4465", END]
    assert 1 not in connection.streams


def test_data_given_while_blocked_waits_in_order() -> None:
    """Later pieces queue after the unsent ones, and frames are as large as the window allows."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    stream = connection.streams[1]
    stream.send_window = 5
    assert not connection.send(stream, [b"abc", b"defg"], 7)
    assert not connection.send(stream, [b"hi"], 2)
    assert not connection.send(stream, [b"j", b"k"], 2, end_stream=True)
    assert (stream.blocked, stream.unsent) == (True, 6)
    assert peer.receive(update(1, 3)) == []
    assert peer.receive(update(1, 100)) == ["drained 1"]
    frames = peer.frames()
    assert b"".join(frame.data for frame in frames) == b"abcdefghijk"
    assert [len(frame.data) for frame in frames] == [5, 3, 3]
    assert ["END_STREAM" in frame.flags for frame in frames] == [False, False, True]
    assert not stream.blocked


def test_the_end_alone_needs_no_window() -> None:
    """An empty DATA frame is not flow-controlled (6.9)."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    connection.streams[1].send_window = -5
    assert connection.send(connection.streams[1], [], 0, end_stream=True)
    assert peer.said() == ["DATA 1 0 END"]
    assert not connection.streams


def test_the_end_after_unsent_data_is_on_the_last_frame() -> None:
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    stream = connection.streams[1]
    stream.send_window = 2
    assert not connection.send(stream, [b"abc"], 3)
    assert not connection.send(stream, [], 0, end_stream=True)
    assert peer.receive(update(1, 1)) == ["drained 1"]
    assert peer.said() == ["DATA 1 2", "DATA 1 1 END"]


def test_misuse_is_raised() -> None:
    """Sending after the end, and headers that are not trailers after unsent data, are errors of our own code."""
    connection, peer = client()
    stream = connection.open(wire.REQUEST, end_stream=True)
    with pytest.raises(StreamMisuse):
        connection.send(stream, [b"x"], 1)
    with pytest.raises(StreamMisuse):
        connection.send_headers(stream, wire.TRAILERS, end_stream=True)
    other = connection.open(wire.REQUEST)
    connection.send(other, [bytes(70_000)], 70_000)
    with pytest.raises(StreamMisuse):
        connection.send_headers(other, wire.TRAILERS)
    peer.said()


def test_control_frames_pass_blocked_data() -> None:
    """Answers to PING and SETTINGS do not wait for windows."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    connection.send(connection.streams[1], [bytes(70_000)], 70_000)
    peer.said()
    assert peer.receive(ping(), settings()) == ["settings"]
    assert peer.said() == ["PING 12345678 ack", "SETTINGS ack"]
    assert peer.receive(rst(1)) == ["reset 1 CANCEL by peer"]
