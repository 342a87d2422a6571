"""A program writes the tables of docs/evidence/abuse.md, row by row."""

from __future__ import annotations

from tests.bench import abuse_page
from tests.e2e.attacks import ATTACKS

FIGURES = {
    **{f"{when} {each} ms": "1,234" for when in ("before", "during") for each in ("p50", "p99", "max")},
    "memory peak MiB": "20.6",
    "outcome": "status 8",
    "watch resumed": "yes",
}


def test_the_page_has_a_place_for_both_tables() -> None:
    text = abuse_page.PAGE.read_text()
    assert set(abuse_page.rows_of(text, abuse_page.ATTACK_TABLE)) == set(ATTACKS)
    loads = abuse_page.rows_of(text, abuse_page.LOAD_TABLE)
    assert set(loads) <= set(abuse_page.loads())
    assert all(len(rows) == 2 for rows in loads.values())


def test_a_row_replaces_the_one_that_was_there() -> None:
    line = abuse_page.row("gzip bomb", "at etcd", FIGURES)
    assert line == (
        "| gzip bomb | at etcd | 1,234 / 1,234 / 1,234 ms | 1,234 / 1,234 / 1,234 ms "
        "| +21 MiB | status 8; watch resumed: yes |"
    )
    text = abuse_page.replaced(abuse_page.PAGE.read_text(), abuse_page.LOAD_TABLE, [line])
    assert abuse_page.rows_of(text, abuse_page.LOAD_TABLE) == {"gzip bomb": [line]}
    assert set(abuse_page.rows_of(text, abuse_page.ATTACK_TABLE)) == set(ATTACKS)


def test_a_load_without_delays_says_so() -> None:
    assert abuse_page.row("x", "y", {"watch resumed": "no"}) == "| x | y | - | - | - | watch resumed: no |"
