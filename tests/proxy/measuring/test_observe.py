"""`measure --observe`: what is saved, computed from two metrics pages; on a real etcd with a real proxy."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest

from coalesce.suggesting import RANGES_MIN
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.cli.group import run
from proxy.measuring.load.prometheus import MetricsPage, NoMetrics
from proxy.measuring.load.show import ProgressBars
from proxy.measuring.observe import MetricsLook, Observation, compare_observed, look_of, observe
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.server import EtcdServer
from tests.proxy.admin.test_admin import admin_of
from tests.proxy_process import ProxyProcess
from tests.waiting import until, until_async

ETCD = {
    "etcd_debugging_mvcc_watcher_total": 15.0,
    "etcd_debugging_mvcc_watch_stream_total": 3.0,
    "etcd_debugging_mvcc_events_total": 100.0,
    "etcd_network_client_grpc_sent_bytes_total": 1000.0,
    "process_cpu_seconds_total": 1.0,
    "process_resident_memory_bytes": 1e6,
}
PROXY = {
    "watchmux_watches": 1000.0,
    "watchmux_trunks": 9.0,
    "watchmux_backfills": 1.0,
    "watchmux_upstream_streams": 2.0,
    "watchmux_sessions": 200.0,
    "watchmux_events_received_total": 50.0,
    "watchmux_events_delivered_total": 5000.0,
    "watchmux_upstream_received_bytes_total": 500.0,
    "watchmux_delivered_bytes_total": 50_000.0,
    "watchmux_lagging": 0.0,
    "watchmux_stalls_total": 0.0,
    "watchmux_delivery_delay_seconds_sum": 0.0,
    "watchmux_delivery_delay_seconds_count": 0.0,
}


def later(page: dict[str, float], **changes: float) -> dict[str, float]:
    return {**page, **changes}


def test_deliveries_of_the_proxy_replace_its_receipts() -> None:
    etcd = later(ETCD, etcd_debugging_mvcc_events_total=120, etcd_network_client_grpc_sent_bytes_total=3000)
    proxy = later(
        PROXY,
        watchmux_events_received_total=60,
        watchmux_events_delivered_total=6000,
        watchmux_upstream_received_bytes_total=1500,
        watchmux_delivered_bytes_total=150_000,
        watchmux_delivery_delay_seconds_sum=0.02,
        watchmux_delivery_delay_seconds_count=10,
    )
    seen = Observation(etcd="e", proxy="p", looks=[look_of(0, ETCD, PROXY), look_of(10, etcd, proxy)])
    found = compare_observed(seen)
    rows = {row.name: (row.before, row.after) for row in found.rows}
    assert rows == {
        "watchers": (5 + 1000, 15),
        "watch streams": (1 + 200, 3),
        "events sent": (2 - 1 + 100, 2),
        "bytes sent": (200 - 100 + 10_000, 200),
    }
    assert ("the proxy's delay", "2.0 ms on average from receipt to write") in found.facts
    assert [series.name for series in found.series] == ["watchers", "events sent"]


@pytest.mark.parametrize("page", ["etcd", "proxy"])
def test_a_page_of_something_else_is_refused(page: str) -> None:
    with pytest.raises(NoMetrics, match="they are not"):
        look_of(0, {} if page == "etcd" else ETCD, {} if page == "proxy" else PROXY)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--observe", "--observe: requires --proxy-metrics"),
        ("--observe --proxy-metrics=a:1", "--observe: requires --upstream"),
        ("--proxy-metrics=a:1", "--proxy-metrics: requires --observe or --proxy"),
        ("--report=/nowhere/x.html", "--report: cannot write /nowhere/x.html: no such file or directory"),
    ],
)
def test_wrong_requests_are_refused_before_anything_runs(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["measure", *arguments.split()]) == 2
    assert message in capsys.readouterr().err


def test_a_real_proxy_in_front_of_a_real_etcd(
    etcd: EtcdServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report = tmp_path / "saved.html"
    with ProxyProcess(etcd.endpoint) as proxy, grpc.insecure_channel(proxy.endpoint) as channel:
        grpc.channel_ready_future(channel).result(20)
        request = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"a"))
        streams: list[Any] = [rpc_pb2_grpc.WatchStub(channel).Watch(iter([request])) for _ in range(20)]
        for stream in streams:
            assert next(stream).created
        until(lambda: etcd.watchers() == 1, "one watcher at etcd")
        arguments = [f"--upstream={etcd.endpoint}", f"--proxy-metrics=127.0.0.1:{proxy.metrics_port}", "--seconds=0.2"]
        assert run(["measure", "--observe", "--json", f"--report={report}", *arguments]) == 0
        seen = msgspec.json.decode(capsys.readouterr().out, type=Observation)
        rows = {row.name: (row.before, row.after) for row in compare_observed(seen).rows}
        assert rows["watchers"] == (20, 1)
        assert rows["watch streams"] == (20, 1)
        assert run(["measure", "--observe", *arguments]) == 0
        assert "20.0x" in capsys.readouterr().out
        for stream in streams:
            stream.cancel()
    assert "20 client watches" in report.read_text()
    assert seen.suggested_covers == []
    assert isinstance(seen.last, MetricsLook)


def test_covers_that_the_status_suggests_are_shown(etcd: EtcdServer) -> None:
    async def scenario() -> Observation:
        async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
            stream = client.watch()
            for number in range(RANGES_MIN):
                stream.create(b"/services/%d" % number)
            await until_async(lambda: len(stream.raw.messages) == RANGES_MIN, "the watches")
            async with admin_of(proxy) as admin:
                pages = MetricsPage(etcd.url), MetricsPage(f"http://{admin.address}")
                with ProgressBars() as bars:
                    seen = await observe(pages[:1], pages[1], 0.1, bars)
                for page in pages:
                    await page.close()
        return seen

    facts = compare_observed(asyncio.run(scenario())).facts
    assert ("suggestion", f"--cover=/services/ would serve {RANGES_MIN} ranges from 1 upstream watch") in facts
