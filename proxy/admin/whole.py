"""The numbers of `--workers`: one snapshot, one set of metrics and one status page for all processes.

Each worker reports its snapshot once a second to the parent, which passes the reports on to the hub; the hub serves the
metrics address. What clients do is the sum of the workers; what etcd sees is the hub. Counters of workers that have
ended are kept, so that the sums never decrease.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from proxy.admin.snapshot import Snapshot
from proxy.admin.views import ClientView, ProcessView, SessionView

OF_THE_HUB: Final = frozenset(
    {
        *("pid", "uptime_s", "memory_limit_bytes", "bookmark_age_s"),
        *("trunks", "parked", "backfills", "upstream_streams", "upstream_streams_waiting"),
        *("upstream_received_bytes_total", "upstream_opened_total", "upstream_reopened_total"),
        *("upstream_paused_total", "upstream_lost_total", "upstream_broken_total", "upstream_resumed_total"),
        *("upstream_rotated_total", "batches_received_total", "events_received_total", "store_went_back_total"),
    }
)
"""Numbers that describe the proxy towards etcd; so do all texts."""

MAXIMA: Final = frozenset(
    {"lagging_s", "lagging_revisions", "connection_streams", "connection_sessions", "probe_delay_s"}
)
"""Fields that are the maximum over the workers."""

MINIMA: Final = frozenset({"certificate_expiry_s"})
"""Fields by label of which the whole has the minimum over the hub and the workers."""

OF_ALL: Final = frozenset(
    {
        *("history_bytes", "history_batches", "upstream_connections", "upstream_reads_total", "reads_failed_total"),
        *("reads_hedged_total", "checks_waiting", "upstream_timeouts_total", "core_failures_total", "probes_total"),
        *("probes_failed_total", "evictions_total", "coalesced_total"),
    }
)
"""Fields that are the sum over the hub and the workers; all others are the sum over the workers."""


class Details(msgspec.Struct, kw_only=True, frozen=True):
    """What a worker reports of single clients and ranges."""

    sessions: list[SessionView] = []
    clients: list[ClientView] = []
    watches: dict[str, int] = {}
    """Client watches of the ranges that have the most."""


class ProcessReport(msgspec.Struct, kw_only=True):
    """One process, as it reports itself. Counters are since its start."""

    name: str
    pid: int
    cpu_s: float
    memory_bytes: int
    snapshot: Snapshot
    delivery_counts: list[int] = []
    delivery_sum_s: float = 0.0
    details: Details = Details()


class Beat(msgspec.Struct, kw_only=True):
    """The report of a process to its parent, every second."""

    problem: str = ""
    """Why it does not serve; "" if it does."""
    hung: str = ""
    report: ProcessReport | None = None
    """None without --metrics-addr."""


class Order(msgspec.Struct, kw_only=True):
    """A message of the parent to a process: changed settings (pickled, in base64), or the reports of the others."""

    settings: str = ""
    reports: list[ProcessReport] | None = None
    ended: ProcessReport | None = None
    """The sums of the workers that have ended."""


def view_of(report: ProcessReport) -> ProcessView:
    """Return what the status page shows of a process."""
    now = report.snapshot
    return ProcessView(
        name=report.name,
        pid=report.pid,
        cpu_s=report.cpu_s,
        memory_bytes=report.memory_bytes,
        connections=now.connections,
        watches=now.watches,
        events_delivered_total=now.events_delivered_total,
    )


def merged(hub: Snapshot, workers: Iterable[Snapshot]) -> Snapshot:
    """Return the snapshot of the whole: of the hub and of all workers, those that have ended included."""
    parts = list(workers)
    values: dict[str, Any] = {}
    for name in Snapshot.__struct_fields__:
        of_hub, of_workers = getattr(hub, name), [getattr(part, name) for part in parts]
        if name in OF_THE_HUB or isinstance(of_hub, str | bool | list):
            values[name] = of_hub
        elif name in MAXIMA:
            values[name] = max(of_workers, default=0)
        elif name in MINIMA:
            values[name] = _least([of_hub, *of_workers])
        else:
            values[name] = _sum([of_hub, *of_workers] if name in OF_ALL else of_workers, of_hub)
    return Snapshot(**values)


def _least(values: list[dict[str, float]]) -> dict[str, float]:
    labels = {label: None for each in values for label in each}
    return {label: min(each[label] for each in values if label in each) for label in labels}


def _sum(values: list[Any], like: Any) -> Any:
    if not isinstance(like, dict):
        return sum(values)
    total = dict.fromkeys(like, 0)
    for each in values:
        for label, count in each.items():
            total[label] = total.get(label, 0) + count
    return total


def with_ended(ended: ProcessReport | None, report: ProcessReport) -> ProcessReport:
    """Add a worker that has ended to the sums of those: its counters stay, its gauges are gone."""
    lasting = Snapshot()
    for name in Snapshot.__struct_fields__:
        if name.endswith("_total"):
            setattr(lasting, name, getattr(report.snapshot, name))
    if ended is not None:
        both = (ended.snapshot, lasting)
        for name in Snapshot.__struct_fields__:
            if name.endswith("_total"):
                setattr(lasting, name, _sum([getattr(each, name) for each in both], getattr(lasting, name)))
    counts = added(report.delivery_counts, ended.delivery_counts if ended is not None else [])
    sum_s = report.delivery_sum_s + (ended.delivery_sum_s if ended is not None else 0.0)
    return ProcessReport(
        name="", pid=0, cpu_s=0, memory_bytes=0, snapshot=lasting, delivery_counts=counts, delivery_sum_s=sum_s
    )


def added(one: list[int], other: list[int]) -> list[int]:
    """Add two lists of counts; an empty one counts as zeros."""
    if not one or not other:
        return list(one or other)
    return [a + b for a, b in zip(one, other, strict=True)]


class Whole:
    """The reports of the other processes, as the hub knows them."""

    def __init__(self) -> None:
        self.reports: list[ProcessReport] = []
        self.ended: ProcessReport | None = None

    def learn(self, order: Order) -> None:
        """Take the newest reports."""
        if order.reports is not None:
            self.reports, self.ended = order.reports, order.ended

    @property
    def all(self) -> list[ProcessReport]:
        """The reports of all workers, and that of those that have ended."""
        return self.reports if self.ended is None else [*self.reports, self.ended]

    def snapshot(self, hub: Snapshot) -> Snapshot:
        """Return the snapshot of the whole; it serves if the hub and a worker do."""
        whole = merged(hub, [report.snapshot for report in self.all])
        if hub.serving and not any(report.snapshot.serving for report in self.reports):
            reasons = [report.snapshot.reason for report in self.reports]
            whole.serving, whole.reason = False, reasons[0] if reasons else "no worker is ready"
        return whole
