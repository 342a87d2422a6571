"""A listener with a test handler that echoes its input."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from proto.framing import Status
from proto.http2 import Stream
from proxy.listening.calls import ConnectionHandle, Handler, Headers, RequestHead, ServerCall
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from tests.e2e.raw_client import HOST, RawClient

ECHO = "/test.Echo/Echo"


class Echo:
    """Sends back its input byte for byte, and ends when the client ends."""

    def __init__(self, connection: ConnectionHandle, stream: Stream, headers: Headers) -> None:
        self.call = ServerCall(connection, stream)
        self.head = RequestHead.parse(headers)
        self.call.end_after(self.head.timeout_s)
        self.closed_with: list[int | None] = []
        self.drains = 0

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        self.call.connection.h2.consumed(self.call.stream, flow_size)
        if data == b"break":
            raise RuntimeError("a handler with a bug")
        if data:
            self.call.write(data)
        if end_stream:
            self.call.end(Status.OK)

    def trailers(self, headers: Headers) -> None:
        self.call.end(Status.OK, f"{len(headers)} trailers")

    def drained(self) -> None:
        self.drains += 1

    def closed(self, code: int | None) -> None:
        self.call.closed()
        self.closed_with.append(code)


class Rig:
    """A listener with the echo service on one path."""

    def __init__(self, settings: ListenerSettings | None) -> None:
        self.listener = Listener(settings)
        self.handlers: list[Echo] = []
        self.listener.routes[ECHO.encode()] = self.open

    def open(self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool) -> Handler | None:
        handler = Echo(connection, stream, headers)
        self.handlers.append(handler)
        if end_stream:
            handler.call.end(Status.OK)
            return None
        return handler

    async def connect(self, window: int = 2**31 - 1) -> RawClient:
        """A client of it."""
        return await RawClient.connect(self.listener.port, window)


@asynccontextmanager
async def rig_of(settings: ListenerSettings | None = None) -> AsyncIterator[Rig]:
    """Yield a running listener with the echo service."""
    rig = Rig(settings)
    await rig.listener.start(HOST, 0)
    try:
        yield rig
    finally:
        await rig.listener.stop()
        assert not rig.listener.connections
