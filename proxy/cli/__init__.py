"""Entry point of the `watchmux` command.

`serve` has its own start (`apart`), so that the code that reads command lines and settings does not stay in memory
while the proxy runs; click handles all other commands (`group`). This module imports neither, since each excludes the
other.

A module for each command: `serve`, `store`, `demo`, `measure`, `status`, `config`. `knobs` makes options of the
settings; `load`, `access` and `strict` are shared by commands.
"""

from __future__ import annotations

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    _open_standard_streams()
    if foreign := foreign_proto():
        sys.stderr.write(f"watchmux: {foreign}\n")
        sys.exit(1)
    if given[:1] == ["serve"]:
        from proxy.cli.apart import serve

        sys.exit(serve(given))
    from proxy.cli.group import run

    sys.exit(run(given))


def _open_standard_streams() -> None:
    """Open the standard streams that the caller has closed: a socket would otherwise get their numbers, and the log."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # The lowest number that is free.
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))


def foreign_proto() -> str:
    """Return an error if `import proto` finds another package than watchmux's, such as that of proto-plus; else ""."""
    from importlib.util import find_spec

    spec = find_spec("proto")
    found = os.path.dirname(spec.origin) if spec is not None and spec.origin else ""
    if os.path.exists(f"{found}/scan.py"):
        # Compared by its content: proto-plus installs into the same directory.
        with open(f"{found}/__init__.py", "rb") as file:
            if b'OWNER = "watchmux"' in file.read():
                return ""
    own = "python3 -m venv /opt/watchmux && /opt/watchmux/bin/pip install watchmux"
    return (
        f"the Python package `proto` ({found or 'missing'}) is that of another program, such as proto-plus; "
        f"install watchmux into an environment of its own: {own}"
    )
