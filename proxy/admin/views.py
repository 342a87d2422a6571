"""What the status page shows, as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from proxy.admin.snapshot import Snapshot


@dataclass(frozen=True, kw_only=True)
class HistoryPoint:
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


@dataclass(frozen=True, kw_only=True)
class TrunkView:
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


@dataclass(frozen=True, kw_only=True)
class SessionView:
    """A lagging session, as shown on the status page."""

    peer: str
    watches: int
    lagging: int
    behind_s: float
    behind_revisions: int
    unsent_bytes: int
    stalled: bool


@dataclass(frozen=True, kw_only=True)
class ClientView:
    """A client connection. Bytes are those of TCP, of the connection's life; None if the kernel does not count them."""

    peer: str
    user_agent: str
    """"-" if it sends none; "" before its first request."""
    tls: str
    """The version of TLS; "" without."""
    age_s: float
    streams: int
    sessions: int
    watches: int
    lagging: int
    behind_s: float
    behind_revisions: int
    unsent_bytes: int
    sent_bytes: int | None
    received_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Clients:
    """The clients, the longest-lagging first, then those with the most watches."""

    connections: int
    """All client connections; `clients` may be fewer."""
    clients: list[ClientView]


@dataclass(frozen=True, kw_only=True)
class EndpointView:
    """An endpoint, as shown on the status page: whether it takes calls, and whether it carries the watches."""

    endpoint: str
    connected: bool
    problem: str
    carries_watches: bool
    version: str


@dataclass(frozen=True, kw_only=True)
class ProcessView:
    """A process of --workers, as shown on the status page."""

    name: str
    pid: int
    cpu_s: float
    memory_bytes: int
    connections: int
    watches: int
    events_delivered_total: int


@dataclass(frozen=True, kw_only=True)
class Overview:
    """All data of the status page."""

    now: Snapshot
    at: float
    delay_p50_s: float | None
    delay_p99_s: float | None
    loop_delay_p99_s: float | None
    endpoints: list[EndpointView]
    trunks: list[TrunkView]
    sessions: list[SessionView]
    clients: list[ClientView]
    points: list[HistoryPoint]
    step_s: float
    limits: Mapping[str, float]
    processes: list[ProcessView] = field(default_factory=list)
    """With --workers: all processes."""
