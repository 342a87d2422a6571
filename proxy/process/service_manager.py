"""What the service manager is told: that the proxy serves, that it is alive, that it leaves (systemd's sd_notify(3)).

systemd asks nobody over HTTP. With WatchdogSec= it waits to hear from the process instead, and restarts one that is
silent: a proxy whose event loop does not turn, or whose watch through itself is not answered
(proxy/admin/self_probe.py), sends nothing. Without NOTIFY_SOCKET in the environment, as everywhere but below systemd,
nothing here does anything.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from proxy import logs

if TYPE_CHECKING:
    from proxy.admin.health import Health

TOLD_IN_TIME = 3
"""Signs of life within the time after which systemd gives up."""

log = logs.logger("service")


class ServiceManager:
    """Tells the service manager of one process, if there is one that wants to hear."""

    def __init__(self, health: Health, environment: Mapping[str, str]) -> None:
        self._health = health
        self._path = environment.get("NOTIFY_SOCKET", "")
        self._interval_s = _watchdog_s(environment) / TOLD_IN_TIME
        self._timer: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """Tell that clients are served, and from now on that the proxy is alive."""
        self._tell("READY=1")
        if self._path and self._interval_s:
            self._alive()

    def stopping(self) -> None:
        """Tell that the proxy is leaving; it is alive for as long as that takes."""
        self._tell("STOPPING=1")

    def stop(self) -> None:
        """Tell nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _alive(self) -> None:
        if not self._health.hung:
            self._tell("WATCHDOG=1")
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._alive)

    def _tell(self, state: str) -> None:
        if not self._path:
            return
        # "@" stands for the NUL of Linux's abstract sockets.
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as told:
                told.sendto(state.encode(), address)
        except OSError as error:
            log.warning("the service manager cannot be told", state=state, problem=error.strerror or str(error))


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """Return the time after which the service manager gives this process up, in seconds; 0 if it never does."""
    text, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdigit() or (process and process != str(os.getpid())):
        return 0.0
    return int(text) / 1e6
