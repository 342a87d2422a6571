"""What must stay cheap: the shape of the costs, with wide margins. `python -m tests.http2.measure` has the figures."""

from __future__ import annotations

from proto.http2 import frames
from tests.http2 import measure, wire
from tests.http2.wire import data, server


def test_opening_the_nth_stream_costs_the_same() -> None:
    """http2 point 17: no step looks at the other streams."""
    early = min(measure.measure_opens(1_000)[1] for _ in range(3))
    late = min(measure.measure_opens(10_000)[2] for _ in range(3))
    assert late < 3 * early


def test_a_call_costs_the_same_beside_ten_thousand_streams() -> None:
    alone = min(measure.measure_call(500, 0) for _ in range(3))
    beside = min(measure.measure_call(500, 10_000) for _ in range(3))
    assert beside < 3 * alone


def test_a_send_is_a_microsecond_at_most() -> None:
    """Ten times what it is, for machines that are busy."""
    assert measure.measure_send(2_000) < 3


def test_ten_thousand_streams_are_small() -> None:
    """Two more integers come with the first data."""
    per_stream, per_connection = measure.measure_memory(10_000)
    assert per_stream < 350
    assert per_connection < 8_000


def test_an_idle_stream_owns_no_container() -> None:
    """And one that was blocked gives its own back."""
    connection, peer = server()
    peer.receive(peer.request(1, "END_STREAM"))
    stream = connection.streams[1]
    connection.send(stream, [bytes(10)], 10)
    assert stream.queue is None
    connection.send(stream, [bytes(70_000)], 70_000)
    assert stream.queue is not None
    peer.receive(wire.update(0, 70_000), wire.update(1, 70_000))
    assert stream.queue is None


def test_a_frame_in_tiny_pieces_is_joined_once() -> None:
    """Pieces gather until the frame is whole: no quadratic copying."""
    connection, peer = server()
    peer.receive(peer.request(1))
    frame = data(1, bytes(16_384))
    for at in range(len(frame) - 1):
        assert connection.receive(frame[at : at + 1]) == []
    # The header had to be looked at, nothing else.
    assert len(connection._partial) == len(frame) - frames.FRAME_HEADER_BYTES
    assert peer.receive(frame[-1:]) == ["data 1 16384"]
    assert connection._partial == []


def test_a_large_message_is_cut_without_copying_the_rest() -> None:
    """A piece of many frames is sliced frame by frame from an offset."""
    connection, peer = server(peer_settings={wire.INITIAL_WINDOW_SIZE: 2**30})
    peer.receive(wire.update(0, 2**30), peer.request(1))
    pieces = [b"12345", bytes(range(256)) * 4_096]
    assert connection.send(connection.streams[1], pieces, 5 + len(pieces[1]))
    output = connection.output()
    assert max(map(len, output)) <= 16_384
    assert len(output) == 65 * 2 + 1
    assert b"".join(piece for piece in output if len(piece) != 9) == b"".join(pieces)
