"""The connections with queued output, in the order in which they are written.

Writes are batched: all connections that a read touched are written at its end, those that anything else touched at the
end of the turn of the event loop, with one write to the transport for each. So an event for five hundred streams on
twenty connections costs twenty writes.

A write costs 20 us. An event for thousands of connections is written in parts, one in each turn: what etcd and the
clients send is read between them, and what is queued for few connections is written first. A connection stays `dirty`
until its part is written, so its own output keeps its order. Until the last part is written, the queue is `behind`, and
no other event for so many is passed on (`upstream/watching/call.py`): the output of one is in memory, not of all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol

from proxy import logs
from proxy.listening.settings import ListenerStats

PART_CONNECTIONS = 256
"""Connections of one part: 5 ms of writes."""

PART_BYTES = 4 * 1024 * 1024
"""Bytes of one part, which the kernel copies in a few milliseconds."""

QUEUED_BYTES_MAX = 64 * 1024 * 1024
"""If so much has been queued since the queue was last empty, all of it is written at once. Output counts once for each
client, although clients share most of it. What is read while the queue is `behind` is for few clients."""

log = logs.logger("listener")


class WrittenConnection(Protocol):
    """A connection with queued output."""

    peer: str

    def flush(self) -> None:
        """Write it."""

    def abort(self) -> None:
        """Close at once."""


class WriteQueue:
    """See the module. It implements `upstream.interfaces.Cork`."""

    def __init__(self, stats: ListenerStats) -> None:
        """`stats` count what the connections write."""
        self._stats = stats
        self._dirty: list[WrittenConnection] = []
        """Written at the end of the read or of the turn."""
        self._aside: deque[WrittenConnection] = deque()
        """Written in parts."""
        self._waiting: deque[Callable[[], None]] = deque()
        """What `when_written` was called with."""
        self._scheduled = False
        """`_turn` is called in the next turn."""
        self.part = PART_CONNECTIONS
        """Output for more clients than this is written in parts."""
        self.corks = 0
        """Calls of `cork` without their `uncork`: while there are any, nothing is written."""
        self.behind = False
        """Many clients wait for their part, or much is queued for many."""
        self.queued_bytes = 0
        """Bytes of events queued since the queue was last empty or `relieve` wrote all of it; added by the caller."""
        self.since = 0.0
        """When the oldest event that is queued was received (time.perf_counter); 0: none. Set by the caller."""
        self._aside_since = 0.0
        """The same of those that are written in parts."""
        self.on_written: Callable[[float], None] | None = None
        """Called after writes of events, with when the oldest was received; set if delays are measured."""

    def flush_soon(self, connection: WrittenConnection, many: bool = False) -> None:
        """Write a connection at the end of this turn; `many`: in parts, with others that get the same output."""
        if not (self._scheduled or self.corks):
            self._schedule()
        (self._aside if many else self._dirty).append(connection)

    def cork(self) -> None:
        """Collect the output of a read until `uncork`: a flush at the end of the turn costs a callback for each."""
        self.corks += 1

    def uncork(self) -> None:
        """Write, at the outermost end of such a section."""
        self.corks -= 1
        if self.corks:
            return
        if self._dirty or self.since:
            self._write_dirty()
        if self._aside and not self._scheduled:
            self._write_part()
            self._go_on()

    def relieve(self) -> None:
        """Write in the middle of a read because much is queued; what is for many connections is written in parts."""
        if len(self._aside) <= self.part or self.queued_bytes >= QUEUED_BYTES_MAX:
            self.flush()
        else:
            self.behind = True

    def flush(self) -> None:
        """Write all queued output now."""
        self._write_dirty()
        while self._aside:
            self._write(self._aside.popleft())
        self._all_written()
        self.behind = bool(self._waiting)

    def when_written(self, do: Callable[[], None]) -> None:
        """Call `do` in a later turn, when nothing waits for its part; in the order of the calls, if there are more."""
        self._waiting.append(do)
        self._go_on()

    def _go_on(self) -> None:
        """Schedule the next turn if one is needed."""
        self.behind = bool(self._aside or self._waiting)
        if (self.behind or self._dirty) and not self._scheduled:
            self._schedule()

    def _schedule(self) -> None:
        self._scheduled = True
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        """Write what is queued for few connections, and one part; or go on with what waits for the last part."""
        try:
            if self._dirty or self.since:
                self._write_dirty()
            if self._aside:
                self._write_part()
            elif self._waiting:
                self.behind = False
                # What it queues for many connections is written from the next turn on.
                self._waiting.popleft()()
        finally:
            self._scheduled = False
            self._go_on()

    def _write_dirty(self) -> None:
        """Write what is queued for few connections."""
        dirty, self._dirty = self._dirty, []
        if len(dirty) > self.part:
            self._aside += dirty
            dirty = []
        for connection in dirty:
            self._write(connection)
        since, self.since = self.since, 0.0
        if not self._aside:
            self.queued_bytes = 0
        elif since:
            self._aside_since = self._aside_since or since
        if since and dirty and self.on_written is not None:
            self.on_written(since)

    def _write_part(self) -> None:
        """Write some of the connections that are written in parts."""
        aside, stats = self._aside, self._stats
        written_max = stats.written_bytes + PART_BYTES
        left = self.part
        while aside and left and stats.written_bytes < written_max:
            self._write(aside.popleft())
            left -= 1
        if not aside:
            self._all_written()

    def _all_written(self) -> None:
        self.queued_bytes = 0
        since, self._aside_since = self._aside_since, 0.0
        if since and self.on_written is not None:
            self.on_written(since)

    def _write(self, connection: WrittenConnection) -> None:
        try:
            connection.flush()
        except Exception:
            # Any exception: the other connections must still be written.
            log.exception("write failed; dropping the connection", peer=connection.peer)
            connection.abort()
