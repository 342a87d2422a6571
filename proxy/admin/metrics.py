"""What Prometheus gets: the numbers of a snapshot as metric families, histograms, limits, and grpc-proxy's own names.

Names follow Prometheus' conventions (base units, `_total` for counters, no counts in labels); every label set is
bounded by the configuration or by the code. A family is made when somebody scrapes.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.admin.delays import Histogram
from proxy.admin.monitor import Monitor
from proxy.admin.snapshot import Snapshot

GAUGES = {
    "connections": "Client connections open now.",
    "streams": "Client streams (calls and watches) open now.",
    "sessions": "Client watch streams open now.",
    "watches": "Client watches open now.",
    "trunks": "Shared upstream watches open now, one for each watched range.",
    "parked": "Ranges without watches whose recent events are kept for clients that come back.",
    "backfills": "Private upstream watches open now that catch up with the past for a client.",
    "lagging": "Client watches that are behind now: their client reads slowly or is catching up.",
    "lagging_s": "For how long the client that has been behind for longest has been so, without a break.",
    "lagging_revisions": "By how many revisions the lagging watch that is furthest behind has still to be brought.",
    "queued": "Client watches that wait for a backfill now.",
    "connection_streams": "Streams open now on the client connection that has the most.",
    "connection_sessions": "Watch streams open now on the client connection that has the most.",
    "requests_waiting_bytes": "Bytes of watch requests that wait, for their turn, their end or etcd.",
    "unread_bytes": "Bytes of passed-through answers that wait for their clients to read on.",
    "resend_bytes": "Bytes of passed-through requests kept until their answers begin, to be sent again.",
    "partial_bytes": "Bytes of messages that are not whole yet, in calls that are translated.",
    "calls_waiting": "Passed-through calls that wait for a connection to etcd now.",
    "checks_waiting": "Permission checks that are not answered yet, those in flight included.",
    "upstream_streams": "Watch streams open at etcd now, those that wait for a place included.",
    "upstream_streams_waiting": "Watch streams that wait now because etcd allows no more on all connections.",
    "upstream_connections": "Connections to etcd that take calls or watches now.",
    "calls_waiting_bytes": "Bytes of passed-through calls that wait for a connection to etcd now.",
    "history_bytes": "Bytes of recent events kept for replay.",
    "history_batches": "Responses of recent events kept for replay.",
    "probe_delay_s": "How long the proxy's latest watch through itself took to be answered.",
}
"""Fields of a snapshot that are gauges, with what they mean."""

COUNTERS = {
    "connections_accepted_total": "Client connections accepted.",
    "connections_http1_total": "Client connections that spoke HTTP/1 and were handed to etcd.",
    "connections_failed_total": "Client connections ended by an error of the client's, floods included.",
    "connections_not_read_total": "Times a client was not read from because it did not read either.",
    "connections_in_turns_total": "Times what one client sent at once was handled in several turns.",
    "handshakes_failed_total": "TLS handshakes of clients that came to nothing or took too long.",
    "requests_total": "Client streams (calls and watches) opened.",
    "written_bytes_total": "Bytes written to clients.",
    "creates_total": "Watches that clients asked for.",
    "creates_refused_total": "Watches that were refused, for whatever reason.",
    "cancels_total": "Watches that clients cancelled.",
    "compacted_total": "Watches cancelled because what they needed was compacted.",
    "progress_requests_total": "Progress requests of clients.",
    "progress_answers_total": "Progress requests answered.",
    "sessions_ended_total": "Client watch streams ended by the proxy.",
    "stalls_total": "Times a client's watch stream could not take more.",
    "replays_total": "Responses joined from history for watches that were behind.",
    "batches_received_total": "Watch responses with events received from upstream.",
    "events_received_total": "Events received from upstream.",
    "messages_delivered_total": "Responses with events delivered to client watches.",
    "events_delivered_total": "Events delivered to client watches.",
    "delivered_bytes_total": "Bytes of responses with events delivered to client watches.",
    "calls_total": "Calls passed through to etcd.",
    "calls_resent_total": "Passed-through calls sent again because no server had looked at them.",
    "calls_unavailable_total": "Passed-through calls ended UNAVAILABLE because no etcd could take them.",
    "calls_unread_total": "Passed-through calls reset because their client left too much of the answers unread.",
    "calls_partial_total": "Calls that are translated, ended because too many bytes of unfinished messages were kept.",
    "calls_broken_total": "Passed-through calls whose connection to etcd broke under them.",
    "upstream_received_bytes_total": "Bytes of watch streams received from upstream.",
    "upstream_opened_total": "Upstream watches opened.",
    "upstream_reopened_total": "Upstream watches opened again where the kept events of their range end.",
    "upstream_paused_total": "Times a backfill was not read on because its clients had too much to read.",
    "upstream_lost_total": "Upstream watches that ended for good.",
    "upstream_broken_total": "Times the connection that carries the upstream watches broke.",
    "upstream_resumed_total": "Times a connection for the upstream watches was made, the first included.",
    "upstream_rotated_total": "Connections that etcd, or what stands in front of it, ended in good order.",
    "upstream_reads_total": "Reads of the current revision and checks of permissions sent upstream.",
    "core_failures_total": "Times the core failed by a bug: every watch stream was ended, and it began anew.",
    "probes_total": "Watches of the proxy through itself.",
    "probes_failed_total": "Watches of the proxy through itself that were not answered; three in a row: it hangs.",
    "reads_hedged_total": "Reads and checks sent to one more endpoint because an answer was late.",
    "store_went_back_total": "Times etcd was found to have another history than before: restored or replaced.",
}
"""Fields of a snapshot that are counters, with what they mean."""

LABELLED = {
    "joins_total": ("kind", "watchmux_joins_total", "Watches that joined, by how they were served."),
    "refusals_total": (
        "limit",
        "watchmux_limit_refusals_total",
        "Connections, streams, calls and watches refused or ended, by the limit that was reached.",
    ),
    "cut_off_total": (
        "reason",
        "watchmux_connections_cut_off_total",
        "Client connections ended by an error of the client's, by what it was: a flood, or an error of HTTP/2.",
    ),
    "timed_out_total": (
        "limit",
        "watchmux_connections_timed_out_total",
        "Client connections closed because they were slow, silent or without streams, by the limit; handshakes too.",
    ),
    "http1_refusals_total": (
        "status",
        "watchmux_http1_refusals_total",
        "HTTP/1 connections that the proxy itself refused, by the status they were told.",
    ),
    "evictions_total": (
        "limit",
        "watchmux_history_evictions_total",
        "Responses dropped from history, by the limit that did it.",
    ),
    "not_kept_total": (
        "limit",
        "watchmux_calls_not_kept_total",
        "Passed-through calls whose request is not kept to be sent again, by the limit that was reached.",
    ),
    "reads_failed_total": (
        "status",
        "watchmux_upstream_reads_failed_total",
        "Reads of the current revision and checks of permissions that etcd did not answer with OK, by the status.",
    ),
    "upstream_timeouts_total": (
        "limit",
        "watchmux_upstream_timeouts_total",
        "Connections to etcd, and what was asked there, given up at a limit (mostly of time), by the limit.",
    ),
}
"""Fields of a snapshot that count by something: the label, the metric and what it means."""

GRPC_PROXY_FIELD = "coalesced_total"
"""The field that is exported under a name of etcd's grpc-proxy only."""

UNITS = {"lagging_s": "lagging_seconds", "probe_delay_s": "probe_delay_seconds"}
"""Fields whose unit Prometheus spells out."""

LIMITS = {
    "max_concurrent_streams": ("watchmux_connection_streams", "watchmux_limit"),
    "connections_max": ("watchmux_connections", "watchmux_limit_refusals_total"),
    "sessions_per_connection_max": ("watchmux_connection_sessions", "watchmux_limit_refusals_total"),
    "requests_waiting_bytes_max": ("watchmux_requests_waiting_bytes", "watchmux_limit_refusals_total"),
    "watches_max": ("watchmux_watches", "watchmux_limit_refusals_total"),
    "watches_per_session_max": ("watchmux_watches", "watchmux_limit_refusals_total"),
    "queue_max": ("watchmux_sessions_ended_total", "watchmux_limit_refusals_total"),
    "trunks_max": ("watchmux_trunks", "watchmux_limit_refusals_total"),
    "lagging_age_s_max": ("watchmux_lagging_seconds", "watchmux_limit_refusals_total"),
    "history_bytes_total_max": ("watchmux_history_bytes", "watchmux_history_evictions_total"),
    "history_bytes_max": ("watchmux_history_bytes", "watchmux_history_evictions_total"),
    "history_revisions_max": ("watchmux_history_batches", "watchmux_history_evictions_total"),
    "history_age_s": ("watchmux_history_batches", "watchmux_history_evictions_total"),
    "history_linger_s": ("watchmux_parked", "watchmux_history_evictions_total"),
    "parked_max": ("watchmux_parked", "watchmux_history_evictions_total"),
    "backfills_max": ("watchmux_backfills", "watchmux_queued"),
    "backfill_bytes_max": ("watchmux_backfills", "watchmux_upstream_paused_total"),
    "replay_bytes_max": ("watchmux_replays_total", "watchmux_delivered_bytes_total"),
    "fragment_run_bytes_max": ("watchmux_replays_total", "watchmux_delivered_bytes_total"),
    "replay_turn_bytes_max": ("watchmux_lagging", "watchmux_replays_total"),
    "response_bytes_max": ("watchmux_batches_received_total", "watchmux_messages_delivered_total"),
    "connections_per_endpoint_max": ("watchmux_upstream_connections", "watchmux_upstream_streams_waiting"),
    "watch_message_bytes_max": ("watchmux_upstream_received_bytes_total", "watchmux_upstream_lost_total"),
    "progress_retry_s_max": ("watchmux_progress_requests_total", "watchmux_progress_answers_total"),
}
"""Every knob that is a bound: the metric of what it bounds, and the one that moves when it is reached."""


def metric_name(field: str) -> str:
    """Return the name under which a field of a snapshot is exported."""
    return f"watchmux_{UNITS.get(field, field)}"


class ProxyCollector(Collector):
    """Turns what a monitor sees into metric families at the moment of a scrape."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        monitor = self._monitor
        snapshot = monitor.take()
        yield from families(snapshot)
        yield from _of_grpc_proxy(snapshot)
        yield from _limits(monitor.limits())
        yield _histogram(
            "watchmux_delivery_delay_seconds",
            "From the receipt of an upstream response to the write of its events, for the oldest one of each turn.",
            monitor.delivery_delay,
        )
        yield _histogram(
            "watchmux_event_loop_delay_seconds", "How late the event loop rang a timer.", monitor.loop_delay.histogram
        )
        up = GaugeMetricFamily(
            "watchmux_upstream_endpoint_up", "Whether there is a connection to the endpoint.", labels=["endpoint"]
        )
        for state in monitor.endpoints():
            up.add_metric([state.endpoint], float(state.connected))
        yield up


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metric families of a snapshot."""
    for field, text in GAUGES.items():
        yield GaugeMetricFamily(metric_name(field), text, value=getattr(snapshot, field))
    for field, text in COUNTERS.items():
        yield CounterMetricFamily(metric_name(field), text, value=getattr(snapshot, field))
    for field, (label, name, text) in LABELLED.items():
        yield _by(label, name, text, getattr(snapshot, field))
    yield GaugeMetricFamily(
        "watchmux_coalescing_ratio",
        "Client watches for each upstream watch now; 0 while there is none.",
        value=snapshot.reduction or 0,
    )
    yield GaugeMetricFamily(
        "watchmux_upstream_reachable", "Whether an etcd answers (1) or none (0).", value=int(snapshot.reachable)
    )
    build = GaugeMetricFamily("watchmux_build_info", "Version of watchmux and of Python.", labels=["version", "python"])
    build.add_metric([snapshot.version, platform.python_version()], 1)
    yield build


def _by(label: str, name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_grpc_proxy(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield what etcd's grpc-proxy exports with the same meaning (server/proxy/grpcproxy/metrics.go).

    Its cache metrics are not among them: there is no cache here.
    """
    yield GaugeMetricFamily(
        "etcd_grpc_proxy_watchers_coalescing_total",
        "Client watches that share the upstream watch of another one now.",
        value=max(0, snapshot.watches - snapshot.upstream_watches),
    )
    yield CounterMetricFamily(
        "etcd_grpc_proxy_events_coalescing_total",
        "Watch responses delivered that etcd had already sent for another client watch.",
        value=snapshot.coalesced_total,
    )


def _limits(limits: Mapping[str, float]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "watchmux_limit", "The limits that are set, by knob, in the knob's own unit.", labels=["limit"]
    )
    for name, value in limits.items():
        family.add_metric([name], value)
    yield family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.cumulative(), sum_value=histogram.sum)
