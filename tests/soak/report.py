"""The output of a soak: a report, the samples, and a graph of memory and delay."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import msgspec

from tests.soak.run import SHARES, Outcome
from tests.soak.sampling import Held, Sample

MIB = 1 << 20
SHOWN_MAX = 30
TOLD = (
    *("joins_total", "stalls_total", "replays_total", "history_evictions_total", "upstream_broken_total"),
    *("upstream_opened_total", "upstream_paused_total", "upstream_lost_total", "compacted_total"),
    *("creates_total", "progress_answers_total", "events_received_total", "events_delivered_total"),
    *("calls_total", "calls_broken_total", "calls_resent_total", "store_went_back_total", "limit_refusals_total"),
    *("cover_events_total", "cover_unwanted_events_total", "cover_refused_total"),
)
"""Counters of the proxy in the report."""


INTRODUCTION = """# Soak

A real etcd, one proxy, and clients of many kinds for as long as wanted: watches of a few wide ranges and of many narrow
ones, from now, the past and the future, with filters, prev_kv, fragments and progress; clients that stop reading, that
come and go; writers, leases, readers. Meanwhile etcd is stopped, killed, held by SIGSTOP, compacted and defragmented,
the ways to it and to the proxy are cut, delayed, silenced and broken in the middle, and the proxy is drained and
killed; its covers change on SIGHUP, so that ranges move between upstream watches of their own and shared ones. At the
end the checkers of [guarantees.md](../guarantees.md) judge the whole history of every watch, and the memory, objects
and descriptors of the proxy at rest are compared between waves.

`make soak MINUTES=20 ARGS=--docs` made this page.

![Memory, descriptors, and how late the event loop was; lines are faults](../images/soak.png)

"""


def text(outcome: Outcome) -> str:
    """Return the report as Markdown."""
    samples = outcome.samples
    delays = sorted(sample.loop_delay_s for sample in samples) or [0.0]
    most = max((sample.memory_bytes for sample in samples), default=0)
    lines = [
        f"# Soak of {outcome.seconds / 60:.1f} minutes, seed {outcome.seed}",
        "",
        f"{outcome.changes} events at etcd, {outcome.acknowledged} acknowledged puts, {sum(outcome.calls.values())} "
        f"calls. {outcome.watches} watches got and checked {outcome.events} events; {outcome.resumed} resumes, "
        f"{outcome.compacted} cancelled as compacted, {outcome.fragments} fragments, {outcome.bookmarks} bookmarks.",
        "",
        f"**Violations: {len(outcome.violations)}. Leaks: {len(outcome.leaks)}.**",
        "",
        *(f"- {violation}" for violation in [*outcome.violations[:SHOWN_MAX], *outcome.leaks]),
        "",
        f"Memory at most {most / MIB:.0f} MiB. Event loop late, second by second: half of them at most "
        f"{1000 * delays[len(delays) // 2]:g} ms, 99 % at most {1000 * delays[len(delays) * 99 // 100]:g} ms, "
        f"the worst at most {1000 * delays[-1]:g} ms.",
        "",
        f"Faults: {sum(outcome.faults.values())}",
        "",
        "| fault | times |",
        "|---|---|",
        *(f"| {name} | {count} |" for name, count in sorted(outcome.faults.items())),
        "",
        "| at rest | process | resident MiB | malloc in use, MiB | objects | blocks | waited for a collection "
        "| descriptors | threads | CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_rest(each, name) for rest in outcome.rests for name, each in (rest.processes or {"": rest}).items()),
        "",
        *_table("more objects at the end than after the second wave, by holder and type", grown(outcome.rests)),
        *_table("what the proxy went through (all its processes)", went_through(samples)),
        *_table("calls ended", outcome.calls),
        *_table("streams of clients ended", outcome.endings),
    ]
    return "\n".join(lines)


def grown(rests: list[Sample]) -> dict[str, int]:
    """Return by how much the objects have grown between the rests that are compared, by holder and type.

    With --workers: in each process that lived from one to the other.
    """
    if len(rests) < len(SHARES):
        return {}
    before, after = rests[-len(SHARES) + 1], rests[-1]
    if not after.processes:
        return _grown(before, after)
    return {
        f"{name}: {kind}": more
        for name, each in after.processes.items()
        for kind, more in _grown(before.processes[name], each).items()
    }


def _grown(before: Sample, after: Sample) -> dict[str, int]:
    if before.held is None or after.held is None or before.pid != after.pid:
        return {}
    was = before.held.census
    return {name: more for name, count in after.held.census.items() if (more := count - was.get(name, 0)) > 0}


def _rest(rest: Sample, name: str) -> str:
    held = rest.held or Held(0, 0, 0, 0)
    return (
        f"| {rest.at_s:.0f} s | {name} {rest.pid} | {rest.memory_bytes / MIB:.1f} | {held.malloc_bytes / MIB:.1f} "
        f"| {held.objects} | {held.blocks} | {held.garbage} | {rest.descriptors} | {rest.threads} | {rest.cpu_s:.1f} |"
    )


def went_through(samples: list[Sample]) -> dict[str, int]:
    """Return the proxy's counters of the relevant events, summed over its processes."""
    last = {sample.pid: sample.counters for sample in samples}
    total: Counter[str] = Counter()
    for counters in last.values():
        for name, value in counters.items():
            if name.partition("{")[0] in TOLD:
                total[name] += int(value)
    return dict(total)


def _table(title: str, counts: dict[str, int]) -> list[str]:
    rows = sorted(counts.items(), key=lambda row: -row[1])[:SHOWN_MAX]
    return [f"| {title} | times |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows), ""]


def write(outcome: Outcome, directory: Path) -> str:
    """Write everything below a directory; return the text to print."""
    directory.mkdir(parents=True, exist_ok=True)
    told = text(outcome)
    (directory / "report.md").write_text(told)
    data = {
        "samples": outcome.samples,
        "rests": outcome.rests,
        "faults": outcome.fault_log,
        "violations": outcome.violations,
    }
    (directory / "samples.json").write_bytes(msgspec.json.encode(data))
    (directory / "proxy.log").write_text(outcome.log)
    if not plot(outcome, directory / "soak.png"):
        told += "\nno graph: matplotlib is not installed (pip install '.[bench]')"
    return told


def write_docs(outcome: Outcome, docs: Path) -> None:
    """Write the page of the documentation, and its graph."""
    page = docs / "evidence" / "soak.md"
    page.parent.mkdir(exist_ok=True)
    page.write_text(INTRODUCTION + text(outcome).replace("# Soak", "## Soak", 1))
    plot(outcome, docs / "images" / "soak.png")


def plot(outcome: Outcome, path: Path) -> bool:
    """Draw memory, descriptors and delay over time; return False if matplotlib is missing."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    figure, (memory, descriptors, delay) = pyplot.subplots(3, 1, sharex=True, figsize=(10, 8))
    times = [sample.at_s for sample in outcome.samples]
    memory.plot(times, [sample.memory_bytes / MIB for sample in outcome.samples])
    memory.set_ylabel("memory, MiB")
    descriptors.plot(times, [sample.descriptors for sample in outcome.samples])
    descriptors.set_ylabel("descriptors")
    delay.plot(times, [max(sample.loop_delay_s * 1000, 0.05) for sample in outcome.samples], drawstyle="steps")
    delay.set_yscale("log")
    delay.set_ylabel("event loop late by at most, ms")
    delay.set_xlabel("seconds")
    for axes in (memory, descriptors, delay):
        for at_s, what in outcome.fault_log:
            axes.axvline(at_s, color="red" if what.startswith("proxy ") else "gray", alpha=0.25, linewidth=0.7)
    figure.suptitle(f"{len(outcome.fault_log)} faults (lines), {outcome.events} events checked")
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    return True
