"""docs/limits.md, made from the code: every bound and time, where it is set, its default, its unit and its reason.

`python -m tests.limits_page` writes the page anew; a test holds it to the code. The reasons are the comments above, or
the docstrings below, the fields of the settings classes.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
import sys
from pathlib import Path

from proto.http2.limits import Limits
from proxy.listening.settings import ListenerSettings

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "limits.md"
SOURCES = (
    ("The core", "coalesce.limits", "Limits"),
    ("A client's HTTP/2 connection", "proto.http2.limits", "Limits"),
    ("The listener", "proxy.listening.settings", "ListenerSettings"),
    ("The Watch service", "proxy.watch", "WatchSettings"),
    ("Pass-through", "proxy.passthrough", "PassthroughSettings"),
    ("HTTP/1", "proxy.listening.http1", "Http1Settings"),
    ("Reads and permission checks", "proxy.reads", "ReaderSettings"),
    ("A connection to etcd", "upstream.settings", "ConnectionSettings"),
    ("The watch client and the pool", "upstream.settings", "Settings"),
)
INTRODUCTION = """# Limits

Every bound and time in watchmux, with its default and the reason for it. This page is made from the code
(`python -m tests.limits_page`); a test holds it there. Those that operators turn have a flag, an environment variable
and a line in a configuration file: `watchmux serve --help` and `configs/watchmux.toml` name them. What is hit is
counted at `--metrics-addr`.
"""
UNITS = (("_bytes", "bytes"), ("_window", "bytes"), ("_s", "seconds"), ("_revisions", "revisions"))


def reasons(module: str, name: str) -> dict[str, str]:
    """What is said of each field of a class: the docstring below it, or the comment above it or its group."""
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
    """The unit a name says."""
    bare = re.sub(r"_(max|first|min)$", "", name)
    said = [word for ending, word in UNITS if bare.endswith(ending)]
    return next(iter(said), "bytes" if "_bytes_" in bare else "count")


def shown(value: object, unit: str) -> str:
    """A default, for people."""
    if value is None:
        return "none"
    if isinstance(value, int) and unit == "bytes" and value >= 1024 and value % 1024 == 0:
        for size, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
            if value % size == 0:
                return f"{value:,} ({value // size} {name})"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}" if isinstance(value, float) else str(value)


def page() -> str:
    """The page as it has to be."""
    parts = [INTRODUCTION]
    for title, module, name in SOURCES:
        # A client's connection has the listener's bounds, which are not all the class's own.
        made = getattr(importlib.import_module(module), name)()
        settings = ListenerSettings().http2 if isinstance(made, Limits) else made
        said = reasons(module, name)
        where = module.replace(".", "/") + ".py"
        parts.append(
            f"\n## {title} (`{where}`)\n\n| name | default | unit | what it bounds, and why |\n|---|---|---|---|\n"
        )
        for field in dataclasses.fields(settings):
            value = getattr(settings, field.name)
            if isinstance(value, int | float | None) and not isinstance(value, bool):
                word = unit(field.name)
                parts.append(f"| `{field.name}` | {shown(value, word)} | {word} | {said[field.name]} |\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)} written\n")
