"""The monitor: delays, and the history of the last hour in steps of ten seconds.

Metrics, the status page and its API read from the monitor, which reads from the parts of the proxy. It exists only with
--metrics-addr. On its own it only runs a timer four times a second and records one point every ten seconds.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import msgspec

from coalesce import report
from proto.spans import FROM_KEY, prefix_of
from proxy.admin.delays import BOUNDS_S, LoopDelay, quantile, watch_deliveries
from proxy.admin.snapshot import Snapshot, SnapshotSource
from proxy.config import knobs

if TYPE_CHECKING:
    from proxy.server import Proxy
    from upstream.pool import EndpointState

STEP_S = 10.0
STEPS_KEPT = 360
TRUNKS_SHOWN = 50
SESSIONS_SHOWN = 20


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One step of the history: gauges at its end, rates over it. Delays in seconds; None if nothing was delivered."""

    at: float
    """Unix time."""
    watches: int
    upstream_watches: int
    events_in_per_s: float
    events_out_per_s: float
    delay_p50_s: float | None
    delay_p99_s: float | None
    lagging: int


class TrunkView(msgspec.Struct, frozen=True, kw_only=True):
    """A trunk, as shown on the status page: its range, watches and events."""

    range: str
    watches: int
    backfills: int
    next_revision: int
    events_total: int
    history_bytes: int
    history_batches: int
    history_floor: int
    opening: bool


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """A lagging session, as shown on the status page."""

    peer: str
    watches: int
    lagging: int
    behind_s: float
    behind_revisions: int
    unsent_bytes: int
    stalled: bool


class EndpointView(msgspec.Struct, frozen=True, kw_only=True):
    """An endpoint, as shown on the status page: whether it takes calls, and whether it carries the watches."""

    endpoint: str
    connected: bool
    problem: str
    carries_watches: bool
    version: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """All data of the status page."""

    now: Snapshot
    at: float
    delay_p50_s: float | None
    delay_p99_s: float | None
    loop_delay_p99_s: float | None
    endpoints: list[EndpointView]
    trunks: list[TrunkView]
    sessions: list[SessionView]
    points: list[Point]
    step_s: float
    limits: Mapping[str, float]


def limits_by_default() -> dict[str, float]:
    """Return the limits of a proxy without settings of its own, by setting."""
    return knobs.limits(knobs.Settings())


class Monitor:
    """The monitor of one proxy; call `start` in the running event loop."""

    def __init__(
        self, proxy: Proxy, address: str, limits: Callable[[], Mapping[str, float]] = limits_by_default
    ) -> None:
        self._proxy = proxy
        self.limits = limits
        """Returns the limits in force, by setting; 0 means no limit."""
        self._source = SnapshotSource(proxy, address)
        self.delivery_delay = watch_deliveries(proxy.listener, proxy.engine)
        self.loop_delay = LoopDelay(self._tick)
        self.points: deque[Point] = deque(maxlen=STEPS_KEPT)
        self._step_at = time.monotonic()
        self._step_from: Snapshot | None = None
        self._step_counts = list(self.delivery_delay.counts)

    def start(self) -> None:
        """Start recording."""
        self._step_from = self.take()
        self._step_at = time.monotonic()
        self.loop_delay.start()

    def stop(self) -> None:
        """Stop recording."""
        self.loop_delay.stop()
        self._proxy.listener.on_flush = None

    def take(self) -> Snapshot:
        """Take a snapshot now."""
        return self._source.take()

    @property
    def hung(self) -> str:
        """The evidence that the proxy hangs; "" if it does not."""
        return self._proxy.health.hung

    def endpoints(self) -> list[EndpointState]:
        """Return the state of each endpoint."""
        return self._proxy.pool.states()

    def overview(self) -> Overview:
        """Return the current data of the status page."""
        proxy = self._proxy
        core = proxy.engine.core
        counts = self.delivery_delay.counts
        recent = [now - then for now, then in zip(counts, self._step_counts, strict=True)]
        if not any(recent):
            recent = counts
        return Overview(
            now=self.take(),
            at=time.time(),
            delay_p50_s=quantile(0.5, BOUNDS_S, recent),
            delay_p99_s=quantile(0.99, BOUNDS_S, recent),
            loop_delay_p99_s=quantile(0.99, BOUNDS_S, self.loop_delay.histogram.counts),
            endpoints=[self._endpoint(state) for state in self.endpoints()],
            trunks=[_trunk_view(trunk) for trunk in report.trunks(core, TRUNKS_SHOWN)],
            sessions=[
                _session_view(session)
                for session in report.slowest(core, asyncio.get_running_loop().time(), SESSIONS_SHOWN)
            ],
            points=list(self.points),
            step_s=STEP_S,
            limits=self.limits(),
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
            Point(
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
