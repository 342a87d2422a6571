"""The README's commands work in their order, with free ports and short loads.

The commands run in the directory they are written for, the checkout. Unlike in a fresh clone, `make demo` finds the
environment already made; `test_make_demo_works_on_a_fresh_clone` uses a real clone.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.etcd.server import HOST, EtcdServer, free_port
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
LINES_MAX = 150
ENDLESS = ("watchmux serve", "etcdctl")
SMALL = ("--watches=200", "--streams=40", "--seconds=0.5")
"""Shortens the loads of demo and measure; `test_make_demo_works_on_a_fresh_clone` runs the demo unchanged."""


def commands() -> list[str]:
    """Return the commands of the README's shell blocks, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """Run a command that does not end by itself."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=30)


def accepts(address: str) -> bool:
    """Return whether the address accepts connections."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_short_enough_to_read() -> None:
    assert len(README.read_text().splitlines()) <= LINES_MAX


def test_the_commands_of_the_readme_work(etcd: EtcdServer) -> None:
    """`serve` keeps running for the commands after it; etcdctl sees through it what is put into etcd."""
    listen, metrics = (f"{HOST}:{free_port()}" for _ in range(2))
    ports = {"127.0.0.1:23790": listen, "127.0.0.1:2379": etcd.endpoint, "127.0.0.1:9379": metrics}
    # The README's .venv/bin is the environment of these tests.
    environment = {**os.environ, "PATH": f"{etcd.binary.etcdctl.parent}:{os.environ['PATH']}", "ETCDCTL_API": "3"}
    done = []
    with contextlib.ExitStack() as background:
        for line in commands():
            command = [re.sub("|".join(ports), lambda found: ports[found[0]], word) for word in line.split()]
            if command[0].startswith(".venv/bin/"):
                command[:1] = [sys.executable, "-m", "proxy.cli"]
            if line.startswith("make "):
                command = [sys.executable, "-m", "proxy.cli", "demo", *SMALL]
            elif "measure" in command:
                command += SMALL
            done.append(line)
            if not any(word in line for word in ENDLESS):
                finished = subprocess.run(
                    command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False
                )
                assert finished.returncode == 0, f"{line}\n{finished.stdout}\n{finished.stderr}"
                continue
            process = background.enter_context(running(command, environment))
            if "serve" in command:
                until(lambda: accepts(listen), f"{line}: to listen")
            else:
                until(lambda: etcd.watchers() == 1, f"{line}: to be registered")
                etcd.ctl("put", "/app/x", "seen")
                assert process.stdout is not None
                assert [process.stdout.readline().strip() for _ in range(3)] == ["PUT", "/app/x", "seen"]
    assert len(done) == 5, done


@pytest.mark.long
@pytest.mark.timeout(600)
def test_make_demo_works_on_a_fresh_clone(tmp_path: Path) -> None:
    """`make demo` is the first command on a fresh clone."""
    clone = tmp_path / "watchmux"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    environment = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
    made = subprocess.run(["make", "demo"], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    shutil.rmtree(clone)
    assert made.returncode == 0, made.stdout + made.stderr
    assert "reduction" in made.stdout
