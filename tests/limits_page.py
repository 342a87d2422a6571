"""Generator of docs/evidence/limits.md: every bound and time, where it is set, its default, its unit and its reason.

`python -m tests.limits_page` writes the page again; a test compares it with the code. The reasons are the comments
above, or the docstrings below, the fields of the settings classes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from proto.http2.limits import Http2Limits
from proxy.listening.settings import ListenerSettings
from tests import limits_table

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evidence" / "limits.md"


class Source(NamedTuple):
    """A class of limits."""

    title: str
    module: str
    name: str
    rows: Mapping[str, limits_table.Row]


SOURCES = (
    Source("The core", "coalesce.limits", "CoreLimits", limits_table.CORE),
    Source("A client's HTTP/2 connection", "proto.http2.limits", "Http2Limits", limits_table.HTTP2),
    Source("The listener", "proxy.listening.settings", "ListenerSettings", limits_table.LISTENER),
    Source("The Watch service", "proxy.watch.settings", "WatchSettings", limits_table.WATCH),
    Source("Pass-through", "proxy.passthrough.settings", "PassthroughSettings", limits_table.PASSTHROUGH),
    Source("HTTP/1", "proxy.listening.http1", "Http1Settings", limits_table.HTTP1),
    Source("Reads and permission checks", "proxy.auth.reads", "ReaderSettings", limits_table.READS),
    Source("A connection to etcd", "upstream.settings", "ConnectionSettings", limits_table.CONNECTION),
    Source("The watch client and the pool", "upstream.settings", "UpstreamSettings", limits_table.UPSTREAM),
)
INTRODUCTION = """# Limits

Every bound and time in watchmux that is a setting, with its default and the reason for it; fixed values are constants
in capitals, with the reason next to each. This page is generated from the code (`python -m tests.limits_page`), and a
test checks that it is current. Limits meant for operators have a flag, an environment variable and an entry in the
configuration file: `watchmux serve --help` and `configs/watchmux.toml` list them.

The metric at `--metrics-addr` shows that a limit was reached: a client or call was refused, ended, cut off, dropped or
delayed by it. "-" means there is no metric: the setting only defines when, or in which portions, something is done. The
test goes up to the limit, and checks what happens beyond it.
"""
COLUMNS = ("name", "default", "unit", "what it bounds, and why", "metric", "test at its edge")
KEPT_INTRODUCTION = """## What clients can make the proxy keep

Everything that a client can make the proxy keep counts towards a limit, and is released when its cause is gone. The
test checks the release.
"""
KEPT_COLUMNS = ("what", "counts for", "is kept until", "test")
UNITS = (("_bytes", "bytes"), ("_window", "bytes"), ("_s", "seconds"), ("_revisions", "revisions"))


def reasons(module: str, name: str) -> dict[str, str]:
    """Return the text on each field of a class: the docstring below it, or the comment above it or its group."""
    source = Path(str(importlib.import_module(module).__file__)).read_text()
    lines = source.splitlines()
    tree = ast.parse(source)
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name).body
    found: dict[str, str] = {}
    text = ""
    for index, node in enumerate(body):
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
            continue
        after = body[index + 1] if index + 1 < len(body) else None
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            text = str(after.value.value)
        else:
            above = []
            line = node.lineno - 2
            while line >= 0 and lines[line].strip().startswith("#"):
                above.append(lines[line].strip(" #"))
                line -= 1
            text = " ".join(reversed(above)) or text
        found[node.target.id] = re.sub(r"\s+", " ", text).replace("|", "\\|")
    return found


def unit(name: str) -> str:
    """Return the unit that a name implies."""
    bare = re.sub(r"_(max|first|min)$", "", name)
    said = [word for ending, word in UNITS if bare.endswith(ending)]
    return next(iter(said), "bytes" if "_bytes_" in bare else "count")


def shown(value: object, unit: str) -> str:
    """Format a default for the page."""
    if value is None:
        return "none"
    if isinstance(value, int) and unit == "bytes" and value >= 1024 and value % 1024 == 0:
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if value % size == 0:
                return f"{value:,} ({value // size} {name})"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def limits(source: Source) -> Iterator[tuple[str, int | float | None]]:
    """Yield the limits of a class, with their defaults."""
    made = getattr(importlib.import_module(source.module), source.name)()
    # A client's connection has the listener's bounds, some of which differ from the class's defaults.
    settings = ListenerSettings().http2 if isinstance(made, Http2Limits) else made
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, int | float | None) and not isinstance(value, bool):
            yield field.name, value


def page() -> str:
    """Return the page as it should be."""
    parts = [INTRODUCTION]
    for source in SOURCES:
        said = reasons(source.module, source.name)
        where = source.module.replace(".", "/") + ".py"
        parts.append(f"\n## {source.title} (`{where}`)\n\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|\n")
        for name, value in limits(source):
            row, word = source.rows[name], unit(name)
            metric = row.metric if row.metric == limits_table.NOTHING else f"`{row.metric}`"
            cells = (f"`{name}`", shown(value, word), word, said[name], metric, f"`{row.edge}`")
            parts.append(f"| {' | '.join(cells)} |\n")
    parts.append(f"\n{KEPT_INTRODUCTION}\n| {' | '.join(KEPT_COLUMNS)} |\n{'|---' * len(KEPT_COLUMNS)}|\n")
    parts.extend(f"| {kept.what} | {kept.counts_for} | {kept.until} | `{kept.test}` |\n" for kept in limits_table.KEPT)
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
