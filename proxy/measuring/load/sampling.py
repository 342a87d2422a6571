"""The upstream's numbers over time, while something else goes on: the lines of a report's charts."""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Self

import msgspec

from proxy.measuring.load.prometheus import Cost, MetricsPage, NoMetrics

EVERY_S = 0.5


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """What a page said, so many seconds after the first sample."""

    at_s: float
    cost: Cost


class Sampler:
    """Reads a page every half second. Use as a context manager; it ends at `stop` or with the block."""

    def __init__(self, page: MetricsPage, every_s: float = EVERY_S) -> None:
        self.samples: list[Sample] = []
        self._page = page
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Read no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        start = time.monotonic()
        while True:
            # A page that fails once is a gap in a line; whoever needs the numbers asks for them and is told.
            with contextlib.suppress(NoMetrics):
                cost = await self._page.cost()
                self.samples.append(Sample(at_s=round(time.monotonic() - start, 2), cost=cost))
            await asyncio.sleep(self._every_s)
