"""`python -m tests.bench.abuse_page`: measure attacks and heavy loads, and write the tables of docs/evidence/abuse.md.

Each is a scenario of `tests.bench.sharing` with a bystander, medians of some rounds: attacks on the connection through
the proxy, and loads also directly at etcd, in turn. Nothing else should run on the machine meanwhile. `--only NAME`
measures some rows and leaves the others unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import click

from tests.bench.sharing.__main__ import HERE, median, scenarios
from tests.bench.sharing.front import Figures, Front
from tests.e2e.attacks import ATTACKS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evidence" / "abuse.md"
BEGIN, END = "<!-- {0}: written by python -m tests.bench.abuse_page -->", "<!-- end of {0} -->"
ATTACK_TABLE, LOAD_TABLE = "attacks", "loads"
HEADINGS = ("load", "way", "before, p50 / p99 / max", "during, p50 / p99 / max", "memory", "outcome")
WAYS = (("at etcd", None), ("through watchmux", HERE))
PREFIX = "attack: "
"""Of the scenarios that are attacks."""
MEASURED = re.compile(r"(before|during) (p50|p99|max) ms|memory peak MiB|outcome")


def loads() -> list[str]:
    """Return the abusive scenarios: those that cost work or memory out of proportion to the bytes sent."""
    mine = ("filtered replays", "gzip bomb", "unread translated answers", "few descriptors")
    return [name for name in sorted(scenarios()) if name in mine or name.startswith("turns: ")]


def number(text: str) -> str:
    """Format a figure with its significant digits."""
    value = float(text.replace(",", ""))
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def row(name: str, way: str, figures: dict[str, str]) -> str:
    """Return one row."""

    def delays(when: str) -> str:
        found = [figures.get(f"{when} {each} ms") for each in ("p50", "p99", "max")]
        return " / ".join(number(each) for each in found if each) + " ms" if all(found) else "-"

    memory = figures.get("memory peak MiB")
    others = [f"{key}: {value}" for key, value in figures.items() if not MEASURED.fullmatch(key)]
    outcome = "; ".join(filter(None, (figures.get("outcome", ""), *others))) or "-"
    shown = f"+{float(memory.replace(',', '')):,.0f} MiB" if memory else "-"
    return f"| {name} | {way} | {delays('before')} | {delays('during')} | {shown} | {outcome} |"


def measured(name: str, rounds: int) -> list[str]:
    """Measure one load on both routes, or one attack through the proxy; return its rows."""
    scenario = scenarios()[PREFIX + name if name in ATTACKS else name]
    found: dict[str, list[Figures]] = {way: [] for way, _ in WAYS[name in ATTACKS :]}
    for _ in range(rounds):
        for way, root in WAYS[name in ATTACKS :]:
            found[way].append(scenario(Front(way, root)))
    return [row(name, way, median(figures)) for way, figures in found.items()]


def table(rows: Sequence[str]) -> str:
    """Return a table in Markdown."""
    return "\n".join((f"| {' | '.join(HEADINGS)} |", f"|{'---|' * len(HEADINGS)}", *rows))


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


def replaced(text: str, name: str, rows: Sequence[str]) -> str:
    """Return the page with the table replaced."""
    begin = BEGIN.format(name)
    return text.replace(f"{begin}{section(text, name)}", f"{begin}\n\n{table(rows)}\n\n")


@click.command()
@click.option("--only", "names", multiple=True, help="Only these attacks or loads; the other rows stay.")
@click.option("--rounds", default=3, show_default=True, help="Runs of each on each route.")
def main(names: tuple[str, ...], rounds: int) -> None:
    """Measure the effect of attacks and loads on other clients, and write it into docs/evidence/abuse.md."""
    known = [*ATTACKS, *loads()]
    if unknown := [name for name in names if name not in known]:
        raise click.UsageError(f"unknown: {unknown[0]}; known: {', '.join(known)}")
    for kind, order in ((ATTACK_TABLE, list(ATTACKS)), (LOAD_TABLE, loads())):
        for name in order:
            if names and name not in names:
                continue
            found = measured(name, rounds)
            click.echo("\n".join(found))
            # After each one, so that results are kept if a later one fails.
            text = PAGE.read_text()
            rows = rows_of(text, kind) | {name: found}
            PAGE.write_text(replaced(text, kind, [line for each in order for line in rows.get(each, [])]))


if __name__ == "__main__":
    main()
