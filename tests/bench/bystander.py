"""A bystander: one watch of its own key, written 20 times a second, while others put load on the target.

It has the same watch at etcd, to show how much of a delay is that of the put and of the machine. Arguments: the port of
the target, the endpoint of etcd. For each line on standard input it prints the largest delay since the last one at the
target and at etcd, and by how much an event came later from the target than from etcd, in milliseconds. A delay ends
when the event is in the bystander's socket, by the kernel, so that the time until this process reads it does not count;
an event that has not arrived counts with its age.
"""

from __future__ import annotations

import asyncio
import sys
import time

import uvloop

from proto.pb import rpc_pb2
from tests.bench.arrivals import Arrivals
from tests.bench.caller import PUT, connect, stamped
from tests.bench.load import WATCH
from tests.bench.profiles import DATA, HEADERS, GrpcGo, frame
from tests.bench.wire import MARKER, STAMP_DIGITS, RawClient, RequestBlocks, message_frame
from tests.etcd.server import HOST

KEY = b"bystander"
EVERY_S = 0.05


class Watcher(RawClient):
    """The watch, and the delays of its events."""

    def __init__(self, arrivals: Arrivals, written: list[int]) -> None:
        """`written`: when each put was made."""
        super().__init__(GrpcGo())
        self.arrivals = arrivals
        self.arrived_ns = 0
        """When what is read now arrived."""
        self.delays_ns: list[int] = []
        """Of all events."""
        self.looked_at = 0
        """How many of them were examined by `latest_ms`."""
        self.written = written

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.arrivals.read(self.transport, self.take)

    def take(self, data: bytes, arrived_ns: int, now: int) -> None:
        """Read what arrived at that time."""
        del now
        self.arrived_ns = arrived_ns
        self.data_received(data)

    def open(self, authority: str) -> None:
        """Open the watch."""
        create = rpc_pb2.WatchCreateRequest(key=KEY)
        message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
        head = frame(HEADERS, 4, 1, RequestBlocks(WATCH, authority).take())
        self.transport.write(head + message_frame(1, message))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream
        at = data.find(MARKER, start, end)
        while kind == DATA and at >= 0:
            begin = at + len(MARKER)
            self.delays_ns.append(self.arrived_ns - int(data[begin : begin + STAMP_DIGITS]))
            at = data.find(MARKER, begin, end)

    def latest_ms(self) -> float:
        """Return the largest delay since the last call; a missing event counts with its age."""
        latest_ns = max(self.delays_ns[self.looked_at :], default=0)
        self.looked_at = received = len(self.delays_ns)
        if received < len(self.written):
            latest_ns = max(latest_ns, time.monotonic_ns() - self.written[received])
        return latest_ns / 1e6


async def run(port: int, endpoint: str) -> None:
    """Watch and write until killed."""
    loop = asyncio.get_running_loop()
    host, _, etcd_port = endpoint.rpartition(":")
    putter = await connect(host, int(etcd_port))
    arrivals = Arrivals()
    written: list[int] = []
    watchers = []
    for to_host, to_port in ((HOST, port), (host, int(etcd_port))):
        _, watcher = await loop.create_connection(lambda: Watcher(arrivals, written), to_host, to_port)
        watcher.open(f"{to_host}:{to_port}")
        watchers.append(watcher)
    orders = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(orders), sys.stdin)

    async def write() -> None:
        await asyncio.sleep(1)
        while True:
            written.append(time.monotonic_ns())
            putter.call(PUT, rpc_pb2.PutRequest(key=KEY, value=stamped(64)).SerializeToString())
            await asyncio.sleep(EVERY_S)

    writing = loop.create_task(write())
    at_target, at_etcd = watchers
    while await orders.readline():
        since = min(at_target.looked_at, at_etcd.looked_at)
        pairs = zip(at_target.delays_ns[since:], at_etcd.delays_ns[since:], strict=False)
        later_ms = max((ours - etcds for ours, etcds in pairs), default=0) / 1e6
        sys.stdout.write(f"{at_target.latest_ms()} {at_etcd.latest_ms()} {later_ms}\n")
        sys.stdout.flush()
    writing.cancel()


if __name__ == "__main__":
    uvloop.run(run(int(sys.argv[1]), sys.argv[2]))
