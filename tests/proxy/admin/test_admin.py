"""The admin port: its pages, what they never show, and the status table on the terminal."""

from __future__ import annotations

import asyncio
import io
import re
import threading
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from typing import Any

import aiohttp
import grpc.aio
import msgspec
import pytest
from prometheus_client import ProcessCollector
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.admin import port
from proxy.admin.metrics import families, start_time_s
from proxy.admin.port import PAGES, Admin
from proxy.admin.snapshot import CoverState, CoverSuggestion, Snapshot, SnapshotSource
from proxy.admin.views import Overview
from proxy.config.values import Address
from proxy.measuring.status import render
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async


@pytest.mark.parametrize("state", [Snapshot(), Snapshot(serving=True, watches=30, trunks=2, backfills=1)])
def test_the_status_table_shows_state_and_reduction(state: Snapshot) -> None:
    output = io.StringIO()
    Console(file=output, width=120).print(render(state))
    text = output.getvalue()
    assert ("not serving" in text) == (not state.serving)
    assert ("10.0x" in text) == bool(state.watches)


def test_the_status_table_shows_reached_limits() -> None:
    output = io.StringIO()
    state = Snapshot(refusals_total={"watches_max": 3, "trunks_max": 0}, lagging=2, lagging_s=61, lagging_revisions=900)
    Console(file=output, width=140).print(render(state))
    text = output.getvalue()
    assert "at watches_max" in text
    assert "trunks_max" not in text
    assert "longest 61 s and 900 revisions" in text


def test_the_status_table_shows_covers_and_suggestions() -> None:
    output = io.StringIO()
    covers = [
        CoverState(cover="", branches=3000, upstream_watches=1, events_total=10, unwanted_events_total=5),
        CoverState(cover="/s/", problem="permission denied"),
        CoverState(cover="/t/", costs_more=True),
    ]
    state = Snapshot(covers=covers, suggested_covers=[CoverSuggestion(cover="/u/", ranges=1204)])
    Console(file=output, width=200).print(render(state))
    text = output.getvalue()
    assert "cover of all keys" in text
    assert "50% of its events are not watched" in text
    assert "refused by etcd, its ranges have upstream watches of their own: permission denied" in text
    assert "costs more than it saves" in text
    assert "1,204" in text
    assert "--cover=/u/ would leave 1 upstream watch" in text


async def test_a_cover_is_shown_with_what_no_client_watches(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, limits=CoreLimits(covers=(b"/s/",))) as proxy, direct(etcd) as store:
        source = SnapshotSource(proxy, "")
        assert source.take().covers == [CoverState(cover="/s/")]
        async with await RawClient.connect(proxy.port) as client:
            await client.open_watch(b"/s/a")
            await store.put(b"/s/a", b"v")
            await store.put(b"/s/b", b"v")
            await until_async(lambda: source.take().covers[0].events_total == 2, "the events")
            snapshot = source.take()
            (cover,) = snapshot.covers
            assert (cover.branches, cover.watches, cover.upstream_watches, cover.unwanted_events_total) == (
                1,
                1,
                1,
                1,
            )
            assert 0 < cover.unwanted_bytes_total < cover.bytes_total
            samples = {sample.name: sample for family in families(snapshot) for sample in family.samples}
            assert samples["watchmux_cover_unwanted_events_total"].labels == {"cover": "/s/"}
            assert samples["watchmux_cover_unwanted_events_total"].value == 1


def test_rates_come_from_two_snapshots() -> None:
    before = Snapshot(uptime_s=10.0, events_delivered_total=100)
    now = Snapshot(uptime_s=12.0, events_delivered_total=150)
    output = io.StringIO()
    Console(file=output, width=120).print(render(now, before))
    assert "25.0 events a second now" in output.getvalue()


@asynccontextmanager
async def admin_of(proxy: Proxy) -> AsyncIterator[Admin]:
    """Yield the running admin port of a proxy."""
    admin = Admin(proxy, Address("127.0.0.1", 0), "127.0.0.1:1")
    await admin.start()
    try:
        yield admin
    finally:
        await admin.stop()


async def fetch(admin: Admin, path: str) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://{admin.address}{path}") as answer:
        return answer.status, await answer.text()


PATHS = {
    "/metrics": 200,
    "/proxy/metrics": 200,
    "/health": 200,
    "/proxy/health": 200,
    "/readyz": 200,
    "/livez": 200,
    "/v1/status": 200,
    "/v1/overview": 200,
    "/": 200,
    "/status.css": 200,
    "/status.js": 200,
    "/nothing": 404,
}


async def told(etcd: EtcdServer) -> dict[str, tuple[int, str]]:
    async with proxy_for(etcd) as proxy, admin_of(proxy) as admin:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        return {path: await fetch(admin, path) for path in PATHS}


def test_a_running_proxy_serves_all_pages(etcd: EtcdServer) -> None:
    answers = asyncio.run(told(etcd))
    assert {path: status for path, (status, _) in answers.items()} == PATHS
    assert {"watchmux_watches", "process_resident_memory_bytes"} <= {
        family.name for family in text_string_to_metric_families(answers["/metrics"][1])
    }
    snapshot = msgspec.json.decode(answers["/v1/status"][1], type=Snapshot)
    assert snapshot.endpoints == [etcd.endpoint]
    assert snapshot.address == "127.0.0.1:1"
    overview = msgspec.json.decode(answers["/v1/overview"][1], type=Overview)
    assert [(each.endpoint, each.connected) for each in overview.endpoints] == [(etcd.endpoint, True)]


async def test_the_loop_turns_while_the_first_scrape_loads(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """All scrapes that arrive meanwhile wait for the same load."""
    turned, threads = threading.Event(), list[int]()

    def load(_: int) -> None:
        threads.append(threading.get_ident())
        assert turned.wait(30)

    monkeypatch.setattr(port, "_load_metrics", load)
    async with proxy_for(etcd) as proxy, admin_of(proxy) as admin:
        scrapes = [asyncio.ensure_future(fetch(admin, path)) for path in ("/metrics", "/proxy/metrics", "/metrics")]
        await until_async(lambda: bool(threads), "the first scrape")
        assert (await fetch(admin, "/livez"))[0] == 200
        assert not any(scrape.done() for scrape in scrapes)
        turned.set()
        assert [status for status, _ in await asyncio.gather(*scrapes)] == [200, 200, 200]
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


async def test_the_loop_does_not_list_its_descriptors(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 8,000 clients this takes 10 ms; the client library does it to find when the process started."""
    threads: list[int] = []
    collect = ProcessCollector.collect

    def counted(collector: ProcessCollector) -> Iterable[Metric]:
        threads.append(threading.get_ident())
        return collect(collector)

    monkeypatch.setattr(ProcessCollector, "collect", counted)
    start_time_s.cache_clear()
    async with proxy_for(etcd) as proxy, admin_of(proxy) as admin:
        for _ in range(2):
            assert (await fetch(admin, "/metrics"))[0] == 200
    assert len(threads) == 1
    assert threads[0] != threading.get_ident()


def test_an_unreachable_etcd_makes_it_unready_but_not_dead() -> None:
    async def run() -> dict[str, int]:
        async with proxy_for("127.0.0.1:1") as proxy, admin_of(proxy) as admin:
            return {path: (await fetch(admin, path))[0] for path in ("/readyz", "/health", "/livez")}

    assert asyncio.run(run()) == {"/readyz": 503, "/health": 503, "/livez": 200}


def test_pages_load_nothing_from_elsewhere() -> None:
    pages = resources.files("proxy.admin").joinpath("pages")
    for name, kind in PAGES.values():
        text = pages.joinpath(name).read_text()
        assert kind.startswith("text/")
        assert not re.search(r"(https?:)?//[a-z0-9]", text.replace("http://www.w3.org/2000/svg", "")), name
        assert "innerHTML" not in text


def test_no_page_shows_values_tokens_or_other_keys(etcd: EtcdServer) -> None:
    """Ranges are shown; no page contains tokens, values, or keys other than those of the ranges."""

    async def run() -> str:
        async with proxy_for(etcd) as proxy, admin_of(proxy) as admin, direct(etcd) as store:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            channel = grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}")
            call: Any = rpc_pb2_grpc.WatchStub(channel).Watch(metadata=(("token", "hunter2"),))
            created = rpc_pb2.WatchCreateRequest(key=b"/shown/", range_end=b"/shown0")
            await call.write(rpc_pb2.WatchRequest(create_request=created))
            await call.read()
            await store.put(b"/shown/discreet", b"hunter3")
            assert (await call.read()).events
            text = "".join([(await fetch(admin, path))[1] for path in PATHS])
            await channel.close()
            return text

    text = asyncio.run(run())
    assert '"/shown/*"' in text
    for secret in ("hunter2", "hunter3", "discreet"):
        assert secret not in text
