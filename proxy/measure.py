"""`watchmux measure`: what an upstream's watches cost it, directly and through the proxy, by its own count.

The same clients and the same writes are put on the upstream twice: first the clients watch at the upstream itself, then
at the proxy. Before and after each time the upstream is asked for its metrics. What the clients got is judged both
times, because a reduction that loses events is none.
"""

from __future__ import annotations

import asyncio
import time

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.load.plan import Shape
from proxy.load.prometheus import MetricsPage
from proxy.load.show import Bars
from proxy.load.stage import Stage
from proxy.load.trial import REFRESH_S, Spec, Trial, run_trial

QUIET_LIMIT_S = 15.0
"""How long the upstream may take to notice that the clients of the first part have left (seconds)."""

VALUE_BYTES = 256


class Side(msgspec.Struct, kw_only=True):
    """What one trial cost the upstream, and what its clients got."""

    watchers: int
    watch_streams: int
    events_sent: int
    bytes_sent: int
    cpu_s: float | None
    p50_ms: float
    p99_ms: float
    events_received: int
    lost: int
    duplicated: int
    out_of_order: int
    wrong: int
    complaints: list[str]
    examples: list[str]

    @property
    def faultless(self) -> bool:
        """Its clients got exactly what they should."""
        return not (self.lost or self.duplicated or self.out_of_order or self.wrong or self.complaints)


class Measurement(msgspec.Struct, kw_only=True):
    """Both sides, and by what each number shrank (direct / proxied; None where nothing was left to divide by)."""

    upstream: str
    proxy: str
    shape: Shape
    seconds: float
    events_written: int
    direct: Side
    proxied: Side
    reduction: dict[str, float | None]

    @property
    def faultless(self) -> bool:
        """Nothing was lost, doubled, out of order or wrong through the proxy."""
        return self.proxied.faultless


def side_of(trial: Trial) -> Side:
    """Sum a trial up."""
    before, after, verdict = trial.before, trial.after, trial.verdict
    cpu_s = after.cpu_s - before.cpu_s if after.cpu_s is not None and before.cpu_s is not None else None
    return Side(
        watchers=trial.watchers,
        watch_streams=trial.watch_streams,
        events_sent=after.events_sent - before.events_sent,
        bytes_sent=after.bytes_sent - before.bytes_sent,
        cpu_s=round(cpu_s, 3) if cpu_s is not None else None,
        p50_ms=round(verdict.p50_ms, 2),
        p99_ms=round(verdict.p99_ms, 2),
        events_received=verdict.events,
        lost=verdict.lost,
        duplicated=verdict.duplicated,
        out_of_order=verdict.out_of_order,
        wrong=verdict.wrong,
        complaints=trial.complaints,
        examples=verdict.examples,
    )


def reduction_of(direct: Side, proxied: Side) -> dict[str, float | None]:
    """Divide what the upstream served directly by what it served through the proxy."""
    factors: dict[str, float | None] = {}
    for name in ("watchers", "watch_streams", "events_sent", "bytes_sent", "cpu_s"):
        before, after = getattr(direct, name), getattr(proxied, name)
        factors[name] = round(before / after, 2) if before is not None and after and after > 0 else None
    return factors


async def run_measure(stage: Stage, shape: Shape, seconds: float, per_second: float, bars: Bars) -> Measurement:
    """Measure directly, then through the stage's proxy, which is started if there is none.

    Raises ChildFailed, LoadFailed, WriteFailed, NoMetrics or NoTruth, each with one line of text.
    """
    spec = Spec(shape=shape, seconds=seconds, per_second=per_second, value_bytes=VALUE_BYTES)
    bars.title("Directly")
    direct = await run_trial(spec, stage.upstream, stage.page, stage.upstream, bars, through_proxy=False)
    await _wait_quiet(stage.page, direct.before.watchers)
    await stage.start_proxy()
    bars.title("Through the proxy")
    proxied = await run_trial(spec, stage.upstream, stage.page, stage.proxy, bars, through_proxy=True)
    sides = side_of(direct), side_of(proxied)
    return Measurement(
        upstream=stage.upstream_name,
        proxy=stage.proxy,
        shape=shape,
        seconds=seconds,
        events_written=proxied.written,
        direct=sides[0],
        proxied=sides[1],
        reduction=reduction_of(*sides),
    )


async def _wait_quiet(page: MetricsPage, watchers: int) -> None:
    """Wait until the clients of the part before are gone; others may watch this upstream too, so not for ever."""
    deadline = time.monotonic() + QUIET_LIMIT_S
    while (await page.cost()).watchers > watchers:
        if time.monotonic() > deadline:
            return
        await asyncio.sleep(REFRESH_S)


def show_measurement(measured: Measurement, console: Console) -> None:
    """Print the table of before and after."""
    shape, direct, proxied = measured.shape, measured.direct, measured.proxied
    title = f"{shape.watches:,} watches over {shape.ranges} ranges on {shape.streams:,} streams"
    table = Table(
        title=f"{title}, {measured.seconds:g} s of writes\ncounted by {measured.upstream} itself", title_justify="left"
    )
    for name in ("what the upstream serves", "directly", "through watchmux", "reduction"):
        table.add_column(name, justify="left" if name.startswith("what") else "right")
    for name, key in (
        ("watchers", "watchers"),
        ("watch streams", "watch_streams"),
        ("events sent", "events_sent"),
        ("bytes sent", "bytes_sent"),
        ("CPU seconds", "cpu_s"),
    ):
        values = getattr(direct, key), getattr(proxied, key)
        if None not in values:
            factor = measured.reduction[key]
            table.add_row(name, *(_number(value) for value in values), f"[bold]{factor:,.1f}x" if factor else "-")
    table.add_section()
    table.add_row("events its clients got", f"{direct.events_received:,}", f"{proxied.events_received:,}", "")
    table.add_row("delay p50", f"{direct.p50_ms:.1f} ms", f"{proxied.p50_ms:.1f} ms", "")
    table.add_row("delay p99", f"{direct.p99_ms:.1f} ms", f"{proxied.p99_ms:.1f} ms", "")
    faults = [side.lost + side.duplicated + side.out_of_order + side.wrong for side in (direct, proxied)]
    table.add_row("lost, doubled or otherwise wrong", *(_faults(count) for count in faults), "")
    console.print(table)
    for name, side in (("directly", direct), ("through the proxy", proxied)):
        for text in (*side.examples, *side.complaints[:5]):
            console.print(Text(f"  {name}: {text}", style="red"))


def _number(value: float) -> str:
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _faults(count: int) -> Text:
    return Text(f"{count:,}", style="bold red" if count else "bold green")
