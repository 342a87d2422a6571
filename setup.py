"""Writes the commit into the package that is built, for `watchmux --version`; all else is in pyproject.toml."""

from __future__ import annotations

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithCommit(build_py):
    """Adds `proxy/commit.txt`; without git, or outside a checkout, there is none."""

    def run(self) -> None:
        """Build, then write the file."""
        super().run()
        if self.editable_mode:
            return
        command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return
        target = Path(self.build_lib) / "proxy/commit.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"{found}\n")


setup(cmdclass={"build_py": BuildWithCommit})
