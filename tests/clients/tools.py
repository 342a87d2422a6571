"""Third-party HTTP/2 tools: curl, nghttp and h2load, from the machine's own Debian where they are missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = {"curl": "curl", "nghttp": "nghttp2-client", "h2load": "nghttp2-client"}


def tool(name: str) -> str:
    """Return the path of a tool; install it if missing, or skip the test if that fails."""
    if shutil.which(name) is None:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            pytest.skip(f"needs {name}; on Debian, as root: apt-get install {PACKAGES[name]}")
        for arguments in (["update", "-q"], ["install", "-y", "-q", "--no-install-recommends", PACKAGES[name]]):
            subprocess.run(["apt-get", *arguments], check=True, capture_output=True)
    found = shutil.which(name)
    assert found is not None
    return found


def use(name: str, *arguments: str | Path) -> str:
    """Run a tool and return its output; it must succeed."""
    environment = {key: value for key, value in os.environ.items() if not key.endswith(("_CA_BUNDLE", "_proxy"))}
    command = [tool(name), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=100, env=environment)
    assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr
