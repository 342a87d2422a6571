"""The output of a run: a table for the terminal and one for the docs, the figures as JSON, and the machine."""

from __future__ import annotations

import os
import platform
import statistics
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from textwrap import wrap
from typing import Any

from rich.table import Table

from tests.bench import several
from tests.bench.cases import CASES, FLOOR, OLD_PEER, OURS, PEER, Case, Kind
from tests.bench.measure import Figures, Results
from tests.bench.profiles import DEFAULT

RATIO_FREE = frozenset({"lost"})

# The figures of each kind of case: the figure, its heading, its digits.
_EVENTS = (
    ("cpu_us", "CPU us/event", 2),
    ("p50_ms", "p50 ms", 2),
    ("p99_ms", "p99 ms", 2),
    ("p100_ms", "max ms", 1),
    ("events_s", "events/s", 0),
    ("memory_mib", "memory MiB", 1),
    ("create_s", "all there s", 2),
    ("lost", "lost", 0),
)
_CALLS = (
    ("cpu_us", "CPU us/call", 1),
    ("p50_ms", "p50 ms", 2),
    ("p99_ms", "p99 ms", 2),
    ("events_s", "calls/s", 0),
    ("memory_mib", "memory MiB", 1),
    ("lost", "failed", 0),
)
_IDLE = (
    ("base_mib", "before, MiB", 1),
    ("memory_mib", "memory MiB", 1),
    ("kib_each", "KiB each", 2),
    ("create_s", "all there s", 2),
    ("create_cpu_us", "CPU us/watch", 1),
    ("idle_cpu_percent", "idle CPU %", 1),
)

# Target ratios to grpc-proxy: (CPU, p99, memory), None: no target.
GOALS: dict[str, tuple[float | None, float | None, float | None]] = {
    "burst": (0.2, 0.45, 0.45),
    "paced": (0.2, 0.45, 0.7),
    "single": (0.58, 0.7, 0.45),
    "stacked": (0.45, 0.5, 0.9),
    "ranges": (0.42, 0.7, 0.9),
    "lowfan": (0.42, 0.7, 0.9),
    "idle": (None, None, 0.14),
    "put-1": (0.75, 1.0, 1.0),
    "range-1": (0.75, 1.0, 1.0),
    "put-64": (0.85, 1.0, 1.0),
    "range-64": (0.85, 1.0, 1.0),
}
FLOOR_MAX = ("single", 1.25)
"""A case, and the allowed CPU per event as a multiple of the floor's."""
PICTURES = {
    "cpu": "CPU per delivered event",
    "delay": "p99 delay",
    "memory": "memory of idle clients",
    "calls": "CPU per unary call",
    "scale": "CPU per event as the watches of a range grow",
}
# Absolute targets of watchmux: the text, the figure and its case, and the maximum.
BOUNDS = (
    ("seconds until 10,000 watches are there", "idle", "create_s", 3.0),
    ("MiB for 100,000 watches on 1,000 streams", "idle-watches", "memory_mib", 300.0),
)
SCALE = ("scale-10", "scale-100", "scale-1000", "scale-10000")
GROWTH_MAX = 1.2
"""The allowed factor of an event's cost with ten times the watches."""
CALCULATED = "\n".join(
    wrap(
        "Calculated, since a machine with more cores was not to be had: from the cost of an event at "
        f"{CASES[several.FEW].watch_count:,} and at {CASES[several.MANY].watch_count:,} watches follows what it costs "
        "with other numbers of workers and clients, as long as a worker has a core for itself and etcd and the clients "
        "are elsewhere:",
        120,
    )
)
GOAL_FIGURES = ("cpu_us", "p99_ms", "memory_mib")


def columns_of(kind: Kind) -> tuple[tuple[str, str, int], ...]:
    """Return the figures of a kind of case."""
    return _CALLS if kind is Kind.CALLS else _IDLE if kind is Kind.IDLE else _EVENTS


def median_of(rounds: list[Figures]) -> Figures:
    """Return the median of each figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def ratio(results: Results, case: str, name: str, peer: str = PEER) -> float | None:
    """Return the ratio of watchmux to the peer; None if one of them is missing."""
    by_target = results.get(case, {})
    ours, theirs = by_target.get(OURS, {}).get(name), by_target.get(peer, {}).get(name)
    return ours / theirs if ours is not None and theirs else None


def _rows(results: Results, cases: list[Case], columns: tuple[tuple[str, str, int], ...]) -> list[list[list[str]]]:
    """Return the cells of each case's rows."""
    groups = []
    for case in cases:
        rows = []
        for target, figures in results[case.name].items():
            cells = [case.name, target]
            for name, _, digits in columns:
                text = f"{figures[name]:,.{digits}f}" if name in figures else "-"
                share = ratio(results, case.name, name) if target == OURS and name not in RATIO_FREE else None
                cells.append(text if share is None or name not in figures else f"{text} ({share:.2f})")
            rows.append(cells)
        groups.append(rows)
    return groups


def _sections(results: Results) -> list[tuple[tuple[tuple[str, str, int], ...], list[Case]]]:
    sections: dict[tuple[tuple[str, str, int], ...], list[Case]] = {}
    for name in results:
        case = CASES[name]
        sections.setdefault(columns_of(case.kind), []).append(case)
    return list(sections.items())


def tables_of(results: Results) -> list[Table]:
    """Format results: a row per case and target, ratios to the peer in brackets."""
    tables = []
    for columns, cases in _sections(results):
        table = Table(title="medians; in brackets the ratio to etcd grpc-proxy in the same run")
        for heading in ("case", "target"):
            table.add_column(heading)
        for _, heading, _ in columns:
            table.add_column(heading, justify="right")
        for group in _rows(results, cases, columns):
            for cells in group:
                table.add_row(*cells)
            table.add_section()
        tables.append(table)
    return tables


def markdown_of(results: Results) -> str:
    """Format the same for the docs, with a description of each case."""
    lines = []
    for columns, cases in _sections(results):
        headings = [heading for _, heading, _ in columns]
        lines.append("| case | target | " + " | ".join(headings) + " |")
        lines.append("|---|---|" + "---:|" * len(headings))
        for group in _rows(results, cases, columns):
            for place, cells in enumerate(group):
                name = f"**{cells[0]}**" if place == 0 else ""
                lines.append(f"| {name} | {' | '.join(cells[1:])} |")
        lines.append("")
    return "\n".join(lines)


def goals_of(results: Results, peer: str = PEER) -> str:
    """Return a table of the target ratios to a peer, the measured ones, and whether they are met."""
    lines = ["| case | CPU | p99 | memory |", "|---|---:|---:|---:|"]
    for case, wanted in GOALS.items():
        cells = []
        for name, goal in zip(GOAL_FIGURES, wanted, strict=True):
            found = ratio(results, case, name, peer)
            if found is None or goal is None:
                cells.append("" if found is None else f"{found:.3f}")
            else:
                cells.append(f"{found:.3f} of {goal:.2f}{'' if found <= goal else ' **missed**'}")
        if any(cells):
            lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def clients_of(results: Results) -> str:
    """Return a table of the ratios to grpc-proxy with clients other than the default's; empty if there are none."""
    lines = ["| case | clients | CPU | p99 | memory |", "|---|---|---:|---:|---:|"]
    for name in results:
        case = CASES[name]
        if case.profile != DEFAULT or case.real:
            found = [ratio(results, name, figure) for figure in GOAL_FIGURES]
            cells = ["" if value is None else f"{value:.3f}" for value in found]
            clients = "clientv3 itself" if case.real else case.profile
            lines.append(f"| {name} | {clients} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def bounds_of(results: Results) -> str:
    """Return a table of the absolute targets of watchmux."""
    ours = {case: by_target[OURS] for case, by_target in results.items() if OURS in by_target}
    found: list[tuple[str, float, float]] = [
        (what, ours[case][figure], most) for what, case, figure, most in BOUNDS if figure in ours.get(case, {})
    ]
    case, most = FLOOR_MAX
    if (times := ratio(results, case, "cpu_us", FLOOR)) is not None:
        found.append((f"CPU of an event in {case}, times the floor's", times, most))
    costs = [ours[case]["cpu_us"] for case in SCALE if case in ours]
    if len(costs) > 1:
        growth = max(later / earlier for earlier, later in pairwise(costs))
        found.append(("CPU of an event with ten times the watches, at most times", growth, GROWTH_MAX))
    if ours:
        lost = sum(figures.get("lost", 0.0) for figures in ours.values())
        found.append(("events lost and calls failed, all cases together", lost, 0.0))
    lines = ["| wanted of watchmux itself | is | at most |", "|---|---:|---:|"]
    for what, value, most in found:
        lines.append(f"| {what} | {value:.2f}{'' if value <= most else ' **missed**'} | {most:g} |")
    return "\n".join(lines) + "\n"


def summary_of(results: Results, about: dict[str, Any]) -> str:
    """Return the machine and the target ratios of a run, for docs/performance.md."""
    rounds = "one round" if about["rounds"] == 1 else f"medians of {about['rounds']} rounds"
    lines = [
        *wrap(
            f"etcd {about['etcd']}, {rounds}, clients as {about['profile']} where the case "
            f"does not name another; {machine_of(about)}",
            120,
        ),
        "",
        "Ratios to grpc-proxy, and what was wanted:",
        "",
        goals_of(results),
    ]
    if about["failures"]:
        lines += ["Not finished:", "", *(f"- {failure}" for failure in about["failures"]), ""]
    if clients := clients_of(results):
        lines += ["With other clients:", "", clients]
    if any(OLD_PEER in targets for targets in results.values()):
        lines += ["The same to the grpc-proxy of etcd 3.4, in front of the same etcd:", "", goals_of(results, OLD_PEER)]
    lines.append(bounds_of(results))
    if measured := several.measured_of(results):
        lines += [
            "`--workers=2` (and a leaf in front of a hub), sums of all processes, compared with one process:",
            "",
            measured,
        ]
    if calculated := several.calculated_of(results):
        lines += [CALCULATED, "", calculated]
    return "\n".join(lines)


def details_of(results: Results, about: dict[str, Any]) -> str:
    """Return the pictures, the tables and the descriptions of the cases, for docs/evidence/performance.md."""
    lines = [f"![{alt}](../images/bench-{name}.png)\n" for name, alt in PICTURES.items()]
    lines += [markdown_of(results), "| case | what |", "|---|---|"]
    lines += [f"| {name} | {what} |" for name, what in about["cases"].items()]
    return "\n".join(lines) + "\n"


def machine_of(about: dict[str, Any]) -> str:
    """Return the docs' text on the machine and its other load."""
    machine = about["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, Linux {machine['kernel']}, Python {machine['python']}, "
        f"uvloop {machine['uvloop']}; "
        f"load average at the start {machine['load_average'][0]}: {about['machine_load']}."
    )


def machine() -> dict[str, Any]:
    """Describe the machine."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory_kib / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "uvloop": version("uvloop"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
