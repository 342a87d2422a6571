"""The parent of several processes accepts the clients' connections, and passes each to a worker.

The kernel could distribute them (SO_REUSEPORT), but at random: of 200 connections one of four workers may get a third
more than its share. And the connections that a worker has not accepted yet would be lost with it.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections.abc import Callable
from typing import Final

from proxy import logs
from proxy.listening.fd_passing import TOGETHER_MAX, ConnectionChannel, channel_pair, send_connections
from proxy.listening.sockets import Listening
from proxy.process.balancing import LeastConnections

AGAIN_S: Final = 0.1
"""How long the parent accepts nothing after it could not (no descriptor is left), or after no worker took any."""

log = logs.logger("workers")


class ConnectionDistributor:
    """See the module."""

    def __init__(
        self, listening: Listening, selector: selectors.BaseSelector, takers: Callable[[float], list[str]]
    ) -> None:
        """`takers` returns the names of the workers that get connections, at a time."""
        self.again_at: float | None = None
        """When `arrange` has something to do; None: not before the takers change."""
        self._listening = listening
        self._selector = selector
        self._takers = takers
        self._balance = LeastConnections()
        self._channels: dict[str, socket.socket] = {}
        self._accepted: list[socket.socket] = []
        """Connections that no worker has taken."""
        self._accepting = False

    def started(self, name: str) -> ConnectionChannel:
        """A worker is about to be started; return what it is to have instead of listening sockets."""
        self._channels[name], theirs = channel_pair()
        self._balance.started(name)
        return ConnectionChannel(theirs, self._listening.port)

    def ended(self, name: str) -> None:
        """A worker has ended; the connections that it did not take are closed."""
        self._channels.pop(name).close()

    def reported(self, name: str, opened: int, taken: int, load: float, most: int | None) -> None:
        """See `LeastConnections`."""
        self._balance.reported(name, opened, taken, load, most)

    def forget(self) -> None:
        """Close the parent's sockets: called in a process that was forked."""
        for each in (*self._listening.sockets, *self._channels.values(), *self._accepted):
            each.close()

    def stop(self) -> None:
        """Accept nothing from now on, and do not listen. May be called again."""
        self._accept(False)
        for each in (*self._listening.sockets, *self._accepted):
            each.close()
        self._accepted, self.again_at = [], None
        self._listening.remove_file()

    def arrange(self, now: float) -> None:
        """Accept connections as long as there are takers, and those that were accepted are taken."""
        if self.again_at is not None and self.again_at <= now:
            self.again_at = None
            self._distribute(now)
        self._accept(self.again_at is None and bool(self._takers(now)))

    def _accept(self, accepting: bool) -> None:
        if accepting != self._accepting:
            self._accepting = accepting
            for one in self._listening.sockets:
                if accepting:
                    self._selector.register(one, selectors.EVENT_READ, lambda one=one: self._readable(one))
                else:
                    self._selector.unregister(one)

    def _readable(self, listening: socket.socket) -> None:
        now = time.monotonic()
        for _ in range(TOGETHER_MAX):
            try:
                self._accepted.append(listening.accept()[0])
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                break
            except OSError as error:
                log.error("cannot accept connections", problem=str(error))
                self.again_at = now + AGAIN_S
                break
        self._distribute(now)

    def _distribute(self, now: float) -> None:
        takers = self._takers(now)
        left, self._accepted = self._accepted, []
        while left and takers:
            parts: dict[str, list[socket.socket]] = {}
            for one in left:
                parts.setdefault(self._balance.choose(takers), []).append(one)
            left = []
            for name, part in parts.items():
                if not send_connections(self._channels[name], part):
                    self._balance.returned(name, len(part))
                    takers.remove(name)
                    left += part
        if left:
            self._accepted, self.again_at = left, now + AGAIN_S
