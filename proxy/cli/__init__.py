"""Entry point of the `watchmux` command.

`serve` has its own start (`apart`), so that the code that reads command lines and settings does not stay in memory
while the proxy runs; click handles all other commands (`group`). This module imports neither, since each excludes the
other.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if foreign := foreign_proto():
        sys.stderr.write(f"watchmux: {foreign}\n")
        sys.exit(1)
    if given[:1] == ["serve"]:
        from proxy.cli.apart import serve

        sys.exit(serve(given))
    from proxy.cli.group import run

    sys.exit(run(given))


def foreign_proto() -> str:
    """Return an error if `import proto` finds another package than watchmux's, such as that of proto-plus; else ""."""
    from importlib.util import find_spec

    spec = find_spec("proto")
    found = Path(spec.origin).parent if spec is not None and spec.origin else None
    # Compared by its content: proto-plus installs into the same directory.
    if found is not None and (found / "scan.py").exists() and b"proto.pb" in (found / "__init__.py").read_bytes():
        return ""
    own = "python3 -m venv /opt/watchmux && /opt/watchmux/bin/pip install watchmux"
    return (
        f"the Python package `proto` ({found or 'missing'}) is that of another program, such as proto-plus; "
        f"install watchmux into an environment of its own: {own}"
    )
