"""Waiting for the load's clients: as long as there is progress, and no longer."""

from __future__ import annotations

import asyncio

import pytest

from proxy.measuring.load import run
from proxy.measuring.load.client import ClientReport, FinalRevisions
from proxy.measuring.load.plan import LoadShape, make_ranges, make_streams
from proxy.measuring.load.target import LoadTarget


def load_of_ten(monkeypatch: pytest.MonkeyPatch, *reports: ClientReport) -> run.Load:
    """Return a load without processes; each read of its total returns the next of `reports`, in the end the last."""
    monkeypatch.setattr(run, "STILL_LIMIT_S", 0.1)
    ranges = make_ranges(b"/x/", LoadShape(ranges=1))
    load = run.Load(
        LoadTarget(address=""),
        ranges,
        make_streams(LoadShape(watches=10, ranges=1, streams=1, channels=1, processes=1), []),
        1,
    )
    left = list(reports)
    monkeypatch.setattr(run.Load, "total", property(lambda _: left.pop(0) if len(left) > 1 else left[0]))
    return load


def test_the_load_waits_for_slow_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty reports take far longer than the limit without progress, but each report has some progress."""
    slow = [ClientReport(events=number) for number in range(30)]
    load = load_of_ten(monkeypatch, *slow, ClientReport(events=30, finished=10))
    assert asyncio.run(load.wait_finished(FinalRevisions([], [])))


def test_the_load_gives_up_without_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    load = load_of_ten(monkeypatch, ClientReport(events=5, opened=9, finished=9))
    assert not asyncio.run(load.wait_finished(FinalRevisions([], [])))
    with pytest.raises(run.LoadFailed, match=r"only 9 of 10 watches were opened, and no more came for 0\.1 s"):
        asyncio.run(load.wait_opened())
