"""The floors of the core: imports and calls point down, and nothing is passed up but the sets of the state.

Each module imports only modules below it, for types as well, so no circle of imports exists. A part gets the parts that
it calls in its constructor. Therefore no module calls a method that is defined only above it, and none passes on one of
its own methods to be called from below, except `History.eviction_hook`: memory is freed in the middle of a step.
"""

from __future__ import annotations

import ast
import re
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import coalesce

ROOT = Path(coalesce.__file__).parent

# From the bottom up, as the package lists them.
ORDER = [*re.findall(r"`(\w+)`", (coalesce.__doc__ or "").partition("from the bottom up")[2]), "__init__"]

# Own methods that are passed on instead of called: history.evict_oldest calls it back.
CALLBACKS = {("replay", "_release")}

# Methods of containers, which have the names of some of ours.
CONTAINERS = {name for kind in (dict, deque, bytes) for name in dir(kind)}


@cache
def tree_of(name: str) -> ast.Module:
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules of the core that a module imports, anywhere in it."""
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names = [name.name for name in node.names] if isinstance(node, ast.Import) else names
        yield from (name.partition(".")[2] for name in names if name.partition(".")[0] == "coalesce")


def methods(tree: ast.Module) -> set[str]:
    """The methods of a module's classes, without properties."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    found = [node for each in classes for node in each.body if isinstance(node, ast.FunctionDef)]
    return {node.name for node in found if not node.decorator_list}


def called(tree: ast.Module) -> list[ast.Attribute]:
    """The methods that a module calls, of any object."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [func for func in calls if isinstance(func, ast.Attribute)]


def is_own(node: ast.Attribute) -> bool:
    """Whether the attribute is one of `self`."""
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def test_every_module_has_its_floor() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in ROOT.glob("*.py"))


def test_the_core_imports_only_modules_below() -> None:
    for place, name in enumerate(ORDER):
        for other in imported(tree_of(name)):
            assert other in ORDER[:place], f"{name} imports {other}"


def test_methods_are_called_from_above_only() -> None:
    lowest: dict[str, str] = {}
    for name in reversed(ORDER):
        lowest |= dict.fromkeys(methods(tree_of(name)) - CONTAINERS, name)
    for place, name in enumerate(ORDER):
        for node in called(tree_of(name)):
            if node.attr in lowest and not is_own(node):
                owner = lowest[node.attr]
                assert ORDER.index(owner) <= place, f"{name}:{node.lineno} calls {node.attr} of {owner}, which is above"


def test_methods_are_not_passed_down() -> None:
    found = set()
    for name in ORDER:
        tree = tree_of(name)
        calls, own = set(map(id, called(tree))), methods(tree)
        used = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and id(node) not in calls]
        found |= {(name, node.attr) for node in used if is_own(node) and node.attr in own}
    assert found == CALLBACKS


def test_parts_are_set_in_constructors_only() -> None:
    """A part has the attributes that its constructor sets; no other object sets one that begins with an underscore."""
    for name in ORDER:
        for node in ast.walk(tree_of(name)):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and not is_own(node):
                assert not node.attr.startswith("_"), f"{name}:{node.lineno} sets {node.attr} of another object"
