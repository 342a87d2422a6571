"""The events a second of one process and of --workers=2, with two cores that are almost only the proxy's.

Each write is for thousands of connections with one stream each, so few writes fill the proxy, and etcd, the writer and
the clients need little. The clients do not read until the end: the kernel keeps what they receive, and then all events
are counted. `make bench` has the CPU per event and the delay.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import socket
import struct
import termios
import time
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

from proto.pb import rpc_pb2
from tests.bench import wire
from tests.bench.caller import PUT, connect, stamped
from tests.bench.load import WATCH
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import Target, children
from tests.etcd.binaries import current
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import until_async

KEY: Final = b"bench/key"
SETTLE_S: Final = 2.0
UNREAD_BYTES_MAX: Final = 4 * 1024 * 1024
CONNECTIONS_AT_A_TIME: Final = 100
LOOK_S: Final = 0.02
BUSY_S: Final = 0.02
LOOKED_AT: Final = 50
"""So many of the connections show when the last event has come."""


class Size(NamedTuple):
    """How many connections there are, and how many writes, at which rate: more events than the proxy can deliver."""

    connections: int
    writes: int
    writes_s: float


SIZES: Final = (Size(4000, 2000, 1500), Size(8000, 1000, 750))


class Unread(wire.RawClient):
    """A connection with one watch. It reads until that is created, and again when the events are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.created = False
        self.events: int | None = None
        """Those read so far; None: it does not count yet."""
        self._last = b""

    def data_received(self, data: bytes) -> None:
        if self.events is None:
            super().data_received(data)
            return
        # A marker may be cut by the end of a read.
        data = self._last + data
        self.events += data.count(wire.MARKER)
        self._last = data[-(len(wire.MARKER) - 1) :]

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream, data, start, end
        self.created = self.created or kind == DATA

    @classmethod
    async def connect(cls, port: int) -> Unread:
        """Open a connection, and its watch."""
        _, client = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        create = rpc_pb2.WatchCreateRequest(key=KEY)
        message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
        head = frame(HEADERS, 4, 1, wire.RequestBlocks(WATCH, f"{HOST}:{port}").take())
        client.transport.write(head + wire.message_frame(1, message))
        return client

    def stop(self) -> socket.socket:
        """Read no more, and return the socket."""
        self.transport.pause_reading()
        found: socket.socket = self.transport.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES_MAX)
        return found

    def count(self) -> int:
        """Read and count all events that the kernel has."""
        self.events = 0
        while _unread_bytes(self.transport.get_extra_info("socket")):
            self.data_received(os.read(self.transport.get_extra_info("socket").fileno(), UNREAD_BYTES_MAX))
        return self.events


class Used(NamedTuple):
    """The seconds from the first write to the last event, and the CPU seconds of everything meanwhile."""

    took_s: float
    proxy_s: list[float]
    etcd_s: float
    load_s: float


def _throughput(size: Size, front: Front) -> Figures:
    """Measure one process and two workers, and compare them."""
    figures: Figures = {}
    if front.root is None:
        return figures
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    rates: list[float] = []
    events = size.connections * size.writes
    for how, flags in (("1 process", ()), ("2 workers", ("--workers=2",))):
        with EtcdServer(current()) as etcd, front.before(etcd.endpoint, *flags):
            time.sleep(SETTLE_S)
            target = front.server(etcd)
            target = replace(target, others=children(target.pid))
            used = asyncio.run(_measured(size, etcd, target))
        rates.append(events / used.took_s)
        figures[f"{how}: events per second"] = round(rates[-1])
        figures[f"{how}: us of CPU per event"] = round(sum(used.proxy_s) / events * 1e6, 2)
        figures[f"{how}: cores used by the proxy"] = round(sum(used.proxy_s) / used.took_s, 2)
        figures[f"{how}: cores used by its busiest process"] = round(max(used.proxy_s) / used.took_s, 2)
        figures[f"{how}: cores used by etcd"] = round(used.etcd_s / used.took_s, 2)
        figures[f"{how}: cores used by writer and clients"] = round(used.load_s / used.took_s, 2)
    figures["2 workers: times the events per second of 1 process"] = round(rates[1] / rates[0], 2)
    return figures


async def _measured(size: Size, etcd: EtcdServer, target: Target) -> Used:
    clients: list[Unread] = []
    while len(clients) < size.connections:
        some = [Unread.connect(target.port) for _ in range(min(CONNECTIONS_AT_A_TIME, size.connections - len(clients)))]
        clients += await asyncio.gather(*some)
    await until_async(lambda: all(client.created for client in clients), "the watches", 60)
    sockets = [client.stop() for client in clients]
    looked_at = sockets[:: len(sockets) // LOOKED_AT]
    assert etcd.process is not None
    store = Target("etcd", etcd.client_port, etcd.process.pid)

    def used() -> Used:
        return Used(time.perf_counter(), target.cpu_each_s(), store.cpu_s(), time.process_time())

    before = after = used()
    await _write(size, etcd)
    sizes: list[int] = []
    # On a busy machine the proxy may wait for a core while it still has events.
    busy_at, busy_s = after.took_s, 0.0
    while time.perf_counter() - max(busy_at, after.took_s) < 1.0 or not sizes:
        found = [_unread_bytes(each) for each in looked_at]
        if found != sizes:
            sizes, after = found, used()
        if target.cpu_s() - busy_s > BUSY_S:
            busy_at, busy_s = time.perf_counter(), target.cpu_s()
        await asyncio.sleep(LOOK_S)
    counts = [client.count() for client in clients]
    assert set(counts) == {size.writes}, f"clients got {min(counts)} to {max(counts)} events of {size.writes}"
    for client in clients:
        client.transport.abort()
    proxy_s = [now - was for now, was in zip(after.proxy_s, before.proxy_s, strict=True)]
    return Used(after.took_s - before.took_s, proxy_s, after.etcd_s - before.etcd_s, after.load_s - before.load_s)


async def _write(size: Size, etcd: EtcdServer) -> None:
    """Write at the rate."""
    writer = await connect(HOST, etcd.client_port)
    put = rpc_pb2.PutRequest(key=KEY, value=stamped(0)).SerializeToString()
    began = time.perf_counter()
    for number in range(size.writes):
        await asyncio.sleep(began + number / size.writes_s - time.perf_counter())
        writer.call(PUT, put)
    await writer.room(1)
    assert not writer.failed, "etcd refused a write"
    writer.transport.abort()


def _unread_bytes(each: socket.socket) -> int:
    size: int = struct.unpack("i", fcntl.ioctl(each, termios.FIONREAD, bytes(4)))[0]
    return size


SCENARIOS: Final[dict[str, Scenario]] = {
    f"workers: {size.connections:,} connections": partial(_throughput, size) for size in SIZES
}
