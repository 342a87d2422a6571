"""One trial: the same load put on a target, once directly on the upstream or once through the proxy.

The order is what makes the numbers fair: the upstream is asked before anybody watches, when all watches are open and
quiet, and when everybody has got everything, and each time it is the upstream that counts.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from proxy.measuring.load.judge import Verdict, judge, read_truth
from proxy.measuring.load.plan import Shape, make_ranges, make_streams
from proxy.measuring.load.prometheus import Cost, MetricsPage
from proxy.measuring.load.run import Load
from proxy.measuring.load.sampling import Sample, Sampler
from proxy.measuring.load.writer import Writer

SETTLE_LIMIT_S = 4.0
SETTLE_QUIET_S = 0.4
REFRESH_S = 0.1
T = TypeVar("T")


class Show(Protocol):
    """Where a trial tells how far it is."""

    def step(self, text: str, total: float) -> None:
        """Begin a step that is done when `total` is reached."""

    def at(self, value: float, text: str = "") -> None:
        """Say how far the step is."""


class Spec(msgspec.Struct, frozen=True, kw_only=True):
    """What to put on: the shape of the clients, and the writes."""

    shape: Shape
    seconds: float
    per_second: float
    value_bytes: int
    past_writes: int = 0
    """Changes made before anybody watches, so that there is a past to start in."""


class Trial(msgspec.Struct, kw_only=True):
    """What came of it."""

    before: Cost
    watching: Cost
    """All watches open, nothing written yet."""
    after: Cost
    """Everything written has been received."""
    verdict: Verdict
    written: int
    """Events written while the clients watched."""
    opened_s: float
    complaints: list[str]
    """Streams that ended, watches that did not finish."""
    samples: list[Sample] = []
    """What the upstream said meanwhile, from before anybody watched until everybody had everything."""

    @property
    def watchers(self) -> int:
        """Upstream watchers that the clients' watches cost, at the end of the writes."""
        return self.after.watchers - self.before.watchers

    @property
    def watch_streams(self) -> int:
        """Upstream watch streams that they cost."""
        return self.after.watch_streams - self.before.watch_streams


async def run_trial(
    spec: Spec, upstream: str, page: MetricsPage, target: str, show: Show, *, through_proxy: bool
) -> Trial:
    """Put the load on `target`, write to `upstream`, and judge what the clients got.

    Raises LoadFailed, WriteFailed, NoMetrics or NoTruth, each with one line of text.
    """
    shape = spec.shape
    prefix = b"/watchmux-load/%d-%d/" % (os.getpid(), time.monotonic_ns())
    ranges = make_ranges(prefix, shape.ranges)
    writer = Writer(upstream, ranges, spec.value_bytes)
    try:
        first = await writer.current_revision() + 1
        past = await _write_past(writer, spec, show)
        streams = make_streams(shape, past)
        load = Load(target, ranges, streams, shape.processes)
        before = await page.cost()
        sampler = Sampler(page)
        with sampler, tempfile.TemporaryDirectory(prefix="watchmux-load-") as directory:
            try:
                opened_s = await _open(load, Path(directory), show)
                watching = await _settle(page)
                past_events = writer.written
                await _write(load, writer, spec, show)
                complete = await _finish(load, writer, show)
                after = await page.cost()
            finally:
                sampler.stop()
                total = load.total
                await load.leave()
            complaints = list(total.failed)
            if not complete:
                complaints.append(f"{load.watches - total.finished} of {load.watches} watches did not get everything")
            show.step("Comparing with the store's history", shape.watches)
            truth = await read_truth(upstream, prefix, first, writer.revision)
            last = writer.revision
            verdict = await asyncio.to_thread(judge, load.plans, truth, last, safe_headers=through_proxy)
            show.at(shape.watches)
        written = writer.written - past_events
        await writer.clean_up()
    finally:
        await writer.close()
    return Trial(
        before=before,
        watching=watching,
        after=after,
        verdict=verdict,
        written=written,
        opened_s=opened_s,
        complaints=complaints,
        samples=sampler.samples,
    )


async def _write_past(writer: Writer, spec: Spec, show: Show) -> list[int]:
    """Write what lies before the clients' time; return the revisions they may start at."""
    if not spec.past_writes:
        return []
    show.step("Writing a past", spec.past_writes)
    revisions = []
    for number in range(spec.past_writes):
        await writer.write()
        revisions.append(writer.revision)
        show.at(number + 1)
    # From the second half: a start in the past that all ranges still have changes behind.
    return revisions[: max(1, len(revisions) // 2) : 7]


async def _open(load: Load, directory: Path, show: Show) -> float:
    show.step("Opening watches", load.watches)
    start = time.monotonic()
    await load.start(directory)
    await _showing(load.wait_opened(), lambda: show.at(load.total.opened, f"{load.total.opened:,} watches"))
    return time.monotonic() - start


async def _settle(page: MetricsPage) -> Cost:
    """Wait until the upstream's count of watchers stands still: those that catch up with the past are only passing."""
    deadline = time.monotonic() + SETTLE_LIMIT_S
    last = await page.cost()
    since = time.monotonic()
    while time.monotonic() < deadline and time.monotonic() - since < SETTLE_QUIET_S:
        await asyncio.sleep(REFRESH_S)
        now = await page.cost()
        if now.watchers != last.watchers:
            since = time.monotonic()
        last = now
    return last


async def _write(load: Load, writer: Writer, spec: Spec, show: Show) -> None:
    show.step("Writing", spec.seconds)
    start = time.monotonic()
    await _showing(
        writer.write_for(spec.seconds, spec.per_second),
        lambda: show.at(min(time.monotonic() - start, spec.seconds), f"{load.total.events:,} events delivered"),
    )


async def _finish(load: Load, writer: Writer, show: Show) -> bool:
    show.step("Waiting for the last events", load.watches)
    return await _showing(
        load.wait_finished(writer.final),
        lambda: show.at(load.total.finished, f"{load.total.events:,} events delivered"),
    )


async def _showing(work: Awaitable[T], update: Callable[[], None]) -> T:
    """Do the work, and say how far it is until it is done."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=REFRESH_S)
            update()
        return task.result()
    finally:
        task.cancel()
