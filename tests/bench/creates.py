"""What a create costs without sockets and etcd: `python -m tests.bench.creates CLIENTS KEYS`.

Clients with a stream each create a watch of each key, eight clients at a time, as the case `many-*` of the bench does;
the HTTP/2 connection, the Watch service, the engine and the core are real. The store's revision moves on 20 times a
second. Prints CPU, memory and the longest turn of the loop (CPU) for each tenth of the clients. 3,500 clients with
3,000 keys need 3.4 GiB and four minutes on a quiet machine.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import uvloop

from coalesce.core import Coalescer
from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from proto.scan import Header, WatchResponse
from proxy.auth.reads import AuthReader
from proxy.listening.connection import ServerConnection
from proxy.listening.listener import Listener
from proxy.server import tune_gc
from proxy.watch.engine import Engine
from proxy.watch.service import PATH, WatchService
from tests.bench.lanes import Sink
from tests.bench.load import CREATES_AT_ONCE, WATCH
from tests.bench.profiles import frame, settings
from tests.bench.targets import Target
from tests.bench.wire import PREFACE, RequestBlocks, key_of, message_frame
from tests.waiting import until_async

AT_A_TIME = 8
WRITE_EVERY_S = 0.05
READ_S = 0.0005
TURN_S = 0.005
WAIT_S = 60
WINDOW = 1 << 30


class Store:
    """Answers what the proxy asks etcd for, a moment later."""

    newest_revision = 0
    ordered_progress = True
    leaderless = False
    own_token = None

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.revision = 1 << 20
        self.engine: Engine
        self.write()

    def write(self) -> None:
        """Write a key that no client watches, again and again."""
        self.revision += 1
        self.loop.call_later(WRITE_EVERY_S, self.write)

    def header(self) -> Header:
        """Return the header of an answer."""
        return Header.make(1 << 60, 1 << 61, self.revision, 3)

    def ask(self, *arguments: Any, **_: Any) -> Any:
        """Answer a read."""
        callback: Callable[[Any], None] = arguments[4]
        header = rpc_pb2.ResponseHeader(cluster_id=1 << 60, member_id=1 << 61, revision=self.revision, raft_term=3)
        self.loop.call_later(READ_S, callback, (rpc_pb2.TxnResponse(header=header).SerializeToString(), []))
        return SimpleNamespace(cancel=lambda: None)

    def open(self, watch: Any) -> None:
        """Register an upstream watch."""
        self.loop.call_soon(self.engine.received, watch, WatchResponse(self.header(), 0, created=True))

    def request_progress(self, number: int, watches: Iterable[Any]) -> None:
        """Answer a progress request."""
        self.loop.call_later(READ_S, self.engine.progressed, tuple(watches), self.header(), number)


class Unread(Sink):
    """A client that takes everything, and whose next requests wait for the answers in any case."""

    def pause_reading(self) -> None:
        """Do nothing."""

    def resume_reading(self) -> None:
        """Do nothing."""


class Turns:
    """The longest turn of the loop, in seconds of CPU, by a timer."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.longest_s = 0.0
        self._last_s = time.thread_time()
        self._look()

    def _look(self) -> None:
        now = time.thread_time()
        self.longest_s = max(self.longest_s, now - self._last_s)
        self._last_s = now
        self._loop.call_later(TURN_S, self._look)


async def create(listener: Listener, messages: list[bytes]) -> ServerConnection:
    """Create all watches of a client."""
    connection = ServerConnection(listener)
    connection.connection_made(cast(Any, Unread()))
    opening = PREFACE + settings() + frame(4, 1, 0, b"") + frame(1, 4, 1, RequestBlocks(WATCH, "etcd").take())
    connection.data_received(opening)
    h2 = connection.h2
    await until_async(lambda: 1 in h2.streams and h2.streams[1].owner is not None, "the stream", WAIT_S)
    stream = h2.streams[1]
    h2.send_window = stream.send_window = h2.receive_window = stream.receive_window = WINDOW
    watches = stream.owner.session.watches
    for start in range(0, len(messages), CREATES_AT_ONCE):
        part = messages[start : start + CREATES_AT_ONCE]
        connection.data_received(b"".join(part))
        await until_async(partial(_are_created, watches, start + len(part)), "the watches", WAIT_S)
    return connection


def _are_created(watches: Sized, count: int) -> bool:
    return len(watches) >= count


class ProxyWithoutSockets:
    """The real connections, Watch service, engine and core in front of a store; clients watch each of so many keys."""

    def __init__(self, store: Store, clients: int, keys: int) -> None:
        self.listener = listener = Listener()
        listener._loop = store.loop
        self.core = Coalescer(CoreLimits(watches_max=clients * keys, watches_per_session_max=keys))
        store.engine = engine = Engine(self.core, AuthReader(cast(Any, store)), listener.output)
        engine.attach(cast(Any, store))
        listener.routes[PATH] = WatchService(engine).open
        creates = (rpc_pb2.WatchCreateRequest(key=key_of(key)) for key in range(keys))
        requests = (rpc_pb2.WatchRequest(create_request=each) for each in creates)
        self._messages = [message_frame(1, request.SerializeToString()) for request in requests]
        self._connections: list[ServerConnection] = []
        tune_gc()
        self._own = Target("", 0, os.getpid())
        self._base_mib = self._own.memory_mib()

    def memory_mib(self) -> float:
        """Return by how much the process has grown."""
        return self._own.memory_mib() - self._base_mib

    async def connect(self, clients: int) -> None:
        """Let so many more clients create their watches, some at a time."""
        left = iter(range(clients))
        await asyncio.gather(*(self._connect_each(left) for _ in range(AT_A_TIME)))

    async def _connect_each(self, left: Iterator[int]) -> None:
        self._connections.extend([await create(self.listener, self._messages) for _ in left])


async def main(clients: int, keys: int) -> None:
    """Print the table."""
    store, turns = Store(), Turns()
    proxy = ProxyWithoutSockets(store, clients, keys)
    before_s, before = time.thread_time(), 0
    sys.stdout.write(
        "| watches | CPU of a create, us | memory of a watch, bytes | longest turn, ms |\n|---:|---:|---:|---:|\n"
    )
    for tenth in range(10):
        await proxy.connect(clients * (tenth + 1) // 10 - clients * tenth // 10)
        now_s, watches = time.thread_time(), proxy.core.stats.watches
        each_us = 1e6 * (now_s - before_s) / (watches - before)
        each_bytes = proxy.memory_mib() * 2**20 / watches
        sys.stdout.write(f"| {watches:,} | {each_us:.1f} | {each_bytes:.0f} | {1e3 * turns.longest_s:.0f} |\n")
        sys.stdout.flush()
        before_s, before, turns.longest_s = now_s, watches, 0.0


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
