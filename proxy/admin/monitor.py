"""The monitor: delays, and the history of the last hour in steps of ten seconds.

Metrics, the status page and its API read from the monitor, which reads from the parts of the proxy. It exists only with
--metrics-addr. On its own it only runs a timer once a second and records one point every ten seconds.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from coalesce import report
from proto.spans import FROM_KEY, prefix_of
from proxy.admin import memory
from proxy.admin.clients import clients
from proxy.admin.delays import BOUNDS_S, DeliveryDelays, Histogram, LoopDelay, quantile
from proxy.admin.health import BUNDLED_STORE
from proxy.admin.snapshot import Snapshot, SnapshotSource
from proxy.admin.views import Clients, EndpointView, HistoryPoint, Overview, ProcessView, SessionView, TrunkView
from proxy.config import knobs
from proxy.process import descriptors

if TYPE_CHECKING:
    from proxy.admin.aggregate import AllProcesses, ProcessReport, WorkerDetails
    from proxy.server import Proxy
    from upstream.pool import EndpointState

STEP_S = 10.0
STEPS_KEPT = 360
TRUNKS_SHOWN = 50
SESSIONS_SHOWN = 20
CLIENTS_SHOWN = 20
CLIENTS_LISTED = 1000
"""Clients in /v1/clients; with --workers each worker reports CLIENTS_SHOWN."""
DETAILS_S = 5.0
"""How old what a worker reports of single clients and ranges may be: to find them, it goes through all of its clients,
which takes 3 us for each (measured)."""


def limits_by_default() -> dict[str, float]:
    """Return the limits of a proxy without settings of its own, by setting."""
    return knobs.limits(knobs.Settings())


class Monitor:
    """The monitor of one proxy; call `start` in the running event loop."""

    def __init__(
        self,
        proxy: Proxy,
        address: str,
        limits: Callable[[], Mapping[str, float]] = limits_by_default,
        whole: AllProcesses | None = None,
    ) -> None:
        """`whole`: the reports of all processes, if this proxy is the hub: then everything here is about the whole."""
        self._proxy = proxy
        self.whole = whole
        self.limits = limits if whole is None else lambda: whole.limits
        """Returns the limits in force, by setting; 0 means no limit."""
        self._source = SnapshotSource(proxy, address)
        self._own_deliveries = DeliveryDelays(proxy.listener.output)
        self._own_loop = LoopDelay(self._tick)
        self.points: deque[HistoryPoint] = deque(maxlen=STEPS_KEPT)
        self._details: WorkerDetails
        self._details_at = float("-inf")
        self._descriptors = 0
        self._step_at = time.monotonic()
        self._step_from: Snapshot | None = None
        self._step_counts = list(self.delivery_delay.counts)

    def start(self) -> None:
        """Start recording."""
        self._step_from = self.take()
        self._step_at = time.monotonic()
        self._own_loop.start()

    def stop(self) -> None:
        """Stop recording."""
        self._own_loop.stop()
        self._proxy.listener.output.on_written = None

    def take(self) -> Snapshot:
        """Take a snapshot now."""
        own = self._source.take()
        return own if self.whole is None else self.whole.snapshot(own)

    def serving(self) -> tuple[bool, str]:
        """Return whether the proxy serves, and why it does not or what is unusual about it."""
        state = self._proxy.health if self.whole is None else self.take()
        return state.serving, state.reason or (BUNDLED_STORE if self._proxy.bundled_store else "")

    @property
    def delivery_delay(self) -> Histogram:
        """The delays of deliveries to clients."""
        return self._own_deliveries.histogram if self.whole is None else self.whole.delivery_delay()

    @property
    def loop_delay(self) -> Histogram:
        """The delays of the event loop, with --workers those of all."""
        return self._own_loop.histogram if self.whole is None else self.whole.loop_delay()

    async def report(self, name: str) -> ProcessReport:
        """Return the report of this process; what is found by going through all clients is up to DETAILS_S old."""
        from proxy.admin.aggregate import ProcessReport, WorkerDetails  # only with --workers

        now = time.monotonic()
        if now >= self._details_at + DETAILS_S:
            self._details_at = now
            self._descriptors = descriptors.in_use()
            self._details = WorkerDetails()
            if self.whole is None:
                self._details = WorkerDetails(
                    clients=(await self.clients(CLIENTS_SHOWN)).clients,
                    sessions=self.slowest_sessions(),
                    watches={each.range: each.watches for each in self._trunks()},
                )
        used = resource.getrusage(resource.RUSAGE_SELF)
        delivered = self._own_deliveries.histogram
        virtual, resident = memory.virtual_and_resident_bytes()
        return ProcessReport(
            name=name,
            pid=os.getpid(),
            cpu_s=round(used.ru_utime + used.ru_stime, 2),
            memory_bytes=resident,
            virtual_memory_bytes=virtual,
            snapshot=self._source.take(),
            delivery_counts=list(delivered.counts),
            delivery_sum_s=delivered.sum,
            loop_counts=list(self._own_loop.histogram.counts),
            loop_sum_s=self._own_loop.histogram.sum,
            descriptors=self._descriptors,
            details=self._details,
        )

    def processes(self) -> list[ProcessView]:
        """Return what the status page shows of all processes; nothing if there is only one."""
        return [] if self.whole is None else self.whole.views()

    def _trunks(self) -> list[TrunkView]:
        """Return the trunks with the most watches; with --workers those of clients are counted."""
        trunks = [_trunk_view(trunk) for trunk in report.trunks(self._proxy.engine.core, TRUNKS_SHOWN)]
        if self.whole is None:
            return trunks
        watches: Counter[str] = Counter()
        for each in self.whole.workers:
            watches.update(each.details.watches)
        counted = [replace(trunk, watches=watches[trunk.range]) for trunk in trunks]
        return sorted(counted, key=lambda trunk: -trunk.watches)

    def slowest_sessions(self) -> list[SessionView]:
        """Return the sessions that are furthest behind."""
        if self.whole is not None:
            sessions = [session for each in self.whole.workers for session in each.details.sessions]
            return sorted(sessions, key=lambda session: -session.behind_s)[:SESSIONS_SHOWN]
        now = asyncio.get_running_loop().time()
        return [_session_view(session) for session in report.slowest(self._proxy.engine.core, now, SESSIONS_SHOWN)]

    async def clients(self, at_most: int = CLIENTS_LISTED) -> Clients:
        """Return the clients, at most `at_most` of them."""
        if self.whole is not None:
            total = sum(each.snapshot.connections for each in self.whole.workers)
            views = [client for each in self.whole.workers for client in each.details.clients]
            views.sort(key=lambda view: (view.behind_s, view.watches, view.streams), reverse=True)
            return Clients(connections=total, clients=views[:at_most])
        now = asyncio.get_running_loop().time()
        return Clients(
            connections=len(self._proxy.listener.connections), clients=await clients(self._proxy, now, at_most)
        )

    @property
    def hung(self) -> str:
        """The evidence that the proxy hangs; "" if it does not."""
        return self._proxy.health.hung

    def endpoints(self) -> list[EndpointState]:
        """Return the state of each endpoint."""
        return self._proxy.pool.states()

    async def overview(self) -> Overview:
        """Return the current data of the status page."""
        shown = (await self.clients(CLIENTS_SHOWN)).clients
        counts = self.delivery_delay.counts
        recent = [now - then for now, then in zip(counts, self._step_counts, strict=True)]
        if not any(recent):
            recent = counts
        return Overview(
            now=self.take(),
            at=time.time(),
            delay_p50_s=quantile(0.5, BOUNDS_S, recent),
            delay_p99_s=quantile(0.99, BOUNDS_S, recent),
            loop_delay_p99_s=quantile(0.99, BOUNDS_S, self.loop_delay.counts),
            endpoints=[self._endpoint(state) for state in self.endpoints()],
            trunks=self._trunks(),
            sessions=self.slowest_sessions(),
            clients=shown,
            points=list(self.points),
            step_s=STEP_S,
            limits=self.limits(),
            processes=self.processes(),
        )

    def _endpoint(self, state: EndpointState) -> EndpointView:
        server = self._proxy.upstream.server
        carries = server is not None and server.endpoint == state.endpoint
        return EndpointView(
            endpoint=state.endpoint,
            connected=state.connected,
            problem=state.problem,
            carries_watches=carries,
            version=server.version if server is not None and carries else "",
        )

    def _tick(self) -> None:
        elapsed_s = time.monotonic() - self._step_at
        if elapsed_s >= STEP_S:
            self.step(elapsed_s)

    def step(self, elapsed_s: float) -> None:
        """Record a point for the `elapsed_s` seconds since the last one."""
        now, before = self.take(), self._step_from or Snapshot()
        counts = list(self.delivery_delay.counts)
        fresh = [after - was for after, was in zip(counts, self._step_counts, strict=True)]
        self.points.append(
            HistoryPoint(
                at=round(time.time(), 1),
                watches=now.watches,
                upstream_watches=now.upstream_watches,
                events_in_per_s=round((now.events_received_total - before.events_received_total) / elapsed_s, 2),
                events_out_per_s=round((now.events_delivered_total - before.events_delivered_total) / elapsed_s, 2),
                delay_p50_s=quantile(0.5, BOUNDS_S, fresh),
                delay_p99_s=quantile(0.99, BOUNDS_S, fresh),
                lagging=now.lagging,
            )
        )
        self._step_from, self._step_counts = now, counts
        self._step_at = time.monotonic()


def _trunk_view(trunk: report.TrunkReport) -> TrunkView:
    return TrunkView(
        range=show_range(trunk.key, trunk.range_end),
        watches=trunk.watches,
        backfills=trunk.backfills,
        next_revision=trunk.next_revision,
        events_total=trunk.events,
        history_bytes=trunk.history_bytes,
        history_batches=trunk.history_batches,
        history_floor=trunk.history_floor,
        opening=trunk.opening,
    )


def _session_view(session: report.SessionReport) -> SessionView:
    connection = getattr(session.outlet, "connection", None)
    stream = getattr(session.outlet, "stream", None)
    return SessionView(
        peer=getattr(connection, "peer", ""),
        watches=session.watches,
        lagging=session.lagging,
        behind_s=round(session.behind_s, 1),
        behind_revisions=session.behind_revisions,
        unsent_bytes=getattr(stream, "unsent", 0),
        stalled=session.stalled,
    )


def show_range(key: bytes, range_end: bytes) -> str:
    """Format a range for people: a key, a prefix with a star, or both ends. Each end is cut at 100 characters."""
    if not range_end:
        return _text(key)
    prefix = prefix_of(key, range_end)
    if prefix is not None:
        return f"{_text(prefix)}*" if prefix else "every key"
    if range_end == FROM_KEY:
        return f"{_text(key)} and above"
    return f"{_text(key)} to {_text(range_end)}"


def _text(key: bytes) -> str:
    return key[:100].decode("utf-8", "backslashreplace").replace("\x00", "\\x00")
