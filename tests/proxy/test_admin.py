"""What the operators' port tells: every number of a snapshot, by Prometheus' conventions, and in the status table."""

from __future__ import annotations

import asyncio
import io
import re

import aiohttp
import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from proxy.admin import COUNTERS, GAUGES, Admin
from proxy.config_values import Address
from proxy.snapshot import Snapshot
from proxy.status import render
from tests.etcd.server import EtcdServer
from tests.proxy.running import proxy_for
from tests.waiting import until_async

DESCRIBED = {"version", "pid", "uptime_s", "address", "endpoints", "serving", "reason", "joins_total"}


def test_every_number_of_a_snapshot_is_a_metric() -> None:
    assert set(Snapshot.__struct_fields__) - DESCRIBED == set(GAUGES) | set(COUNTERS)
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES)
    assert not {name.removesuffix("_total") for name in COUNTERS} & set(GAUGES)
    for text in (*GAUGES.values(), *COUNTERS.values()):
        assert text.endswith(".")


@pytest.mark.parametrize("state", [Snapshot(), Snapshot(serving=True, watches=30, trunks=2, backfills=1)])
def test_the_status_table_shows_state_and_reduction(state: Snapshot) -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(render(state))
    text = output.getvalue()
    assert ("not serving" in text) == (not state.serving)
    assert ("10.0x" in text) == bool(state.watches)


def test_rates_are_between_two_snapshots() -> None:
    before = Snapshot(uptime_s=10.0, events_delivered_total=100)
    now = Snapshot(uptime_s=12.0, events_delivered_total=150)
    output = io.StringIO()
    Console(file=output, width=120).print(render(now, before))
    assert "25.0 events a second now" in output.getvalue()


async def fetch(admin: Admin, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{admin.address}{path}") as answer:
        return answer.status, await answer.text()


async def told(etcd: EtcdServer) -> dict[str, tuple[int, str]]:
    async with proxy_for(etcd) as proxy:
        admin = Admin(proxy, Address("127.0.0.1", 0), "127.0.0.1:1")
        await admin.start()
        try:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            return {path: await fetch(admin, path) for path in ("/metrics", "/health", "/v1/status", "/nothing")}
        finally:
            await admin.stop()


def test_metrics_health_and_status_of_a_running_proxy(etcd: EtcdServer) -> None:
    answers = asyncio.run(told(etcd))
    assert {path: status for path, (status, _) in answers.items()} == {
        "/metrics": 200,
        "/health": 200,
        "/v1/status": 200,
        "/nothing": 404,
    }
    families = {family.name: family for family in text_string_to_metric_families(answers["/metrics"][1])}
    ours = {name for name in families if name.startswith("watchmux_")}
    assert len(ours) == len(GAUGES) + len(COUNTERS) + 2
    for name in ours:
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name)
        assert families[name].documentation
        assert families[name].samples
    assert families["watchmux_upstream_reachable"].samples[0].value == 1
    snapshot = msgspec.json.decode(answers["/v1/status"][1], type=Snapshot)
    assert snapshot.endpoints == [etcd.endpoint]
    assert snapshot.address == "127.0.0.1:1"
