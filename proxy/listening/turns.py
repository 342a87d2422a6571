"""A bound on the work that client input causes in one turn of the event loop, for all clients together.

The unit of work is about five microseconds; frames, requests, inflated bytes and filters each have a price. Input
beyond the bound waits as unparsed bytes. The next turns continue with it, with events and other I/O in between: one
connection after another, each with a bounded share, and within a connection one stream after another.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

from proto.http2 import Stream

UNBOUNDED = 1 << 62

SHARE = 200
"""Work of one connection before the others get their turn: a millisecond."""

PART = 200
"""Connections that `in_parts` handles in one turn: a few milliseconds."""

T = TypeVar("T")


class DeferredConnection(Protocol):
    """A connection with deferred work."""

    def take_turn(self) -> None:
        """Do some of it, as long as `TurnBudget.left` is above zero; call `TurnBudget.wait` again if there is more."""


class DeferredHandler(Protocol):
    """A handler with client requests that wait for a turn."""

    stream: Stream

    def go_on(self) -> bool:
        """Handle some of them. Returns True if more can be handled in the next turn."""


class TurnBudget:
    """The work budget of one turn of the loop, and the workers that wait for a turn."""

    def __init__(self, per_turn: int) -> None:
        """`per_turn`: work of one turn, in units; 0: no bound."""
        self._per_turn = per_turn or UNBOUNDED
        self._refill_below = self._per_turn - self._per_turn // 4
        self.left = self._per_turn
        """Work that may still be done now. Negative if the last step cost more than was left."""
        self._waiting: deque[DeferredConnection] = deque()
        self._turning = False
        """The next turn is scheduled."""

    def spend(self, work: int) -> None:
        """Charge work that was done. Up to a quarter of the budget needs no callback in the turn."""
        self.left -= work
        if self.left < self._refill_below and not self._turning:
            self._ask()

    def wait(self, worker: DeferredConnection) -> None:
        """Queue a worker for one `take_turn`."""
        self._waiting.append(worker)
        if not self._turning:
            self._ask()

    def _ask(self) -> None:
        self._turning = True
        asyncio.get_running_loop().call_soon(self._next_turn)

    def _next_turn(self) -> None:
        self._turning = False
        waiting = self._waiting
        if not waiting:
            self.left = self._per_turn
            return
        # Reserve a part for connections with little input: theirs is handled as it is read.
        reserve = self._per_turn // 4
        left = self._per_turn - reserve
        while waiting and left > 0:
            worker = waiting.popleft()
            self.left = share = min(SHARE, left)
            worker.take_turn()
            left -= share - self.left
        self.left = reserve + max(0, left)
        if waiting and not self._turning:
            self._ask()


def in_parts(
    items: Iterable[T], do: Callable[[T], None], then: Callable[[], None] | None = None, part: int = 0
) -> None:
    """Call `do` for each item, `part` (0: PART) of them now and as many in each following turn; then call `then`."""
    _next_part(deque(items), do, then, part or PART)


def _next_part(left: deque[T], do: Callable[[T], None], then: Callable[[], None] | None, part: int) -> None:
    for _ in range(min(part, len(left))):
        do(left.popleft())
    if left:
        asyncio.get_running_loop().call_soon(_next_part, left, do, then, part)
    elif then is not None:
        then()
