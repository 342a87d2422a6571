"""A TCP relay that injects faults: it can cut, delay, silence or close connections to an etcd after so many bytes.

Network faults must be tested with the real programs at both ends, and at a chosen moment. The relay forwards bytes
without parsing HTTP/2; only `where` may examine the first bytes of a connection, to find out which peer opened it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import Enum
from typing import cast

from tests.waiting import until_async

HOST = "127.0.0.1"


class Way(Enum):
    """The direction of bytes."""

    THERE = "from the client to the target"
    BACK = "from the target to the client"


@dataclass
class Fault:
    """The fault in one direction."""

    delay_s: float = 0.0
    """Delay of each piece; order and pace stay."""
    paused: bool = False
    """No byte arrives and no error is reported, as with an unplugged cable; sent bytes are held."""
    bytes_left: int | None = None
    """The connection is reset after so many more bytes; None: never."""


class _End(asyncio.Protocol):
    """One of the two connections of a link."""

    def __init__(self, link: Link, way: Way) -> None:
        self.link = link
        self.way = way
        """The connection that received bytes are forwarded to."""
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        if self.link.broken:
            self.link.abort()

    def data_received(self, data: bytes) -> None:
        self.link.take(self.way, data)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.transport = None
        self.link.abort()


class Link:
    """One connection through a relay."""

    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.ends = {Way.THERE: _End(self, Way.THERE), Way.BACK: _End(self, Way.BACK)}
        self.broken = False
        """The link has ended, though an end of stream may still be in transit."""
        self.opening = b""
        """The first bytes received, for `Relay.fault_of`."""
        self._held: dict[Way, deque[tuple[float, bytes]]] = {Way.THERE: deque(), Way.BACK: deque()}
        self._connecting: asyncio.Task[None] | None = None

    def connect(self) -> None:
        """Connect to the target."""
        self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        try:
            loop = asyncio.get_running_loop()
            await loop.create_connection(lambda: self.ends[Way.BACK], HOST, self.relay.target_port)
        except OSError:
            self.abort()
        else:
            self.flow()

    def take(self, way: Way, data: bytes) -> None:
        """Accept bytes from one end."""
        if way is Way.THERE and len(self.opening) < 4096:
            self.opening += data
        fault = self.relay.fault_of(self, way)
        loop = asyncio.get_running_loop()
        self._held[way].append((loop.time() + fault.delay_s, data))
        if fault.delay_s:
            loop.call_later(fault.delay_s, self.flow)
        else:
            self.flow()

    def flow(self) -> None:
        """Write the bytes that are due."""
        now = asyncio.get_running_loop().time()
        for way, held in self._held.items():
            fault = self.relay.fault_of(self, way)
            other = self.ends[Way.BACK if way is Way.THERE else Way.THERE].transport
            while held and other is not None and not fault.paused and held[0][0] <= now + 0.001:
                _, data = held.popleft()
                if fault.bytes_left is not None:
                    data = data[: fault.bytes_left]
                    fault.bytes_left -= len(data)
                other.write(data)
                self.relay.passed[way] += len(data)
                if fault.bytes_left == 0:
                    # Bytes written before the end arrive before it.
                    other.close()
                    return

    def abort(self) -> None:
        """Reset it at both ends."""
        self.broken = True
        self.relay.links.discard(self)
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        for end in self.ends.values():
            transport, end.transport = end.transport, None
            if transport is not None:
                transport.abort()


class Relay:
    """A relay to one port. Use `relay_to`."""

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = 0
        self.links: set[Link] = set()
        self.accepted = 0
        """Connections so far."""
        self.passed = {Way.THERE: 0, Way.BACK: 0}
        """Bytes so far."""
        self.faults = {Way.THERE: Fault(), Way.BACK: Fault()}
        self.where: Callable[[bytes, Way], Fault | None] = lambda _opening, _way: None
        """Returns the fault of connections that opened with certain bytes; None: the relay's own."""
        self._cut = False
        self._server: asyncio.Server | None = None

    @property
    def endpoint(self) -> str:
        """Where to connect, as HOST:PORT."""
        return f"{HOST}:{self.port}"

    def fault_of(self, link: Link, way: Way) -> Fault:
        """Return the fault in a direction of a connection."""
        return self.where(link.opening, way) or self.faults[way]

    async def start(self) -> None:
        """Listen on a free port."""
        self._server = await asyncio.get_running_loop().create_server(self._accept, HOST, 0)
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close everything."""
        if self._server is not None:
            self._server.close()
        self._break()
        await until_async(lambda: not self.links, "the relay's connections to end")

    def _accept(self) -> _End:
        self.accepted += 1
        link = Link(self)
        self.links.add(link)
        loop = asyncio.get_running_loop()
        loop.call_soon(link.abort if self._cut else link.connect)
        return link.ends[Way.THERE]

    def cut(self) -> None:
        """Reset all connections, and each new one at once."""
        self._cut = True
        self._break()

    def _break(self) -> None:
        for link in tuple(self.links):
            link.abort()

    def half_open(self) -> None:
        """Forward nothing more and report no error; new connections open, and stay silent."""
        for fault in self.faults.values():
            fault.paused = True

    def pause(self, way: Way) -> None:
        """Forward nothing more in one direction."""
        self.faults[way].paused = True

    def delay(self, way: Way, seconds: float) -> None:
        """Delay everything in one direction."""
        self.faults[way].delay_s = seconds

    def break_after(self, way: Way, size: int) -> None:
        """Reset the connections after so many more bytes in one direction."""
        self.faults[way].bytes_left = size

    def mend(self) -> None:
        """End all faults. Held bytes are forwarded."""
        self._cut = False
        self.faults = {Way.THERE: Fault(), Way.BACK: Fault()}
        self.flow()

    def flow(self) -> None:
        """Forward the bytes that are no longer held."""
        for link in tuple(self.links):
            link.flow()


@asynccontextmanager
async def relay_to(port: int) -> AsyncIterator[Relay]:
    """Run a relay to a port of this host."""
    relay = Relay(port)
    await relay.start()
    try:
        yield relay
    finally:
        await relay.stop()
