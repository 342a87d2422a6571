"""One process of several (`supervising.py`), as it sees its parent: it reports itself, and follows orders."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from proxy.admin.aggregate import AllProcesses, Heartbeat, ParentMessage
from proxy.admin.monitor import Monitor
from proxy.listening.sockets import Listening
from proxy.process.endpoints import Examination, ExaminationResult

if TYPE_CHECKING:
    from proxy.process.child import Parent
    from proxy.process.reloading import Reloading
    from proxy.server import Proxy

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
    whole_id: str = ""
    """The id of the whole proxy."""
    cluster_id: int = 0
    """The etcd cluster that the processes before it have watched; 0 if it is not known."""


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
        self._proxy: Proxy | None = None
        self._pending: Examination | None = None
        """Endpoints to examine; they may arrive while the process is starting."""
        self._examining: asyncio.Task[None] | None = None
        self._examined: ExaminationResult | None = None
        self._news = asyncio.Event()
        """There is something to report at once."""

    def came(self, line: bytes) -> None:
        """Follow an order of the parent."""
        order = msgspec.json.decode(line, type=ParentMessage)
        if self.place.whole is not None:
            self.place.whole.learn(order)
        self._settings = order.settings or self._settings
        self._apply()
        self._pending = order.examine or self._pending
        self._examine()

    def record(self, proxy: Proxy, address: str, limits: Callable[[], Mapping[str, float]]) -> Monitor:
        """Record from now on what is reported and shown."""
        self.monitor = Monitor(proxy, address, limits, self.place.whole)
        self.monitor.start()
        return self.monitor

    def start(self, proxy: Proxy, parent: Parent, reloading: Reloading, monitor: Monitor) -> None:
        """Report from now on, and apply changed settings."""
        self._reloading, self._proxy = reloading, proxy
        self._apply()
        self._examine()
        self._report_task = asyncio.get_running_loop().create_task(
            self._report_periodically(proxy, parent, monitor), name="reports"
        )

    def _apply(self) -> None:
        if self._settings and self._reloading is not None:
            settings = pickle.loads(base64.b64decode(self._settings))
            self._settings = ""
            self._reloading.reload(lambda: (settings, []))

    def _examine(self) -> None:
        """Examine the endpoints of the newest order, instead of those of an earlier one."""
        if self._pending is not None and self._proxy is not None:
            if self._examining is not None:
                self._examining.cancel()
            examination, self._pending = self._examination(self._proxy, self._pending), None
            self._examining = asyncio.get_running_loop().create_task(examination, name="examine endpoints")

    async def _examination(self, proxy: Proxy, pending: Examination) -> None:
        problem = await proxy.examine_endpoints(*pending.endpoints)
        self._examined = ExaminationResult(pending.number, problem)
        self._news.set()

    def stop(self) -> None:
        """Stop reporting."""
        for task in (self._report_task, self._examining):
            if task is not None:
                task.cancel()
        if self.monitor is not None:
            self.monitor.stop()

    async def _report_periodically(self, proxy: Proxy, parent: Parent, monitor: Monitor) -> None:
        health, listener = proxy.health, proxy.listener
        news = self._news
        health.on_change = news.set
        since_s, used_s, load = time.monotonic(), time.process_time(), 0.0
        while True:
            news.clear()
            if (now := time.monotonic()) >= since_s + REPORT_INTERVAL_S / 2:
                load = (time.process_time() - used_s) / (now - since_s)
                since_s, used_s = now, time.process_time()
            report = msgspec.Raw(msgspec.json.encode(await monitor.report(self.place.name)))
            beat = Heartbeat(
                problem=health.reason,
                hung=health.hung,
                open=listener.open,
                open_max=listener.settings.connections_max,
                taken=listener.taken,
                load=round(load, 2),
                cluster_id=proxy.upstream.cluster_id,
                examined=self._examined,
                report=report,
            )
            if not parent.unsent_bytes:
                parent.write_line(beat)
            # Not asyncio.wait_for: in Python 3.11 it drops a cancellation that comes right after the news.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await news.wait()
