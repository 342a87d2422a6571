"""One timer of the event loop for many expiries: a timer for each call would cost more than the rest of its start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf


class ExpiryTimer:
    """A timer for the earliest of many expiries. If that moves later, the timer fires early, harmlessly."""

    __slots__ = ("_at", "_expire", "_timer")

    def __init__(self, expire: Callable[[], None]) -> None:
        """`expire` handles what is due, and sets the timer again."""
        self._expire = expire
        self._timer: asyncio.TimerHandle | None = None
        # Infinite without a timer.
        self._at = inf

    def set(self, first: float | None) -> None:
        """Let the timer fire at `first`, in loop time, or before; None: nothing expires."""
        if first is None or self._at <= first:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._at = first
        self._timer = asyncio.get_running_loop().call_at(first, self._fire)

    def _fire(self) -> None:
        self._timer, self._at = None, inf
        self._expire()
