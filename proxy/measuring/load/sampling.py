"""Samples of the upstream's metrics over time, for the charts of a report."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Self

import msgspec

from proxy.measuring.load.prometheus import MetricsPage, NoMetrics, ServingCost

EVERY_S = 0.5


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a metrics page, at a time in seconds after the first sample."""

    at_s: float
    cost: ServingCost


class Sampler:
    """Reads a page every half second. Use as a context manager; it stops at `stop` or at the end of the block."""

    def __init__(self, page: MetricsPage, every_s: float = EVERY_S) -> None:
        self.samples: list[Sample] = []
        self._page = page
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None

    def __enter__(self) -> Self:
        self._task = asyncio.create_task(self._run())
        return self

    def __exit__(self, *_error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop reading."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        start = time.monotonic()
        while True:
            # A failed read only leaves a gap in a chart; code that needs the numbers reads the page itself.
            with contextlib.suppress(NoMetrics):
                cost = await self._page.cost()
                self.samples.append(Sample(at_s=round(time.monotonic() - start, 2), cost=cost))
            await asyncio.sleep(self._every_s)
