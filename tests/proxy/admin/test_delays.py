"""Histograms and the monitor's history: counts, quantiles, steps, formatting of ranges."""

from __future__ import annotations

import asyncio

import pytest

from proxy.admin.delays import BOUNDS_S, Histogram, LoopDelay, quantile
from proxy.admin.monitor import STEPS_KEPT, Monitor, show_range
from tests.e2e.running import proxy_for
from tests.waiting import until_async


def test_a_value_at_a_bound_counts_for_that_bucket() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 99.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.sum == 102.0
    assert histogram.count == 4


@pytest.mark.parametrize(
    ("share", "counts", "bound"),
    [(0.5, [0, 0, 0], None), (0.5, [1, 1, 0], 1.0), (0.51, [1, 1, 0], 2.0), (0.99, [1, 1, 1], 2.0)],
)
def test_quantiles_are_upper_bounds(share: float, counts: list[int], bound: float | None) -> None:
    assert quantile(share, (1.0, 2.0), counts) == bound


def test_bounds_are_ascending() -> None:
    assert list(BOUNDS_S) == sorted(set(BOUNDS_S))


def test_a_late_event_loop_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.admin.delays.TICK_S", 0.01)
    rung = []

    async def run() -> Histogram:
        delay = LoopDelay(lambda: rung.append(True))
        delay.start()
        await until_async(lambda: len(rung) >= 2, "the timer to ring twice")
        delay.stop()
        return delay.histogram

    assert asyncio.run(run()).count == len(rung)


@pytest.mark.parametrize(
    ("key", "range_end", "shown"),
    [
        (b"/a", b"", "/a"),
        (b"/a/", b"/a0", "/a/*"),
        (b"a", b"c", "a to c"),
        (b"a", b"\0", "a and above"),
        (b"\0", b"\0", "every key"),
        (b"\xff", b"\0", "\\xff*"),
        (b"<b>", b"", "<b>"),
        (b"k" * 500, b"", "k" * 100),
    ],
)
def test_ranges_are_formatted_for_people(key: bytes, range_end: bytes, shown: str) -> None:
    assert show_range(key, range_end) == shown


def test_the_history_of_points_is_bounded() -> None:
    async def run() -> int:
        async with proxy_for("127.0.0.1:1") as proxy:
            monitor = Monitor(proxy, "")
            for _ in range(STEPS_KEPT + 5):
                monitor.step(10.0)
            return len((await monitor.overview()).points)

    assert asyncio.run(run()) == STEPS_KEPT
