"""Histograms of the proxy's own delays: from receipt to write, and of the event loop.

Neither has a cost per event. The delivery delay is measured once per turn of the event loop, after the writes: from the
receipt of the turn's oldest event until all its data has been passed to the kernel or the transport, so it is never
underestimated. A timer measures the delay of the event loop once a second.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from proxy.listening.write_queue import WriteQueue

BOUNDS_S = (
    *(0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0),
)
"""Upper bounds of the buckets, in seconds: from the cost of a single event to delays that must never occur."""

TICK_S = 1.0

UNSORTED_MAX = 256
"""Delays kept until they are sorted into a histogram, which takes less than 0.1 ms."""


class Histogram:
    """A histogram in the form of Prometheus: observations counted by bucket."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...] = BOUNDS_S) -> None:
        self.bounds = bounds
        # One bucket for each bound (value <= bound), and one for all larger values.
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Record a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        """The number of observations."""
        return sum(self.counts)

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, number of observations at or below it) pairs; the last bound is `+Inf`."""
        total = 0
        buckets = []
        for bound, count in zip((*map(repr, self.bounds), "+Inf"), self.counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets


def quantile(share: float, bounds: tuple[float, ...], counts: list[int]) -> float | None:
    """Return the upper bound of the bucket that contains the `share` quantile; None without observations.

    Values above the last bound count as that bound.
    """
    total = sum(counts)
    if not total:
        return None
    need = share * total
    seen = 0
    for bound, count in zip(bounds, counts, strict=False):
        seen += count
        if seen >= need:
            return bound
    return bounds[-1]


class DeliveryDelays:
    """Records, after the writes of each turn, the time since the oldest event among them was received."""

    def __init__(self, output: WriteQueue) -> None:
        self._histogram = Histogram()
        # Delays not yet in the histogram: code that each single event needs must be fetched into the CPU's cache again.
        self._unsorted: list[float] = []
        output.on_written = self._written

    @property
    def histogram(self) -> Histogram:
        """All delays so far."""
        for delay in self._unsorted:
            self._histogram.observe(delay)
        self._unsorted.clear()
        return self._histogram

    def _written(self, since: float) -> None:
        self._unsorted.append(time.perf_counter() - since)
        if len(self._unsorted) >= UNSORTED_MAX:
            _ = self.histogram


class LoopDelay:
    """A periodic timer that records how late the event loop runs it, and calls `every` each time."""

    def __init__(self, every: Callable[[], None]) -> None:
        self.histogram = Histogram()
        self._every = every
        self._due = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the timer in the running event loop."""
        self._due = time.perf_counter() + TICK_S
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self._timer_fired)

    def stop(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _timer_fired(self) -> None:
        self.histogram.observe(max(0.0, time.perf_counter() - self._due))
        self._every()
        self.start()
