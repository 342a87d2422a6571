"""Prometheus metrics: the numbers of a snapshot, histograms, limits, and the metrics of etcd's grpc-proxy.

Names follow Prometheus' conventions (base units, `_total` for counters, no counts in labels); every label set is
bounded by the configuration or by the code. Metric families are built at scrape time.
"""

from __future__ import annotations

import os
import platform
import resource
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from proxy.admin import memory
from proxy.admin.delays import Histogram
from proxy.admin.monitor import Monitor
from proxy.admin.snapshot import Snapshot
from proxy.config.knobs import Knob
from proxy.listening.call_metrics import BOUNDS_S, METHODS
from proxy.process import descriptors

if TYPE_CHECKING:
    from proxy.admin.aggregate import AllProcesses

GAUGES = {
    "bundled_store": "Whether the proxy serves its bundled store, which loses its data, and no etcd (1) or not (0).",
    "connections": "Current number of client connections.",
    "streams": "Current number of client streams (calls and watch streams).",
    "sessions": "Current number of client watch streams.",
    "watches": "Current number of client watches.",
    "trunks": "Current number of shared upstream watches, one per watched range.",
    "parked": "Current number of ranges without watches whose recent events are kept for clients that return.",
    "backfills": "Current number of private upstream watches that catch up with the past for clients.",
    "lagging": "Current number of client watches that lag because their client reads slowly or catches up.",
    "lagging_s": "Time in seconds for which the longest-lagging client has lagged without interruption.",
    "lagging_revisions": "Number of revisions that the furthest-behind lagging watch still needs.",
    "queued": "Current number of client watches that wait for a backfill.",
    "connection_streams": "Current number of streams on the client connection that has the most.",
    "connection_sessions": "Current number of watch streams on the client connection that has the most.",
    "requests_waiting_bytes": "Bytes of pending watch requests (incomplete, or waiting for their turn or for etcd).",
    "unread_bytes": "Bytes of passed-through responses that their clients have not read yet.",
    "resend_bytes": "Bytes of passed-through requests kept for a retry until their response begins.",
    "shared_reads_bytes": "Bytes of answers that Range calls share, and of Range calls that wait to share one.",
    "partial_bytes": "Bytes of incomplete messages in translated calls.",
    "calls_waiting": "Current number of passed-through calls that wait for a connection to etcd.",
    "checks_waiting": "Current number of unanswered permission checks, including those in flight.",
    "upstream_streams": "Current number of watch streams to etcd, including those that wait for a free stream.",
    "upstream_streams_waiting": "Current number of watch streams that wait because etcd allows no further streams.",
    "upstream_connections": "Current number of connections to etcd that accept calls or watches.",
    "calls_waiting_bytes": "Bytes of passed-through calls that wait for a connection to etcd.",
    "history_bytes": "Bytes of recent events kept for replay.",
    "history_batches": "Number of responses with recent events kept for replay.",
    "bookmark_age_s": "Age in seconds of the oldest bookmark of a shared upstream watch, looked at every 10 s.",
    "memory_limit_bytes": "Memory limit of the process's cgroup in bytes, or the memory of the machine.",
    "probe_delay_s": "Response time in seconds of the latest self-probe.",
}
"""Gauges: fields of a snapshot and their HELP texts."""

COUNTERS = {
    "connections_accepted_total": "Total number of client connections accepted.",
    "connections_http1_total": "Total number of client connections that used HTTP/1 and were passed to etcd.",
    "connections_failed_total": "Total number of client connections closed for a client error, floods included.",
    "connections_not_read_total": "Total number of times a client was not read from because it did not read either.",
    "connections_in_turns_total": "Total number of times a client's input was processed in several event loop turns.",
    "handshakes_failed_total": "Total number of failed or timed-out TLS handshakes of clients.",
    "log_lines_lost_total": "Total number of log lines that could not be written, to a full disk for example.",
    "requests_total": "Total number of client streams (calls and watch streams) opened, and of self-probes.",
    "written_bytes_total": "Total number of bytes written to clients.",
    "creates_total": "Total number of watches requested by clients, and of self-probes.",
    "creates_refused_total": "Total number of watches refused, for any reason, and of self-probes.",
    "cancels_total": "Total number of watches cancelled by clients.",
    "compacted_total": "Total number of watches cancelled because their next revision was compacted.",
    "progress_requests_total": "Total number of progress requests from clients.",
    "progress_answers_total": "Total number of progress requests answered.",
    "sessions_ended_total": "Total number of client watch streams ended by the proxy.",
    "stalls_total": "Total number of times a client watch stream could not accept more data.",
    "replays_total": "Total number of responses joined from history for lagging watches.",
    "batches_received_total": "Total number of watch responses with events from etcd; joined ones count once.",
    "events_received_total": "Total number of events received from etcd.",
    "messages_delivered_total": "Total number of responses with events delivered to client watches.",
    "events_delivered_total": "Total number of events delivered to client watches.",
    "delivered_bytes_total": "Total number of bytes of responses with events delivered to client watches.",
    "calls_total": "Total number of calls passed through to etcd.",
    "range_calls_total": "Total number of Range calls of clients, except while --share-reads is off.",
    "range_calls_upstream_total": "Total number of calls made at etcd for them; the others shared one of these.",
    "range_calls_not_shared_total": "Total number of Range calls passed through alone because of a limit on bytes.",
    "range_bytes_saved_total": "Total number of bytes of answers that Range calls shared instead of etcd sending them.",
    "calls_resent_total": "Total number of passed-through calls retried because no server had processed them.",
    "calls_unavailable_total": "Total number of passed-through calls ended UNAVAILABLE because no etcd accepted them.",
    "calls_unread_total": "Total number of passed-through calls reset because their client left too much unread.",
    "calls_partial_total": "Total number of translated calls ended because incomplete messages used too much memory.",
    "calls_broken_total": "Total number of passed-through calls ended because their connection to etcd broke.",
    "upstream_received_bytes_total": "Total number of bytes received on watch streams from etcd.",
    "upstream_opened_total": "Total number of upstream watches opened.",
    "upstream_reopened_total": "Total number of upstream watches reopened at the end of their range's kept events.",
    "upstream_paused_total": "Total number of times a backfill was paused because its clients could not keep up.",
    "upstream_lost_total": "Total number of upstream watches that ended permanently.",
    "upstream_broken_total": "Total number of times a connection of the upstream watches broke.",
    "upstream_resumed_total": "Total number of connections established for the upstream watches, including the first.",
    "upstream_rotated_total": "Total number of connections closed gracefully by etcd or a load balancer before it.",
    "upstream_reads_total": "Total number of revision reads and permission checks sent to etcd.",
    "core_failures_total": "Total number of core failures (bugs); each ends all watch streams and restarts the core.",
    "probes_total": "Total number of self-probes.",
    "probes_failed_total": "Total number of unanswered self-probes; three in a row mean that the proxy hangs.",
    "reads_hedged_total": "Total number of reads and checks sent to another endpoint because the answer was late.",
    "store_went_back_total": "Total number of times etcd was found to have a different history: restored or replaced.",
}
"""Counters: fields of a snapshot and their HELP texts."""

LABELLED = {
    "joins_total": ("kind", "watchmux_joins_total", "Total number of watches started, by how they are served."),
    "refusals_total": (
        "limit",
        "watchmux_limit_refusals_total",
        "Total number of connections, streams, calls and watches refused or ended at a limit, by limit.",
    ),
    "cut_off_total": (
        "reason",
        "watchmux_connections_cut_off_total",
        "Total number of client connections closed because of a client error, by reason: a flood or an HTTP/2 error.",
    ),
    "timed_out_total": (
        "limit",
        "watchmux_connections_timed_out_total",
        "Total number of client connections (and TLS handshakes) closed as slow, idle or without streams, by limit.",
    ),
    "http1_refusals_total": (
        "status",
        "watchmux_http1_refusals_total",
        "Total number of HTTP/1 connections refused by the proxy itself, by HTTP status.",
    ),
    "evictions_total": (
        "limit",
        "watchmux_history_evictions_total",
        "Total number of responses evicted from history, by limit.",
    ),
    "not_kept_total": (
        "limit",
        "watchmux_calls_not_kept_total",
        "Total number of passed-through calls whose request was not kept for a retry, by limit.",
    ),
    "reads_failed_total": (
        "status",
        "watchmux_upstream_reads_failed_total",
        "Total number of revision reads and permission checks that etcd did not answer with OK, by status.",
    ),
    "upstream_timeouts_total": (
        "limit",
        "watchmux_upstream_timeouts_total",
        "Total number of connections and requests to etcd given up at a limit (mostly a timeout), by limit.",
    ),
}
"""Counters with a label: fields of a snapshot, with label, metric name and HELP text."""

COVERS = {
    "branches": (GaugeMetricFamily, "Current number of watched ranges below the cover."),
    "watches": (GaugeMetricFamily, "Current number of client watches served by the cover."),
    "upstream_watches": (GaugeMetricFamily, "Current number of upstream watches of the cover."),
    "events_total": (CounterMetricFamily, "Total number of events received for the cover."),
    "bytes_total": (CounterMetricFamily, "Total number of bytes of events received for the cover."),
    "unwanted_events_total": (CounterMetricFamily, "Total number of these events whose key no client watches."),
    "unwanted_bytes_total": (CounterMetricFamily, "Total number of bytes of events whose key no client watches."),
    "refused_total": (CounterMetricFamily, "Total number of times etcd refused the cover; see the log for the reason."),
    "costs_more": (GaugeMetricFamily, "Whether the cover costs more than it saves (1) or not (0)."),
}
"""Metrics of each configured cover: fields of its state, with kind and HELP text."""

BY_PROTOCOL = "listener_connections"
"""The field of connections by protocol and TLS."""

BY_METHOD = ("grpc_started_total", "grpc_handled_total", "grpc_buckets_total", "grpc_seconds_total")
"""Fields that are exported under the names of go-grpc-prometheus."""

GRPC_PROXY_FIELD = "coalesced_total"
"""The field that is exported only under a name of etcd's grpc-proxy."""

UNITS = {
    "lagging_s": "lagging_seconds",
    "probe_delay_s": "probe_delay_seconds",
    "bookmark_age_s": "bookmark_age_seconds",
}
"""Fields whose metric names spell out the unit, as Prometheus requires."""


def metric_name(field: str) -> str:
    """Return the metric name of a snapshot's field."""
    return LABELLED[field][1] if field in LABELLED else f"watchmux_{UNITS.get(field, field)}"


def metric_at(limit: Knob) -> str:
    """Return the metric, with its label, that shows that a setting's limit was reached."""
    name = metric_name(limit.about.reached)
    return f'{name}{{limit="{limit.key}"}}' if limit.about.reached in LABELLED else name


def registry_of(monitor: Monitor) -> CollectorRegistry:
    """Return everything that a scrape shows."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ProxyCollector(monitor))
    return registry


class ProxyCollector(Collector):
    """Turns the state of a monitor into metric families at scrape time."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor

    def collect(self) -> Iterator[Metric]:
        """Yield every family."""
        monitor = self._monitor
        snapshot = monitor.take()
        yield from families(snapshot)
        yield from _of_grpc_proxy(snapshot)
        yield from calls_by_method(snapshot)
        yield from _limits(monitor.limits())
        yield _histogram(
            "watchmux_delivery_delay_seconds",
            "Time in seconds from receiving an upstream response to writing its events; the oldest of each turn.",
            monitor.delivery_delay,
        )
        yield _histogram(
            "watchmux_event_loop_delay_seconds", "Delay of event loop timers in seconds.", monitor.loop_delay
        )
        up = GaugeMetricFamily(
            "watchmux_upstream_endpoint_up", "Whether the endpoint is connected (1) or not (0).", labels=["endpoint"]
        )
        for state in monitor.endpoints():
            up.add_metric([state.endpoint], float(state.connected))
        yield up
        yield from _this_process() if monitor.whole is None else _processes(monitor.whole)


PROCESS_GAUGES = {
    "memory_bytes": ("resident_memory_bytes", "Resident memory of the process, shared pages included, in bytes."),
    "connections": ("connections", "Current number of client connections of the process (of the hub: of workers)."),
    "watches": ("watches", "Current number of watches of the process (of the hub: those of the workers)."),
}


def _processes(whole: AllProcesses) -> Iterator[Metric]:
    """Yield the metrics that are shown by process, with --workers, and those that every process has, for the whole."""
    processes = whole.views()
    for field, (name, text) in PROCESS_GAUGES.items():
        gauge = GaugeMetricFamily(f"watchmux_process_{name}", text, labels=["process"])
        for each in processes:
            gauge.add_metric([each.name], getattr(each, field))
        yield gauge
    used = CounterMetricFamily("watchmux_process_cpu_seconds_total", "CPU time of the process.", labels=["process"])
    for each in processes:
        used.add_metric([each.name], each.cpu_s)
    yield used
    cpu_s = sum(each.cpu_s for each in whole.lives)
    sizes = whole.virtual_memory_bytes, whole.memory_bytes
    yield from _of_every_process(cpu_s, sizes, whole.descriptors, os.getppid())


def _this_process() -> Iterator[Metric]:
    used = resource.getrusage(resource.RUSAGE_SELF)
    sizes = memory.virtual_and_resident_bytes()
    yield from _of_every_process(used.ru_utime + used.ru_stime, sizes, descriptors.in_use(), os.getpid())


def _of_every_process(cpu_s: float, sizes: tuple[int, int], opened: int, pid: int) -> Iterator[Metric]:
    """Yield the metrics that Prometheus' clients export of a process; theirs lists the descriptors to count them."""
    yield CounterMetricFamily(
        "process_cpu_seconds_total",
        "CPU time in seconds; with --workers of hub and workers, those that have ended included.",
        value=cpu_s,
    )
    virtual, resident = sizes
    for name, text, value in (
        ("resident_memory_bytes", "Resident memory; with --workers the sum, shared pages included in each.", resident),
        ("virtual_memory_bytes", "Address space; with --workers the sum.", virtual),
        ("open_fds", "Open file descriptors; with --workers of the process that has the most.", opened),
        ("max_fds", "Maximum number of open file descriptors of a process.", descriptors.limit()),
        ("start_time_seconds", "Start time since the epoch; with --workers of their parent.", start_time_s(pid)),
    ):
        yield GaugeMetricFamily(f"process_{name}", text, value=value)


@cache
def start_time_s(pid: int) -> float:
    """Return when a process started, since the epoch. The first call lists its descriptors: 1 us of CPU for each."""
    collector = ProcessCollector(pid=lambda: pid, registry=CollectorRegistry())
    samples = {sample.name: sample.value for family in collector.collect() for sample in family.samples}
    return samples.get("process_start_time_seconds", 0.0)


def families(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metric families of a snapshot."""
    for field, text in GAUGES.items():
        yield GaugeMetricFamily(metric_name(field), text, value=getattr(snapshot, field))
    for field, text in COUNTERS.items():
        yield CounterMetricFamily(metric_name(field), text, value=getattr(snapshot, field))
    for field, (label, name, text) in LABELLED.items():
        yield _by(label, name, text, getattr(snapshot, field))
    yield from _covers(snapshot)
    yield from _certificates(snapshot)
    yield GaugeMetricFamily(
        "watchmux_coalescing_ratio",
        "Current number of client watches per upstream watch; 0 without upstream watches.",
        value=snapshot.reduction or 0,
    )
    yield GaugeMetricFamily(
        "watchmux_upstream_reachable", "Whether any etcd is reachable (1) or not (0).", value=int(snapshot.reachable)
    )
    listening = GaugeMetricFamily(
        "watchmux_listener_connections",
        "Current number of client connections, by protocol (handshake: not known yet) and whether they use TLS.",
        labels=["protocol", "tls"],
    )
    for key, count in snapshot.listener_connections.items():
        listening.add_metric(key.split(" "), count)
    yield listening
    build = GaugeMetricFamily(
        "watchmux_build_info", "Versions of watchmux and Python; the value is always 1.", labels=["version", "python"]
    )
    build.add_metric([snapshot.version, platform.python_version()], 1)
    yield build
    server = GaugeMetricFamily(
        "watchmux_upstream_server",
        "The etcd member that carries the upstream watches; server_id as in its own etcd_server_id. Always 1.",
        labels=["server_id", "version"],
    )
    if snapshot.server_id:
        server.add_metric([snapshot.server_id, snapshot.server_version], 1)
    yield server


def _covers(snapshot: Snapshot) -> Iterator[Metric]:
    for field, (kind, text) in COVERS.items() if snapshot.covers else ():
        family = kind(f"watchmux_cover_{field}", text, labels=["cover"])
        for cover in snapshot.covers:
            family.add_metric([cover.cover], float(getattr(cover, field)))
        yield family


def _certificates(snapshot: Snapshot) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "watchmux_certificate_expiry_timestamp_seconds",
        "Time in seconds since the epoch when the certificate of the listener, or that shown to etcd, expires.",
        labels=["use"],
    )
    for use, expires_s in snapshot.certificate_expiry_s.items():
        family.add_metric([use], expires_s)
    if family.samples:
        yield family


def _by(label: str, name: str, text: str, counts: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(name, text, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family


def _of_grpc_proxy(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metrics of etcd's grpc-proxy, with the same meaning (server/proxy/grpcproxy/metrics.go).

    Its cache metrics are omitted: the proxy has no cache.
    """
    yield GaugeMetricFamily(
        "etcd_grpc_proxy_watchers_coalescing_total",
        "Current number of client watches that share an upstream watch with another one.",
        value=max(0, snapshot.watches - snapshot.upstream_watches),
    )
    yield CounterMetricFamily(
        "etcd_grpc_proxy_events_coalescing_total",
        "Total number of delivered watch responses that etcd had already sent for another client watch.",
        value=snapshot.coalesced_total,
    )


def calls_by_method(snapshot: Snapshot) -> Iterator[Metric]:
    """Yield the metrics of go-grpc-prometheus, which etcd and its grpc-proxy have, for the calls of clients.

    `grpc_server_handled_total` counts a call when its status is sent; a client that leaves is a Canceled call.
    """
    labels = ["grpc_type", "grpc_service", "grpc_method"]
    started = CounterMetricFamily(
        "grpc_server_started_total", "Total number of RPCs started on the server.", labels=labels
    )
    handled = CounterMetricFamily(
        "grpc_server_handled_total",
        "Total number of RPCs completed on the server, regardless of success or failure.",
        labels=[*labels, "grpc_code"],
    )
    seconds = HistogramMetricFamily(
        "grpc_server_handling_seconds",
        "Time in seconds from the request's head to the end of the response, at the proxy.",
        labels=labels,
    )
    for path, count in snapshot.grpc_started_total.items():
        method = _method_labels(path)
        started.add_metric(method, count)
        counts = [snapshot.grpc_buckets_total.get(f"{path} {index}", 0) for index in range(len(BOUNDS_S) + 1)]
        bounds = (*map(repr, BOUNDS_S), "+Inf")
        buckets = list(zip(bounds, map(float, accumulate(counts)), strict=True))
        seconds.add_metric(method, buckets, snapshot.grpc_seconds_total.get(path, 0.0))
    for key, count in snapshot.grpc_handled_total.items():
        path, _, code = key.partition(" ")
        handled.add_metric([*_method_labels(path), code], count)
    yield from (family for family in (started, handled, seconds) if family.samples)


def _method_labels(path: str) -> list[str]:
    _, service, method = path.split("/")
    return [METHODS[path.encode()], service, method]


def _limits(limits: Mapping[str, float]) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "watchmux_limit", "Configured limit, by setting, in the unit of the setting.", labels=["limit"]
    )
    for name, value in limits.items():
        family.add_metric([name], value)
    yield family


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    return HistogramMetricFamily(name, text, buckets=histogram.cumulative(), sum_value=histogram.sum)
