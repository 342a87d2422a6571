"""One process of several (`supervising.py`), as it sees its parent: it reports itself, and follows orders."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import pickle
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from proxy.admin.aggregate import AllProcesses, EndpointsInForce, Heartbeat, ParentMessage
from proxy.admin.monitor import Monitor
from proxy.listening.sockets import Listening

if TYPE_CHECKING:
    from proxy.process.child import Parent
    from proxy.process.reloading import Reloading
    from proxy.server import Proxy
    from upstream.endpoints import Endpoint

REPORT_INTERVAL_S: Final = 2.5
"""Interval of the reports to the parent; a process that begins or ceases to serve reports at once. A report costs a
process, the parent and the hub 0.7 ms of CPU together."""


@dataclass(frozen=True, slots=True)
class ProcessPlace:
    """The part of a process in the proxy of several processes."""

    name: str
    listening: Listening
    """The hub's inherited socket; of a worker, where it gets the connections that the parent accepts."""
    metrics: Listening | None = None
    """The hub's: inherited sockets of --metrics-addr; None without."""
    whole: AllProcesses | None = None
    """The hub's: what is known of all processes."""
    hub: str = ""
    """A worker's: the endpoint of the hub."""


class ReportingProcess:
    """See the module."""

    def __init__(self, place: ProcessPlace) -> None:
        self.place = place
        self.monitor: Monitor | None = None
        """What it reports."""
        self._reloading: Reloading | None = None
        self._report_task: asyncio.Task[None] | None = None
        self._settings = ""
        """Changed settings that arrived while the process was starting."""

    def came(self, line: bytes) -> None:
        """Follow an order of the parent."""
        order = msgspec.json.decode(line, type=ParentMessage)
        if self.place.whole is not None:
            self.place.whole.learn(order)
        self._settings = order.settings or self._settings
        self._apply()

    def record(self, proxy: Proxy, address: str, limits: Callable[[], Mapping[str, float]]) -> Monitor:
        """Record from now on what is reported and shown."""
        self.monitor = Monitor(proxy, address, limits, self.place.whole)
        self.monitor.start()
        return self.monitor

    def start(self, proxy: Proxy, parent: Parent, reloading: Reloading, monitor: Monitor) -> None:
        """Report from now on, and apply changed settings."""
        self._reloading = reloading
        self._apply()
        self._report_task = asyncio.get_running_loop().create_task(
            self._report_periodically(proxy, parent, monitor), name="reports"
        )

    def _apply(self) -> None:
        if self._settings and self._reloading is not None:
            settings = pickle.loads(base64.b64decode(self._settings))
            self._settings = ""
            self._reloading.reload(lambda: (settings, []))

    def stop(self) -> None:
        """Stop reporting."""
        if self._report_task is not None:
            self._report_task.cancel()
        if self.monitor is not None:
            self.monitor.stop()

    async def _report_periodically(self, proxy: Proxy, parent: Parent, monitor: Monitor) -> None:
        health, listener = proxy.health, proxy.listener
        changed = asyncio.Event()
        health.on_change = changed.set
        since_s, used_s, load = time.monotonic(), time.process_time(), 0.0
        while True:
            changed.clear()
            if (now := time.monotonic()) >= since_s + REPORT_INTERVAL_S / 2:
                load = (time.process_time() - used_s) / (now - since_s)
                since_s, used_s = now, time.process_time()
            report = msgspec.Raw(msgspec.json.encode(monitor.report(self.place.name)))
            beat = Heartbeat(
                problem=health.reason,
                hung=health.hung,
                open=listener.open,
                taken=listener.taken,
                load=round(load, 2),
                endpoints=EndpointsInForce(_texts(proxy.endpoints), _texts(proxy.watch_endpoints)),
                report=report,
            )
            if not parent.unsent_bytes:
                parent.write_line(beat)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(changed.wait(), REPORT_INTERVAL_S)


def _texts(endpoints: Sequence[Endpoint]) -> list[str]:
    return [endpoint.text for endpoint in endpoints]
