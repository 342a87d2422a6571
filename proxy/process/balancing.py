"""Which worker gets the next client connection: the one that has the fewest, of those that have CPU left. Pure.

A worker reports how many connections it has, and how many it was given so far. What it was given since then counts in
addition, so that connections between two reports are distributed evenly too. A worker that was restarted gets
new connections until it has as many as the others.

Connections differ in load, and those of short commands do not stay: a new worker would get all of these for hours,
while the others keep connections that stay. So a worker that is busy gets none while another one is not.
A worker that is full would refuse the connection, so it gets none while another one has a place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BUSY: Final = 0.8
"""A worker that uses more of a core than this is busy."""


@dataclass(slots=True)
class _WorkerConnections:
    """The connections of one worker."""

    open: int = 0
    """As it reported."""

    taken: int = 0
    """Connections that it had been given when it reported."""

    given: int = 0

    busy: bool = False

    most: int | None = None
    """How many it accepts; None: it has not reported yet."""

    @property
    def expected(self) -> int:
        return self.open + self.given - self.taken

    @property
    def order(self) -> tuple[bool, bool, int, int]:
        """The one with the lowest gets the next connection."""
        full = self.most is not None and self.expected >= self.most
        return full, self.busy, self.expected, self.given


class LeastConnections:
    """The connections of all workers, by their names."""

    def __init__(self) -> None:
        self._workers: dict[str, _WorkerConnections] = {}

    def started(self, name: str) -> None:
        """A worker was started; it has no connections."""
        self._workers[name] = _WorkerConnections()

    def reported(self, name: str, opened: int, taken: int, load: float = 0.0, most: int | None = None) -> None:
        """A worker has `opened` connections, `most` at most, of `taken` that it was given since its start.

        `load`: cores it uses.
        """
        worker = self._workers[name]
        worker.open, worker.taken, worker.busy, worker.most = opened, taken, load > BUSY, most

    def choose(self, takers: Sequence[str]) -> str:
        """Give one connection to one of `takers`, at least one, and return its name."""
        workers = self._workers
        name = min(takers, key=lambda taker: workers[taker].order)
        workers[name].given += 1
        return name

    def returned(self, name: str, count: int) -> None:
        """A worker did not take `count` connections after all."""
        self._workers[name].given -= count
