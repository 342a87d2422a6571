"""The load cases, by name: what clients are there and what is written.

Figures only mean something beside a peer's in the same run; every case is driven at every target in turn.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One load. Watches are dealt over the ranges in turn; writes go to the ranges in turn."""

    name: str
    what: str
    connections: int
    streams: int
    """Streams in total, dealt over the connections."""
    watches: int = 1
    """Watches on each stream."""
    ranges: int = 1
    writes: int = 0
    rate: float = 0.0
    """Writes per second; 0 = as fast as they go."""
    value_bytes: int = 64
    idle_s: float = 0.0
    """Seconds to sit still before memory is read (idle cases)."""

    @property
    def expected(self) -> int:
        """Events delivered in total when nothing is lost."""
        watches = self.streams * self.watches
        whole, rest = divmod(watches, self.ranges)
        per_range = [whole + (index < rest) for index in range(self.ranges)]
        return sum(per_range[write % self.ranges] for write in range(self.writes))


CASES = {
    case.name: case
    for case in (
        Case("burst", "1,000 streams on 20 connections, one range, writes as fast as they go", 20, 1000, writes=300),
        Case("paced", "500 streams on 20 connections, 20 writes/s", 20, 500, writes=200, rate=20),
        Case("single", "500 connections with one stream each, 10 writes/s", 500, 500, writes=80, rate=10),
        Case("stacked", "10 streams with 100 watches each, burst", 1, 10, watches=100, writes=300),
        Case("ranges", "200 ranges with 10 watches each, 400 writes/s", 20, 200, 10, 200, writes=3200, rate=400),
        Case("lowfan", "200 ranges with one watch each, 400 writes/s", 20, 200, 1, 200, writes=3200, rate=400),
        Case("large", "50 streams on 10 connections, values of 100 KB, 20 writes/s", 10, 50, 1, 1, 60, 20, 100_000),
        Case("idle", "10,000 idle streams on 100 connections", 100, 10_000, idle_s=2.0),
    )
}
