"""`watchmux measure --observe`: what a proxy in production saves its etcd, measured without adding load.

It reads metrics pages over some time: those of etcd's members, for what etcd serves, and the proxy's, for what the
proxy received from etcd and delivered to clients. Without the proxy etcd would serve the clients' watches itself, so
the numbers "without" are etcd's, minus what the proxy received, plus what it delivered. CPU and memory without the
proxy are not estimated; they are shown as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence

import msgspec

from proxy.admin.snapshot import CoverSuggestion
from proxy.measuring.comparison import Comparison, Row, Series, Unit, counted, show_value
from proxy.measuring.load.prometheus import MetricsPage, MetricsReading, NoMetrics, ServingCost, cost_of
from proxy.measuring.load.show import ProgressBars
from proxy.measuring.status import NoStatus, fetch

EVERY_S = 1.0


class MetricsLook(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of both pages at one time, in seconds after the first look."""

    at_s: float
    etcd: ServingCost
    watches: float
    upstream_watches: float
    upstream_streams: float
    sessions: float
    events_in: float
    events_out: float
    bytes_in: float
    bytes_out: float
    lagging: float
    stalls: float
    cpu_s: float | None
    memory_bytes: float | None
    delay_s: float
    """Sum of the proxy's delays so far; `delays` is their number."""
    delays: float


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """All looks of an observation."""

    etcd: str
    proxy: str
    looks: list[MetricsLook]
    members: str = ""
    """Which members of etcd were read."""
    warnings: list[str] = []
    """What may make the numbers wrong."""
    suggested_covers: list[CoverSuggestion] = []
    """What the proxy's status suggests at the end; empty if its status cannot be read."""

    @property
    def first(self) -> MetricsLook:
        """The first look."""
        return self.looks[0]

    @property
    def last(self) -> MetricsLook:
        """The last look."""
        return self.looks[-1]

    @property
    def seconds(self) -> float:
        """The duration."""
        return self.last.at_s - self.first.at_s


def look_of(at_s: float, etcd: Mapping[str, float], proxy: Mapping[str, float]) -> MetricsLook:
    """Combine two pages. Raises NoMetrics for a page that lacks a metric."""
    try:
        return MetricsLook(
            at_s=at_s,
            etcd=cost_of(etcd),
            watches=proxy["watchmux_watches"],
            upstream_watches=proxy["watchmux_trunks"] + proxy["watchmux_backfills"],
            upstream_streams=proxy["watchmux_upstream_streams"],
            sessions=proxy["watchmux_sessions"],
            events_in=proxy["watchmux_events_received_total"],
            events_out=proxy["watchmux_events_delivered_total"],
            bytes_in=proxy["watchmux_upstream_received_bytes_total"],
            bytes_out=proxy["watchmux_delivered_bytes_total"],
            lagging=proxy["watchmux_lagging"],
            stalls=proxy["watchmux_stalls_total"],
            cpu_s=proxy.get("process_cpu_seconds_total"),
            memory_bytes=proxy.get("process_resident_memory_bytes"),
            delay_s=proxy["watchmux_delivery_delay_seconds_sum"],
            delays=proxy["watchmux_delivery_delay_seconds_count"],
        )
    except KeyError as missing:
        raise NoMetrics(f"the proxy's metrics have no {missing.args[0]}: they are not from watchmux") from None


def add_up(pages: Sequence[MetricsReading]) -> dict[str, float]:
    """Add up the samples of several members."""
    sums: dict[str, float] = {}
    for page in pages:
        for name, value in page.sums.items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def check_members(etcds: Sequence[MetricsReading], proxy: MetricsReading, where: str) -> tuple[str, list[str]]:
    """Return which members were read, and warnings if the proxy's watches may be elsewhere.

    Raises NoMetrics if the etcd at `where` is not the one behind the proxy.
    """
    seen: set[str] = set().union(*(page.server_ids for page in etcds))
    cluster = seen.union(*(page.peer_ids for page in etcds))
    warnings = []
    carries = proxy.server_ids
    if carries and seen and not carries & cluster:
        raise NoMetrics(
            f"the proxy's upstream watches are at etcd member {', '.join(sorted(carries))}, but {where} is another "
            f"cluster ({', '.join(sorted(cluster))}): give the etcd behind this proxy"
        )
    if carries and seen and not carries & seen:
        warnings.append(
            f"the proxy's upstream watches are at member {', '.join(sorted(carries))}, which was not read: the numbers "
            "miss what it serves; give all members, separated by commas"
        )
    if missing := len(cluster) - len(seen):
        warnings.append(f"{missing} of the cluster's {len(cluster)} members were not read: the numbers miss them")
    if proxy.sums.get("watchmux_bundled_store"):
        warnings.append("the proxy serves its bundled store, not an etcd")
    members = f"{len(seen)} of {len(cluster)} members ({', '.join(sorted(seen))})" if seen else "unknown members"
    return members, warnings


async def observe(etcds: Sequence[MetricsPage], proxy: MetricsPage, seconds: float, bars: ProgressBars) -> Observation:
    """Read all pages every second for `seconds` seconds. Raises NoMetrics."""
    bars.step("Observing", seconds)
    start = time.monotonic()
    looks: list[MetricsLook] = []
    where = ", ".join(page.url for page in etcds)
    while True:
        at_s = time.monotonic() - start
        *of_etcd, of_proxy = await asyncio.gather(*(page.read() for page in (*etcds, proxy)))
        looks.append(look_of(round(at_s, 2), add_up(of_etcd), of_proxy.sums))
        members, warnings = check_members(of_etcd, of_proxy, where)
        bars.at(min(at_s, seconds), f"{looks[-1].watches:,.0f} client watches")
        if at_s >= seconds and len(looks) > 1:
            return Observation(
                etcd=where,
                proxy=proxy.url,
                looks=looks,
                members=members,
                warnings=warnings,
                suggested_covers=await _suggested(proxy),
            )
        await asyncio.sleep(min(EVERY_S, max(0.05, seconds - at_s)))


async def _suggested(proxy: MetricsPage) -> list[CoverSuggestion]:
    """Read the suggested covers from the status that is served at the same address as the metrics."""
    with contextlib.suppress(NoStatus):
        return (await fetch(proxy.session(), proxy.url.removesuffix("/metrics"))).suggested_covers
    return []


def compare_observed(seen: Observation) -> Comparison:
    """Convert an observation to rows: what etcd would serve without the proxy, and what it serves with it."""
    first, last = seen.first, seen.last

    def per_second(after: float, before: float) -> float:
        return max(0.0, (after - before) / seen.seconds)

    events = per_second(last.etcd.events_sent, first.etcd.events_sent)
    sent = per_second(last.etcd.bytes_sent, first.etcd.bytes_sent)
    events_in, events_out = per_second(last.events_in, first.events_in), per_second(last.events_out, first.events_out)
    bytes_in, bytes_out = per_second(last.bytes_in, first.bytes_in), per_second(last.bytes_out, first.bytes_out)
    rows = [
        Row(name=name, unit=unit, before=max(now - taken_off, 0) + put_in, after=float(now))
        for name, unit, now, taken_off, put_in in (
            ("watchers", Unit.COUNT, last.etcd.watchers, last.upstream_watches, last.watches),
            ("watch streams", Unit.COUNT, last.etcd.watch_streams, last.upstream_streams, last.sessions),
            ("events sent", Unit.RATE, events, events_in, events_out),
            ("bytes sent", Unit.BYTES_RATE, sent, bytes_in, bytes_out),
        )
    ]
    return Comparison(
        title=f"{counted(last.watches, 'client watch', 'client watches')} on {counted(last.sessions, 'stream')}, "
        f"observed for {seen.seconds:.0f} s",
        subtitle=f"etcd from {seen.etcd}, the proxy from {seen.proxy}",
        warnings=seen.warnings,
        before_name="without watchmux",
        after_name="now",
        rows=rows,
        series=_series(seen),
        facts=_facts(seen),
    )


def _facts(seen: Observation) -> list[tuple[str, str]]:
    first, last = seen.first, seen.last
    facts = [
        (
            "without watchmux",
            "etcd's own number, minus what the proxy received, plus what the proxy delivered to clients",
        ),
        ("etcd", f"read from {seen.members}"),
        ("lagging", f"{last.lagging:,.0f} watches are behind now, {last.stalls - first.stalls:,.0f} new stalls"),
    ]
    for each in seen.suggested_covers:
        text = f"--cover={each.cover} would serve {each.ranges:,} ranges from 1 upstream watch"
        facts.append(("suggestion", text))
    if last.delays > first.delays:
        delay_ms = (last.delay_s - first.delay_s) / (last.delays - first.delays) * 1000
        facts.append(("the proxy's delay", f"{delay_ms:.1f} ms on average from receipt to write"))
    for name, before, after in (
        ("etcd", first.etcd.cpu_s, last.etcd.cpu_s),
        ("the proxy", first.cpu_s, last.cpu_s),
    ):
        memory = last.etcd.memory_bytes if name == "etcd" else last.memory_bytes
        if before is not None and after is not None:
            share = (after - before) / seen.seconds * 100
            facts.append((f"{name} uses", f"{share:.1f}% of a core, {show_value(memory, Unit.BYTES)} of memory"))
    return facts


def _series(seen: Observation) -> list[Series]:
    watchers = Series(
        name="watchers",
        unit=Unit.COUNT,
        before=[(look.at_s, max(look.etcd.watchers - look.upstream_watches, 0) + look.watches) for look in seen.looks],
        after=[(look.at_s, float(look.etcd.watchers)) for look in seen.looks],
    )
    before, after = [], []
    for was, now in zip(seen.looks, seen.looks[1:], strict=False):
        span = max(now.at_s - was.at_s, 0.001)
        served = (now.etcd.events_sent - was.etcd.events_sent) / span
        after.append((now.at_s, max(served, 0.0)))
        saved = (now.events_out - was.events_out - now.events_in + was.events_in) / span
        before.append((now.at_s, max(served + saved, 0.0)))
    return [watchers, Series(name="events sent", unit=Unit.RATE, before=before, after=after)]
