"""Real client libraries, each in a separate environment below `.clients/`, and the tour program of each.

The libraries need dependencies of different ages, so none shares the tests' environment. They come from PyPI and npm
through the ordinary clients; Node.js, where the machine has none, comes from the machine's own Debian.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2] / ".clients"
PROGRAMS = Path(__file__).resolve().parent / "programs"


class ClientMissing(RuntimeError):
    """A client library is not available; the text names it and the remedy."""


@dataclass(frozen=True)
class Library:
    """One client library: the packages to install, and the program that uses it."""

    name: str
    packages: tuple[str, ...]
    program: str
    speaks_tls: bool = True
    needs_gateway: bool = False
    """It speaks JSON over HTTP/1, to etcd's gateway."""

    @property
    def is_node(self) -> bool:
        """Whether it runs on Node.js; else on Python."""
        return self.program.endswith(".mjs")

    @property
    def home(self) -> Path:
        """Where it is installed."""
        return ROOT / self.name

    def install(self) -> None:
        """Install it, unless present. Raises ClientMissing."""
        if (self.home / "complete").exists():
            return
        ROOT.mkdir(exist_ok=True)
        shutil.rmtree(self.home, ignore_errors=True)
        if self.is_node:
            _node_modules(self.home, self.packages)
        else:
            _run([sys.executable, "-m", "venv", str(self.home)])
            pip = [str(self.home / "bin/pip"), "install", "--quiet", "--disable-pip-version-check"]
            _run([*pip, *self.packages])
        (self.home / "complete").touch()

    def command(self, host: str, port: int, tls: Sequence[str] = (), program: str | None = None) -> list[str]:
        """The command line of its tour, or of another program; `tls`: paths of authority, client certificate, key."""
        name = program or self.program
        if self.is_node:
            # Node looks for packages next to the program.
            copied = self.home / name
            shutil.copy(PROGRAMS / name, copied)
            return ["node", str(copied), host, str(port), *tls]
        return [str(self.home / "bin/python"), str(PROGRAMS / name), host, str(port), *tls]


LIBRARIES = (
    Library("python-etcd3", ("etcd3==0.12.0", "protobuf<4"), "python_etcd3.py"),
    Library("python-aetcd", ("aetcd==1.0.0",), "python_aetcd.py", speaks_tls=False),
    Library("python-etcd3gw", ("etcd3gw",), "python_etcd3gw.py", needs_gateway=True),
    Library(
        "python-patroni",
        ("patroni[etcd3]==4.0.11", "psycopg==3.3.*", "psycopg-binary==3.3.*"),
        "python_patroni.py",
        needs_gateway=True,
    ),
    Library("node-etcd3", ("etcd3@1.1.2",), "node_etcd3.mjs"),
)


def _run(command: list[str], cwd: Path | None = None) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise ClientMissing(f"{' '.join(command)} failed: {(done.stderr or done.stdout).strip()[-800:]}")


def _node_modules(home: Path, packages: tuple[str, ...]) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        if shutil.which("apt-get") is None or os.geteuid() != 0:
            raise ClientMissing("the Node.js client needs node and npm; on Debian, as root: apt-get install nodejs npm")
        _run(["apt-get", "update", "-q"])
        _run(["apt-get", "install", "-y", "-q", "--no-install-recommends", "nodejs", "npm"])
    home.mkdir()
    (home / "package.json").write_text('{"private": true}\n')
    with tempfile.TemporaryDirectory() as cache:
        _run(["npm", "install", "--no-audit", "--no-fund", f"--cache={cache}", *packages], home)


if __name__ == "__main__":
    try:
        for library in LIBRARIES:
            library.install()
            sys.stdout.write(f"{library.name}: {library.home}\n")
    except ClientMissing as error:
        sys.exit(f"error: {error}")
