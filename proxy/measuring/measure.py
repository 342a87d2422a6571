"""`watchmux measure`: the cost of watches for an upstream, without and with the proxy, by the upstream's own metrics.

The upstream gets the same clients and the same writes twice: first the clients connect to the upstream itself, then to
the proxy. The upstream's metrics are read before and after each part. The events of the clients are checked both times,
because a reduction that loses events is worthless.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import msgspec

from proxy.measuring.comparison import Comparison, Row, Series, Unit, counted
from proxy.measuring.load.plan import LoadShape
from proxy.measuring.load.prometheus import MetricsPage
from proxy.measuring.load.run import LoadFailed
from proxy.measuring.load.sampling import Sample
from proxy.measuring.load.show import ProgressBars
from proxy.measuring.load.stage import LoadStage
from proxy.measuring.load.target import LoadTarget
from proxy.measuring.load.trial import REFRESH_S, Circumstances, Trial, TrialSpec, run_trial
from proxy.measuring.load.writer import cluster_id

QUIET_LIMIT_S = 15.0
"""How long the upstream may take to drop the watchers of the first part's clients (seconds)."""

VALUE_BYTES = 256

OWN_CALLS_MAX = 20
"""Calls that a trial may make besides its writes and watches."""


class TrialCost(Circumstances, kw_only=True):
    """The cost of one trial for the upstream, and the verdict on its clients' events."""

    watchers: int
    watch_streams: int
    slow_watchers: int
    events_sent: int
    bytes_sent: int
    cpu_s: float | None
    memory_bytes: int | None
    """Resident memory of the upstream once all events were received."""
    memory_growth_bytes: int | None
    """Growth of that since before the first watch."""
    p50_ms: float
    p99_ms: float
    events_received: int
    lost: int
    duplicated: int
    out_of_order: int
    wrong: int
    examples: list[str]
    other_watchers: int = 0
    """Watchers of other clients, whose events, bytes and CPU time are in the numbers."""

    @property
    def faultless(self) -> bool:
        """Whether its clients got exactly the expected events."""
        return not (self.lost or self.duplicated or self.out_of_order or self.wrong or self.complaints)


class Measurement(msgspec.Struct, kw_only=True):
    """Both sides, and the reduction of each number (direct / proxied; None where it cannot be computed)."""

    upstream: str
    proxy: str
    shape: LoadShape
    seconds: float
    events_written: int
    direct: TrialCost
    proxied: TrialCost
    reduction: dict[str, float | None]

    @property
    def faultless(self) -> bool:
        """Whether no event was lost, duplicated, out of order or wrong through the proxy."""
        return self.proxied.faultless


def side_of(trial: Trial) -> TrialCost:
    """Summarize a trial."""
    before, after, verdict = trial.before, trial.after, trial.verdict
    cpu_s = after.cpu_s - before.cpu_s if after.cpu_s is not None and before.cpu_s is not None else None
    growth = None
    if after.memory_bytes is not None and before.memory_bytes is not None:
        growth = max(0, after.memory_bytes - before.memory_bytes)
    return TrialCost(
        watchers=trial.watchers,
        watch_streams=trial.watch_streams,
        slow_watchers=after.slow_watchers,
        events_sent=after.events_sent - before.events_sent,
        bytes_sent=after.bytes_sent - before.bytes_sent,
        cpu_s=round(cpu_s, 3) if cpu_s is not None else None,
        memory_bytes=after.memory_bytes,
        memory_growth_bytes=growth,
        p50_ms=round(verdict.p50_ms, 2),
        p99_ms=round(verdict.p99_ms, 2),
        events_received=verdict.events,
        lost=verdict.lost,
        duplicated=verdict.duplicated,
        out_of_order=verdict.out_of_order,
        wrong=verdict.wrong,
        examples=verdict.examples,
        other_watchers=before.watchers,
        **{name: getattr(trial, name) for name in Circumstances.__struct_fields__},
    )


def reduction_of(direct: TrialCost, proxied: TrialCost) -> dict[str, float | None]:
    """Divide the upstream's numbers of the direct part by those of the part through the proxy."""
    factors: dict[str, float | None] = {}
    for name in ("watchers", "watch_streams", "events_sent", "bytes_sent", "cpu_s", "list_ranges"):
        before, after = getattr(direct, name), getattr(proxied, name)
        factors[name] = round(before / after, 2) if before is not None and after and after > 0 else None
    return factors


async def run_measure(
    stage: LoadStage, shape: LoadShape, seconds: float, per_second: float, bars: ProgressBars
) -> Measurement:
    """Measure directly, then through the stage's proxy, which is started unless the user gave one.

    Raises ChildFailed, LoadFailed, LoginFailed, WriteFailed, NoMetrics or NoTruth, each with one line of text.
    """
    spec = TrialSpec(shape=shape, seconds=seconds, per_second=per_second, value_bytes=VALUE_BYTES)
    if stage.proxy.address:
        await check_same_cluster(stage.upstream, stage.proxy)
    bars.title("Directly")
    direct = await run_trial(spec, stage.upstream, stage.page, stage.upstream, bars, through_proxy=False)
    await _wait_quiet(stage.page, direct.before.watchers)
    await stage.start_proxy()
    bars.title("Through the proxy")
    proxied = await run_trial(
        spec, stage.upstream, stage.page, stage.proxy, bars, through_proxy=True, proxy_page=stage.proxy_page
    )
    sides = side_of(direct), side_of(proxied)
    return Measurement(
        upstream=stage.upstream_name,
        proxy=stage.proxy.address,
        shape=shape,
        seconds=seconds,
        events_written=proxied.written,
        direct=sides[0],
        proxied=sides[1],
        reduction=reduction_of(*sides),
    )


async def _wait_quiet(page: MetricsPage, watchers: int) -> None:
    """Wait, within a limit, until the previous part's watchers are gone: other clients may use this upstream too."""
    deadline = time.monotonic() + QUIET_LIMIT_S
    while (await page.cost()).watchers > watchers:
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(REFRESH_S)


COMPARED = (
    ("watchers", Unit.COUNT, "watchers", ""),
    ("watch streams", Unit.COUNT, "watch_streams", ""),
    ("events sent", Unit.COUNT, "events_sent", ""),
    ("bytes sent", Unit.BYTES, "bytes_sent", ""),
    ("CPU time", Unit.SECONDS, "cpu_s", "from the first watch to the last event, including the writes"),
    ("ranges for lists", Unit.COUNT, "list_ranges", "after the writes each stream lists all keys, at the same time"),
)
"""The compared numbers: name, unit, field of a TrialCost, note."""

ALSO_MEASURED = (
    ("slow watchers", Unit.COUNT, "slow_watchers"),
    ("events its clients got", Unit.COUNT, "events_received"),
    ("delay p50", Unit.DELAY, "p50_ms"),
    ("delay p99", Unit.DELAY, "p99_ms"),
)
"""Numbers that are shown, but not compared."""


def compare(measured: Measurement) -> Comparison:
    """Convert a measurement to rows, series and facts."""
    shape, direct, proxied = measured.shape, measured.direct, measured.proxied
    sides = (("directly", direct), ("through the proxy", proxied))
    cores = f"run on this machine, which has {os.cpu_count() or 1} cores, and share it with the other processes"
    return Comparison(
        title=f"{shape.title} on {counted(shape.streams, 'stream')}",
        subtitle=f"{measured.seconds:g} s of writes, counted by {measured.upstream} itself",
        before_name="directly",
        after_name="through watchmux",
        rows=[*_compared_rows(direct, proxied), *_other_rows(direct, proxied)],
        series=_series(direct.samples, proxied.samples),
        facts=[
            ("events written", f"{measured.events_written:,}"),
            ("delays", "from the start of a write to its receipt by each client"),
            ("the clients", cores),
            ("proxy", measured.proxy),
        ],
        warnings=[f"{name}: {text}" for name, side in sides if (text := others_of(side))],
        complaints=[f"{name}: {text}" for name, side in sides for text in (*side.examples, *side.complaints[:5])],
    )


def _compared_rows(direct: TrialCost, proxied: TrialCost) -> Iterator[Row]:
    for name, unit, field, note in COMPARED:
        before, after = getattr(direct, field), getattr(proxied, field)
        if before is not None and after is not None:
            yield Row(name=name, unit=unit, before=before, after=after, note=note)


def _other_rows(direct: TrialCost, proxied: TrialCost) -> Iterator[Row]:
    """Yield the rows without a reduction."""
    row = partial(Row, compared=False)
    before, after = direct.memory_growth_bytes, proxied.memory_growth_bytes
    if before is not None and after is not None:
        note = "etcd keeps the memory allocated in the first part, so it may grow less in the second"
        yield row(name="memory grew by", unit=Unit.BYTES, before=before, after=after, note=note)
    for name, unit, field in ALSO_MEASURED:
        yield row(name=name, unit=unit, before=getattr(direct, field), after=getattr(proxied, field))
    if proxied.proxy_cpu_s is not None:
        note = "what the proxy itself uses, on whichever machine it runs"
        yield row(name="the proxy's CPU time", unit=Unit.SECONDS, before=None, after=proxied.proxy_cpu_s, note=note)
        yield row(name="the proxy's memory", unit=Unit.BYTES, before=None, after=proxied.proxy_memory_bytes)
    faults = [float(side.lost + side.duplicated + side.out_of_order + side.wrong) for side in (direct, proxied)]
    yield row(name="lost, doubled, wrong", unit=Unit.FAULTS, before=faults[0], after=faults[1])


def others_of(side: TrialCost) -> str:
    """Describe the traffic of other clients that is in a side's numbers; "" if there was none."""
    parts = []
    if side.other_watchers:
        parts.append(counted(side.other_watchers, "watcher"))
    if side.other_writes > 0:
        parts.append(counted(side.other_writes, "write"))
    # The trial's own calls are counted except for a few: a login, a renewal of the lease.
    if (side.other_calls or 0) > OWN_CALLS_MAX:
        parts.append(f"{side.other_calls:,} calls")
    if not parts:
        return ""
    return f"the numbers include the traffic of other clients of this etcd: {', '.join(parts)}"


async def check_same_cluster(upstream: LoadTarget, proxy: LoadTarget) -> None:
    """Raise LoadFailed if the proxy is in front of another etcd than `upstream`."""
    if proxy.address == upstream.address:
        raise LoadFailed(f"--proxy and --upstream are both {proxy.address}; give the proxy's --listen-addr as --proxy")
    ours, theirs = await cluster_id(upstream), await cluster_id(proxy)
    if ours != theirs:
        raise LoadFailed(
            f"the proxy at {proxy.address} is in front of another etcd (cluster {theirs:x}) than "
            f"{upstream.address} (cluster {ours:x})"
        )


def _series(before: list[Sample], after: list[Sample]) -> list[Series]:
    """Return the series over time: watchers, bytes and CPU a second. Each starts with the trial's first sample."""
    found = [Series(name="watchers", unit=Unit.COUNT, before=_levels(before), after=_levels(after))]
    for name, unit, field in (
        ("bytes sent", Unit.BYTES_RATE, "bytes_sent"),
        ("CPU seconds a second", Unit.SECONDS, "cpu_s"),
    ):
        found.append(Series(name=name, unit=unit, before=_rates(before, field), after=_rates(after, field)))
    return [series for series in found if series.before and series.after]


def _levels(samples: list[Sample]) -> list[tuple[float, float]]:
    return [(sample.at_s, float(sample.cost.watchers)) for sample in samples]


def _rates(samples: list[Sample], field: str) -> list[tuple[float, float]]:
    rates = []
    for was, now in pairwise(samples):
        before, after = getattr(was.cost, field), getattr(now.cost, field)
        if before is not None and after is not None and now.at_s > was.at_s:
            rates.append((now.at_s, max(0.0, (after - before) / (now.at_s - was.at_s))))
    return rates
