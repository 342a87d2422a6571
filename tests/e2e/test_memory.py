"""Memory used by clients that read nothing: ten thousand streams, and events that none of them reads."""

from __future__ import annotations

import pytest

from tests.e2e.attacks import WATCHED, WINDOW_MAX, attacking
from tests.e2e.running import direct
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until_async

STREAMS = 10_000
STREAM_BYTES_MAX = 5 * 1024
EVENTS = 200
EVENT_BYTES = 100_000
UNREAD_BYTES_MAX = 120 * 2**20
"""For the 20 MB of events, of which the history holds 16 MiB, and what waits for the connection; not per stream."""


@pytest.mark.long
@pytest.mark.parametrize(("window", "deaf"), [(0, False), (65_535, True), (WINDOW_MAX, True)])
def test_streams_that_are_not_read_cost_little(etcd: EtcdServer, window: int, deaf: bool) -> None:
    async def scenario(proxy: ProxyProcess) -> None:
        async with direct(etcd) as store, attacking(proxy.port, window) as attacker:
            before = proxy.memory_bytes()
            await attacker.flood(attacker.watch(2 * number + 1) for number in range(STREAMS))
            await until_async(lambda: proxy.metric("watchmux_watches") == STREAMS, "the watches", 60)
            assert proxy.memory_bytes() - before < STREAMS * STREAM_BYTES_MAX
            if deaf:
                attacker.pause()
            for _ in range(EVENTS):
                await store.put(WATCHED, bytes(EVENT_BYTES))
            await until_async(lambda: proxy.metric("watchmux_lagging") == STREAMS, "all of them to be behind", 60)
            assert proxy.memory_bytes() - before < UNREAD_BYTES_MAX
            assert not attacker.over.is_set()

    with ProxyProcess(etcd.endpoint) as proxy:
        run(scenario(proxy), 120)
