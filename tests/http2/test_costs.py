"""How costs grow, counted in steps of the interpreter, which other load on the machine does not change.

`python -m tests.http2.measure` prints the figures.
"""

from __future__ import annotations

from proto.http2 import frames
from tests.http2 import measure, wire
from tests.http2.wire import data, server
from tests.steps import steps

SEND_STEPS_MAX = 100
"""It is 76; other releases of Python may need a third more."""


def test_opening_the_nth_stream_costs_the_same() -> None:
    """http2 point 17: no step visits the other streams."""
    client, server = measure.pair()

    def opening() -> int:
        for _ in range(50):
            client.open(measure.REQUEST)
        data = b"".join(client.output())
        return steps(lambda: server.receive(data))

    early = [opening() for _ in range(3)][-1]
    for _ in range(10_000):
        client.open(measure.REQUEST)
    server.receive(b"".join(client.output()))
    assert 0 < opening() <= early * 1.05


def test_a_call_costs_the_same_with_ten_thousand_streams() -> None:
    def calling(idle: int) -> int:
        server, data = measure.calls(50, idle)
        return steps(lambda: measure.answer(server, data))

    assert 0 < calling(10_000) <= calling(1) * 1.05


def test_a_send_takes_few_steps() -> None:
    """The fast path: a message to a stream with room in its windows, on a connection with a thousand streams."""
    server, streams, _ = measure.open_many(1_000)
    taken = steps(lambda: [server.send(stream, measure.MESSAGE, measure.MESSAGE_SIZE) for stream in streams])
    assert 0 < taken / len(streams) <= SEND_STEPS_MAX


def test_ten_thousand_streams_are_small() -> None:
    """The first data adds two more integers."""
    per_stream, per_connection = measure.measure_memory(10_000)
    assert per_stream < 350
    assert per_connection < 8_000


def test_an_idle_stream_owns_no_container() -> None:
    """A stream that was blocked drops its queue."""
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
    """Pieces are kept until the frame is whole: no quadratic copying."""
    connection, peer = server()
    peer.receive(peer.request(1))
    frame = data(1, bytes(16_384))
    for at in range(len(frame) - 1):
        assert connection.receive(frame[at : at + 1]) == []
    # Only the frame header was joined, to read it.
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
