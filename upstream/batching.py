"""Reading events in batches: what follows closely is left to the kernel for a moment, and then read at once.

Each process that an event wakes has a cost that does not depend on the number of clients. In front of several
processes (the hub of `--workers`) each of them pays this cost, so a burst is passed on in a few reads. The first event
after a quiet time is never delayed.
"""

from __future__ import annotations

import asyncio


class EventBatches:
    """The batches of one connection."""

    def __init__(self, interval_s: float, loop: asyncio.AbstractEventLoop) -> None:
        """`interval_s`: how long to wait after a read that brought events soon after the previous ones; 0: never."""
        self.interval_s = interval_s
        # The connection's, while it is open.
        self.transport: asyncio.Transport | None = None
        self._loop = loop
        # When a read last brought events, in the time of the loop, which counts in milliseconds.
        self._came_at = -1.0
        self._waits = False

    def events_came(self) -> None:
        """Handle a read that brought events: stop reading for a moment if others came shortly before."""
        now = self._loop.time()
        soon = now - self._came_at <= 2 * self.interval_s
        self._came_at = now
        transport = self.transport
        if soon and not self._waits and transport is not None and not transport.is_closing():
            self._waits = True
            transport.pause_reading()
            self._loop.call_later(self.interval_s, self._read_on)

    def _read_on(self) -> None:
        self._waits = False
        if self.transport is not None and not self.transport.is_closing():
            self.transport.resume_reading()
