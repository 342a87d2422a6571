"""What a running proxy can tell about itself, read off its parts at the moment somebody asks.

Nothing is counted for this: the core, the engine and the listener keep plain counters anyway, and a snapshot reads
them. So an event costs the same whether anybody looks or not. Metrics, the status page and `watchmux status` all
show snapshots.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from proxy.server import Proxy


class Snapshot(msgspec.Struct, kw_only=True):
    """A proxy at one moment. Names ending in `_total` count since its start, the others are how many there are now."""

    version: str = ""
    pid: int = 0
    uptime_s: float = 0.0
    address: str = ""
    endpoints: list[str] = []
    serving: bool = False
    reason: str = ""
    """Why it is not serving; empty when it is."""

    connections: int = 0
    streams: int = 0
    sessions: int = 0
    watches: int = 0
    trunks: int = 0
    backfills: int = 0
    lagging: int = 0
    queued: int = 0
    history_bytes: int = 0
    history_batches: int = 0

    connections_accepted_total: int = 0
    connections_refused_total: int = 0
    requests_total: int = 0
    written_bytes_total: int = 0
    creates_total: int = 0
    refused_total: int = 0
    cancels_total: int = 0
    compacted_total: int = 0
    joins_total: dict[str, int] = {}
    progress_requests_total: int = 0
    progress_answers_total: int = 0
    sessions_ended_total: int = 0
    stalls_total: int = 0
    replays_total: int = 0
    batches_received_total: int = 0
    events_received_total: int = 0
    messages_delivered_total: int = 0
    events_delivered_total: int = 0
    delivered_bytes_total: int = 0
    upstream_opened_total: int = 0
    upstream_lost_total: int = 0
    upstream_broken_total: int = 0
    upstream_reads_total: int = 0

    @property
    def upstream_watches(self) -> int:
        """Watches that etcd serves for all of them."""
        return self.trunks + self.backfills

    @property
    def reduction(self) -> float | None:
        """Client watches for each upstream watch; None while there is none."""
        return self.watches / self.upstream_watches if self.upstream_watches else None


class Source:
    """Takes snapshots of one proxy."""

    def __init__(self, proxy: Proxy, address: str) -> None:
        self._proxy = proxy
        self._address = address
        self._started = time.monotonic()
        self._version = _version()

    def take(self) -> Snapshot:
        """Read the proxy's parts now. Costs some microseconds, whatever the number of watches."""
        proxy = self._proxy
        core, engine, listener = proxy.engine.core.stats, proxy.engine.stats, proxy.listener.stats
        return Snapshot(
            version=self._version,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 1),
            address=self._address,
            endpoints=[endpoint.text for endpoint in proxy.endpoints],
            serving=proxy.health.serving,
            reason=proxy.health.reason,
            connections=len(proxy.listener.connections),
            streams=proxy.listener.streams,
            sessions=core.sessions,
            watches=core.watches,
            trunks=core.trunks,
            backfills=core.backfills,
            lagging=core.lagging,
            queued=core.queued,
            history_bytes=core.history_bytes,
            history_batches=core.history_batches,
            connections_accepted_total=listener.accepted,
            connections_refused_total=listener.refused,
            requests_total=listener.requests,
            written_bytes_total=listener.written_bytes,
            creates_total=core.creates,
            refused_total=core.refused,
            cancels_total=core.cancels,
            compacted_total=core.compacted,
            joins_total={
                "live": core.joins_live,
                "future": core.joins_future,
                "history": core.joins_history,
                "backfill": core.joins_backfill,
            },
            progress_requests_total=core.progress_requests,
            progress_answers_total=core.progress_answers,
            sessions_ended_total=core.sessions_ended,
            stalls_total=core.stalls,
            replays_total=core.replays,
            batches_received_total=core.batches,
            events_received_total=core.batch_events,
            messages_delivered_total=core.delivered,
            events_delivered_total=core.delivered_events,
            delivered_bytes_total=engine.delivered_bytes,
            upstream_opened_total=core.upstreams_opened,
            upstream_lost_total=engine.upstream_lost,
            upstream_broken_total=engine.upstream_broken,
            upstream_reads_total=proxy.reader.reads,
        )


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("watchmux")
    except PackageNotFoundError:
        return ""
