"""Run scenarios directly at etcd and through the proxy, several rounds in turn, and print the medians."""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import sys
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

import tests.bench.sharing as package
from tests.bench.cases import PEER
from tests.bench.sharing.front import Figures, Front, Scenario

HERE = Path(__file__).resolve().parents[3]


def scenarios() -> dict[str, Scenario]:
    """Return all scenarios of this package by name."""
    found: dict[str, Scenario] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            found |= getattr(importlib.import_module(f"{package.__name__}.{module.name}"), "SCENARIOS", {})
    return found


def median(rounds: list[Figures]) -> dict[str, str]:
    """Return the median of each figure; of words, the last."""
    joined: dict[str, str] = {}
    for name, last in rounds[-1].items():
        numbers = [value for figures in rounds if isinstance(value := figures.get(name), int | float)]
        joined[name] = f"{statistics.median(numbers):,.4g}" if numbers else str(last)
    return joined


@click.command()
@click.argument("names", nargs=-1)
@click.option("--rounds", default=3, show_default=True, help="Runs of each scenario on each route.")
@click.option("--root", type=click.Path(path_type=Path, exists=True), help="A second checkout; its proxy runs too.")
@click.option("--peer", is_flag=True, help="Run etcd's grpc-proxy too, in the scenarios that know it.")
@click.option("--only", help="The only route to run: direct, grpc-proxy, 'other checkout' or watchmux.")
@click.option("--list", "listed", is_flag=True, help="List the scenarios.")
def main(names: tuple[str, ...], rounds: int, root: Path | None, peer: bool, only: str | None, listed: bool) -> None:
    """Measure NAMES (default: all scenarios)."""
    known = scenarios()
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"unknown scenario {unknown[0]}; known: {', '.join(sorted(known))}")
    if listed:
        click.echo("\n".join(sorted(known)))
        return
    ways = [("direct", None), *([("other checkout", root.resolve())] if root else []), ("watchmux", HERE)]
    if peer:
        ways.insert(1, (PEER, None))
    ways = [way for way in ways if only in (None, way[0])]
    for name in names or sorted(known):
        results: dict[str, list[Figures]] = {}
        for _ in range(rounds):
            for way, checkout in ways:
                try:
                    results.setdefault(way, []).append(known[name](Front(way, checkout)))
                except (AssertionError, OSError, TimeoutError) as error:
                    sys.stderr.write(f"FAILED: {name}, {way}: {error}\n")
        Console().print(_table(name, results))


def _table(name: str, results: dict[str, list[Figures]]) -> Table:
    table = Table(title=name)
    table.add_column("figure")
    medians = {way: median(rounds) for way, rounds in results.items() if rounds}
    for way in medians:
        table.add_column(way, justify="right")
    for figure in dict.fromkeys(figure for figures in medians.values() for figure in figures):
        table.add_row(figure, *(figures.get(figure, "") for figures in medians.values()))
    return table


if __name__ == "__main__":
    main()
