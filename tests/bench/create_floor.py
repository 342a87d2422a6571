"""The floor of a cold create: a minimal loop that makes the same system calls, to measure what they cost alone.

It takes the place of a proxy for one client that creates one watch after the other. A create is passed on to etcd
unchanged, with a linearizable read on another connection; when both are answered, etcd's `created` is passed to the
client. It acknowledges PINGs, but checks nothing and keeps nothing, so it is not usable as a server.
Arguments: etcd's host and port, the port to listen on.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import cast

import uvloop

from proto.framing import frame as grpc_frame
from proto.http2 import Connection, DataReceived, HeadersReceived, Http2Limits, Role
from proto.http2.frames import PREFACE
from proto.pb import rpc_pb2
from tests.bench.profiles import ACK, DATA, HEADERS, PING, SETTINGS, Wide, frame
from tests.bench.wire import frames

END_STREAM, END_HEADERS = 1, 4


def _read() -> bytes:
    request = rpc_pb2.TxnRequest()
    request.failure.add().request_range.MergeFrom(rpc_pb2.RangeRequest(key=b"\0", limit=1, keys_only=True))
    return grpc_frame(request.SerializeToString())


READ = _read()


def _head(path: bytes) -> bytes:
    """Return a header block of literals: it refers to no table."""
    fields = {b":method": b"POST", b":scheme": b"http", b":path": path, b":authority": b"etcd", b"te": b"trailers"}
    fields |= {b"content-type": b"application/grpc"}
    return b"".join(b"\0%c%b%c%b" % (len(name), name, len(value), value) for name, value in fields.items())


class Upstream(asyncio.Protocol):
    """A connection to etcd: passes on the payload of each frame that answers."""

    def __init__(self, path: bytes, answers: int, answered: Callable[[bytes], None]) -> None:
        self.head = _head(path)
        self.answers = answers
        """The type of the frame that is an answer: DATA, or HEADERS at the end of the stream."""
        self.answered = answered
        self.rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.write(PREFACE + Wide.opening)

    def data_received(self, data: bytes) -> None:
        data, done = self.rest + data, 0
        for kind, flags, _, start, end in frames(data):
            done = end
            if kind == PING and not flags & ACK:
                self.transport.write(frame(PING, ACK, 0, data[start:end]))
            elif kind == SETTINGS and not flags & ACK:
                self.transport.write(frame(SETTINGS, ACK, 0, b""))
            elif kind == self.answers and (kind == DATA or flags & END_STREAM):
                self.answered(data[start:end])
        self.rest = data[done:]


class Downstream(asyncio.Protocol):
    """The client's connection. The real HTTP/2 code reads its requests."""

    def __init__(self, host: str, port: int) -> None:
        self.h2 = Connection(Role.SERVER, Http2Limits())
        self.address = host, port
        self.created: list[bytes] = []
        self.reads = 0
        self.next_stream = 1
        self.waiting: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.h2.start()
        self.opening = asyncio.get_running_loop().create_task(self.open())

    async def open(self) -> None:
        """Connect to etcd, twice."""
        loop = asyncio.get_running_loop()
        watch = Upstream(b"/etcdserverpb.Watch/Watch", DATA, self.take_created)
        await loop.create_connection(lambda: watch, *self.address)
        watch.transport.write(frame(HEADERS, END_HEADERS, 1, watch.head))
        read = Upstream(b"/etcdserverpb.KV/Txn", HEADERS, self.take_read)
        await loop.create_connection(lambda: read, *self.address)
        self.watch, self.read = watch, read
        for message in self.waiting:
            self.create(message)

    def data_received(self, data: bytes) -> None:
        for event in self.h2.receive(data):
            if isinstance(event, HeadersReceived):
                self.stream = event.stream
                self.h2.send_headers(event.stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            elif isinstance(event, DataReceived):
                self.h2.consumed(event.stream, event.flow_size)
                if self.opening.done():
                    self.create(event.data)
                else:
                    self.waiting.append(event.data)
        self.flush()

    def create(self, message: bytes) -> None:
        """Pass a create on, and read."""
        stream, self.next_stream = self.next_stream, self.next_stream + 2
        head = frame(HEADERS, END_HEADERS, stream, self.read.head)
        self.read.transport.write(head + frame(DATA, END_STREAM, stream, READ))
        self.watch.transport.write(frame(DATA, 0, 1, message))

    def take_created(self, message: bytes) -> None:
        self.created.append(message)
        self.answer()

    def take_read(self, _: bytes) -> None:
        self.reads += 1
        self.answer()

    def answer(self) -> None:
        """Answer a create if both answers are here."""
        if self.created and self.reads:
            self.reads -= 1
            message = self.created.pop(0)
            self.h2.send(self.stream, [message], len(message))
            self.flush()

    def flush(self) -> None:
        if output := b"".join(self.h2.output()):
            self.transport.write(output)


async def run(host: str, port: int, listen: int) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Downstream(host, port), "127.0.0.1", listen)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
