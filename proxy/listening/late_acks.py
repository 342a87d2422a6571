"""The acknowledgements of PINGs that are sent late, so that Go clients send fewer.

A Go client answers a read of DATA with a WINDOW_UPDATE and a PING, by which it measures the bandwidth, unless an
earlier PING is not acknowledged yet. If each is acknowledged at once, an event costs a read and a write more for each
connection, three times the system calls. Only the growth of the client's windows depends on the measurement. So while
events follow each other but little is sent (`Connection.receive_update_and_ping` decides), such a PING is acknowledged
LATE_ACK_S_MAX later, and the client answers none of the events until then. When the client returns a part of a window
of which it had used half, the PING is acknowledged. Other PINGs, such as keep-alives, are acknowledged at once.
"""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import Protocol

from proto.http2 import LATE_ACK_S_MAX, Connection
from proxy.listening.turns import in_parts

SPREAD_S = 0.25
"""One timer serves all acknowledgements that are due within this time."""

PER_TURN = 32
"""Acknowledgements of one turn of the loop, each a write: an event waits for them, half a millisecond."""


class PingedConnection(Protocol):
    """The connection of a client that waits for an acknowledgement."""

    h2: Connection

    def schedule_flush(self) -> None:
        """Write what `h2` has queued, at the end of the turn."""


class LateAcknowledgements:
    """The connections that owe one, in the order in which they are due."""

    def __init__(self) -> None:
        self._since: dict[PingedConnection, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: PingedConnection, now: float) -> None:
        """Let a connection acknowledge later; `now`: seconds, monotonic."""
        # Again at the end, if it has acknowledged the previous one early.
        self._since.pop(connection, None)
        self._since[connection] = now
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LATE_ACK_S_MAX, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer = None
        now = monotonic()
        due = []
        for connection, since in self._since.items():
            left_s = since + LATE_ACK_S_MAX - now
            if left_s > SPREAD_S:
                self._timer = asyncio.get_running_loop().call_later(left_s, self._timer_fired)
                break
            due.append(connection)
        for connection in due:
            del self._since[connection]

        def acknowledge(connection: PingedConnection) -> None:
            connection.h2.acknowledge_late(now)
            connection.schedule_flush()

        in_parts(due, acknowledge, part=PER_TURN)
