"""What a soak leaves behind: a report to read, the samples, and a graph of memory and delay."""

from __future__ import annotations

import importlib
from pathlib import Path

import msgspec

from tests.soak.run import Outcome

MIB = 1 << 20
SHOWN_MAX = 30


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
        f"{outcome.compacted} cancelled as compacted.",
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
        "| at rest | process | memory MiB | descriptors | threads | CPU s |",
        "|---|---|---|---|---|---|",
        *(
            f"| {rest.at_s:.0f} s | {rest.pid} | {rest.memory_bytes / MIB:.1f} | {rest.descriptors} | {rest.threads} "
            f"| {rest.cpu_s:.1f} |"
            for rest in outcome.rests
        ),
        "",
        *_table("calls ended", outcome.calls),
        *_table("streams of clients ended", outcome.endings),
    ]
    return "\n".join(lines)


def _table(title: str, counts: dict[str, int]) -> list[str]:
    rows = sorted(counts.items(), key=lambda row: -row[1])[:SHOWN_MAX]
    return [f"| {title} | times |", "|---|---|", *(f"| {name} | {count} |" for name, count in rows), ""]


def write(outcome: Outcome, directory: Path) -> str:
    """Write everything below a directory; return what to print."""
    directory.mkdir(parents=True, exist_ok=True)
    told = text(outcome)
    (directory / "report.md").write_text(told)
    data = {"samples": outcome.samples, "faults": outcome.fault_log, "violations": outcome.violations}
    (directory / "samples.json").write_bytes(msgspec.json.encode(data))
    (directory / "proxy.log").write_text(outcome.log)
    if not plot(outcome, directory / "memory.svg"):
        told += "\nno graph: matplotlib is not installed (pip install '.[bench]')"
    return told


def plot(outcome: Outcome, path: Path) -> bool:
    """Draw memory, descriptors and delay over time; tell whether matplotlib is there to do it."""
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError:
        return False
    matplotlib.use("svg")
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
    figure.savefig(path)
    pyplot.close(figure)
    return True
