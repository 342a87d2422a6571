"""One trial: the load on a target, which is the upstream itself or the proxy.

To make the numbers comparable, the upstream's own metrics are read at fixed points: before the first watch, once all
watches are open and caught up, and once all clients have all events.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec

from proxy.measuring.load.client import ClientReport
from proxy.measuring.load.judge import RunVerdict, judge, read_truth
from proxy.measuring.load.plan import ROOT, LoadShape, make_ranges, make_streams
from proxy.measuring.load.prometheus import MetricsPage, NoMetrics, ServingCost
from proxy.measuring.load.run import Load
from proxy.measuring.load.sampling import Sample, Sampler
from proxy.measuring.load.target import LoadTarget
from proxy.measuring.load.writer import PutWriter

SETTLE_LIMIT_S = 4.0
SETTLE_QUIET_S = 0.4
REFRESH_S = 0.1
T = TypeVar("T")


class TrialProgress(Protocol):
    """Receives the progress of a trial."""

    def step(self, text: str, total: float) -> None:
        """Begin a step that is done when `total` is reached."""

    def at(self, value: float, text: str = "") -> None:
        """Report how far the step is."""

    def warn(self, text: str) -> None:
        """Report something that the user must know, at once: the trial may end with an error."""


class TrialSpec(msgspec.Struct, frozen=True, kw_only=True):
    """The load of a trial: the shape of the clients, and the writes."""

    shape: LoadShape
    seconds: float
    per_second: float
    value_bytes: int
    past_writes: int = 0
    """Changes made before the first watch, so that watches can start in the past."""


class Circumstances(msgspec.Struct, kw_only=True):
    """What a trial found besides the cost and the events."""

    complaints: list[str]
    """Streams that ended, and watches that did not get all events."""
    samples: list[Sample] = []
    """The upstream's metrics over time, from before the first watch until all events were received."""
    other_writes: int = 0
    """Revisions that other clients made during the trial."""
    other_calls: int | None = None
    """Calls that other clients made between `before` and `after`; None if unknown."""
    lists: int = 0
    """Lists of all keys by the clients at the same time, one for each stream, after the writes."""
    list_ranges: int = 0
    """Range calls that the upstream served for them."""
    proxy_cpu_s: float | None = None
    """CPU time of the proxy between `before` and `after`; None without its metrics."""
    proxy_memory_bytes: float | None = None
    """Resident memory of the proxy at `after`."""


class Trial(Circumstances, kw_only=True):
    """The result of a trial."""

    before: ServingCost
    watching: ServingCost
    """When all watches are open, before the writes."""
    after: ServingCost
    """When all events have been received."""
    verdict: RunVerdict
    written: int
    """Events written while the clients watched."""
    opened_s: float

    @property
    def watchers(self) -> int:
        """The number of upstream watchers for the clients' watches, at the end of the writes."""
        return self.after.watchers - self.before.watchers

    @property
    def watch_streams(self) -> int:
        """The number of upstream watch streams for them."""
        return self.after.watch_streams - self.before.watch_streams


async def run_trial(
    spec: TrialSpec,
    upstream: LoadTarget,
    page: MetricsPage,
    target: LoadTarget,
    show: TrialProgress,
    *,
    through_proxy: bool,
    proxy_page: MetricsPage | None = None,
) -> Trial:
    """Run the load on `target`, write to `upstream`, and judge the events of the clients.

    All keys are removed at the end, however it ends; what is left is reported by `show.warn`. `proxy_page`: the
    metrics of the proxy, for its own cost. Raises LoadFailed, WriteFailed, LoginFailed, NoMetrics or NoTruth, each with
    one line of text.
    """
    shape = spec.shape
    prefix = ROOT + b"%d-%d/" % (os.getpid(), time.monotonic_ns())
    ranges = make_ranges(prefix, shape)
    upstream, target = await upstream.logged_in(), await target.logged_in()
    writer = PutWriter(upstream, ranges, spec.value_bytes)
    try:
        first = await writer.start(prefix) + 1
        past = await _write_past(writer, spec, show)
        streams = make_streams(shape, past)
        load = Load(target, ranges, streams, shape.processes)
        before, commits = await page.cost(), writer.commits
        proxy_before = await _samples(proxy_page)
        sampler = Sampler(page)
        with sampler, tempfile.TemporaryDirectory(prefix="watchmux-load-") as directory:
            try:
                opened_s = await _open(load, Path(directory), show)
                watching = await _settle(page)
                past_events = writer.written
                await _write(load, writer, spec, show)
                complete = await _finish(load, writer, show)
                after = await page.cost()
                proxy_after = await _samples(proxy_page)
                list_ranges = await _list(load, prefix, page, show) if complete else 0
            finally:
                sampler.stop()
                total = load.total
                await load.leave()
            complaints = _complaints(load, total, complete)
            show.step("Comparing with the store's history", shape.watches)
            truth = await read_truth(upstream, prefix, first, writer.revision)
            last = writer.revision
            verdict = await asyncio.to_thread(judge, load.plans, truth, last, safe_headers=through_proxy)
            show.at(shape.watches)
        written = writer.written - past_events
    finally:
        if left := await writer.clean_up():
            show.warn(f"the keys below {prefix.decode()} at {upstream.address} could not be removed: {left}")
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
        other_writes=writer.revision - first + 1 - writer.commits,
        lists=total.listed,
        list_ranges=list_ranges,
        other_calls=_other_calls(before, after, 0 if through_proxy else writer.commits - commits + len(streams)),
        proxy_cpu_s=_growth(proxy_before, proxy_after, "process_cpu_seconds_total"),
        proxy_memory_bytes=proxy_after.get("process_resident_memory_bytes"),
    )


def _complaints(load: Load, total: ClientReport, complete: bool) -> list[str]:
    late = f"{load.watches - total.finished} of {load.watches} watches did not get all events"
    return [*total.failed, *(() if complete else (late,))]


async def _samples(page: MetricsPage | None) -> dict[str, float]:
    """Read the proxy's own numbers; none if there is no page, or the proxy has ended, which its clients report."""
    if page is not None:
        with contextlib.suppress(NoMetrics):
            return await page.samples()
    return {}


def _other_calls(before: ServingCost, after: ServingCost, ours: int) -> int | None:
    """Count the calls of other clients; `ours` are the trial's. Unknown through a proxy, which makes calls too."""
    if not ours or before.calls is None or after.calls is None:
        return None
    return max(0, after.calls - before.calls - ours)


def _growth(before: Mapping[str, float], after: Mapping[str, float], name: str) -> float | None:
    return round(after[name] - before[name], 3) if name in before and name in after else None


async def _write_past(writer: PutWriter, spec: TrialSpec, show: TrialProgress) -> list[int]:
    """Write the changes before the first watch; return the revisions at which watches may start."""
    if not spec.past_writes:
        return []
    show.step("Writing a past", spec.past_writes)
    revisions = []
    for number in range(spec.past_writes):
        await writer.write()
        revisions.append(writer.revision)
        show.at(number + 1)
    # From the first half, so that every range still has changes after each start.
    return revisions[: max(1, len(revisions) // 2) : 7]


async def _open(load: Load, directory: Path, show: TrialProgress) -> float:
    show.step("Opening watches", load.watches)
    start = time.monotonic()
    await load.start(directory)
    await _showing(load.wait_opened(), lambda: show.at(load.total.opened, f"{load.total.opened:,} watches"))
    return time.monotonic() - start


async def _settle(page: MetricsPage) -> ServingCost:
    """Wait until the upstream's number of watchers is stable: those that catch up with the past are temporary."""
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


async def _write(load: Load, writer: PutWriter, spec: TrialSpec, show: TrialProgress) -> None:
    show.step("Writing", spec.seconds)
    start = time.monotonic()
    await _showing(
        writer.write_for(spec.seconds, spec.per_second),
        lambda: show.at(min(time.monotonic() - start, spec.seconds), f"{load.total.events:,} events delivered"),
    )


async def _finish(load: Load, writer: PutWriter, show: TrialProgress) -> bool:
    show.step("Waiting for the last events", load.watches)
    return await _showing(
        load.wait_finished(writer.final),
        lambda: show.at(load.total.finished, f"{load.total.events:,} events delivered"),
    )


async def _list(load: Load, prefix: bytes, page: MetricsPage, show: TrialProgress) -> int:
    """Let all streams list all keys at once; return the number of Range calls that the upstream served for them."""
    show.step("Listing", load.streams)
    before = (await page.cost()).ranges
    await _showing(load.list_all(prefix), lambda: show.at(load.total.listed, f"{load.total.listed:,} lists"))
    return (await page.cost()).ranges - before


async def _showing(work: Awaitable[T], update: Callable[[], None]) -> T:
    """Run `work`, and call `update` regularly until it is done."""
    task = asyncio.ensure_future(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=REFRESH_S)
            update()
        return task.result()
    finally:
        task.cancel()
