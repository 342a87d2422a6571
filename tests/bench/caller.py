"""Thousands of unary calls: the load of the pass-through cases, and the writer of all others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from tests.bench.profiles import DATA, HEADERS, Wide, frame
from tests.bench.wire import END_STREAM, MARKER, STAMP_DIGITS, RawClient, RequestBlocks, message_frame

PUT = "/etcdserverpb.KV/Put"
RANGE = "/etcdserverpb.KV/Range"
DELETE = "/etcdserverpb.KV/DeleteRange"


class Caller(RawClient):
    """One connection that makes calls, and calls `done` for each answer."""

    def __init__(self, authority: str, profile: Wide | None = None) -> None:
        super().__init__(profile)
        self._authority = authority
        self._blocks: dict[str, RequestBlocks] = {}
        self._last_id = -1
        self._answered: set[int] = set()
        # Calls in flight, and their start times (seconds).
        self._begun: dict[int, float] = {}
        self.delays: list[float] = []
        """Seconds that each call took."""
        self.failed = 0
        """Calls that ended without a message."""
        self.turn = asyncio.Event()
        """A call has ended since this was cleared."""

    @property
    def in_flight(self) -> int:
        """Calls in flight."""
        return len(self._begun)

    def call(self, path: str, message: bytes) -> None:
        """Make one call. Different methods on one connection would change each other's compression table."""
        self._last_id += 2
        blocks = self._blocks.get(path)
        if blocks is None:
            assert not self._blocks, "one method on a connection"
            blocks = self._blocks[path] = RequestBlocks(path, self._authority)
        stream = self._last_id
        self._begun[stream] = time.perf_counter()
        head = frame(HEADERS, 4, stream, blocks.take())
        self.transport.write(head + message_frame(stream, message, END_STREAM))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del data
        if kind == DATA and end > start:
            self._answered.add(stream)
        elif flags & END_STREAM and stream in self._begun:
            self.delays.append(time.perf_counter() - self._begun.pop(stream))
            if stream in self._answered:
                self._answered.discard(stream)
            else:
                self.failed += 1
            self.turn.set()

    async def room(self, in_flight: int) -> None:
        """Wait until fewer calls than that are in flight. Raises ConnectionError when the server has gone."""
        while len(self._begun) >= in_flight:
            if self.broken:
                raise ConnectionError(f"the server broke the connection: {self.broken}")
            self.turn.clear()
            await self.turn.wait()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.turn.set()


async def connect(host: str, port: int, profile: Wide | None = None) -> Caller:
    """Open a connection to make calls on."""
    loop = asyncio.get_running_loop()
    _, caller = await loop.create_connection(lambda: Caller(f"{host}:{port}", profile), host, port)
    return caller


async def drive(caller: Caller, path: str, messages: Iterator[bytes], in_flight: int) -> None:
    """Make all calls, so many concurrently."""
    for message in messages:
        await caller.room(in_flight)
        caller.call(path, message)
    await caller.room(1)


def stamped(value_bytes: int) -> bytes:
    """Make a value with the time of its write."""
    return (MARKER + b"%0*d" % (STAMP_DIGITS, time.monotonic_ns())).ljust(value_bytes, b".")
