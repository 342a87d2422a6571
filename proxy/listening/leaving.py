"""The streams of connections that have ended: their handlers are told, a bounded number in each turn of the event loop.

One client may leave with twenty thousand watches, and a machine full of clients with as many on a hundred connections.
Each costs some ten microseconds in the core: at once they would hold every other client up for a fifth of a second.
Until its turn a stream is as one whose client does not read: what is written to it goes nowhere and does no harm.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable

from proto.http2 import Stream
from proxy import logs

log = logs.logger("listener")


class ClosedStreamReaper:
    """The streams that have yet to be told. What still fits into this turn of the loop is told at once."""

    __slots__ = ("_left", "_per_turn", "_turning", "_waiting")

    def __init__(self, per_turn: int) -> None:
        """`per_turn`: streams whose handlers are told in one turn of the loop."""
        self._per_turn = self._left = per_turn
        self._waiting: deque[tuple[deque[Stream], Callable[[], None]]] = deque()
        """By connection: its streams, and what is to be done after the last one."""
        self._turning = False
        """The next turn is asked for."""

    def add(self, streams: Iterable[Stream], then: Callable[[], None]) -> None:
        """Tell the handlers of these that their streams are gone, behind those that wait; then call `then`."""
        self._waiting.append((deque(streams), then))
        self._tell()

    def _tell(self) -> None:
        """Tell as many as this turn allows."""
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
            self._left -= 1
            if not self._turning:
                self._turning = True
                asyncio.get_running_loop().call_soon(self._next_turn)
            try:
                owner.closed(None)
            except Exception:
                # Whatever it is: the others have to be told as well.
                log.exception("a handler failed as its stream ended", stream=stream.id)

    def _next_turn(self) -> None:
        self._turning = False
        self._left = self._per_turn
        self._tell()
