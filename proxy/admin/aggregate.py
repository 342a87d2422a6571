"""The numbers of `--workers`: one snapshot, one set of metrics and one status page for all processes.

Each process reports its snapshot every 2.5 s to the parent, which passes all reports on to the hub; the hub serves the
metrics address. What clients do is the sum of the workers; what etcd sees is the hub.

A counter of the whole never decreases, although processes end. The parent keeps the last counters of each process that
has ended. A page shows only counters that the parent has, also of the hub itself, so the end of a process takes nothing
back that a page has shown. Reports pass through the parent undecoded, and are decoded when a page is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import zip_longest
from typing import Any, Final

import msgspec

from proxy.admin.delays import Histogram
from proxy.admin.snapshot import CoverState, Snapshot
from proxy.admin.views import ClientView, ProcessView, SessionView
from proxy.process.endpoints import Examination, ExaminationResult
from proxy.process.supervision import HUB

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
        *("reads_hedged_total", "checks_waiting", "upstream_timeouts_total", "core_failures_total"),
        *("probes_failed_total", "evictions_total", "coalesced_total"),
    }
)
"""Fields that are the sum over the hub and the workers; all others are the sum over the workers."""


COVER_SUMS: Final = frozenset(
    {"branches", "watches", "events_total", "bytes_total", "unwanted_events_total", "unwanted_bytes_total"}
)
"""Fields of a cover that are the sum over the workers."""


class WorkerDetails(msgspec.Struct, kw_only=True, frozen=True):
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
    virtual_memory_bytes: int = 0
    snapshot: Snapshot
    delivery_counts: list[int] = []
    delivery_sum_s: float = 0.0
    loop_counts: list[int] = []
    loop_sum_s: float = 0.0
    descriptors: int = 0
    """Open file descriptors."""
    details: WorkerDetails = WorkerDetails()


class Heartbeat(msgspec.Struct, kw_only=True):
    """The report of a process to its parent, every few seconds."""

    problem: str = ""
    """Why it does not serve; "" if it does."""
    hung: str = ""
    open: int = 0
    """Connections of clients."""
    open_max: int | None = None
    """How many of them it accepts."""
    taken: int = 0
    """Those that the parent has passed to it since its start."""
    load: float = 0.0
    """Cores that it has used lately."""
    cluster_id: int = 0
    """The etcd cluster that it watches; 0 while it knows none."""
    examined: ExaminationResult | None = None
    """Of the hub: the result of its last examination of endpoints."""
    report: msgspec.Raw
    """A `ProcessReport`."""


class ParentMessage(msgspec.Struct, kw_only=True):
    """A message of the parent to a process: changed settings (pickled, in base64), or what it knows of all of them."""

    settings: str = ""
    reports: list[msgspec.Raw] | None = None
    """The newest `ProcessReport` of each process that runs."""
    limits: dict[str, float] | None = None
    """With changed settings: the limits of the whole, by setting."""
    examine: Examination | None = None
    """To the hub: endpoints that it is to examine."""
    ended: dict[str, ProcessReport] | None = None
    """By name, the counters of its processes that have ended; None: they are as before."""


def view_of(report: ProcessReport, ended: ProcessReport | None) -> ProcessView:
    """Return what the status page shows of a process; `ended`: the counters of its predecessors."""
    now = report.snapshot
    return ProcessView(
        name=report.name,
        pid=report.pid,
        cpu_s=round(report.cpu_s + (ended.cpu_s if ended else 0.0), 2),
        memory_bytes=report.memory_bytes,
        connections=now.connections,
        watches=now.watches,
        events_delivered_total=now.events_delivered_total,
    )


def merged(hub: Snapshot, workers: Iterable[Snapshot]) -> Snapshot:
    """Return the snapshot of the whole: of the hub and of all workers, those that have ended included."""
    parts = list(workers)
    values: dict[str, Any] = {}
    for name in _names(Snapshot):
        of_hub, of_workers = getattr(hub, name), [getattr(part, name) for part in parts]
        if name == "address":
            # Clients know the workers' address, not the hub's private socket.
            values[name] = next((part.address for part in parts if part.address), of_hub)
        elif name == "covers":
            values[name] = _covers(of_hub, [cover for each in of_workers for cover in each])
        elif name in OF_THE_HUB or isinstance(of_hub, str | bool | list):
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


def _covers(hub: list[CoverState], workers: list[CoverState]) -> list[CoverState]:
    """Return the covers of the whole: towards etcd as the hub has them, the rest as sums of the workers.

    Each worker receives the events of a cover; at the hub, it has one range only: that of the workers.
    """
    whole = []
    for cover in hub:
        parts = [each for each in workers if each.cover == cover.cover]
        used = [each for each in parts if each.branches]
        sums = {name: sum(getattr(each, name) for each in parts) for name in COVER_SUMS}
        costs_more = bool(used) and all(each.costs_more for each in used)
        whole.append(replace(cover, **sums, costs_more=costs_more))
    return whole


def with_counters(snapshot: Snapshot, parts: Sequence[Snapshot]) -> Snapshot:
    """Return the snapshot with the sums of the counters of `parts` instead of its own counters."""
    values: dict[str, Any] = {}
    for name in _counters(Snapshot):
        like = getattr(snapshot, name)
        values[name] = _sum([getattr(part, name) for part in parts], {} if isinstance(like, dict) else like)
    return replace(snapshot, **values, covers=[_cover_of(cover, parts) for cover in snapshot.covers])


def _cover_of(cover: CoverState, parts: Sequence[Snapshot]) -> CoverState:
    same = [each for part in parts for each in part.covers if each.cover == cover.cover]
    return replace(cover, **{name: sum(getattr(each, name) for each in same) for name in _counters(CoverState)})


def _names(kind: type[Snapshot] | type[CoverState]) -> list[str]:
    return [each.name for each in fields(kind)]


def _counters(kind: type[Snapshot] | type[CoverState]) -> list[str]:
    return [name for name in _names(kind) if name.endswith("_total")]


def with_ended(ended: ProcessReport | None, report: ProcessReport) -> ProcessReport:
    """Add a process that has ended to its predecessors: its counters stay, its gauges are gone."""
    parts = [report] if ended is None else [ended, report]
    prefixes = dict.fromkeys(cover.cover for part in parts for cover in part.snapshot.covers)
    nothing = Snapshot(covers=[CoverState(cover=prefix) for prefix in prefixes])
    return ProcessReport(
        name=report.name,
        pid=0,
        cpu_s=sum(part.cpu_s for part in parts),
        memory_bytes=0,
        snapshot=with_counters(nothing, [part.snapshot for part in parts]),
        delivery_counts=added([part.delivery_counts for part in parts]),
        delivery_sum_s=sum(part.delivery_sum_s for part in parts),
        loop_counts=added([part.loop_counts for part in parts]),
        loop_sum_s=sum(part.loop_sum_s for part in parts),
    )


def added(counts: Iterable[Sequence[int]]) -> list[int]:
    """Add lists of counts; an empty one counts as zeros."""
    return [sum(same) for same in zip_longest(*counts, fillvalue=0)]


class AllProcesses:
    """What the parent knows of all processes, as the hub has it."""

    def __init__(
        self,
        reports: Sequence[msgspec.Raw] = (),
        ended: Mapping[str, ProcessReport] | None = None,
        since: float = 0.0,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        """`since`: when the parent started, by the monotonic clock, which all processes of a machine share."""
        self.since = since
        self.limits = dict(limits or {})
        """The limits of the whole as they are configured, by setting; each process has its part."""
        self.ended = dict(ended or {})
        """By name, the counters of processes that have ended."""
        self._raw = list(reports)
        self._reports: list[ProcessReport] | None = None

    def learn(self, order: ParentMessage) -> None:
        """Take the newest reports."""
        if order.reports is not None:
            self._raw, self._reports = order.reports, None
        if order.ended is not None:
            self.ended = order.ended
        if order.limits is not None:
            self.limits = order.limits

    @property
    def reports(self) -> list[ProcessReport]:
        """The reports of all processes that run and have reported, the hub first."""
        if self._reports is None:
            self._reports = [msgspec.json.decode(raw, type=ProcessReport) for raw in self._raw]
        return self._reports

    @property
    def workers(self) -> list[ProcessReport]:
        """The reports of the workers that run."""
        return [report for report in self.reports if report.name != HUB]

    @property
    def lives(self) -> list[ProcessReport]:
        """The reports of all processes, those that have ended included."""
        return [*self.reports, *self.ended.values()]

    @property
    def _lives_of_workers(self) -> list[ProcessReport]:
        return [report for report in self.lives if report.name != HUB]

    @property
    def memory_bytes(self) -> int:
        """The resident memory of all processes; pages that they share count in each."""
        return sum(report.memory_bytes for report in self.reports)

    @property
    def virtual_memory_bytes(self) -> int:
        """The address space of all processes."""
        return sum(report.virtual_memory_bytes for report in self.reports)

    @property
    def descriptors(self) -> int:
        """The open file descriptors of the process that has the most."""
        return max((report.descriptors for report in self.reports), default=0)

    def snapshot(self, hub: Snapshot) -> Snapshot:
        """Return the snapshot of the whole, `hub` being that of the hub now; it serves if the hub and a worker do."""
        own = with_counters(hub, [each.snapshot for each in self.lives if each.name == HUB])
        whole = merged(own, [each.snapshot for each in self._lives_of_workers])
        whole.uptime_s = round(time.monotonic() - self.since, 1)
        if hub.serving and not any(report.snapshot.serving for report in self.workers):
            reasons = [report.snapshot.reason for report in self.workers]
            whole.serving, whole.reason = False, reasons[0] if reasons else "no worker is ready"
        return whole

    def views(self) -> list[ProcessView]:
        """Return what the status page shows of each process."""
        return [view_of(report, self.ended.get(report.name)) for report in self.reports]

    def delivery_delay(self) -> Histogram:
        """Return the delays of deliveries to clients."""
        lives = self._lives_of_workers
        return _histogram([each.delivery_counts for each in lives], sum(each.delivery_sum_s for each in lives))

    def loop_delay(self) -> Histogram:
        """Return the delays of the event loops of all processes."""
        return _histogram([each.loop_counts for each in self.lives], sum(each.loop_sum_s for each in self.lives))


def _histogram(counts: Iterable[Sequence[int]], sum_s: float) -> Histogram:
    total = Histogram()
    total.counts, total.sum = added([total.counts, *counts]), sum_s
    return total
