"""Writes requirements.lock: `make lock`.

The versions are those that pip resolves now for the dependencies in pyproject.toml, and their own dependencies.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
HEAD = """\
# The exact versions of what watchmux runs with, for production: pip install -r requirements.lock
# Written by `make lock`.
"""


def resolved() -> list[str]:
    """Return NAME==VERSION of each dependency, as pip would install them into an empty environment."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report=-", "."]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    packages = [package["metadata"] for package in report["install"]]
    return sorted(f"{one['name'].lower()}=={one['version']}" for one in packages if one["name"] != "watchmux")


if __name__ == "__main__":
    LOCK.write_text(HEAD + "".join(f"{line}\n" for line in resolved()))
