"""Watches that wait for a later revision: sets by position, lowest first.

Watches that are created at "now" one after the other mostly get the same position, so adding, removing and taking one
costs a dict operation, and the heap has one number per position.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

T = TypeVar("T")


class AheadWatches(Generic[T]):
    """Watches by position; the owner drops it with the last watch, so `first` is valid."""

    __slots__ = ("_positions", "by_position")

    def __init__(self) -> None:
        self.by_position: dict[int, dict[T, None]] = {}
        # A heap; positions that have no watches any more stay until they are the lowest or are too many.
        self._positions: list[int] = []

    def __bool__(self) -> bool:
        return bool(self.by_position)

    @property
    def first(self) -> int:
        """No watch has a lower position."""
        return self._positions[0]

    def add(self, watch: T, position: int) -> None:
        """Add a watch."""
        alike = self.by_position.get(position)
        if alike is not None:
            alike[watch] = None
            return
        self.by_position[position] = {watch: None}
        heapq.heappush(self._positions, position)
        if len(self._positions) > 2 * len(self.by_position) + 16:
            # A sorted list is a heap.
            self._positions = sorted(self.by_position)

    def remove(self, watch: T, position: int) -> None:
        """Remove a watch."""
        alike = self.by_position[position]
        del alike[watch]
        if not alike:
            del self.by_position[position]

    def take_first(self) -> dict[T, None]:
        """Remove and return the watches at the first position, in the order in which they were added."""
        return self.by_position.pop(heapq.heappop(self._positions), {})
