"""`python -m tests.bench.abuse_page`: measure attacks and heavy loads, and write the tables of docs/evidence/abuse.md.

The first table is that of `tests.bench.abuse`: attacks on the connection. The second one shows loads that share the
proxy with a bystander (`tests.bench.sharing`), directly at etcd and through the proxy in turn, medians of some rounds.
Nothing else should run on the machine meanwhile. `--only NAME` measures some rows and leaves the others unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click
import uvloop

from tests.bench.abuse import HEADINGS, row
from tests.bench.sharing.__main__ import HERE, median, scenarios
from tests.bench.sharing.front import Figures, Front
from tests.e2e.attacks import ATTACKS
from tests.etcd.server import EtcdServer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "abuse.md"
BEGIN, END = "<!-- {0}: written by python -m tests.bench.abuse_page -->", "<!-- end of {0} -->"
ATTACK_TABLE, LOAD_TABLE = "attacks", "loads"
LOAD_HEADINGS = ("load", "way", "before, p50 / p99 / max", "during, p50 / p99 / max", "memory", "outcome")
WAYS = (("at etcd", None), ("through watchmux", HERE))
MEASURED = re.compile(r"(before|during) (p50|p99|max) ms|memory peak MiB|outcome")


def loads() -> list[str]:
    """Return the abusive scenarios: those that cost work or memory out of proportion to the bytes sent."""
    mine = ("filtered replays", "gzip bomb", "unread translated answers", "few descriptors")
    return [name for name in sorted(scenarios()) if name in mine or name.startswith("turns: ")]


def number(text: str) -> str:
    """Format a figure with its significant digits."""
    value = float(text.replace(",", ""))
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def load_row(name: str, way: str, figures: dict[str, str]) -> str:
    """Return one row of the second table."""

    def delays(when: str) -> str:
        found = [figures.get(f"{when} {each} ms") for each in ("p50", "p99", "max")]
        return " / ".join(number(each) for each in found if each) + " ms" if all(found) else "-"

    memory = figures.get("memory peak MiB")
    others = [f"{key}: {value}" for key, value in figures.items() if not MEASURED.fullmatch(key)]
    outcome = "; ".join(filter(None, (figures.get("outcome", ""), *others))) or "-"
    shown = f"+{float(memory.replace(',', '')):,.0f} MiB" if memory else "-"
    return f"| {name} | {way} | {delays('before')} | {delays('during')} | {shown} | {outcome} |"


def load_rows(name: str, rounds: int) -> list[str]:
    """Measure one load on both routes."""
    found: dict[str, list[Figures]] = {way: [] for way, _ in WAYS}
    for _ in range(rounds):
        for way, root in WAYS:
            found[way].append(scenarios()[name](Front(way, root)))
    return [load_row(name, way, median(figures)) for way, figures in found.items()]


def attack_rows(name: str) -> list[str]:
    """Measure one attack."""
    with EtcdServer() as etcd:
        return [uvloop.run(row(name, etcd))]


def table(headings: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table in Markdown."""
    return "\n".join((f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}", *rows))


def section(text: str, name: str) -> str:
    """Return the text between the marks of a table. Raises AssertionError."""
    begin, end = BEGIN.format(name), END.format(name)
    assert text.count(begin) == text.count(end) == 1, f"docs/evidence/abuse.md has no place for {name}"
    return text.partition(begin)[2].partition(end)[0]


def rows_of(text: str, name: str) -> dict[str, list[str]]:
    """Return the rows of a table, by their first cell."""
    found: dict[str, list[str]] = {}
    for line in section(text, name).strip().splitlines()[2:]:
        found.setdefault(line.split(" | ")[0].strip("| "), []).append(line)
    return found


def replaced(text: str, name: str, headings: Sequence[str], rows: Sequence[str]) -> str:
    """Return the page with the table replaced."""
    begin = BEGIN.format(name)
    return text.replace(f"{begin}{section(text, name)}", f"{begin}\n\n{table(headings, rows)}\n\n")


@click.command()
@click.option("--only", "names", multiple=True, help="Only these attacks or loads; the other rows stay.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each load on each route.")
def main(names: tuple[str, ...], rounds: int) -> None:
    """Measure the effect of attacks and loads on other clients, and write it into docs/evidence/abuse.md."""
    known = [*ATTACKS, *loads()]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"unknown: {unknown[0]}; known: {', '.join(known)}")
    for kind, headings, order in ((ATTACK_TABLE, HEADINGS, list(ATTACKS)), (LOAD_TABLE, LOAD_HEADINGS, loads())):
        for name in order:
            if names and name not in names:
                continue
            measured = attack_rows(name) if kind == ATTACK_TABLE else load_rows(name, rounds)
            click.echo("\n".join(measured))
            # After each one, so that results are kept if a later one fails.
            text = PAGE.read_text()
            rows = rows_of(text, kind) | {name: measured}
            lines = [line for each in order for line in rows.get(each, [])]
            PAGE.write_text(replaced(text, kind, headings, lines))


if __name__ == "__main__":
    main()
