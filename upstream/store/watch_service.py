"""The Watch service: for each stream, one task reads requests and another writes answers.

The reader assigns ids and refuses requests as they arrive; the writer sends the stream's queue in order. The reader
waits when the client sends creates faster than it reads the answers (etcd's control channel is bounded too). When the
client closes its side, the stream stays open.
"""

from __future__ import annotations

import asyncio
import contextlib
import random

import grpc

from proto.pb import rpc_pb2
from upstream.store.calls import Calls, Context, parse, service, stream
from upstream.store.state import StoreState
from upstream.store.watch_batch import encode_message
from upstream.store.watch_requests import CONTROLS_MAX, take_request
from upstream.store.watchable import ServedStream

PROGRESS_NOTIFY_INTERVAL_S = 600.0
PROGRESS_NOTIFY_JITTER = 0.1
"""Each stream's interval is longer by a random fraction up to this, so that streams opened together drift apart."""


class StoreWatchService:
    """etcdserverpb.Watch."""

    def __init__(
        self, state: StoreState, calls: Calls, progress_notify_interval_s: float = PROGRESS_NOTIFY_INTERVAL_S
    ) -> None:
        self._state = state
        self._calls = calls
        self._interval_s = progress_notify_interval_s

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service("etcdserverpb.Watch", {"Watch": stream(self._serve)})

    async def _serve(self, context: Context) -> None:
        session = _Session(self._state, context, self._calls)
        interval_s = self._interval_s * (1 + random.uniform(0, PROGRESS_NOTIFY_JITTER))
        reader = asyncio.create_task(session.read(), name="watch reader")
        ticker = asyncio.create_task(session.tick(interval_s), name="watch progress ticker")
        try:
            await session.write(reader)
        finally:
            session.close()
            for task in (reader, ticker):
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await task


class _Session:
    """One client's stream."""

    __slots__ = ("_calls", "_context", "_ready", "_room", "_state", "_stream")

    def __init__(self, state: StoreState, context: Context, calls: Calls) -> None:
        self._state = state
        self._context = context
        self._calls = calls
        # Set while there is something to write, or the reader has failed.
        self._ready = asyncio.Event()
        # Set while there is room for control answers.
        self._room = asyncio.Event()
        self._stream: ServedStream = state.watchable.open_stream(self._ready.set)

    async def read(self) -> None:
        """Take requests until the client ends its side."""
        try:
            while (data := await self._calls.read(self._context)) is not None:
                take_request(self._stream, parse(rpc_pb2.WatchRequest, data), self._check)
                while self._stream.queued_controls >= CONTROLS_MAX:
                    self._room.clear()
                    await self._room.wait()
        except Exception:
            self._ready.set()
            raise

    def _check(self, key: bytes, range_end: bytes) -> None:
        self._state.auth.check(self._calls.user(self._context), key, range_end)

    async def write(self, reader: asyncio.Task[None]) -> None:
        """Send answers as they are queued; ends only with an error of the reader or the stream."""
        head = self._state.head
        while True:
            message = self._stream.take()
            if message is None:
                if reader.done() and not reader.cancelled() and (error := reader.exception()) is not None:
                    raise error
                self._ready.clear()
                await self._ready.wait()
                continue
            for piece in encode_message(head, message):
                await self._calls.write(self._context, piece)
            self._room.set()

    async def tick(self, interval_s: float) -> None:
        """Queue progress notifications every `interval_s`."""
        while True:
            await asyncio.sleep(interval_s)
            self._stream.progress_tick()

    def close(self) -> None:
        """End the stream's watches."""
        self._stream.close()
