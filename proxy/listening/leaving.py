"""Cleanup of the streams of closed connections: a bounded number of handlers is notified in each turn of the loop.

One client may disconnect with twenty thousand watches, and a host full of clients with as many on a hundred
connections. Each costs about ten microseconds in the core: all at once would block every other client for a fifth of a
second. Until its turn, a stream behaves like one whose client does not read: writes to it are dropped harmlessly.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from proto.http2 import ErrorCode, Stream
from proxy import logs

log = logs.logger("listener")


class ClosedStreamReaper:
    """Notifies the handlers of closed streams: now as far as this turn of the loop allows, the rest in later turns."""

    def __init__(self, per_turn: int) -> None:
        """`per_turn`: streams whose handlers are notified in one turn of the loop."""
        self._per_turn = self._left = per_turn
        self._waiting: deque[tuple[deque[Stream], Callable[[], None]]] = deque()
        """By connection: its streams, and a callback for after the last one."""
        self._turning = False
        """The next turn is scheduled."""

    def add(self, streams: Iterable[Stream], then: Callable[[], None]) -> None:
        """Queue streams whose handlers are to be notified that they are closed; call `then` after the last one."""
        self._waiting.append((deque(streams), then))
        self._report_left()

    def _report_left(self) -> None:
        """Notify as many handlers as this turn allows."""
        waiting = self._waiting
        while waiting and self._left:
            streams, then = waiting[0]
            if not streams:
                waiting.popleft()
                then()
                continue
            stream = streams.popleft()
            owner, stream.owner = stream.owner, None
            if owner is None:
                continue
            stream.report_reset(ErrorCode.CANCEL)
            self._left -= 1
            if not self._turning:
                self._turning = True
                asyncio.get_running_loop().call_soon(self._next_turn)
            try:
                owner.closed(None)
            except Exception:
                # Any exception: the other handlers must still be notified.
                log.exception("handler failed when its stream closed", stream=stream.id)

    def _next_turn(self) -> None:
        self._turning = False
        self._left = self._per_turn
        self._report_left()
