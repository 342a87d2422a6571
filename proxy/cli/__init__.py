"""Entry point of the `watchmux` command.

`serve` has its own start (`apart`), so that the code that reads command lines and settings does not stay in memory
while the proxy runs; click handles all other commands (`group`). This module imports neither, since each excludes the
other.
"""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    if given[:1] == ["serve"]:
        from proxy.cli.apart import serve

        sys.exit(serve(given))
    from proxy.cli.group import run

    sys.exit(run(given))
