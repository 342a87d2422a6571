"""The results of `measure`, without and with the proxy, row by row; shown as a table in a terminal and as a page.

A row is one of the upstream's own numbers, before and after. This module alone decides which numbers are divided and
how they are formatted.
"""

from __future__ import annotations

from enum import Enum

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text


class Unit(Enum):
    """The unit of a row."""

    COUNT = "count"
    RATE = "per second"
    BYTES = "bytes"
    BYTES_RATE = "bytes per second"
    SECONDS = "seconds"
    DELAY = "milliseconds"
    FAULTS = "faults"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One number, before and after; None: unknown."""

    name: str
    unit: Unit
    before: float | None
    after: float | None
    compared: bool = True
    """Whether the factor between the two numbers is meaningful."""
    note: str = ""

    @property
    def factor(self) -> float | None:
        """The reduction, before / after; None when `after` is 0 or either number is unknown."""
        if not self.compared or self.before is None or not self.after or self.after < 0:
            return None
        return self.before / self.after


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One quantity over time, before and after: lists of (seconds, value)."""

    name: str
    unit: Unit
    before: list[tuple[float, float]]
    after: list[tuple[float, float]]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """All data shown of a measurement."""

    title: str
    subtitle: str
    before_name: str
    after_name: str
    rows: list[Row]
    series: list[Series] = []
    facts: list[tuple[str, str]] = []
    """Circumstances of the measurement: (name, value)."""
    warnings: list[str] = []
    """What the reader must know to read the numbers right."""
    complaints: list[str] = []


def show_value(value: float | None, unit: Unit) -> str:
    """Format a number with its unit for people."""
    if value is None:
        return "-"
    match unit:
        case Unit.BYTES | Unit.BYTES_RATE:
            size, name = next(
                ((scale, name) for scale, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if value >= scale),
                (1, "B"),
            )
            text = f"{value / size:,.1f} {name}" if size > 1 else f"{value:,.0f} B"
            return text + ("/s" if unit is Unit.BYTES_RATE else "")
        case Unit.SECONDS:
            return f"{value:,.2f} s"
        case Unit.DELAY:
            return f"{value:,.1f} ms"
        case Unit.RATE:
            return f"{value:,.1f}/s"
        case _:
            return f"{value:,.0f}"


def show_age(seconds: float) -> str:
    """Format an age for people, as the status page does: `90 s`, `5 min`, `3 h`, `4 days`."""
    for limit, scale, unit in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds / 86_400:,.0f} days"


def counted(number: float, one: str, many: str = "") -> str:
    """Format a number of things: `1 stream`, `2 streams`; `many` for a plural without -s."""
    return f"{number:,.0f} {one if number == 1 else many or one + 's'}"


def show_factor(factor: float | None) -> str:
    """Format a reduction."""
    if factor is None:
        return ""
    return f"{factor:,.0f}x" if factor >= 100 else f"{factor:,.1f}x"


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the table of before and after."""
    table = Table(title=f"{comparison.title}\n{comparison.subtitle}", title_justify="left")
    table.add_column("what etcd serves")
    table.add_column(comparison.before_name, justify="right")
    table.add_column(comparison.after_name, justify="right")
    table.add_column("reduction", justify="right")
    compared = True
    for row in comparison.rows:
        if compared and not row.compared:
            table.add_section()
        compared = row.compared
        table.add_row(
            row.name,
            *(_cell(value, row.unit) for value in (row.before, row.after)),
            Text(show_factor(row.factor), style="bold green" if (row.factor or 0) >= 1.5 else "bold"),
        )
    console.print(table)
    for row in comparison.rows:
        if row.note:
            console.print(Text(f"  {row.name}: {row.note}", style="dim"))
    for name, value in comparison.facts:
        console.print(Text(f"  {name}: {value}", style="dim"))
    for text in comparison.warnings:
        console.print(Text(f"  {text}", style="yellow"))
    for text in comparison.complaints:
        console.print(Text(f"  {text}", style="red"))


def _cell(value: float | None, unit: Unit) -> Text:
    text = show_value(value, unit)
    if unit is Unit.FAULTS and value is not None:
        return Text(text, style="bold red" if value else "bold green")
    return Text(text)
