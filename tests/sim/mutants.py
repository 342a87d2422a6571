"""Deliberate bugs: the code under simulation with one line changed, to check that the simulator notices.

A mutant replaces one sequence of tokens in one module, so that layout and comments of the source do not matter. The
module is compiled in memory: the files do not change, and the real modules stay imported along with their mutants. All
other modules of its family are loaded again too, since they import each other.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import sys
import tokenize
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from tests.sim.parts import REAL, Parts, StoreModules

CORE = "coalesce"
STORE = "upstream.store"
WATCH_STATE = "upstream.watching.state"
CHOICE = "upstream.watching.choice"
FEED = "upstream.watching.feed"
LINEAGE = "upstream.watching.lineage"
DECIDING = "proxy.auth"
ATTEMPTS = "upstream.attempts"
_LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
FAMILIES = (CORE, STORE, WATCH_STATE, CHOICE, FEED, LINEAGE, DECIDING, ATTEMPTS)
# Modules of a family that is not a package.
_MEMBERS = {
    f"upstream.watching.{name}": WATCH_STATE for name in ("positions", "proof", "registrations", "streams", "suspects")
}


class Mutant(NamedTuple):
    """One deliberate bug: the module, the line and its replacement, and the effect on a client."""

    name: str
    module: str
    """The full name; a name without a dot is a module of the core."""

    old: str
    new: str
    two_levels: bool = False
    """Only clients behind two levels of the core notice."""

    @property
    def full_module(self) -> str:
        """The module's full name."""
        return self.module if "." in self.module else f"{CORE}.{self.module}"


class _PatchedLoader(importlib.machinery.SourceFileLoader):
    """Loads a module with one text replaced."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        """Compile the patched source; no cache is read or written."""
        source = Path(self.path).read_text()
        places = _occurrences(source, self._mutant.old)
        if len(places) != 1:
            raise LookupError(f"mutant {self._mutant.name}: its tokens occur {len(places)} times in {fullname}")
        start, end = places[0]
        return compile(source[:start] + self._mutant.new.strip() + source[end:], self.path, "exec", dont_inherit=True)


def _tokens(source: str) -> list[tuple[str, int, int]]:
    """Return the tokens of a piece of source with their offsets, without layout and comments."""
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    found: list[tuple[str, int, int]] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type not in _LAYOUT:
                start, end = (lines[row - 1] + column for row, column in (token.start, token.end))
                found.append((token.string, start, end))
    except tokenize.TokenError:
        # A piece may have unclosed brackets: all of its tokens have been read by then.
        pass
    return found


def _occurrences(source: str, piece: str) -> list[tuple[int, int]]:
    """Return where (start and end offset) the tokens of `piece` occur in `source`."""
    # Without indentation: a piece may begin inside a block and end outside.
    flat = "\n".join(line.lstrip() for line in piece.splitlines())
    whole, wanted = _tokens(source), [text for text, _, _ in _tokens(flat)]
    return [
        (whole[place][1], whole[place + len(wanted) - 1][2])
        for place in range(len(whole) - len(wanted) + 1)
        if [text for text, _, _ in whole[place : place + len(wanted)]] == wanted
    ]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the patched module; all others are found as usual."""

    def __init__(self, mutant: Mutant, file: str) -> None:
        self._mutant = mutant
        self._file = file

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the patched module's spec, or None."""
        del path, target
        if fullname != self._mutant.full_module:
            return None
        loader = _PatchedLoader(fullname, self._file, self._mutant)
        return importlib.machinery.ModuleSpec(fullname, loader, origin=self._file)


def family_of(mutant: Mutant) -> str:
    """Return the modules that are loaded again together with the mutant's."""
    return next(family for family in FAMILIES if _belongs(mutant.full_module, family))


def load(mutant: Mutant) -> Parts:
    """Return the parts with the bug in one of them. Raises LookupError unless its line occurs exactly once."""
    name, family = mutant.full_module, family_of(mutant)
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise LookupError(f"mutant {mutant.name}: there is no module {name}")
    saved = {module: sys.modules[module] for module in _loaded(family)}
    parents = {module: vars(sys.modules[module]).copy() for module in _parents(family)}
    finder = _Finder(mutant, spec.origin)
    for module in saved:
        del sys.modules[module]
    sys.meta_path.insert(0, finder)
    try:
        return _parts(family)
    finally:
        sys.meta_path.remove(finder)
        for module in _loaded(family):
            del sys.modules[module]
        sys.modules.update(saved)
        # An import sets the module's name in its package, where the real one belongs.
        for module, names in parents.items():
            vars(sys.modules[module]).update(names)


def _parts(family: str) -> Parts:
    if family == CORE:
        core = importlib.import_module(CORE)
        return replace(REAL, core=core, invariants=importlib.import_module(f"{CORE}.invariants"))
    if family == WATCH_STATE:
        return replace(REAL, watch_state=importlib.import_module(WATCH_STATE))
    if family == CHOICE:
        return replace(REAL, choice=importlib.import_module(CHOICE))
    if family == FEED:
        return replace(REAL, feed=importlib.import_module(FEED))
    if family == LINEAGE:
        return replace(REAL, lineage=importlib.import_module(LINEAGE))
    if family == DECIDING:
        return replace(REAL, queries=importlib.import_module(f"{DECIDING}.queries"))
    if family == ATTEMPTS:
        return replace(REAL, attempts=importlib.import_module(ATTEMPTS))
    modules = {each.name: importlib.import_module(f"{STORE}.{each.name}") for each in fields(StoreModules)}
    return replace(REAL, store=StoreModules(**modules))


def _belongs(module: str, family: str) -> bool:
    return module == family or module.startswith(family + ".") or _MEMBERS.get(module) == family


def _loaded(family: str) -> list[str]:
    return [module for module in sys.modules if _belongs(module, family)]


def _parents(family: str) -> list[str]:
    parts = family.split(".")[:-1]
    return [".".join(parts[: place + 1]) for place in range(len(parts))]
