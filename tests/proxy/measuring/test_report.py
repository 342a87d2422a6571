"""The report of a measurement: numbers with units, factors, a table, and a self-contained page."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from proxy.measuring.comparison import Comparison, Row, Series, Unit, show_comparison, show_factor, show_value
from proxy.measuring.report import render_report

ROWS = [
    Row(name="watchers", unit=Unit.COUNT, before=5000, after=10),
    Row(name="bytes sent", unit=Unit.BYTES, before=3 * 2**20, after=0, note="to gRPC clients"),
    Row(name="lost", unit=Unit.FAULTS, before=0, after=2, compared=False),
]


def comparison(**values: Any) -> Comparison:
    given: dict[str, Any] = {
        "title": "5,000 watches",
        "subtitle": "counted by etcd",
        "before_name": "directly",
        "after_name": "through watchmux",
        "rows": ROWS,
    }
    return Comparison(**{**given, **values})


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, Unit.COUNT, "-"),
        (12345, Unit.COUNT, "12,345"),
        (0, Unit.BYTES, "0 B"),
        (1023, Unit.BYTES, "1,023 B"),
        (1536, Unit.BYTES, "1.5 KiB"),
        (5 * 2**30, Unit.BYTES_RATE, "5.0 GiB/s"),
        (0.126, Unit.SECONDS, "0.13 s"),
        (4.04, Unit.DELAY, "4.0 ms"),
        (7, Unit.RATE, "7.0/s"),
    ],
)
def test_numbers_have_their_units(value: float | None, unit: Unit, shown: str) -> None:
    assert show_value(value, unit) == shown


@pytest.mark.parametrize(("factor", "shown"), [(None, ""), (1.04, "1.0x"), (99.94, "99.9x"), (1234.5, "1,234x")])
def test_factors_of_100_and_more_have_no_decimals(factor: float | None, shown: str) -> None:
    assert show_factor(factor) == shown


@pytest.mark.parametrize(("before", "after", "factor"), [(10, 5, 2.0), (10, 0, None), (None, 5, None), (0, 5, 0.0)])
def test_division_by_zero_is_avoided(before: float | None, after: float | None, factor: float | None) -> None:
    assert Row(name="x", unit=Unit.COUNT, before=before, after=after).factor == factor


def test_the_table_has_both_sides_and_the_factor() -> None:
    output = io.StringIO()
    show_comparison(comparison(complaints=["it broke"], facts=[("proxy", "here:1")]), Console(file=output, width=120))
    text = output.getvalue()
    for part in ("5,000", "500x", "3.0 MiB", "to gRPC clients", "proxy: here:1", "it broke"):
        assert part in text


class Page(HTMLParser):
    """Collects the parts of a page; an unclosed tag is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


LINES = Series(
    name="watchers", unit=Unit.COUNT, before=[(0.0, 0.0), (1.0, 5000.0)], after=[(0.0, 0.0), (1.0, 10.0), (2.0, 10.0)]
)


def test_the_page_stands_alone_and_is_well_formed() -> None:
    text = render_report(comparison(series=[LINES]), "1.2.3", at=0)
    page = Page(text)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert not [name for name, _ in page.attributes if name in ("src", "href") or name.startswith("on")]
    assert not re.search(r"https?://|url\(|@import", text)
    assert "1970-01-01 00:00:00 UTC" in text
    assert "watchmux 1.2.3" in text
    drawings = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text)]
    assert len(drawings) == 2 + 1
    lines = list(drawings[2].iter("polyline"))
    assert [len(str(line.get("points")).split()) for line in lines] == [2, 3]


def test_lines_stay_inside_their_box() -> None:
    text = render_report(comparison(series=[LINES]), "", at=0)
    for points in re.findall(r'points="([^"]*)"', text):
        for point in points.split():
            x, y = map(float, point.split(","))
            assert 0 <= x <= 520
            assert 0 <= y <= 220


def test_names_from_others_are_shown_as_text() -> None:
    text = render_report(comparison(title="<script>alert(1)</script>", complaints=["<b>"]), "", at=0)
    assert "<script>" not in text
    assert "<b>" not in text.replace("<td><b>", "")


def test_empty_lines_are_drawn_too() -> None:
    flat = Series(name="events", unit=Unit.BYTES_RATE, before=[(0.0, 0.0)], after=[(0.0, 0.0)])
    assert "0 B/s" in render_report(comparison(series=[flat], rows=[]), "", at=0)
