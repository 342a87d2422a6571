"""Pauses of the garbage collector with many watches: `python -m tests.bench.pauses CONNECTIONS KEYS`.

Connections with one stream each create a watch of each key, as in `creates`; then each key is written, four times in
all. There are no sockets and no etcd; connections, Watch service, engine and core are real. Prints for each phase the
longest turn of the event loop and the longest collection of each generation, in ms of CPU, and the memory. 3,500
connections with 300 keys need half a gigabyte and a minute.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, cast

import uvloop

from coalesce.core import Coalescer
from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2
from proto.scan import WatchResponse
from proxy.auth.reads import AuthReader
from proxy.listening.connection import ServerConnection
from proxy.listening.listener import Listener
from proxy.server import tune_gc
from proxy.watch.engine import Engine
from proxy.watch.service import PATH, WatchService
from tests.bench.creates import AT_A_TIME, Store, create
from tests.bench.sharing.leaving import Turns
from tests.bench.targets import Target
from tests.bench.wire import key_of, message_frame
from tests.coalesce.shell import put

PASSES = 4


class WrittenStore(Store):
    """A store that sends events to its upstream watches."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[Any] = []

    def open(self, watch: Any) -> None:
        """Register an upstream watch."""
        super().open(watch)
        self.opened.append(watch)

    def send(self, watch: Any) -> None:
        """Write the key of an upstream watch."""
        self.revision += 1
        self.engine.received(watch, WatchResponse(self.header(), 0, events=[put(self.revision, watch.key)]))


class Collections:
    """The longest collection of each generation, in seconds of CPU."""

    def __init__(self) -> None:
        self.longest_s = [0.0, 0.0, 0.0]
        self._began_s = 0.0
        gc.callbacks.append(self._note)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began_s = time.thread_time()
        else:
            generation = info["generation"]
            took_s = time.thread_time() - self._began_s
            self.longest_s[generation] = max(self.longest_s[generation], took_s)


async def main(clients: int, keys: int) -> None:
    """Print the table."""
    listener, store, turns, collections = Listener(), WrittenStore(), Turns(), Collections()
    listener._loop = store.loop
    core = Coalescer(CoreLimits(watches_max=clients * keys, watches_per_session_max=keys))
    store.engine = engine = Engine(core, AuthReader(cast(Any, store)), listener.output)
    engine.attach(cast(Any, store))
    listener.routes[PATH] = WatchService(engine).open
    requests = (rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=key_of(key))) for key in range(keys))
    messages = [message_frame(1, request.SerializeToString()) for request in requests]
    tune_gc()
    turns.start()
    own = Target("", 0, os.getpid())
    base_mib = own.memory_mib()
    connections: list[ServerConnection] = []

    async def some(left: Iterator[int]) -> None:
        connections.extend([await create(listener, messages) for _ in left])

    def row(phase: str) -> None:
        longest = " | ".join(f"{1e3 * longest_s:.1f}" for longest_s in collections.longest_s)
        sys.stdout.write(f"| {phase} | {1e3 * turns.longest_s:.0f} | {longest} | {own.memory_mib() - base_mib:.0f} |\n")
        sys.stdout.flush()
        collections.longest_s = [0.0, 0.0, 0.0]
        turns.longest_s = 0.0

    head = "phase | longest turn, ms | generation 0, ms | generation 1, ms | all, ms | memory, MiB"
    sys.stdout.write(f"| {head} |\n|---|---:|---:|---:|---:|---:|\n")
    left = iter(range(clients))
    await asyncio.gather(*(some(left) for _ in range(AT_A_TIME)))
    row("creates")
    for number in range(PASSES):
        for watch in store.opened:
            store.send(watch)
            written = asyncio.Event()
            listener.output.when_written(written.set)
            await written.wait()
        row(f"event {number + 1} of each key")
    turns.stop()
    assert core.stats.delivered == PASSES * clients * keys, "each watch gets each event"


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
