"""The metrics: Prometheus' conventions, completeness for the configuration, and values when a limit is reached."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import grpc.aio
import pytest
from prometheus_client import Metric, ProcessCollector
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import CollectorRegistry

from coalesce import CoreLimits
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.admin.metrics import (
    BY_METHOD,
    BY_PROTOCOL,
    COUNTERS,
    GAUGES,
    GRPC_PROXY_FIELD,
    LABELLED,
    ProxyCollector,
    metric_name,
)
from proxy.admin.monitor import Monitor, limits_by_default
from proxy.admin.snapshot import Snapshot
from proxy.config.knobs import knobs
from proxy.server import Proxy
from proxy.watch.settings import WatchSettings
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

DESCRIBED = {
    "certificate_expiry_s",
    "covers",
    "suggested_covers",
    "server_id",
    "server_version",
    "version",
    "host",
    "pid",
    "uptime_s",
    "address",
    "endpoints",
    "endpoint_problems",
    "reachable",
    "serving",
    "reason",
}
GRPC_PROXYS = {"etcd_grpc_proxy_watchers_coalescing_total", "etcd_grpc_proxy_events_coalescing"}
UNITS = re.compile(r"(?<!_)_(ms|us|milliseconds|minutes|kb|kib|mb|mib|kilobytes|percent)(_|$)")


def scrape(monitor: Monitor) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ProxyCollector(monitor))
    return generate_latest(registry).decode()


def value(text: str, name: str, **labels: str) -> float:
    """Return the value of one sample of a page."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    raise AssertionError(f"{name}{labels} is not on the page")


def faults(families: Iterable[Metric]) -> list[str]:
    """Prometheus' own rules for names (promtool check metrics; prometheus.io/docs/practices/naming)."""
    found = []
    for family in families:
        name, kind = family.name, family.type
        names = {sample.name for sample in family.samples}
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or "__" in name:
            found.append(f"{name}: not a plain name")
        if not family.documentation.endswith("."):
            found.append(f"{name}: no sentence says what it is")
        if kind == "counter" and names != {f"{name}_total"}:
            found.append(f"{name}: a counter ends in _total")
        if kind != "counter" and name.endswith("_total") and name not in GRPC_PROXYS:
            found.append(f"{name}: only counters end in _total")
        if kind == "histogram" and not name.endswith("_seconds"):
            found.append(f"{name}: no base unit")
        if kind != "histogram" and re.search(r"_(count|sum|bucket)$", name):
            found.append(f"{name}: looks like a part of a histogram")
        if UNITS.search(name) or kind in name.split("_"):
            found.append(f"{name}: not a base unit, or the kind in the name")
        if not family.samples:
            found.append(f"{name}: nothing in it")
        found += [
            f"{name}: label {label}" for sample in family.samples for label in sample.labels if label.endswith("_")
        ]
    return found


def test_every_number_of_a_snapshot_is_a_metric() -> None:
    assert {field.name for field in fields(Snapshot)} - DESCRIBED == {
        *(*GAUGES, *COUNTERS, *LABELLED, *BY_METHOD, BY_PROTOCOL, GRPC_PROXY_FIELD)
    }
    assert all(name.endswith("_total") for name in COUNTERS)
    assert not any(name.endswith("_total") for name in GAUGES)


def test_every_limit_of_the_configuration_has_a_metric() -> None:
    bounds = {knob.key for knob in knobs() if knob.about.bounds and "_max" in knob.key}
    assert bounds | {"max_concurrent_streams", "history_age_s", "history_linger_s"} == set(limits_by_default())


async def idle_page(etcd: EtcdServer) -> tuple[str, set[str]]:
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving and proxy.upstream.connected, "the proxy to find etcd")
        monitor = Monitor(proxy, "127.0.0.1:1")
        return scrape(monitor), set(monitor.limits())


async def test_the_process_is_described_as_by_prometheus_clients(etcd: EtcdServer) -> None:
    """Without a list of the open descriptors, of which there may be ten thousand."""
    page, _ = await idle_page(etcd)
    expected = {
        sample.name: sample.value for family in ProcessCollector(registry=None).collect() for sample in family.samples
    }
    for name in ("process_start_time_seconds", "process_max_fds"):
        assert value(page, name) == expected.pop(name)
    for name, of_theirs in expected.items():
        assert value(page, name) == pytest.approx(of_theirs, rel=0.5, abs=20), name


def test_metric_names_follow_the_conventions(etcd: EtcdServer) -> None:
    text, limits = asyncio.run(idle_page(etcd))
    families = list(text_string_to_metric_families(text))
    assert not faults(families)
    names = {sample.name for family in families for sample in family.samples}
    for field in (*GAUGES, *COUNTERS):
        assert metric_name(field) in names
    for knob in knobs():
        if knob.key in limits:
            assert {metric_name(knob.about.used), metric_name(knob.about.reached)} <= names
    assert len(names) == len({family.name for family in families}) + 2 * 2, "two histograms, each of three names"
    assert value(text, "watchmux_upstream_endpoint_up", endpoint=etcd.endpoint) == 1
    assert value(text, "watchmux_upstream_resumed_total") == 1
    if shutil.which("promtool"):
        checked = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        complaints = (checked.stdout + checked.stderr).splitlines()
        assert [line for line in complaints if not line.startswith("etcd_grpc_proxy_watchers")] == []


async def watch(proxy: Proxy, count: int) -> tuple[grpc.aio.Channel, list[Any]]:
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}")
    calls: list[Any] = []
    for _ in range(count):
        call: Any = rpc_pb2_grpc.WatchStub(channel).Watch()
        await call.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"a")))
        assert (await call.read()).created
        calls.append(call)
    return channel, calls


def test_deliveries_are_counted_and_timed_once_per_turn(etcd: EtcdServer) -> None:
    async def run() -> str:
        async with proxy_for(etcd) as proxy, direct(etcd) as store:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            monitor = Monitor(proxy, "")
            channel, calls = await watch(proxy, 5)
            await store.put(b"a", b"1")
            for call in calls:
                assert (await call.read()).events
            text = scrape(monitor)
            await channel.close()
            return text

    text = asyncio.run(run())
    assert value(text, "watchmux_messages_delivered_total") == 5
    assert value(text, "etcd_grpc_proxy_events_coalescing_total") == 4
    assert value(text, "etcd_grpc_proxy_watchers_coalescing_total") == 4
    assert value(text, "watchmux_coalescing_ratio") == 5
    assert value(text, "watchmux_delivery_delay_seconds_count") == 1
    assert 0 < value(text, "watchmux_delivery_delay_seconds_sum") < 5
    assert value(text, "watchmux_upstream_received_bytes_total") > 0
    assert value(text, "watchmux_joins_total", kind="live") == 5


LOW: dict[str, dict[str, Any]] = {
    "watches_max": {"limits": CoreLimits(watches_max=2)},
    "watches_per_session_max": {"limits": CoreLimits(watches_per_session_max=2)},
    "trunks_max": {"limits": CoreLimits(trunks_max=2)},
    "sessions_per_connection_max": {"watch": WatchSettings(sessions_per_connection_max=1)},
}


@pytest.mark.parametrize("limit", LOW)
def test_a_refusal_names_its_limit(limit: str, etcd: EtcdServer) -> None:
    async def run() -> str:
        async with proxy_for(etcd, **LOW[limit]) as proxy:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            monitor = Monitor(proxy, "")
            async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
                call: Any = rpc_pb2_grpc.WatchStub(channel).Watch()
                for key in (b"a", b"b", b"c"):
                    await call.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=key)))
                    await call.read()
                if limit == "sessions_per_connection_max":
                    with pytest.raises(grpc.RpcError):
                        await rpc_pb2_grpc.WatchStub(channel).Watch().read()
                return scrape(monitor)

    text = asyncio.run(run())
    for name in LOW:
        assert value(text, "watchmux_limit_refusals_total", limit=name) == (name == limit)
