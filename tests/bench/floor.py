"""The floor: a minimal loop that writes the same bytes to the same sockets, to measure the cost of system calls alone.

It takes the place of a proxy: one watch per range upstream, the clients of a case downstream. Per event it does one
read, one join of prepared frame heads with the shared bytes, and one write per connection. It acknowledges PINGs late,
as watchmux does, but checks nothing, has no flow control, drops slow clients, and is not usable as a server; no real
server can cost less in this language on this event loop.

Arguments: the case, etcd's host and port, the port to listen on.
"""

from __future__ import annotations

import asyncio
import struct
import sys
import time
from typing import cast

import uvloop

from proto.http2 import UPDATE_AND_PING_BYTES, Connection, DataReceived, HeadersReceived, Http2Limits, Role
from proto.pb import rpc_pb2
from proto.scan import Header, encode_response, encode_watch_id
from proxy.listening.late_acks import LateAcknowledgements
from tests.bench.cases import CASES, Case
from tests.bench.load import WATCH
from tests.bench.profiles import ACK, DATA, HEADERS, PING, SETTINGS, WINDOW_UPDATE, frame
from tests.bench.wire import RawClient, RequestBlocks, frame_head, frames, message_frame, range_of

HEADER = Header.make(1, 1, 1, 1)
# Between the shared bytes of two watches: the id after the one, the frame's and message's head before the other.
Joints = list[tuple[int, bytes]]


class Downstream(asyncio.Protocol):
    """One client's connection."""

    def __init__(self, floor: Floor) -> None:
        self.floor = floor
        # The real HTTP/2 code reads the client's requests; only the write side is minimal.
        self.h2 = Connection(Role.SERVER, Http2Limits(max_streams=100_000))
        self.rest: dict[int, bytes] = {}
        self.watches: dict[int, Joints] = {}
        """By range: (stream, encoded watch id) of each watch."""
        self.counts: dict[int, int] = {}
        self.prepared: dict[tuple[int, int], list[bytes]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.h2.start()
        self.flush()

    def data_received(self, data: bytes) -> None:
        if len(data) == UPDATE_AND_PING_BYTES:
            self.h2.now = time.monotonic()
            answer = self.h2.receive_update_and_ping(data)
            if answer:
                self.transport.write(answer)
                return
            if answer is not None:
                self.floor.late.add(self, self.h2.now)
                return
        if data[3] in (PING, SETTINGS, WINDOW_UPDATE) and self.acknowledge(data):
            return
        for event in self.h2.receive(data):
            if isinstance(event, HeadersReceived):
                self.h2.send_headers(event.stream, [(b":status", b"200"), (b"content-type", b"application/grpc")])
            elif isinstance(event, DataReceived):
                stream = event.stream.id
                self.h2.consumed(event.stream, event.flow_size)
                left = self.rest.get(stream, b"") + event.data
                while len(left) >= 5 and len(left) >= 5 + int.from_bytes(left[1:5], "big"):
                    end = 5 + int.from_bytes(left[1:5], "big")
                    self.create(stream, left[5:end])
                    left = left[end:]
                self.rest[stream] = left
        self.flush()

    def acknowledge(self, data: bytes) -> bool:
        """Acknowledge the PINGs of a read that has nothing else to answer; return False if it has more."""
        done = 0
        answer = b""
        for kind, flags, _, start, end in frames(data):
            done = end
            if kind == PING:
                answer += b"" if flags & ACK else frame(PING, ACK, 0, data[start:end])
            elif kind != WINDOW_UPDATE and not (kind == SETTINGS and flags & ACK):
                return False
        if done < len(data):
            return False
        if answer:
            self.transport.write(answer)
        return True

    def create(self, stream: int, message: bytes) -> None:
        request = rpc_pb2.WatchRequest.FromString(message).create_request
        watch_id = self.counts.get(stream, 0)
        self.counts[stream] = watch_id + 1
        index = int(request.key.split(b"/")[1])
        self.watches.setdefault(index, []).append((stream, encode_watch_id(watch_id)))
        self.floor.followers.setdefault(index, {})[self] = None
        answer = encode_response(HEADER, watch_id, created=True)
        self.h2.send(self.h2.streams[stream], (b"\0" + struct.pack(">I", len(answer)), answer), 5 + len(answer))

    def schedule_flush(self) -> None:
        """Write late acknowledgements."""
        self.flush()

    def flush(self) -> None:
        pieces = self.h2.output()
        if pieces:
            self.transport.write(b"".join(pieces))

    def heads(self, index: int, size: int) -> list[bytes]:
        """Prepare the bytes between the shared bytes, `size` of them, for all watches of a range."""
        joints = []
        last = b""
        for stream, watch_id in self.watches[index]:
            length = size + len(watch_id)
            joints.append(last + frame_head(DATA, 0, stream, length + 5) + b"\0" + struct.pack(">I", length))
            last = watch_id
        joints.append(last)
        return joints

    def write(self, index: int, shared: bytes) -> None:
        """Write an event for every watch of a range."""
        key = (index, len(shared))
        joints = self.prepared.get(key)
        if joints is None:
            joints = self.prepared[key] = self.heads(index, len(shared))
        self.transport.write(shared.join(joints))


class Upstream(RawClient):
    """The connection to etcd: one stream, one watch per range, numbered as the ranges are."""

    def __init__(self, floor: Floor) -> None:
        super().__init__()
        self.floor = floor
        self.left = b""

    def open(self, case: Case, authority: str) -> None:
        """Watch all ranges."""
        self.transport.write(frame(HEADERS, 4, 1, RequestBlocks(WATCH, authority).take()))
        for index in range(case.ranges):
            key, end = range_of(index)
            create = rpc_pb2.WatchCreateRequest(key=key, range_end=end, watch_id=index)
            message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
            self.transport.write(message_frame(1, message))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream
        if kind != DATA:
            return
        left = self.left + data[start:end]
        at, size = 0, len(left)
        while size - at >= 5:
            stop = at + 5 + int.from_bytes(left[at + 1 : at + 5], "big")
            if stop > size:
                break
            self.message(left[at + 5 : stop])
            at = stop
        self.left = left[at:]

    def message(self, message: bytes) -> None:
        """Forward an event, without its watch id, which follows the header."""
        head = 2 + message[1]
        index = 0
        after = head
        if message[head] == 0x10:
            index = message[head + 1]
            after = head + 2
            if index > 127:
                index = index & 127 | message[head + 2] << 7
                after += 1
        if message[after] != 0x5A:
            return
        shared = message[:head] + message[after:]
        for follower in self.floor.followers.get(index, ()):
            follower.write(index, shared)


class Floor:
    """The clients of each range."""

    def __init__(self) -> None:
        self.followers: dict[int, dict[Downstream, None]] = {}
        self.late = LateAcknowledgements()


async def run(case: Case, host: str, port: int, listen: int) -> None:
    """Serve until killed."""
    floor = Floor()
    loop = asyncio.get_running_loop()
    _, upstream = await loop.create_connection(lambda: Upstream(floor), host, port)
    upstream.open(case, f"{host}:{port}")
    await loop.create_server(lambda: Downstream(floor), "127.0.0.1", listen, backlog=1024)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(run(CASES[sys.argv[1]], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
