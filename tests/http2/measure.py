"""Measures the cost of the HTTP/2 connection: `python -m tests.http2.measure`. CPU only, no sockets."""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections.abc import Callable

from proto.http2 import Connection, HeadersReceived, Http2Limits, Role, Stream, frames
from proto.http2.limits import WINDOW_BYTES_MAX

REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/etcdserverpb.Watch/Watch"),
    (b":authority", b"127.0.0.1:2379"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"grpc-go/1.71.1"),
    (b"te", b"trailers"),
    (b"hasleader", b"true"),
]
RESPONSE = [(b":status", b"200"), (b"content-type", b"application/grpc")]
TRAILERS = [(b"grpc-status", b"0"), (b"grpc-message", b"")]
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


def best_us(times: int, count: int, run: Callable[[], object]) -> float:
    """Return the best of `times` runs, in microseconds of CPU per one of `count`."""
    best = float("inf")
    for _ in range(times):
        gc.collect()
        start = time.process_time()
        run()
        best = min(best, time.process_time() - start)
    return best / count * 1e6


def open_many(count: int) -> tuple[Connection, list[Stream], bytes]:
    """Return a server with `count` open streams, the streams, and the bytes that opened them."""
    client, server = pair()
    for _ in range(count):
        client.open(REQUEST)
    data = b"".join(client.output())
    streams = [event.stream for event in server.receive(data) if isinstance(event, HeadersReceived)]
    return server, streams, data


def measure_send(count: int) -> float:
    server, streams, _ = open_many(count)
    server.send_window = WINDOW_BYTES_MAX
    for stream in streams:
        stream.send_window = WINDOW_BYTES_MAX

    def run() -> None:
        send = server.send
        for stream in streams:
            send(stream, MESSAGE, MESSAGE_SIZE)
        server.output()

    return best_us(7, count, run)


def measure_opens(count: int) -> tuple[float, float, float]:
    """Return us per stream: the client's open, the server's receive, and the same of the last tenth."""
    client, server = pair()
    start = time.process_time()
    for _ in range(count):
        client.open(REQUEST)
    opened = time.process_time()
    pieces = client.output()
    tenth = count // 10
    first, last = b"".join(pieces[: 9 * tenth]), b"".join(pieces[9 * tenth :])
    begin = time.process_time()
    server.receive(first)
    middle = time.process_time()
    server.receive(last)
    end = time.process_time()
    return (opened - start) / count * 1e6, (end - begin) / count * 1e6, (end - middle) / tenth * 1e6


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


def measure_call(count: int, idle: int) -> float:
    """Return us per unary call on the server: request headers and data in, headers, data and trailers out."""
    server, data = calls(count, idle)
    start = time.process_time()
    answer(server, data)
    return (time.process_time() - start) / count * 1e6


def measure_receive(count: int, frame: bytes, server: Connection) -> float:
    data = frame * count

    def run() -> None:
        server.receive(data)
        server.send_window = 1 << 16
        for stream in server.streams.values():
            stream.send_window = stream.receive_window = 1 << 30
        server.receive_window = 1 << 30
        for _ in range(200):
            server.output()

    run()
    return best_us(5, count, run)


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


def main() -> None:
    """Print the figures."""
    count = 10_000
    gc.freeze()
    out = sys.stdout.write
    out(f"send, fast path                     {measure_send(count):8.3f} us\n")
    opened, received, late = measure_opens(count)
    out(f"open, client                        {opened:8.3f} us a stream\n")
    out(f"open, server                        {received:8.3f} us a stream ({late:.3f} us the last 1,000 of {count})\n")
    out(f"unary call, server                  {measure_call(count, 0):8.3f} us\n")
    out(f"unary call, server, 10,000 open     {measure_call(count, count):8.3f} us\n")
    limits = Http2Limits(pings_max=1 << 60, tiny_updates_max=1 << 60)
    for name, frame in (
        ("PING", frames.ping(b"12345678")),
        ("WINDOW_UPDATE, connection", frames.window_update(0, 100)),
        ("WINDOW_UPDATE, stream", frames.window_update(1, 100)),
        ("DATA of 105 bytes", frames.FRAME_HEADER.pack(105 << 8, 0, 1) + b"x" * 105),
    ):
        client, server = Connection(Role.CLIENT), Connection(Role.SERVER, limits)
        client.start()
        server.start()
        client.open(REQUEST)
        exchange(client, server)
        server.receive_window = server.streams[1].receive_window = 1 << 30
        out(f"receive {name:27} {measure_receive(2_000, frame, server):8.3f} us\n")
    per_stream, per_connection = measure_memory(count)
    out(f"memory                              {per_stream:8.0f} bytes a stream, {per_connection:.0f} a connection\n")


if __name__ == "__main__":
    main()
