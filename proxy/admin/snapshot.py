"""What a running proxy can tell about itself, read off its parts at the moment somebody asks.

Nothing is counted for this: the core, the engine and the listener keep plain counters anyway, and a snapshot reads
them. So an event costs the same whether anybody looks or not. Metrics, the status page and `watchmux status` all
show snapshots.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import msgspec

from coalesce import report

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
    lagging_s: float = 0.0
    """For how long the client that has been behind for longest has been so."""
    lagging_revisions: int = 0
    """By how many revisions the furthest of the lagging watches is behind."""
    queued: int = 0
    connection_streams: int = 0
    """Streams of the connection that has the most."""
    connection_sessions: int = 0
    """Watch streams of the connection that has the most."""
    calls_waiting: int = 0
    upstream_streams: int = 0
    history_bytes: int = 0
    history_batches: int = 0

    connections_accepted_total: int = 0
    connections_http1_total: int = 0
    connections_failed_total: int = 0
    connections_timed_out_total: int = 0
    handshakes_failed_total: int = 0
    requests_total: int = 0
    written_bytes_total: int = 0
    creates_total: int = 0
    creates_refused_total: int = 0
    refusals_total: dict[str, int] = {}
    cut_off_total: dict[str, int] = {}
    """What was refused or ended at a limit, by the limit's name."""
    evictions_total: dict[str, int] = {}
    """Responses dropped from history, by the limit that did it."""
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
    coalesced_total: int = 0
    calls_total: int = 0
    calls_resent_total: int = 0
    calls_unavailable_total: int = 0
    calls_broken_total: int = 0
    calls_unread_total: int = 0
    unread_bytes: int = 0
    upstream_received_bytes_total: int = 0
    upstream_opened_total: int = 0
    upstream_paused_total: int = 0
    upstream_lost_total: int = 0
    upstream_broken_total: int = 0
    upstream_resumed_total: int = 0
    store_went_back_total: int = 0
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
        self._version = program_version()

    def take(self) -> Snapshot:
        """Read the proxy's parts now. What it walks is bounded: connections, and a thousand lagging sessions."""
        proxy = self._proxy
        core, engine, listener = proxy.engine.core.stats, proxy.engine.stats, proxy.listener.stats
        lagging_s, lagging_revisions = report.lag(proxy.engine.core, asyncio.get_running_loop().time())
        connections, passed = proxy.listener.connections, proxy.passthrough.stats
        return Snapshot(
            version=self._version,
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 1),
            address=self._address,
            endpoints=[endpoint.text for endpoint in proxy.endpoints],
            serving=proxy.health.serving,
            reason=proxy.health.reason,
            connections=len(connections),
            streams=proxy.listener.streams,
            sessions=core.sessions,
            watches=core.watches,
            trunks=core.trunks,
            backfills=core.backfills,
            lagging=core.lagging,
            lagging_s=round(lagging_s, 3),
            lagging_revisions=lagging_revisions,
            queued=core.queued,
            connection_streams=max((len(each.h2.streams) for each in connections), default=0),
            connection_sessions=max((each.sessions for each in connections), default=0),
            calls_waiting=proxy.passthrough.waiting,
            upstream_streams=proxy.upstream.stream_count,
            history_bytes=core.history_bytes,
            history_batches=core.history_batches,
            connections_accepted_total=listener.accepted,
            connections_http1_total=listener.http1,
            connections_failed_total=listener.failed,
            connections_timed_out_total=listener.timed_out,
            handshakes_failed_total=listener.handshakes_failed,
            requests_total=listener.requests,
            written_bytes_total=listener.written_bytes,
            creates_total=core.creates,
            creates_refused_total=core.refused,
            refusals_total={
                "connections_max": listener.refused,
                "sessions_per_connection_max": proxy.watches.refused,
                **core.refused_at,
            },
            cut_off_total=dict(listener.cut_off),
            evictions_total=dict(core.evicted_at),
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
            coalesced_total=engine.coalesced,
            calls_total=passed.calls,
            calls_resent_total=passed.resent,
            calls_unavailable_total=passed.unavailable,
            calls_broken_total=passed.broken,
            calls_unread_total=passed.unread,
            unread_bytes=passed.unread_bytes,
            upstream_received_bytes_total=proxy.upstream.received_bytes,
            upstream_opened_total=core.upstreams_opened,
            upstream_paused_total=engine.upstream_paused,
            upstream_lost_total=engine.upstream_lost,
            upstream_broken_total=engine.upstream_broken,
            upstream_resumed_total=engine.upstream_resumed,
            store_went_back_total=engine.went_back,
            upstream_reads_total=proxy.reader.reads,
        )


def program_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("watchmux")
    except PackageNotFoundError:
        return ""
