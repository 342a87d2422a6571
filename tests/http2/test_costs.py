"""How costs grow, counted in steps of the interpreter, which other load on the machine does not change."""

from __future__ import annotations

import gc
import tracemalloc

from proto.http2 import Connection, HeadersReceived, Role, Stream, frames
from tests.http2 import wire
from tests.http2.wire import REQUEST, RESPONSE, TRAILERS, server
from tests.steps import steps

SEND_STEPS_MAX = 100
"""It is 76; other releases of Python may need a third more."""

MESSAGE = [b"\0\0\0\0\x64", b"x" * 100]
MESSAGE_SIZE = 105


def pair() -> tuple[Connection, Connection]:
    """Return a client and a server that have exchanged their settings."""
    client, server = Connection(Role.CLIENT), Connection(Role.SERVER)
    client.start()
    server.start()
    exchange(client, server)
    return client, server


def exchange(client: Connection, server: Connection) -> None:
    """Exchange bytes until neither side has output."""
    while True:
        to_server, to_client = client.output(), server.output()
        if not to_server and not to_client:
            return
        server.receive(b"".join(to_server))
        client.receive(b"".join(to_client))


def open_many(count: int) -> tuple[Connection, list[Stream], bytes]:
    """Return a server with `count` open streams, the streams, and the bytes that opened them."""
    client, server = pair()
    for _ in range(count):
        client.open(REQUEST)
    data = b"".join(client.output())
    streams = [event.stream for event in server.receive(data) if isinstance(event, HeadersReceived)]
    return server, streams, data


def calls(count: int, idle: int) -> tuple[Connection, bytes]:
    """Return a server that has `idle` open streams, and the bytes of `count` unary calls to it."""
    client, server = pair()
    for _ in range(idle):
        client.open(REQUEST)
    server.receive(b"".join(client.output()))
    for _ in range(count):
        stream = client.open(REQUEST)
        client.send(stream, MESSAGE, MESSAGE_SIZE, True)
    return server, b"".join(client.output())


def answer(server: Connection, data: bytes) -> None:
    """Receive unary calls and answer each with headers, data and trailers."""
    for event in server.receive(data):
        if isinstance(event, HeadersReceived):
            stream = event.stream
            server.send_headers(stream, RESPONSE)
            server.send(stream, MESSAGE, MESSAGE_SIZE)
            server.send_headers(stream, TRAILERS, True)
    server.output()


def measure_memory(count: int) -> tuple[float, float]:
    """Return bytes per stream and bytes per connection of a server."""
    client, server = pair()
    for _ in range(count):
        client.open(REQUEST)
    data = b"".join(client.output())
    client.streams.clear()
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    server.receive(data)
    gc.collect()
    per_stream = (tracemalloc.get_traced_memory()[0] - before) / count
    before = tracemalloc.get_traced_memory()[0]
    connections = [Connection(Role.SERVER) for _ in range(100)]
    per_connection = (tracemalloc.get_traced_memory()[0] - before) / len(connections)
    tracemalloc.stop()
    return per_stream, per_connection


def test_opening_the_nth_stream_costs_the_same() -> None:
    """http2 point 17: no step visits the other streams."""
    client, server = pair()

    def opening() -> int:
        for _ in range(50):
            client.open(REQUEST)
        data = b"".join(client.output())
        return steps(lambda: server.receive(data))

    early = [opening() for _ in range(3)][-1]
    for _ in range(10_000):
        client.open(REQUEST)
    server.receive(b"".join(client.output()))
    assert 0 < opening() <= early * 1.05


def test_a_call_costs_the_same_with_ten_thousand_streams() -> None:
    def calling(idle: int) -> int:
        server, data = calls(50, idle)
        return steps(lambda: answer(server, data))

    assert 0 < calling(10_000) <= calling(1) * 1.05


def test_a_send_takes_few_steps() -> None:
    """The fast path: a message to a stream with room in its windows, on a connection with a thousand streams."""
    server, streams, _ = open_many(1_000)
    taken = steps(lambda: [server.send(stream, MESSAGE, MESSAGE_SIZE) for stream in streams])
    assert 0 < taken / len(streams) <= SEND_STEPS_MAX


def test_ten_thousand_streams_are_small() -> None:
    """The first data adds two more integers."""
    per_stream, per_connection = measure_memory(10_000)
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
    frame = wire.data(1, bytes(16_384))
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
