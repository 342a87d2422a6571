"""The whole proxy under a random workload with faults; see churn.py."""

from __future__ import annotations

import asyncio
import random

import pytest

from coalesce.limits import CoreLimits
from tests.e2e.churn import Churn, History
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer


async def _churn(etcd: EtcdServer, seed: int, steps: int, kills: int) -> None:
    chance = random.Random(seed)
    limits = CoreLimits(
        history_bytes_max=chance.choice((20_000, 300_000, 16_000_000)),
        history_revisions_max=chance.choice((20, 200, 20_000)),
        linger_s=chance.choice((0.05, 2.0)),
    )
    async with proxy_for(etcd, limits=limits) as proxy, direct(etcd) as store:
        history = History(etcd.client_port)
        churn = Churn(proxy, etcd, store, history, chance)
        try:
            for _ in range(3):
                await churn.connect()
            for number in range(steps):
                await churn.step()
                if kills and number % (steps // kills) == steps // kills - 1:
                    killing = asyncio.create_task(churn.kill())
                    while not killing.done():
                        await churn.step()
                    await killing
            last = await churn.settle()
            assert churn.judge(last) == []
            stats = proxy.engine.core.stats
            print(stats, proxy.engine.stats)  # noqa: T201 - shown when it fails
            for client in churn.clients:
                await client.close()
        finally:
            await history.stop()


@pytest.mark.parametrize("seed", range(2))
def test_clients_that_come_and_go_miss_nothing(etcd: EtcdServer, seed: int) -> None:
    run(_churn(etcd, seed, 600, 1))


@pytest.mark.long
@pytest.mark.timeout(320)
@pytest.mark.parametrize("seed", range(100, 104))
def test_clients_that_come_and_go_for_long_miss_nothing(etcd: EtcdServer, seed: int) -> None:
    run(_churn(etcd, seed, 4000, 4), 300)
