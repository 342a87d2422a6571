"""The target of a program: an address, and the etcds behind it, which it may restart or stop."""

from __future__ import annotations

import signal
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass

from tests.etcd.server import EtcdServer
from tests.waiting import until


@dataclass(frozen=True)
class Target:
    """The target of a program."""

    port: int
    """The clients' port: etcd's or the proxy's."""
    calls_port: int
    """The port for unary calls: the same, or etcd's."""
    proxied: bool
    etcds: Sequence[EtcdServer]

    def restart(self, kill: bool, flags: Sequence[str] | None) -> None:
        """Stop etcd (or kill it) and start it, with other flags if some are given; return when it serves."""
        etcd = self.etcds[0]
        etcd.kill() if kill else etcd.stop()
        if flags is not None:
            etcd.extra = list(flags)
        etcd.start()

    def lose_leader(self) -> None:
        """Suspend the other members until the first one has noticed that there is no leader."""
        for etcd in self.etcds[1:]:
            _signal(etcd, signal.SIGSTOP)
        until(lambda: not has_leader(self.etcds[0]), "the leader to be lost")

    def find_leader(self) -> None:
        """Resume the other members and wait for a leader."""
        self.go_on()
        until(lambda: has_leader(self.etcds[0]), "a leader")

    def go_on(self) -> None:
        """Resume the other members."""
        for etcd in self.etcds[1:]:
            _signal(etcd, signal.SIGCONT)


def has_leader(etcd: EtcdServer) -> bool:
    """Return whether a member knows a leader."""
    try:
        return etcd.metrics()["etcd_server_has_leader"] == 1.0
    except (urllib.error.URLError, OSError):
        return False


def _signal(etcd: EtcdServer, what: signal.Signals) -> None:
    if etcd.process is not None:
        etcd.process.send_signal(what)
