"""Packages of any Debian suite, unpacked without being installed.

The suite is read through a private apt configuration, made from the machine's own source list, so that neither the
machine's packages nor its lists change.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

UNSTABLE = "sid"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


class DebianMissing(RuntimeError):
    """A package could not be fetched; the text names the reason."""


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Create a folder if needed, and hold a lock on it that excludes the other workers of a test run."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def archive() -> tuple[str, str]:
    """Return (repository, release) of the machine's main Debian archive, from apt's own configuration."""
    if shutil.which("apt-get") is None:
        raise DebianMissing("this machine has no apt-get")
    lines = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(CREATED_BY)|$(REPO_URI)|$(RELEASE)|$(COMPONENT)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    for line in lines:
        kind, repository, release, component = line.split("|")
        if (
            (kind, component) == ("Packages", "main")
            and repository.rstrip("/").endswith("/debian")
            and "-" not in release
        ):
            return repository, release
    raise DebianMissing("apt's source list names no Debian archive (component main)")


class Suite:
    """A private apt view of one suite; `suite` makes it."""

    def __init__(self, name: str, scratch: Path) -> None:
        self.name = name
        self._downloads = scratch / "download"
        for part in ("lists/partial", "cache/archives/partial", "download"):
            (scratch / part).mkdir(parents=True)
        repository, _ = archive()
        trust = f"[signed-by={KEYRING}] " if KEYRING.exists() else ""
        (scratch / "sources.list").write_text(f"deb {trust}{repository} {name} main\n")
        self._options = [
            f"-oDir::Etc::sourcelist={scratch}/sources.list",
            "-oDir::Etc::sourceparts=/dev/null",
            f"-oDir::State::lists={scratch}/lists",
            f"-oDir::Cache={scratch}/cache",
            "-oAPT::Sandbox::User=root",
            "-oAcquire::Languages=none",
            "-oAcquire::Retries=3",
        ]
        self._run("apt-get", "update")

    def _run(self, program: str, *command: str) -> str:
        line = [program, *self._options, *command]
        done = subprocess.run(line, cwd=self._downloads, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip()[-500:]
            raise DebianMissing(f"{program} {' '.join(command)} for Debian {self.name} failed: {reason}")
        return done.stdout

    def depends(self, package: str) -> list[str]:
        """Return the packages that `package` depends on directly."""
        lines = self._run("apt-cache", "depends", package).splitlines()
        return [line.split()[1] for line in lines if line.strip().startswith("Depends:")]

    def unpack(self, packages: Sequence[str], target: Path) -> None:
        """Download `packages`, without what they depend on, and unpack them into the directory `target`."""
        self._run("apt-get", "download", *packages)
        for package in sorted(self._downloads.glob("*.deb")):
            subprocess.run(["dpkg-deb", "-x", package, target], check=True)
            package.unlink()


@contextlib.contextmanager
def suite(name: str) -> Iterator[Suite]:
    """Yield a view of the suite `name`. Raises DebianMissing, as do its methods."""
    with tempfile.TemporaryDirectory(prefix="watchmux-apt-") as scratch:
        Path(scratch).chmod(0o755)
        yield Suite(name, Path(scratch))
