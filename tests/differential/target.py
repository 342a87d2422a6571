"""What a program is played against: an address, and the etcds behind it, which it may restart or stop."""

from __future__ import annotations

import signal
import urllib.error
from collections.abc import Sequence
from dataclasses import dataclass

from tests.etcd.server import EtcdServer
from tests.waiting import until


@dataclass(frozen=True)
class Target:
    """Where a program is played."""

    port: int
    """The clients' port: etcd's or the proxy's."""
    calls_port: int
    """Where unary calls go: the same, or straight to etcd."""
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
        """Hold the other members still until the first one knows of no leader."""
        for etcd in self.etcds[1:]:
            _signal(etcd, signal.SIGSTOP)
        until(lambda: not has_leader(self.etcds[0]), "the leader to be lost", 20)

    def find_leader(self) -> None:
        """Let the other members go on until there is a leader."""
        self.go_on()
        until(lambda: has_leader(self.etcds[0]), "a leader", 20)

    def go_on(self) -> None:
        """Let the other members go on."""
        for etcd in self.etcds[1:]:
            _signal(etcd, signal.SIGCONT)


def has_leader(etcd: EtcdServer) -> bool:
    """Tell whether a member knows of a leader."""
    try:
        return etcd.metrics()["etcd_server_has_leader"] == 1.0
    except (urllib.error.URLError, OSError):
        return False


def _signal(etcd: EtcdServer, what: signal.Signals) -> None:
    if etcd.process is not None:
        etcd.process.send_signal(what)
