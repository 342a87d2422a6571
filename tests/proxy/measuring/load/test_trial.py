"""A trial on a real etcd: the verdict is faultless, and the trial leaves no keys in etcd."""

from __future__ import annotations

import asyncio

from proxy.measuring.load.plan import LoadShape
from proxy.measuring.load.prometheus import MetricsPage
from proxy.measuring.load.target import LoadTarget
from proxy.measuring.load.trial import Trial, TrialSpec, run_trial
from tests.etcd.server import EtcdServer

SHAPE = LoadShape(watches=60, ranges=5, streams=12, channels=4, processes=2, pause_s=0.3)


class Steps:
    """Records the steps of a trial."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def step(self, text: str, total: float) -> None:
        assert total > 0
        self.texts.append(text)

    def at(self, value: float, text: str = "") -> None:
        assert value >= 0, text

    def warn(self, text: str) -> None:
        self.texts.append(text)


def trial_on(etcd: EtcdServer, steps: Steps) -> Trial:
    async def run() -> Trial:
        page = MetricsPage(etcd.url)
        try:
            target = LoadTarget(address=etcd.endpoint)
            spec = TrialSpec(shape=SHAPE, seconds=1.0, per_second=60, value_bytes=64, past_writes=60)
            return await run_trial(spec, target, page, target, steps, through_proxy=False)
        finally:
            await page.close()

    return asyncio.run(run())


def test_a_real_etcd_is_faultless_and_counts_every_watch(etcd: EtcdServer) -> None:
    steps = Steps()
    trial = trial_on(etcd, steps)
    assert trial.complaints == []
    assert trial.verdict.faultless, trial.verdict.examples
    assert trial.verdict.watches == 60
    assert trial.watchers == 60
    assert trial.watch_streams == 12
    assert trial.written > 60
    assert trial.lists == trial.list_ranges == 12
    assert trial.verdict.events == trial.after.events_sent - trial.before.events_sent
    assert 0 < trial.verdict.p50_ms <= trial.verdict.p99_ms
    assert steps.texts == [
        "Writing a past",
        "Opening watches",
        "Writing",
        "Waiting for the last events",
        "Listing",
        "Comparing with the store's history",
    ]
    # The trial deletes its keys, since etcd may be in production.
    assert etcd.ctl("get", "", "--prefix", "--keys-only").stdout.strip() == ""
