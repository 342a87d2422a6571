"""Deliberate bugs: the core with one line changed, to see that the simulator notices.

A mutant is a text replacement in one module of `coalesce`, compiled in memory: the files stay as they are, and the real
core stays imported beside its mutants.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

import coalesce as real_core

_FOLDER = Path(real_core.__file__ or "").parent


class Mutant(NamedTuple):
    """One deliberate bug: in which module which line becomes what, and what a client would suffer from it."""

    name: str
    module: str
    old: str
    new: str


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

    def __init__(self, mutant: Mutant) -> None:
        self._mutant = mutant

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return the patched module's spec, or None."""
        del path, target
        if fullname != f"coalesce.{self._mutant.module}":
            return None
        file = str(_FOLDER / f"{self._mutant.module}.py")
        loader = _PatchedLoader(fullname, file, self._mutant)
        return importlib.machinery.ModuleSpec(fullname, loader, origin=file)


def load(mutant: Mutant) -> ModuleType:
    """Return a copy of the core with the bug in it. Raises LookupError when its line is not there exactly once."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "coalesce"}
    for name in saved:
        del sys.modules[name]
    finder = _Finder(mutant)
    sys.meta_path.insert(0, finder)
    try:
        return importlib.import_module("coalesce")
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] == "coalesce"]:
            del sys.modules[name]
        sys.modules.update(saved)
