"""The rules of CONTRIBUTING.md for the text of the project: sizes, names, import circles, words.

Run by `make check`. tests/test_imports.py holds the direction of imports.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PRODUCT = ("proto", "coalesce", "upstream", "proxy")
FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
TEST_NAME_MAX = 60

# Words that the project does not use: each has a plain one (CONTRIBUTING.md).
WORDS = re.compile(
    r"\b(told|tells?|nobody|somebody|everybody|anew|whoever|whatever|beside"
    r"|(?<!there )(is|are) no(?! longer| more|$))\b",
    re.IGNORECASE,
)
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").rglob("*.toml")])


class Module(NamedTuple):
    """What the rules look at in one module."""

    path: Path
    lines: int
    classes: list[ast.ClassDef]
    functions: list[ast.FunctionDef | ast.AsyncFunctionDef]
    imports: list[ast.Import | ast.ImportFrom]


@cache
def modules(folder: str) -> tuple[Module, ...]:
    """Return the modules below a folder, without generated ones."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if "pb" not in path.parts:
            text = path.read_bytes()
            module = Module(path, text.count(b"\n"), [], [], [])
            _sort_out(ast.parse(text).body, module)
            found.append(module)
    return tuple(found)


def _sort_out(body: Iterable[ast.stmt], module: Module) -> None:
    for node in body:
        if isinstance(node, ast.ClassDef):
            module.classes.append(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            module.functions.append(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module.imports.append(node)
        for part in ("body", "orelse", "finalbody"):
            _sort_out(getattr(node, part, ()), module)


def product() -> list[Module]:
    """Return the modules of the product."""
    return [module for folder in PRODUCT for module in modules(folder)]


def place(path: Path, line: int) -> str:
    """Return FILE:LINE."""
    return f"{path.relative_to(ROOT)}:{line}"


def test_no_two_classes_have_one_name() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module in product():
        for node in module.classes:
            places[node.name].append(place(module.path, node.lineno))
    assert not {name: found for name, found in places.items() if len(found) > 1}


def name_of(path: Path) -> str:
    """Return the dotted name of a module."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: Module, known: Container[str]) -> Iterator[str]:
    """Yield the modules of the product that a module imports, also those only for types or inside a function."""
    for node in module.imports:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        yield from (name for name in names if name in known)


def test_packages_name_their_modules() -> None:
    """The docstring of a package is the map of its modules."""
    for path in (path for folder in PRODUCT for path in (ROOT / folder).rglob("__init__.py") if "pb" not in path.parts):
        named = set(re.findall(r"`(\w+)`", ast.get_docstring(ast.parse(path.read_bytes())) or ""))
        found = {each.stem for each in path.parent.glob("*.py")} - {"__init__", "__main__"}
        assert not found - named, f"{path.relative_to(ROOT)} does not name {sorted(found - named)}"


def test_imports_have_no_circles() -> None:
    known = {name_of(module.path): module for module in product()}
    graph = {name: {*imported(module, known)} - {name} for name, module in known.items()}
    for name in graph:
        # A package imports its modules; a module that is imported from its package is no circle with it.
        graph[name] -= {package for package in graph[name] if name.startswith(f"{package}.")}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from None


def test_files_and_functions_are_short() -> None:
    long = []
    for module in (*product(), *modules("tests")):
        if module.lines > FILE_LINES_MAX:
            long.append(f"{module.path.relative_to(ROOT)}: {module.lines} lines")
        for node in module.functions:
            size = (node.end_lineno or node.lineno) - node.lineno + 1
            if size > FUNCTION_LINES_MAX:
                long.append(f"{place(module.path, node.lineno)}: {node.name}: {size} lines")
    assert not long


def test_names_of_tests_are_short() -> None:
    assert not [
        f"{place(module.path, node.lineno)}: {node.name}"
        for module in modules("tests")
        for node in module.functions
        if node.name.startswith("test_") and len(node.name) > TEST_NAME_MAX
    ]


def test_log_messages_are_sentences() -> None:
    """Their readers are operators: a message has words, not the name of an event."""
    for folder in PRODUCT:
        for path in (ROOT / folder).rglob("*.py"):
            for found in re.finditer(
                r"\blog\w*\.?(?:debug|info|warning|error|exception)?\(\s*f?\"(\w+_\w+)\"", path.read_text()
            ):
                raise AssertionError(f"{place(path, 1)}: {found[1]}")


def test_prose_uses_plain_words() -> None:
    """Also in names: comments, docstrings, help, messages and pages are searched line by line."""
    found = []
    for path in (*(module.path for module in product()), *PAGES):
        lines = enumerate(path.read_text().splitlines(), 1)
        found += [f"{place(path, number)}: {line.strip()}" for number, line in lines if WORDS.search(line)]
    assert not found, "\n".join(found)
