"""The figures of a run as pictures (PNG)."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tests.bench.cases import FLOOR, OLD_PEER, OURS, PEER
from tests.bench.measure import Results
from tests.bench.report import ratio

COLOURS = {  # of the targets that are drawn
    FLOOR: "#b0b0b0",
    "etcd": "#e0a458",
    PEER: "#4a7fb5",
    OLD_PEER: "#9dbcd8",
    OURS: "#2a9d6e",
}
FANOUT = ("burst", "paced", "single", "stacked", "ranges", "lowfan", "variants", "catch-up", "tls")


def draw(results: Results, out: Path) -> None:
    """Draw the available figures into `out`."""
    mpl.use("agg")
    mpl.rcParams["font.size"] = 9
    cases = [case for case in FANOUT if case in results]
    if cases:
        _save(_bars(results, cases, "cpu_us", "CPU per delivered event, us"), out / "cpu")
        _save(_bars(results, cases, "p99_ms", "p99 delay, ms"), out / "delay")
    idle = [case for case in results if case.startswith("idle")]
    if idle:
        _save(_bars(results, idle, "memory_mib", "resident memory, MiB"), out / "memory")
    calls = [case for case in results if case.startswith(("put", "range-"))]
    if calls:
        _save(_bars(results, calls, "cpu_us", "CPU per unary call, us"), out / "calls")
    scale = [case for case in results if case.startswith("scale-")]
    if len(scale) > 1:
        _save(_scale(results, scale), out / "scale")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path.with_suffix(".png"), dpi=110)


def _bars(results: Results, cases: list[str], name: str, title: str) -> Figure:
    """Draw a panel per case, since cases differ by orders of magnitude; a bar per target."""
    columns = min(5, len(cases))
    rows = -(-len(cases) // columns)
    figure = Figure(figsize=(2.1 * columns + 0.4, 2.1 * rows + 0.4), layout="constrained")
    figure.suptitle(f"{title} (above each: the ratio to grpc-proxy)")
    panels = figure.subplots(rows, columns, squeeze=False)
    for place, panel in enumerate(panels.flat):
        if place >= len(cases):
            panel.set_axis_off()
            continue
        _panel(panel, results, cases[place], name)
    return figure


def _panel(panel: Axes, results: Results, case: str, name: str) -> None:
    by_target = {
        target: figures[name] for target, figures in results[case].items() if target in COLOURS and name in figures
    }
    bars = panel.bar(list(by_target), list(by_target.values()), color=[COLOURS[target] for target in by_target])
    panel.bar_label(bars, fmt="{:.3g}", fontsize=7)
    panel.margins(y=0.15)
    share = ratio(results, case, name)
    panel.set_title(case if share is None else f"{case}: {share:.2f}", fontsize=9)
    panel.tick_params(axis="x", labelrotation=30, labelsize=7)
    panel.tick_params(axis="y", labelsize=7)


def _scale(results: Results, cases: list[str]) -> Figure:
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    watches = [int(case.removeprefix("scale-")) for case in cases]
    for target in (PEER, OURS):
        if all(target in results[case] for case in cases):
            figures = [results[case][target]["cpu_us"] for case in cases]
            axes.plot(watches, figures, marker="o", color=COLOURS[target], label=target)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("watches of one range")
    axes.set_ylabel("CPU per delivered event, us")
    axes.legend()
    return figure
