"""Notifications to the service manager: ready, alive, stopping (systemd's sd_notify(3)).

systemd has no HTTP probes. With WatchdogSec= it expects notifications from the process instead, and restarts a process
that sends none: a proxy whose event loop is blocked, or whose self-probe fails (proxy/admin/self_probe.py), sends
nothing. Without NOTIFY_SOCKET in the environment, which only systemd sets, this module does nothing.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping

from proxy import logs

TOLD_IN_TIME = 3
"""Keepalive notifications per watchdog interval."""

log = logs.logger("service")


class ServiceManager:
    """Notifies the service manager of one process, if NOTIFY_SOCKET is set."""

    def __init__(self, hung: Callable[[], str], environment: Mapping[str, str]) -> None:
        """`hung` returns the evidence that the program hangs; "" if it does not."""
        self._hung = hung
        self._path = environment.get("NOTIFY_SOCKET", "")
        self.interval_s = _watchdog_s(environment) / TOLD_IN_TIME if self._path else 0.0
        """How often to call `alive`; 0: never."""
        self._timer: asyncio.TimerHandle | None = None

    def ready(self) -> None:
        """Notify that the proxy is ready."""
        self._notify("READY=1")

    def start(self) -> None:
        """Notify that the proxy is ready, and start the watchdog notifications, on the running event loop."""
        self.ready()
        if self.interval_s:
            self._repeat()

    def stopping(self) -> None:
        """Notify that the proxy is stopping; the watchdog notifications continue meanwhile."""
        self._notify("STOPPING=1")

    def stop(self) -> None:
        """Stop all notifications."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def alive(self) -> None:
        """Notify that the program does not hang, if so."""
        if not self._hung():
            self._notify("WATCHDOG=1")

    def _repeat(self) -> None:
        self.alive()
        self._timer = asyncio.get_running_loop().call_later(self.interval_s, self._repeat)

    def _notify(self, state: str) -> None:
        if not self._path:
            return
        # "@" stands for the NUL of Linux's abstract sockets.
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as manager:
                manager.sendto(state.encode(), address)
        except OSError as error:
            log.warning("systemd could not be notified (sd_notify)", state=state, problem=error.strerror or str(error))


def _watchdog_s(environment: Mapping[str, str]) -> float:
    """Return the watchdog timeout of this process in seconds; 0 if it has none."""
    text, process = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
    if not text.isdigit() or (process and process != str(os.getpid())):
        return 0.0
    return int(text) / 1e6
