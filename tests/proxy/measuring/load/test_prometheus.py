"""The upstream's own numbers: read from a real etcd's metrics page; other pages are refused."""

from __future__ import annotations

import asyncio

import pytest

from proxy.measuring.load.prometheus import MetricsPage, NoMetrics, ServingCost, cost_of, parse_page
from tests.etcd.server import EtcdServer


def test_samples_of_one_name_are_summed() -> None:
    text = 'a_total{x="1"} 2\na_total{x="2"} 3\nb 1.5\n'
    assert parse_page(text, "here").sums == {"a_total": 5.0, "b": 1.5}


def test_the_members_of_a_cluster_are_known_by_id() -> None:
    text = 'etcd_server_id{server_id="a1"} 1\n' + "".join(
        f'etcd_network_peer_sent_bytes_total{{To="{peer}"}} 5\n' for peer in ("0", "b2", "c3")
    )
    page = parse_page(text, "here")
    assert page.server_ids == {"a1"}
    assert page.peer_ids == {"b2", "c3"}


def test_other_pages_are_refused() -> None:
    with pytest.raises(NoMetrics, match="here is not a metrics page"):
        parse_page("<html>no</html>", "here")
    with pytest.raises(NoMetrics, match="have no etcd_debugging_mvcc_watcher_total: they are not from etcd"):
        cost_of({"up": 1.0})


def test_the_cost_is_read_from_a_real_etcd(etcd: EtcdServer) -> None:
    async def fetch() -> ServingCost:
        page = MetricsPage(etcd.url)
        try:
            return await page.cost()
        finally:
            await page.close()

    cost = asyncio.run(fetch())
    assert cost.watchers == 0
    assert cost.cpu_s is not None
    assert cost.cpu_s > 0
    assert cost.memory_bytes


def test_an_unreadable_page_gives_an_error_of_one_line(etcd: EtcdServer) -> None:
    async def fetch(url: str) -> None:
        page = MetricsPage(url)
        try:
            await page.cost()
        finally:
            await page.close()

    with pytest.raises(NoMetrics, match=r"^cannot read http://127\.0\.0\.1:1/metrics: connection refused$"):
        asyncio.run(fetch("http://127.0.0.1:1"))
    with pytest.raises(NoMetrics, match="answered 404"):
        asyncio.run(fetch(f"{etcd.url}/nothing/metrics"))
