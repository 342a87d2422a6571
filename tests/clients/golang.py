"""clientv3, etcd's own Go client, in a test program (`go/`) built with Debian's Go and Debian's clientv3.

Nothing is installed: compiler and sources are unpacked below `.clients/go/`, from the suite of the newest etcd, and the
build reads nothing else. Of the dependencies of golang-etcd-server-dev, only those that clientv3 imports are fetched
(60 MB instead of 310).
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests import debian
from tests.clients.libraries import ROOT as CLIENTS
from tests.clients.libraries import ClientMissing

SOURCES: Final = Path(__file__).resolve().parent / "go"
ROOT: Final = CLIENTS / "go"
PROGRAM: Final = ROOT / "clientv3"

_COMPILER: Final = "golang-go"
_LIBRARIES: Final = (
    "golang-etcd-server-dev",
    "golang-github-coreos-go-semver-dev",
    "golang-github-coreos-go-systemd-dev",
    "golang-github-gogo-protobuf-dev",
    "golang-github-golang-protobuf-1-5-dev",
    "golang-github-grpc-ecosystem-grpc-gateway-dev",
    "golang-go.uber-multierr-dev",
    "golang-go.uber-zap-dev",
    "golang-golang-x-net-dev",
    "golang-golang-x-sys-dev",
    "golang-golang-x-text-dev",
    "golang-google-genproto-dev",
    "golang-google-grpc-dev",
    "golang-google-protobuf-dev",
)


def _fetch() -> None:
    """Unpack compiler and libraries, unless present. Raises ClientMissing."""
    unpacked = ROOT / "debian"
    if (ROOT / "complete").exists():
        return
    shutil.rmtree(unpacked, ignore_errors=True)
    try:
        with debian.suite(debian.UNSTABLE) as view:
            # golang-go names the release: golang-1.27-go, and so on.
            compiler = next(name for name in view.depends(_COMPILER) if name.endswith("-go"))
            view.unpack([compiler, compiler.removesuffix("-go") + "-src", *_LIBRARIES], unpacked)
    except (debian.DebianMissing, StopIteration, subprocess.SubprocessError, OSError) as error:
        raise ClientMissing(f"clientv3 cannot be built without Debian's Go: {error}") from None
    (ROOT / "complete").touch()


def _compile() -> None:
    unpacked = ROOT / "debian"
    home = next((unpacked / "usr/lib").glob("go-*"))
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(ROOT),
        "GOROOT": str(home),
        "GOPATH": str(unpacked / "usr/share/gocode"),
        "GOCACHE": str(ROOT / "cache"),
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }
    command = [str(home / "bin/go"), "build", "-o", str(PROGRAM), "."]
    done = subprocess.run(command, cwd=SOURCES, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ClientMissing(f"clientv3 cannot be built: {(done.stderr or done.stdout).strip()[-1000:]}")


@functools.cache
def program() -> Path:
    """Return the path of the program, built from the current sources. Raises ClientMissing with the reason."""
    with debian.alone(ROOT):
        newest = max(source.stat().st_mtime for source in SOURCES.glob("*.go"))
        if not PROGRAM.exists() or PROGRAM.stat().st_mtime < newest:
            _fetch()
            _compile()
    return PROGRAM


if __name__ == "__main__":
    try:
        sys.stdout.write(f"clientv3: {program()}\n")
    except ClientMissing as error:
        sys.exit(f"error: {error}")
