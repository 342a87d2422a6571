"""The documents match the code: limits, invariants, the tree, links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from coalesce import invariants
from tests import limits_page

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def test_limits_page_matches_the_code() -> None:
    """`python -m tests.limits_page` writes it again."""
    assert limits_page.PAGE.read_text() == limits_page.page()


def test_every_limit_has_a_reason() -> None:
    for line in limits_page.page().splitlines():
        if line.startswith("| `"):
            assert len(line.split(" | ")[3]) > 20, line


def numbered(text: str) -> dict[int, str]:
    """Return the numbered items of a text, white space folded, up to the first sentence's end."""
    items = re.findall(r"^ ?(\d+)\. (.+?)(?=^ ?\d+\. |\n\n|\Z)", text, re.MULTILINE | re.DOTALL)
    return {int(number): " ".join(item.split()) for number, item in items}


def test_documented_invariants_match_the_code() -> None:
    _, _, section = ARCHITECTURE.partition("### Invariants\n")
    section = section.partition("\n##")[0]
    assert numbered(section) == numbered(invariants.__doc__ or "")


def test_every_package_is_in_the_documented_tree() -> None:
    """ARCHITECTURE.md's tree lists every package of the program."""
    for package in ("proxy", "upstream", "coalesce", "proto"):
        for init in (ROOT / package).rglob("__init__.py"):
            assert f"{init.parent.name}/" in ARCHITECTURE, init.parent


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", path.read_text()):
        assert (path.parent / target).exists(), target


def test_named_tests_exist() -> None:
    """Every test that docs/guarantees.md names as a proof exists."""
    named = set(re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "guarantees.md").read_text()))
    assert len(named) > 20
    missing = [
        f"{path}::{name}"
        for path, name in named
        if not re.search(rf"def {name}\b", (ROOT / "tests" / path).read_text())
    ]
    assert not missing, missing


@pytest.mark.parametrize(("title", "hops_max"), [("The walk of an event", 15), ("The walk of a create", 20)])
def test_walks_name_functions_that_exist(title: str, hops_max: int) -> None:
    _, _, section = ARCHITECTURE.partition(f"### {title}\n")
    section = section.partition("\n##")[0]
    hops = numbered(section)
    assert 10 < len(hops) <= hops_max
    for path, names in re.findall(r"`([\w/]+\.py):([\w.]+)`", section):
        source = (ROOT / path).read_text()
        for name in names.split("."):
            assert re.search(rf"(def|class) {name}\b", source), f"{path}:{names}"


def test_tests_in_the_track_record_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "evidence" / "track-record.md").read_text()))
    assert len(named) > 50
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    missing = [name for name in sorted(named) if not re.search(rf"def {name}\b", source)]
    assert not missing, missing
