"""Errors of a command: one line for its user, and an exit code.

This is a separate module because `python -m proxy.cli` loads the command line under another name than an import does,
and an exception class must exist only once to be caught.
"""

from __future__ import annotations

import contextlib
import sys

WRONG_REQUEST = 2
FAILURE = 1
INTERRUPTED = 130


class Failed(Exception):
    """A command cannot continue; each line of the text is one for the user. `code` is the exit code."""

    def __init__(self, text: str, code: int = FAILURE) -> None:
        super().__init__(text)
        self.code = code


def complain(text: str) -> None:
    """Print lines for the user on standard error."""
    # Without a place to write to, the exit code is the message.
    with contextlib.suppress(OSError):
        for line in text.splitlines():
            sys.stderr.write(f"watchmux: {' '.join(line.split())}\n")


def flush_streams() -> None:
    """Flush standard output and standard error, if what they lead to still takes it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
