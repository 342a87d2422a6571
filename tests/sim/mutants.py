"""Deliberate bugs: the code under simulation with one line changed, to see that the simulator notices.

A mutant is a text replacement in one module, compiled in memory: the files stay as they are, and the real modules stay
imported beside their mutants. With the module come all others of its family, since they know each other by import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
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
LINEAGE = "upstream.watching.lineage"
DECIDING = "proxy.deciding"
_FAMILIES = (CORE, STORE, WATCH_STATE, CHOICE, LINEAGE, DECIDING)


class Mutant(NamedTuple):
    """One deliberate bug: in which module which line becomes what, and what a client would suffer from it."""

    name: str
    module: str
    """In full; a name without a dot is a module of the core."""

    old: str
    new: str

    @property
    def full_module(self) -> str:
        """The module's name in full."""
        return self.module if "." in self.module else f"{CORE}.{self.module}"


class _PatchedLoader(importlib.machinery.SourceFileLoader):
    """Loads a module with one text replaced."""

    def __init__(self, fullname: str, path: str, mutant: Mutant) -> None:
        super().__init__(fullname, path)
        self._mutant = mutant

    def get_code(self, fullname: str) -> CodeType:
        """Compile the patched source; no cache is read or written."""
        source = Path(self.path).read_text()
        found = source.count(self._mutant.old)
        if found != 1:
            raise LookupError(f"mutant {self._mutant.name}: its line occurs {found} times in {fullname}")
        return compile(source.replace(self._mutant.old, self._mutant.new), self.path, "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the one module that is patched; the others are found as always."""

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


def load(mutant: Mutant) -> Parts:
    """Return the parts with the bug in one of them. Raises LookupError when its line is not there exactly once."""
    name = mutant.full_module
    family = next(family for family in _FAMILIES if _belongs(name, family))
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
        # An import sets the module's name in its package: there the real one belongs.
        for module, names in parents.items():
            vars(sys.modules[module]).update(names)


def _parts(family: str) -> Parts:
    if family == CORE:
        return replace(REAL, core=importlib.import_module(CORE))
    if family == WATCH_STATE:
        return replace(REAL, watch_state=importlib.import_module(WATCH_STATE))
    if family == CHOICE:
        return replace(REAL, choice=importlib.import_module(CHOICE))
    if family == LINEAGE:
        return replace(REAL, lineage=importlib.import_module(LINEAGE))
    if family == DECIDING:
        return replace(REAL, questions=importlib.import_module(f"{DECIDING}.questions"))
    modules = {each.name: importlib.import_module(f"{STORE}.{each.name}") for each in fields(StoreModules)}
    return replace(REAL, store=StoreModules(**modules))


def _belongs(module: str, family: str) -> bool:
    return module == family or module.startswith(family + ".")


def _loaded(family: str) -> list[str]:
    return [module for module in sys.modules if _belongs(module, family)]


def _parents(family: str) -> list[str]:
    parts = family.split(".")[:-1]
    return [".".join(parts[: place + 1]) for place in range(len(parts))]
