"""`watchmux demo`: shows in half a minute, on real processes, what the proxy does, and checks the result.

It starts a store, a proxy and client processes. The clients open a thousand watches through the proxy, some in the
past, some with filters or prev_kv, one of them slow; then keys are written. The guarantee checkers compare the events
of each client with the store's own history, and the number of upstream watchers comes from the store's metrics.
"""

from __future__ import annotations

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.measuring.load.plan import LoadShape, count_kinds
from proxy.measuring.load.stage import LoadStage
from proxy.measuring.load.trial import Trial, TrialProgress, TrialSpec, run_trial

PAST_WRITES = 200
VALUE_BYTES = 256
WRITES_PER_SECOND = 60.0
SLOW_S = 2.0


class DemoResult(msgspec.Struct, kw_only=True):
    """The result of the demo."""

    trial: Trial
    shape: LoadShape
    seconds: float
    upstream_name: str

    @property
    def faultless(self) -> bool:
        """Whether every client got exactly the expected events."""
        return self.trial.verdict.faultless and not self.trial.complaints


async def run_demo(
    stage: LoadStage, shape: LoadShape, seconds: float, show: TrialProgress, endpoints: str | None = None
) -> DemoResult:
    """Run the demo on a stage; `endpoints` are all members of a cluster, if the upstream is one of them.

    Raises ChildFailed, LoadFailed, LoginFailed, WriteFailed, NoMetrics or NoTruth, each with one line of text.
    """
    await stage.start_proxy(endpoints)
    spec = TrialSpec(
        shape=shape,
        seconds=seconds,
        per_second=WRITES_PER_SECOND,
        value_bytes=VALUE_BYTES,
        past_writes=PAST_WRITES,
    )
    trial = await run_trial(
        spec, stage.upstream, stage.page, stage.proxy, show, through_proxy=True, proxy_page=stage.proxy_page
    )
    return DemoResult(trial=trial, shape=shape, seconds=seconds, upstream_name=stage.upstream_name)


def show_result(result: DemoResult, console: Console) -> None:
    """Print the table and the verdict."""
    trial, verdict, shape = result.trial, result.trial.verdict, result.shape
    title = f"{shape.title}, {result.seconds:g} s of writes"
    table = Table(title=f"{title}, in front of {result.upstream_name}", show_header=False, title_justify="left")
    table.add_column("what")
    table.add_column("number", justify="right", style="bold")
    table.add_column("note", style="dim")
    slow = ", one of them slow" if shape.pause_s else ""
    kinds = count_kinds(shape)
    table.add_row("client watches", f"{shape.watches:,}", f"on {shape.streams:,} gRPC streams{slow}")
    table.add_row("", f"{kinds.past:,}", "of them start in the past")
    table.add_row("", f"{kinds.filtered:,}", "have filters")
    table.add_row("", f"{kinds.prev_kv:,}", "have prev_kv")
    table.add_section()
    table.add_row("upstream watchers", f"{trial.watchers:,}", "by the upstream's own count")
    table.add_row("upstream streams", f"{trial.watch_streams:,}", "by the upstream's own count")
    table.add_row("reduction", _factor(shape.watches, trial.watchers), "client watches for each upstream watcher")
    table.add_row("lists", f"{trial.lists:,}", "of all keys, one by each stream, at the same time")
    table.add_row("upstream ranges", f"{trial.list_ranges:,}", "for these lists, by the upstream's own count")
    table.add_section()
    sent = trial.after.events_sent - trial.before.events_sent
    table.add_row("events written", f"{trial.written:,}", "while the clients watched")
    table.add_row("events in", f"{sent:,}", "sent by the upstream, including the past")
    table.add_row("events out", f"{verdict.events:,}", "received by the clients")
    table.add_section()
    for name, count in (
        ("lost", verdict.lost),
        ("duplicated", verdict.duplicated),
        ("out of order", verdict.out_of_order),
        ("otherwise wrong", verdict.wrong),
    ):
        table.add_row(name, Text(f"{count:,}", style="bold red" if count else "bold green"), "")
    table.add_section()
    table.add_row("delay p50", f"{verdict.p50_ms:.1f} ms", "from the start of the write to its receipt")
    table.add_row("delay p99", f"{verdict.p99_ms:.1f} ms", "without the slow client")
    console.print(table)
    for text in (*verdict.examples, *trial.complaints[:5]):
        console.print(Text(f"  {text}", style="red"))
    if result.faultless:
        console.print(f"[green]Every one of the {verdict.watches:,} histories equals the store's.")
    else:
        console.print("[red]The clients' histories are not what the store's history says they should be.")


def _factor(watches: int, watchers: int) -> str:
    return f"{watches / watchers:,.0f}x" if watchers > 0 else "-"
