"""The data that successive frames of a read bring for one stream is one event, up to the size of a frame."""

from __future__ import annotations

import pytest

from proto.http2 import JOINED_DATA_BYTES_MAX, Connection
from tests.http2.wire import Peer, data, ping, server, update


def two_streams() -> tuple[Connection, Peer]:
    """Return a server with the streams 1 and 3."""
    connection, peer = server()
    peer.receive(peer.request(1), peer.request(3))
    return connection, peer


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        ([data(1, b"a"), data(1, b"bc"), data(1, b"d")], ["data 1 4"]),
        ([data(1, b"a"), data(3, b"bc"), data(3, b"d"), data(1, b"e")], ["data 1 1", "data 3 3", "data 1 1"]),
        ([data(1, b"a"), data(1, b"b"), data(1, b"c", "END_STREAM")], ["data 1 2", "data 1 1 END"]),
        ([data(1, b"a"), data(1, b"b", padding=3), data(1, b"c")], ["data 1 1", "data 1 2"]),
        ([data(1, b"a"), ping(), data(1, b"b")], ["data 1 1", "data 1 1"]),
        ([data(1, b"a"), data(1, b""), data(1, b"b")], ["data 1 2"]),
        ([data(1, b"a"), data(5, b"b")], ["data 1 1", "failed PROTOCOL_ERROR"]),
        ([data(1, b"a"), data(1, b"bc")[:-1]], ["data 1 1"]),
    ],
)
def test_the_data_of_a_stream_in_a_read_is_joined(frames: list[bytes], expected: list[str]) -> None:
    _, peer = two_streams()
    assert peer.receive(*frames) == expected


def test_joined_data_is_as_large_as_one_frame_at_most() -> None:
    """A call passes on what it gets at once, and the turns of shared answers are bounded to about a frame."""
    _, peer = two_streams()
    most = JOINED_DATA_BYTES_MAX
    assert peer.receive(data(1, bytes(most)), data(1, b"b")) == [f"data 1 {most}", "data 1 1"]
    assert peer.receive(data(1, b"a"), data(1, bytes(most - 1)), data(1, b"b")) == [f"data 1 {most}", "data 1 1"]


def test_joined_data_counts_for_both_windows() -> None:
    connection, peer = two_streams()
    connection.receive_window = connection.streams[1].receive_window = 1000
    assert peer.receive(data(1, bytes(10)) * 5) == ["data 1 50"]
    assert (connection.receive_window, connection.streams[1].receive_window) == (950, 950)
    connection.streams[1].receive_window = 25
    assert peer.receive(data(1, bytes(10)) * 3) == ["data 1 20", "reset 1 FLOW_CONTROL_ERROR"]
    connection.receive_window = 25
    assert peer.receive(data(3, bytes(10)) * 3) == ["data 3 20", "failed FLOW_CONTROL_ERROR"]


def test_joined_frames_are_counted_as_work() -> None:
    connection, peer = two_streams()
    connection.turn_work_max = 4
    assert peer.receive(data(1, b"a") * 10, update(0, 1)) == ["data 1 4"]
    assert connection.behind
    assert connection.work == 4
    assert peer.receive() == ["data 1 4"]
    assert peer.receive() == ["data 1 2"]
    assert not connection.behind


def test_data_after_a_reset_of_its_stream_is_not_joined() -> None:
    _, peer = two_streams()
    peer.receive(peer.headers(1, [(b"grpc-status", b"0")], "END_STREAM"))
    assert peer.receive(data(3, b"a"), data(1, b"b"), data(1, b"c")) == ["data 3 1", "reset 1 STREAM_CLOSED"]
