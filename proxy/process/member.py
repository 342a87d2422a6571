"""One process of several (`supervising.py`), as it sees its parent: it reports itself, and follows orders."""

from __future__ import annotations

import asyncio
import base64
import pickle
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from proxy.admin.monitor import Monitor
from proxy.admin.whole import Beat, Order, Whole
from proxy.listening.listener import BACKLOG
from proxy.listening.sockets import Listening, listen

if TYPE_CHECKING:
    from proxy.config.values import Address
    from proxy.process.child import Parent
    from proxy.process.reloading import Reloading
    from proxy.server import Proxy

BEAT_S: Final = 1.0
"""Interval of the reports to the parent."""


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """The part of a process in the proxy of several processes."""

    name: str
    listening: Listening | None
    """Inherited sockets for clients; None: a socket of its own, on the TCP port that all workers share."""
    port: int = 0
    """That port."""
    metrics: Listening | None = None
    """The hub's: inherited sockets of --metrics-addr; None without."""
    reports: bool = False
    """It reports its numbers to the parent."""


class Member:
    """See the module."""

    def __init__(self, place: ProcessPlace) -> None:
        self.place = place
        self.whole = Whole() if place.metrics is not None else None
        """The reports of the others, if this is the hub."""
        self._reloading: Reloading | None = None
        self.monitor: Monitor | None = None
        """What it reports; None if it reports only that it is up."""
        self._beats: asyncio.Task[None] | None = None

    @property
    def metrics_sockets(self) -> Sequence[socket.socket]:
        """The inherited sockets of --metrics-addr; none: it is not served by inherited ones."""
        return () if self.place.metrics is None else self.place.metrics.sockets

    async def listening(self, address: Address) -> Listening:
        """Return the sockets for clients. Raises OSError."""
        if self.place.listening is not None:
            return self.place.listening
        return await listen(address.host, self.place.port, "", BACKLOG, shared=True)

    def came(self, line: bytes) -> None:
        """Follow an order of the parent."""
        order = msgspec.json.decode(line, type=Order)
        if self.whole is not None:
            self.whole.learn(order)
        if order.settings and self._reloading is not None:
            settings = pickle.loads(base64.b64decode(order.settings))
            self._reloading.reload(lambda: (settings, []))

    def start(
        self,
        proxy: Proxy,
        parent: Parent,
        reloading: Reloading,
        address: str,
        limits: Callable[[], Mapping[str, float]],
    ) -> None:
        """Report from now on, and apply changed settings."""
        self._reloading = reloading
        if self.place.reports:
            self.monitor = Monitor(proxy, address, limits)
            self.monitor.start()
        self._beats = asyncio.get_running_loop().create_task(self._beat(proxy, parent), name="reports")

    def stop(self) -> None:
        """Stop reporting."""
        if self._beats is not None:
            self._beats.cancel()
        if self.monitor is not None:
            self.monitor.stop()

    async def _beat(self, proxy: Proxy, parent: Parent) -> None:
        while True:
            report = None if self.monitor is None else self.monitor.report(self.place.name)
            parent.write_line(Beat(problem=proxy.health.reason, hung=proxy.health.hung, report=report))
            await asyncio.sleep(BEAT_S)
