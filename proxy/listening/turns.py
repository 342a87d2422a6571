"""What clients ask for is work: so much of it is done in one turn of the event loop, for all clients together.

The unit is a piece of some five microseconds; frames, requests, inflated bytes and filters each have their price. What
is too much waits, in bytes that nobody has looked at, and goes on in the next turns with events and other I/O in
between: connection after connection, each with a bounded share, and within a connection stream after stream.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

UNBOUNDED = 1 << 62

SHARE = 200
"""Work of one connection before the others have their turn: a millisecond."""

PART = 200
"""Connections that something is done to in one turn: some milliseconds."""

T = TypeVar("T")


class Worker(Protocol):
    """Who has work that waits: a connection."""

    def take_turn(self) -> None:
        """Do some of it, as long as `Turns.left` is above zero; call `Turns.wait` again if there is more."""


class Turns:
    """The work of one turn of the loop, and who waits for the next one."""

    __slots__ = ("_per_turn", "_turning", "_waiting", "left")

    def __init__(self, per_turn: int) -> None:
        """`per_turn`: work of one turn, in pieces; 0: no bound."""
        self._per_turn = per_turn or UNBOUNDED
        self.left = self._per_turn
        """What may still be done now. A step that costs more than is left is done and paid with what comes."""
        self._waiting: deque[Worker] = deque()
        self._turning = False
        """The next turn is asked for."""

    def spend(self, work: int) -> None:
        """Take note of work that is done."""
        self.left -= work
        if not self._turning:
            self._ask()

    def wait(self, worker: Worker) -> None:
        """Have a worker take its turn, behind those that wait; once for each `take_turn`."""
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
        # A part is for those that have not asked for much: what is read of them is handled at once.
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


def in_parts(items: Iterable[T], do: Callable[[T], None], then: Callable[[], None] | None = None) -> None:
    """Do something to each of many, PART of them now and as many in each turn of the loop that follows."""
    _next_part(deque(items), do, then)


def _next_part(left: deque[T], do: Callable[[T], None], then: Callable[[], None] | None) -> None:
    for _ in range(min(PART, len(left))):
        do(left.popleft())
    if left:
        asyncio.get_running_loop().call_soon(_next_part, left, do, then)
    elif then is not None:
        then()
