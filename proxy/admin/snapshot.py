"""Snapshots: the state and counters of a running proxy at one moment.

A snapshot reads the plain counters that the core, the engine and the listener keep anyway, so events cost the same
whether snapshots are taken or not. Metrics, the status page and `watchmux status` all show snapshots.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from dataclasses import MISSING, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from coalesce import report
from proxy import logs
from proxy.admin import memory
from proxy.listening.call_metrics import CODES
from proxy.listening.turns import in_parts
from proxy.version import program_version

if TYPE_CHECKING:
    from proxy.listening.connection import ServerConnection
    from proxy.server import Proxy


@dataclass(kw_only=True)
class CoverState:
    """A configured cover; fields ending in `_total` count since it was first used."""

    cover: str
    """The prefix, as text; "" = all keys."""
    branches: int = 0
    """Watched ranges below it."""
    watches: int = 0
    upstream_watches: int = 0
    events_total: int = 0
    bytes_total: int = 0
    """Events received for it, and their bytes."""
    unwanted_events_total: int = 0
    unwanted_bytes_total: int = 0
    """Those of keys that no client watches."""
    refused_total: int = 0
    problem: str = ""
    """Why etcd refuses it; empty if it does not. Meanwhile its ranges have upstream watches of their own."""
    costs_more: bool = False
    """It costs more than it saves."""


@dataclass(kw_only=True)
class CoverSuggestion:
    """A cover that would replace the upstream watches of the ranges below it by one."""

    cover: str
    ranges: int


@dataclass(init=False, repr=False, eq=False)
class Snapshot:
    """A proxy at one moment. Fields ending in `_total` count since its start, the others are current values."""

    version: str = ""
    host: str = ""
    """The name of the host that it runs on."""
    pid: int = 0
    uptime_s: float = 0.0
    address: str = ""
    endpoints: list[str] = field(default_factory=list)
    endpoint_problems: list[str] = field(default_factory=list)
    """Of each endpoint that cannot be used, the reason and the remedy."""
    reachable: bool = False
    """Whether any etcd is reachable."""
    serving: bool = False
    reason: str = ""
    """Why the proxy is not serving; empty if it is."""
    bundled_store: bool = False
    """It serves the bundled store, in memory, and not an etcd."""
    server_id: str = ""
    """The etcd member that carries the upstream watches, in hexadecimal; empty if there is none or it is unknown."""
    server_version: str = ""

    certificate_expiry_s: dict[str, float] = field(default_factory=dict)
    """When each certificate in use expires, in seconds since the epoch, by use: listener, upstream."""

    connections: int = 0
    listener_connections: dict[str, int] = field(default_factory=dict)
    """Connections of clients, by protocol and TLS, separated by a space."""
    streams: int = 0
    sessions: int = 0
    watches: int = 0
    trunks: int = 0
    parked: int = 0
    backfills: int = 0
    lagging: int = 0
    lagging_s: float = 0.0
    """For how long the longest-lagging client has lagged, in seconds."""
    lagging_revisions: int = 0
    """How many revisions the furthest-behind lagging watch is behind."""
    queued: int = 0
    covers: list[CoverState] = field(default_factory=list)
    suggested_covers: list[CoverSuggestion] = field(default_factory=list)
    connection_streams: int = 0
    """Streams of the connection that has the most."""
    connection_sessions: int = 0
    """Watch streams of the connection that has the most."""
    calls_waiting: int = 0
    calls_waiting_bytes: int = 0
    upstream_streams: int = 0
    history_bytes: int = 0
    history_batches: int = 0
    bookmark_age_s: float = 0.0
    """Age of the oldest bookmark of a trunk, in seconds; looked at every 10 s."""
    memory_limit_bytes: int = 0
    """The memory that the process and others of its group may use; the machine's without a limit."""

    connections_accepted_total: int = 0
    connections_http1_total: int = 0
    connections_failed_total: int = 0
    timed_out_total: dict[str, int] = field(default_factory=dict)
    """Client connections closed at a timeout, by limit."""
    connections_not_read_total: int = 0
    connections_in_turns_total: int = 0
    http1_refusals_total: dict[str, int] = field(default_factory=dict)
    """HTTP/1 connections refused by the proxy, by HTTP status."""
    handshakes_failed_total: int = 0
    log_lines_lost_total: int = 0
    requests_total: int = 0
    grpc_started_total: dict[str, int] = field(default_factory=dict)
    """Calls of clients, by path."""
    grpc_handled_total: dict[str, int] = field(default_factory=dict)
    """Ended calls of clients, by path and code, separated by a space."""
    grpc_buckets_total: dict[str, int] = field(default_factory=dict)
    """Ended calls of clients, by path and index of the bucket of their duration, separated by a space."""
    grpc_seconds_total: dict[str, float] = field(default_factory=dict)
    """The sum of the durations of ended calls, by path."""
    written_bytes_total: int = 0
    creates_total: int = 0
    creates_refused_total: int = 0
    refusals_total: dict[str, int] = field(default_factory=dict)
    """Connections, streams, calls and watches refused or ended at a limit, by limit."""
    cut_off_total: dict[str, int] = field(default_factory=dict)
    """Connections closed for a client error, by reason."""
    evictions_total: dict[str, int] = field(default_factory=dict)
    """Responses evicted from history, by limit."""
    cancels_total: int = 0
    compacted_total: int = 0
    joins_total: dict[str, int] = field(default_factory=dict)
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
    range_calls_total: int = 0
    range_calls_upstream_total: int = 0
    range_calls_not_shared_total: int = 0
    range_bytes_saved_total: int = 0
    shared_reads_bytes: int = 0
    calls_resent_total: int = 0
    calls_unavailable_total: int = 0
    calls_broken_total: int = 0
    calls_unread_total: int = 0
    not_kept_total: dict[str, int] = field(default_factory=dict)
    """Requests not kept for a retry, by limit."""
    requests_waiting_bytes: int = 0
    unread_bytes: int = 0
    resend_bytes: int = 0
    partial_bytes: int = 0
    calls_partial_total: int = 0
    upstream_received_bytes_total: int = 0
    upstream_opened_total: int = 0
    upstream_reopened_total: int = 0
    upstream_paused_total: int = 0
    upstream_lost_total: int = 0
    upstream_broken_total: int = 0
    upstream_resumed_total: int = 0
    store_went_back_total: int = 0
    upstream_reads_total: int = 0
    reads_hedged_total: int = 0
    checks_waiting: int = 0
    reads_failed_total: dict[str, int] = field(default_factory=dict)
    """Reads and checks that etcd did not answer with OK, by status."""
    upstream_connections: int = 0
    upstream_rotated_total: int = 0
    upstream_streams_waiting: int = 0
    upstream_timeouts_total: dict[str, int] = field(default_factory=dict)
    """Connections and requests to etcd given up at a timeout, by limit."""
    core_failures_total: int = 0
    """Failures of the core (bugs); each ended all watch sessions."""
    probes_total: int = 0
    probes_failed_total: int = 0
    """Self-probes, and those that were not answered."""
    probe_delay_s: float = 0.0

    def __init__(self, **values: Any) -> None:
        """`values`: by field."""
        # To compile the `__init__` of a dataclass with so many fields takes 0.8 MiB, which stays with the process.
        for each in fields(self):
            default = each.default if each.default_factory is MISSING else each.default_factory()
            setattr(self, each.name, values.pop(each.name, default))
        if values:
            raise TypeError(f"unknown fields: {', '.join(values)}")

    @property
    def reads_saved(self) -> int:
        """Range calls of clients that were answered without a call of their own at etcd."""
        return max(0, self.range_calls_total - self.range_calls_upstream_total)

    @property
    def upstream_watches(self) -> int:
        """Watches that the proxy has open at etcd."""
        return self.trunks + self.backfills

    @property
    def reduction(self) -> float | None:
        """Client watches per upstream watch; None without upstream watches."""
        return self.watches / self.upstream_watches if self.upstream_watches else None


CORE_GAUGES = (
    *("sessions", "watches", "trunks", "parked", "backfills", "lagging", "queued"),
    *("history_bytes", "history_batches", "bookmark_age_s"),
)
"""Fields that have the same name in the core's own counters."""

CORE_COUNTERS = {
    "creates_total": "creates",
    "creates_refused_total": "refused",
    "cancels_total": "cancels",
    "compacted_total": "compacted",
    "progress_requests_total": "progress_requests",
    "progress_answers_total": "progress_answers",
    "sessions_ended_total": "sessions_ended",
    "stalls_total": "stalls",
    "upstream_reopened_total": "resumed",
    "replays_total": "replays",
    "batches_received_total": "batches",
    "events_received_total": "batch_events",
    "messages_delivered_total": "delivered",
    "events_delivered_total": "delivered_events",
    "upstream_opened_total": "upstreams_opened",
}
"""Fields that have another name in the core's counters."""

SUGGESTED_S = 30.0
"""Interval at which covers are suggested again from the open trunks: milliseconds of work."""

MEMORY_LIMIT_S = 60.0
"""Interval at which the memory limit is read again: it takes 0.2 ms, twice as long as the rest of a snapshot."""

JOIN_KINDS = ("live", "future", "history", "backfill")


class SnapshotSource:
    """Takes snapshots of one proxy."""

    def __init__(self, proxy: Proxy, address: str) -> None:
        self._proxy = proxy
        self._address = address
        self._started = time.monotonic()
        self._version = program_version()
        self._suggested: tuple[float, list[CoverSuggestion]] = (float("-inf"), [])
        self._memory_limit: tuple[float, int] = (float("-inf"), 0)
        # See `_most_of_a_connection`.
        self._most = (0, 0)
        self._looking = False

    def take(self) -> Snapshot:
        """Read the proxy's parts now. The work is bounded: a part of the connections, a thousand lagging sessions."""
        health = self._proxy.health
        snapshot = Snapshot(
            version=self._version,
            host=socket.gethostname(),
            pid=os.getpid(),
            uptime_s=round(time.monotonic() - self._started, 1),
            address=self._address,
            endpoints=[endpoint.text for endpoint in self._proxy.endpoints],
            endpoint_problems=[state.problem for state in self._proxy.pool.states() if state.problem],
            reachable=health.upstream_reachable,
            serving=health.serving,
            reason=health.reason,
            bundled_store=self._proxy.bundled_store,
            memory_limit_bytes=self._memory_limit_bytes(),
            certificate_expiry_s=self._proxy.certificates(),
        )
        self._read_listener(snapshot)
        self._read_core(snapshot)
        self._read_engine(snapshot)
        self._read_passthrough(snapshot)
        probe = self._proxy.probe
        snapshot.probes_total, snapshot.probes_failed_total = probe.made, probe.failed
        snapshot.probe_delay_s = probe.delay_s
        return snapshot

    def _memory_limit_bytes(self) -> int:
        """Return the memory limit, as read in the last minute."""
        now = time.monotonic()
        if now >= self._memory_limit[0] + MEMORY_LIMIT_S:
            self._memory_limit = now, memory.limit_bytes()
        return self._memory_limit[1]

    def _read_listener(self, snapshot: Snapshot) -> None:
        listener, stats = self._proxy.listener, self._proxy.listener.stats
        connections = listener.connections
        snapshot.connections = len(connections)
        tls = str(listener.tls).lower()
        snapshot.listener_connections = {
            f"http2 {tls}": len(connections),
            f"http1 {tls}": len(self._proxy.http1.connections),
            "handshake true": listener.handshakes,
        }
        snapshot.streams = listener.streams
        snapshot.connection_streams, snapshot.connection_sessions = self._most_of_a_connection()
        snapshot.connections_accepted_total = stats.accepted
        snapshot.connections_http1_total = stats.http1
        snapshot.connections_failed_total = stats.failed
        snapshot.timed_out_total = dict(stats.timed_out)
        snapshot.connections_not_read_total = stats.not_read
        snapshot.connections_in_turns_total = stats.in_turns
        snapshot.http1_refusals_total = {str(status): count for status, count in self._proxy.http1.refused.items()}
        snapshot.handshakes_failed_total = stats.handshakes_failed
        snapshot.log_lines_lost_total = logs.lines_lost()
        snapshot.requests_total = stats.requests
        snapshot.written_bytes_total = stats.written_bytes
        snapshot.cut_off_total = dict(stats.cut_off)
        self._read_calls(snapshot)

    def _most_of_a_connection(self) -> tuple[int, int]:
        """Return the most streams and watch streams that a connection has.

        Of many connections, it is what the last snapshot began to find, since each takes a microsecond.
        """
        connections = self._proxy.listener.connections
        if self._looking:
            return self._most
        streams = sessions = 0

        def look(connection: ServerConnection) -> None:
            nonlocal streams, sessions
            streams, sessions = max(streams, len(connection.h2.streams)), max(sessions, connection.sessions)

        def found() -> None:
            self._most, self._looking = (streams, sessions), False

        self._looking = True
        in_parts(connections, look, found)
        return self._most

    def _read_calls(self, snapshot: Snapshot) -> None:
        for key, method in self._proxy.listener.calls.methods.items():
            path = key.decode()
            snapshot.grpc_started_total[path] = method.started
            snapshot.grpc_seconds_total[path] = round(method.seconds, 6)
            for code, count in zip(CODES, method.codes, strict=True):
                if count:
                    snapshot.grpc_handled_total[f"{path} {code}"] = count
            for index, count in enumerate(method.buckets):
                if count:
                    snapshot.grpc_buckets_total[f"{path} {index}"] = count

    def _read_core(self, snapshot: Snapshot) -> None:
        core = self._proxy.engine.core
        stats = core.stats
        lagging_s, snapshot.lagging_revisions = report.lag(core, asyncio.get_running_loop().time())
        snapshot.lagging_s = round(lagging_s, 3)
        for name in CORE_GAUGES:
            setattr(snapshot, name, getattr(stats, name))
        for name, counter in CORE_COUNTERS.items():
            setattr(snapshot, name, getattr(stats, counter))
        snapshot.refusals_total = {
            "connections_max": self._proxy.listener.stats.refused,
            **self._proxy.listener.stats.refused_at,
            **self._proxy.watches.refused_at,
            **self._proxy.passthrough.stats.refused_at,
            **stats.refused_at,
        }
        self._read_covers(snapshot)
        snapshot.requests_waiting_bytes = self._proxy.watches.waiting_bytes
        snapshot.evictions_total = dict(stats.evicted_at)
        snapshot.joins_total = {kind: getattr(stats, f"joins_{kind}") for kind in JOIN_KINDS}

    def _read_covers(self, snapshot: Snapshot) -> None:
        core, now = self._proxy.engine.core, asyncio.get_running_loop().time()
        snapshot.covers = [
            CoverState(
                cover=cover.prefix.decode("utf-8", "backslashreplace"),
                branches=cover.branches,
                watches=cover.watches,
                upstream_watches=cover.upstream_watches,
                events_total=cover.events,
                bytes_total=cover.bytes,
                unwanted_events_total=cover.unwanted_events,
                unwanted_bytes_total=cover.unwanted_bytes,
                refused_total=cover.refused,
                problem=cover.problem,
                costs_more=cover.costs_more,
            )
            for cover in report.covers(core, now)
        ]
        if now >= self._suggested[0]:
            found = [
                CoverSuggestion(cover=each.prefix.decode("utf-8", "backslashreplace"), ranges=each.ranges)
                for each in report.suggested_covers(core)
            ]
            self._suggested = (now + SUGGESTED_S, found)
        snapshot.suggested_covers = self._suggested[1]

    def _read_engine(self, snapshot: Snapshot) -> None:
        stats, upstream = self._proxy.engine.stats, self._proxy.upstream
        delivery = self._proxy.engine.delivery.stats
        snapshot.delivered_bytes_total = delivery.delivered_bytes
        snapshot.coalesced_total = delivery.coalesced
        snapshot.core_failures_total = stats.failures
        snapshot.upstream_paused_total = stats.upstream_paused
        snapshot.upstream_lost_total = stats.upstream_lost
        snapshot.upstream_broken_total = stats.upstream_broken
        snapshot.upstream_resumed_total = stats.upstream_resumed
        snapshot.store_went_back_total = stats.went_back
        if (server := upstream.server) is not None:
            snapshot.server_id = f"{server.member_id:x}" if server.member_id else ""
            snapshot.server_version = server.version
        snapshot.upstream_streams = upstream.stream_count
        snapshot.upstream_received_bytes_total = upstream.received_bytes
        snapshot.upstream_reads_total = self._proxy.reader.reads
        snapshot.reads_failed_total = dict(self._proxy.reader.failed)
        snapshot.checks_waiting = self._proxy.reader.checks_waiting
        pool = self._proxy.pool
        snapshot.reads_hedged_total = pool.hedged
        snapshot.upstream_connections = pool.connection_count + upstream.connection_count
        snapshot.upstream_rotated_total = pool.rotated + upstream.rotated
        snapshot.upstream_streams_waiting = upstream.streams_waiting
        snapshot.upstream_timeouts_total = {
            name: count + pool.timeouts[name] for name, count in upstream.timeouts.items()
        }

    def _read_passthrough(self, snapshot: Snapshot) -> None:
        stats = self._proxy.passthrough.stats
        snapshot.calls_waiting = self._proxy.passthrough.waiting
        snapshot.calls_waiting_bytes = stats.waiting_bytes
        snapshot.calls_total = stats.calls
        snapshot.range_calls_total = stats.range_calls
        snapshot.range_calls_upstream_total = stats.range_calls_upstream
        snapshot.range_calls_not_shared_total = stats.range_calls_not_shared
        snapshot.range_bytes_saved_total = stats.range_bytes_saved
        snapshot.shared_reads_bytes = stats.shared_reads_bytes
        snapshot.calls_resent_total = stats.resent
        snapshot.calls_unavailable_total = stats.unavailable
        snapshot.calls_broken_total = stats.broken
        snapshot.calls_unread_total = stats.unread
        snapshot.not_kept_total = dict(stats.not_kept_at)
        snapshot.unread_bytes = stats.unread_bytes
        snapshot.resend_bytes = stats.resend_bytes
        snapshot.partial_bytes = stats.partial_bytes
        snapshot.calls_partial_total = stats.partial_refused
