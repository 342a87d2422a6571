"""The import rules of ARCHITECTURE.md: imports point down, and the core is pure.

proxy -> upstream -> proto, proxy -> coalesce -> proto. Upstream and core do not import each other; the engine joins
them, the only module that drives a Coalescer. The core does no I/O, reads no clock, draws no random number, starts no
task and logs nothing, because it imports no module that could.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("proto", "coalesce", "upstream", "proxy")

# The packages that each package may import.
BELOW = {
    "proto": {"proto"},
    "coalesce": {"coalesce", "proto"},
    "upstream": {"upstream", "proto"},
    "proxy": {"proxy", "upstream", "coalesce", "proto"},
}

# The modules of the standard library that the core may import: containers, algorithms and types.
CORE_STDLIB = {
    "__future__",
    "array",
    "bisect",
    "collections",
    "collections.abc",
    "dataclasses",
    "enum",
    "functools",
    "heapq",
    "itertools",
    "operator",
    "struct",
    "typing",
    "zlib",
}

# The wire formats in the core: watch messages as bytes, their prefix in gRPC, what etcd's errors mean, ranges of keys.
CORE_PROTO = {
    "proto",
    "proto.etcd_errors",
    "proto.event_key",
    "proto.framing",
    "proto.scan",
    "proto.shared_response",
    "proto.spans",
}

# Builtins that do I/O or run code without any import.
IMPURE_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open", "print"}

# Decisions of the engine and the watch client, outside the core.
DECIDING = (
    *(f"proxy/auth/{name}.py" for name in ("model", "queries", "permission_checks", "admitted", "restore")),
    "proxy/passthrough/waiting.py",
    "upstream/watching/state.py",
    "upstream/watching/choice.py",
    "upstream/watching/lineage.py",
    "upstream/watching/stream.py",
    "upstream/watching/streams.py",
    "upstream/watching/proof.py",
    "upstream/watching/suspects.py",
    "upstream/watching/feed.py",
    "upstream/watching/effects.py",
)
IMPURE_MODULES = {"asyncio", "random", "time", "datetime", "socket", "ssl", "os", "logging", "structlog", "threading"}

# The engine drives the core. The server only constructs it.
DRIVER, MAKER = "proxy/watch/engine.py", "proxy/server.py"


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def modules(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*.py") if not path.stem.endswith(("_pb2", "_pb2_grpc")))


def imports(path: Path) -> Iterator[str]:
    """All module names that a file imports, anywhere in it, also for types only."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            assert node.module is not None
            yield node.module


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_down(package: str) -> None:
    assert modules(package)
    for path in modules(package):
        for name in imports(path):
            top = name.partition(".")[0]
            assert top not in PACKAGES or top in BELOW[package], f"{named(path)} imports {name}"
            assert top != "tests", f"{named(path)} imports {name}"


def test_the_core_imports_only_allowed_modules() -> None:
    for path in modules("coalesce"):
        for name in imports(path):
            ours = name == "coalesce" or name.startswith("coalesce.") or name in CORE_PROTO
            assert ours or name in CORE_STDLIB, f"{named(path)} imports {name}"


def test_the_core_has_no_tasks_and_no_impure_builtins() -> None:
    for path in modules("coalesce"):
        for node in ast.walk(tree_of(path)):
            impure = isinstance(node, ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith | ast.Await)
            impure = impure or (isinstance(node, ast.Name) and node.id in IMPURE_BUILTINS)
            assert not impure, f"{named(path)}:{getattr(node, 'lineno', 0)}: {ast.dump(node)[:80]}"


@pytest.mark.parametrize("path", DECIDING)
def test_decision_modules_outside_the_core_are_pure(path: str) -> None:
    """No I/O, clock, randomness, task or log line: the simulator drives it as the program does."""
    files = sorted((ROOT / path).glob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    assert files
    for file in files:
        for name in imports(file):
            assert name.partition(".")[0] not in IMPURE_MODULES, f"{named(file)} imports {name}"
            assert name not in ("proxy.logs", "proxy.auth.reads", "upstream.pool", "upstream.connection"), named(file)
        for node in ast.walk(tree_of(file)):
            impure = isinstance(node, ast.AsyncFunctionDef | ast.Await)
            assert not impure, f"{named(file)}:{getattr(node, 'lineno', 0)}"


def test_importing_the_core_loads_no_grpc_and_no_asyncio() -> None:
    script = (
        "import sys; before = set(sys.modules);"
        "import coalesce.core, coalesce.guarantees.checkers;"
        "print(*sorted(set(sys.modules) - before))"
    )
    result = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    loaded = result.stdout.split()
    assert "coalesce.core" in loaded
    for name in ("grpc", "asyncio", "google", "socket", "ssl", "logging", "random", "selectors", "uvloop", "hpack"):
        assert not [each for each in loaded if each == name or each.startswith(f"{name}.")], name


def users_of_the_core() -> dict[str, set[str]]:
    """Return, for each file of the proxy, the names that it imports from the core's driving side."""
    users: dict[str, set[str]] = {}
    for path in modules("proxy"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.ImportFrom) and node.module in ("coalesce", "coalesce.core"):
                taken = {name.name for name in node.names}
                if node.module == "coalesce.core" or "Coalescer" in taken or "core" in taken:
                    users.setdefault(named(path), set()).update(taken)
            if isinstance(node, ast.Import) and any(name.name == "coalesce.core" for name in node.names):
                users.setdefault(named(path), set()).add("coalesce.core")
    return users


def test_only_the_engine_drives_the_core() -> None:
    users = users_of_the_core()
    assert DRIVER in users
    assert set(users) <= {DRIVER, MAKER}
    if MAKER in users:
        assert users[MAKER] == {"Coalescer"}
        tree = tree_of(ROOT / MAKER)
        calls = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        uses = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "Coalescer"]
        assert len(uses) == 1
        assert id(uses[0]) in calls


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_have_docstrings(package: str) -> None:
    for path in modules(package):
        tree = tree_of(path)
        assert ast.get_docstring(tree) or not tree.body, f"{named(path)} has no docstring"
