"""`make bench`: every case at every target in turn, several rounds, medians, and the ratio to etcd's grpc-proxy."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from tests.bench.cases import CASES, Case
from tests.bench.targets import PYTHON, TARGETS, Target
from tests.etcd.binaries import etcds
from tests.etcd.server import HOST, EtcdServer

PEER = "grpc-proxy"
FIGURES = ("cpu_us", "p50_ms", "p99_ms", "memory_mib", "events_s", "create_s", "lost")


def measure(case: Case, target: Target, etcd: EtcdServer) -> dict[str, float]:
    """Drive `case` at `target` once and return its figures."""
    load = subprocess.Popen(
        [PYTHON, "-m", "tests.bench.load", case.name, HOST, str(target.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert load.stdin is not None
    assert load.stdout is not None
    try:
        figures: dict[str, Any] = json.loads(load.stdout.readline())
        cpu_s = target.cpu_s()
        if case.writes:
            subprocess.run([PYTHON, "-m", "tests.bench.writer", case.name, etcd.endpoint], check=True, timeout=300)
            figures |= json.loads(load.stdout.readline())
            spent_s = target.cpu_s() - cpu_s
            figures["cpu_us"] = 1e6 * spent_s / max(1, figures["events"])
            figures["lost"] = figures["expected"] - figures["events"]
        else:
            subprocess.run(["sleep", str(case.idle_s)], check=True)
        figures["memory_mib"] = target.memory_mib()
    finally:
        load.kill()
        load.wait()
        load.stdin.close()
        load.stdout.close()
    return {name: float(figures[name]) for name in FIGURES if name in figures}


def median_of(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Return the median of each figure."""
    return {name: statistics.median(figures[name] for figures in rounds) for name in rounds[0]}


def table_of(results: dict[str, dict[str, dict[str, float]]]) -> Table:
    """Lay out results: a row per case and target, ratios to the peer behind."""
    table = Table(title="medians; in brackets the ratio to etcd grpc-proxy in the same run")
    for column in ("case", "target", "CPU us/event", "p50 ms", "p99 ms", "memory MiB", "create s", "lost"):
        table.add_column(column, justify="left" if column in ("case", "target") else "right")
    for case, by_target in results.items():
        peer = by_target.get(PEER, {})
        for target, figures in by_target.items():
            cells = []
            for name in ("cpu_us", "p50_ms", "p99_ms", "memory_mib", "create_s", "lost"):
                text = f"{figures[name]:.2f}" if name in figures else "-"
                if target == "watchmux" and peer.get(name) and name != "lost" and name in figures:
                    text += f" ({figures[name] / peer[name]:.2f})"
                cells.append(text)
            table.add_row(case, target, *cells)
        table.add_section()
    return table


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Only these cases.")
@click.option("--target", "targets", multiple=True, type=click.Choice(list(TARGETS)), help="Only these targets.")
@click.option("--rounds", default=3, show_default=True, help="Rounds; the median is shown.")
@click.option("--etcd", "version", default="", help="An etcd version there is, such as 3.4.23 (default: the newest).")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures to this file as well.")
def main(names: tuple[str, ...], targets: tuple[str, ...], rounds: int, version: str, json_file: Path | None) -> None:
    """Measure CPU per delivered event, delay and memory beside etcd's own grpc-proxy."""
    binary = next(binary for binary in etcds() if binary.name.startswith(version))
    results: dict[str, dict[str, dict[str, float]]] = {}
    for case in (CASES[name] for name in names or CASES):
        found: dict[str, list[dict[str, float]]] = {}
        for _ in range(rounds):
            for name in targets or TARGETS:
                with EtcdServer(binary) as etcd, TARGETS[name](etcd) as target:
                    found.setdefault(name, []).append(measure(case, target, etcd))
                    sys.stderr.write(f"{case.name} {name} {found[name][-1]}\n")
        results[case.name] = {name: median_of(figures) for name, figures in found.items()}
    Console().print(table_of(results))
    if json_file is not None:
        json_file.write_text(json.dumps({"etcd": binary.name, "rounds": rounds, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
