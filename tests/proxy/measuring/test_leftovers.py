"""A load leaves no keys in a real etcd, however it ends; what it cannot remove is reported."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.etcd.server import EtcdServer
from tests.waiting import until

SMALL = ("--watches=20", "--ranges=4", "--streams=4", "--seconds=60")
COMMANDS = {"measure": "--upstream", "demo": "--endpoints"}


def keys(etcd: EtcdServer) -> list[str]:
    return etcd.ctl("get", "/watchmux-load/", "--prefix", "--keys-only").stdout.split()


@contextmanager
def under_load(etcd: EtcdServer, command: str) -> Iterator[subprocess.Popen[str]]:
    """Run a load on etcd; it has written keys when the block begins."""
    arguments = [command, *SMALL, f"{COMMANDS[command]}={etcd.endpoint}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "proxy.cli", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        until(lambda: etcd.metrics()["etcd_debugging_mvcc_keys_total"] > 3, "keys of the load", 60)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ("measure", signal.SIGINT),
        ("measure", signal.SIGTERM),
        ("demo", signal.SIGHUP),
        # The commands handle signals in one place.
        pytest.param("measure", signal.SIGHUP, marks=pytest.mark.long),
        pytest.param("demo", signal.SIGINT, marks=pytest.mark.long),
        pytest.param("demo", signal.SIGTERM, marks=pytest.mark.long),
    ],
)
def test_a_signal_leaves_no_keys(etcd: EtcdServer, command: str, number: signal.Signals) -> None:
    with under_load(etcd, command) as process:
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert errors.splitlines()[-1].startswith("watchmux: " + ("interrupted" if number == signal.SIGINT else "ended by"))
    assert keys(etcd) == []
    # It deleted nothing but what it wrote, and its lease is gone.
    assert etcd.ctl("lease", "list").stdout.split() == ["found", "0", "leases"]


def test_keys_of_a_killed_load_belong_to_a_lease(etcd: EtcdServer) -> None:
    with under_load(etcd, "measure") as process:
        process.kill()
        process.wait(20)
    lease = etcd.ctl("lease", "list").stdout.split()[-1]
    left = keys(etcd)
    etcd.ctl("lease", "revoke", lease)
    assert left
    assert keys(etcd) == []


def test_keys_that_cannot_be_removed_are_reported(etcd: EtcdServer) -> None:
    with under_load(etcd, "measure") as process:
        assert etcd.process is not None
        os.kill(etcd.process.pid, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            os.kill(etcd.process.pid, signal.SIGCONT)
    assert "watchmux: the keys below /watchmux-load/" in errors
    assert f"at {etcd.endpoint} could not be removed" in errors
    assert "etcd removes them itself within 120 s" in errors
