"""The program's version, and the commit that it was built from."""

from __future__ import annotations

import os
import socket
import sys


def program_version() -> str:
    """Return the version of the installed package; "" if it is not installed."""
    # Not by importlib.metadata, which takes 0.7 MiB of a serving process: the directory that an installer makes is
    # called NAME-VERSION.dist-info, and a normalized version has no hyphen (PyPA's binary distribution format).
    for place in sys.path:
        for name in os.listdir(place or ".") if os.path.isdir(place or ".") else ():
            if name.startswith("watchmux-") and name.endswith(".dist-info"):
                return name.removesuffix(".dist-info").partition("-")[2]
    return ""


def process_identity() -> dict[str, str]:
    """Return what the first line of the log says of the process: its version and its host."""
    return {"version": program_version(), "host": socket.gethostname()}


def program_commit() -> str:
    """Return the commit: written into the package when it was built (setup.py), or that of the checkout; "" if unknown.

    Runs git in a checkout, so it is not for a serving process.
    """
    from pathlib import Path

    here = Path(__file__).parent
    try:
        return (here / "commit.txt").read_text().strip()
    except OSError:
        pass
    if not (here.parent / ".git").exists():
        return ""
    import subprocess

    command = ["git", "-C", str(here.parent), "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
