"""How a command tells its user that it cannot go on: one line, and an exit code.

A module of its own, because `python -m proxy.cli` loads the command line under another name than an import would, and
an exception class must exist once to be caught.
"""

from __future__ import annotations

import sys

WRONG_REQUEST = 2
FAILURE = 1
INTERRUPTED = 130


class Failed(Exception):
    """A command that cannot go on; the text is one line for the user. `code` is the exit code."""

    def __init__(self, text: str, code: int = FAILURE) -> None:
        super().__init__(text)
        self.code = code


def complain(text: str) -> None:
    """Tell the user, in one line on standard error."""
    sys.stderr.write(f"watchmux: {' '.join(text.split())}\n")
