"""Pauses of the garbage collector with many watches: `python -m tests.bench.pauses CONNECTIONS KEYS`.

Connections with one stream each create a watch of each key, as in `creates`; then each key is written, four times in
all. There are no sockets and no etcd; connections, Watch service, engine and core are real. Prints for each phase the
longest turn of the event loop and the longest collection of each generation, in ms of CPU, and the memory. 3,500
connections with 300 keys need half a gigabyte and a minute.
"""

from __future__ import annotations

import asyncio
import gc
import sys
import time
from typing import Any

import uvloop

from proto.scan import WatchResponse
from tests.bench.creates import ProxyWithoutSockets, Store
from tests.bench.sharing.leaving import Turns
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
    store, turns, collections = WrittenStore(), Turns(), Collections()
    proxy = ProxyWithoutSockets(store, clients, keys)
    turns.start()

    def row(phase: str) -> None:
        longest = " | ".join(f"{1e3 * longest_s:.1f}" for longest_s in collections.longest_s)
        sys.stdout.write(f"| {phase} | {1e3 * turns.longest_s:.0f} | {longest} | {proxy.memory_mib():.0f} |\n")
        sys.stdout.flush()
        collections.longest_s = [0.0, 0.0, 0.0]
        turns.longest_s = 0.0

    head = "phase | longest turn, ms | generation 0, ms | generation 1, ms | all, ms | memory, MiB"
    sys.stdout.write(f"| {head} |\n|---|---:|---:|---:|---:|---:|\n")
    await proxy.connect(clients)
    row("creates")
    for number in range(PASSES):
        for watch in store.opened:
            store.send(watch)
            written = asyncio.Event()
            proxy.listener.output.when_written(written.set)
            await written.wait()
        row(f"event {number + 1} of each key")
    turns.stop()
    assert proxy.core.stats.delivered == PASSES * clients * keys, "each watch gets each event"


if __name__ == "__main__":
    uvloop.run(main(*map(int, sys.argv[1:])))
