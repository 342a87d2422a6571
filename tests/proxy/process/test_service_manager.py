"""Notifications to systemd, on a socket of the test; a hung proxy sends none."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from proxy.admin.health import Health
from proxy.process.service_manager import ServiceManager
from tests.etcd.server import EtcdServer
from tests.proxy.cli.test_cli_serve import served
from tests.waiting import until, until_async


class Manager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: str) -> None:
        self.heard: list[str] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind(path)

    def hear(self) -> list[str]:
        """Receive pending notifications, and return all so far."""
        while True:
            try:
                self.heard.append(self._socket.recv(100).decode())
            except BlockingIOError:
                return self.heard

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize("abstract", [False, True])
def test_a_hung_proxy_sends_no_watchdog_notification(abstract: bool, tmp_path: Path) -> None:
    path = f"@watchmux-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    manager = Manager("\0" + path[1:] if abstract else path)

    async def story() -> None:
        health = Health()
        told = ServiceManager(lambda: health.hung, {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "30000"})
        told.start()
        await until_async(lambda: manager.hear().count("WATCHDOG=1") > 3, "watchdog notifications")
        assert manager.heard[0] == "READY=1"
        health.set_hung("it hangs")
        timers = [told._timer]
        before = len(manager.hear())

        def rang() -> bool:
            timers.append(told._timer)
            return len(set(map(id, timers))) > 5

        # The timer continues, but sends nothing.
        await until_async(rang, "the timer to ring")
        assert len(manager.hear()) == before
        health.set_hung("")
        await until_async(lambda: len(manager.hear()) > before, "watchdog notifications again")
        told.stop()

    asyncio.run(story())
    manager.close()


@pytest.mark.parametrize(
    "environment", [{}, {"WATCHDOG_USEC": "30000"}, {"NOTIFY_SOCKET": "/none/there", "WATCHDOG_PID": "1"}]
)
async def test_without_a_manager_nothing_happens(environment: dict[str, str]) -> None:
    told = ServiceManager(str, environment)
    told.start()
    told.stopping()
    assert told._timer is None


@pytest.mark.parametrize("workers", [1, 2])
def test_a_served_proxy_is_ready_alive_and_stopping(
    workers: int, tmp_path: Path, etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "notify")
    manager = Manager(path)
    monkeypatch.setenv("NOTIFY_SOCKET", path)
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with served(tmp_path, f"--endpoints={etcd.endpoint}", f"--workers={workers}") as proxy:
        until(lambda: "WATCHDOG=1" in manager.hear(), "a watchdog notification")
        assert proxy.end() == 0
    assert manager.hear()[0] == "READY=1"
    assert "STOPPING=1" in manager.heard
    manager.close()
