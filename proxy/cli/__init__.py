"""The `watchmux` command: where it begins.

`serve` goes a way of its own (`apart`), so that what reads command lines and settings is not in memory as long as it
serves; every other command is click's (`group`). This module imports neither, since each excludes the other.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; ends the process with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["serve"]:
        from proxy.cli.apart import serve

        sys.exit(serve(given))
    from proxy.cli.group import run

    sys.exit(run(given))
