"""The status page in a real browser, with a busy proxy: wide and narrow, light and dark."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.measuring.comparison import Row, Unit
from proxy.measuring.report import render_report
from tests import browser
from tests.browser import Browser
from tests.etcd.server import EtcdServer
from tests.proxy.measuring.test_report import comparison
from tests.proxy_process import ProxyProcess
from tests.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]

NASTY = b"/app/<img src=x onerror=document.title='broken'>/"
LOOKS = {"wide": (1200, 900, False), "dark": (1200, 900, True), "phone": (400, 860, False)}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    browser.install()
    with Browser() as started:
        yield started


def watch(channel: grpc.Channel, keys: list[bytes]) -> Any:
    """Open one stream with a watch for each key as a prefix."""
    requests = [
        rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=key, range_end=key[:-1] + b"0"))
        for key in keys
    ]
    answers = rpc_pb2_grpc.WatchStub(channel).Watch(iter(requests))
    for _ in keys:
        assert next(answers).created
    return answers


def test_the_page_warns_of_the_bundled_store(chromium: Browser) -> None:
    with ProxyProcess("") as proxy:
        shown(chromium, proxy)
        notice = "return document.getElementById('store').checkVisibility()"
        assert chromium.run(notice)
        assert chromium.run("return document.title").startswith("⚠ ")
        chromium.open("about:blank")  # a page whose proxy has gone would complain
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        shown(chromium, proxy)
        assert not chromium.run(notice)
        chromium.open("about:blank")


@pytest.fixture
def busy(etcd: EtcdServer) -> Iterator[ProxyProcess]:
    """A proxy with 30 watches over 3 ranges, after a few writes."""
    with ProxyProcess(f"{etcd.endpoint},127.0.0.1:1") as proxy, contextlib.ExitStack() as stack:
        channel = stack.enter_context(grpc.insecure_channel(proxy.endpoint))
        grpc.channel_ready_future(channel).result(20)
        streams = [watch(channel, [b"/app/a/", b"/app/b/", NASTY]) for _ in range(10)]
        for number in range(5):
            etcd.ctl("put", "/app/a/x", str(number))
        with ThreadPoolExecutor() as pool:
            list(pool.map(next, streams))
        yield proxy


def shown(chromium: Browser, proxy: ProxyProcess) -> None:
    chromium.open(f"http://127.0.0.1:{proxy.metrics_port}/")
    until(lambda: chromium.run("return document.body.dataset.ready") == "yes", "the page to have its numbers")


def test_the_page_shows_the_state_of_the_proxy(chromium: Browser, busy: ProxyProcess) -> None:
    shown(chromium, busy)
    assert chromium.text("#state") == "serving"
    assert chromium.text("#reduction") == "10\u00d7"
    assert chromium.text("#watches") == "30"
    assert chromium.text("#upstream") == "3"
    trunks = chromium.text("#trunks")
    assert "/app/a/*" in trunks
    assert NASTY.decode() in trunks, "a key is text"
    endpoints = chromium.text("#endpoints")
    assert "watches and calls" in endpoints
    assert "connection refused" in endpoints
    assert "no client lags" in chromium.text("#sessions")
    assert "grpc-python" in chromium.text("#clients")
    until(lambda: chromium.text("#out").endswith("/s"), "rates")
    assert chromium.complaints() == []
    assert "broken" not in chromium.run("return document.title")


@pytest.mark.parametrize("look", LOOKS)
def test_the_page_fits_and_is_legible(look: str, chromium: Browser, busy: ProxyProcess, tmp_path: Path) -> None:
    width, height, dark = LOOKS[look]
    chromium.look(width, height, dark=dark)
    shown(chromium, busy)
    assert chromium.run("return document.documentElement.scrollWidth") <= width
    ink, paper = (
        sum(map(int, chromium.run(f"return getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3)")))
        for name in ("color", "backgroundColor")
    )
    assert (ink > paper) == dark
    assert abs(ink - paper) > 400
    sizes = "return [...document.querySelectorAll('td,th,p,figcaption')].map(e => getComputedStyle(e).fontSize)"
    assert all(float(size.removesuffix("px")) >= 12 for size in chromium.run(sizes))
    if width >= 1200:
        wider = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth).length"
        assert chromium.run(wider) == 0, "on a wide screen each table fits"
        rows = "return new Set([...document.querySelectorAll('.tile')].map(e => e.offsetTop)).size"
        assert chromium.run(rows) == 1
    # A table that is wider than the screen shows a shadow at the edge where it goes on.
    shadows = "return getComputedStyle(document.querySelector('.scroll')).backgroundAttachment"
    assert chromium.run(shadows).startswith("local, local, scroll, scroll")
    chromium.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_a_chart_draws_the_past(chromium: Browser, busy: ProxyProcess) -> None:
    shown(chromium, busy)

    def points() -> int:
        with urllib.request.urlopen(f"http://127.0.0.1:{busy.metrics_port}/v1/overview", timeout=5) as answer:
            return len(json.loads(answer.read())["points"])

    until(lambda: points() >= 2, "two steps of the past", 40)
    count = "return document.querySelectorAll('#chart-watches path.line').length"
    until(lambda: chromium.run(count) == 2, "two lines")


def test_charts_follow_the_width_of_the_window(chromium: Browser, busy: ProxyProcess) -> None:
    """Their labels would shrink with the page until the next values arrive; here none arrive."""
    chromium.look(1280, 900)
    shown(chromium, busy)
    chromium.run("window.fetch = () => new Promise(() => {})")
    chromium.look(390, 844)
    fits = "return [...document.querySelectorAll('svg')].every(e => e.viewBox.baseVal.width === e.clientWidth)"
    until(lambda: chromium.run(fits), "the charts to be drawn again")


def test_the_page_shows_that_the_proxy_is_gone(chromium: Browser, busy: ProxyProcess) -> None:
    shown(chromium, busy)
    busy.kill()
    until(lambda: "the values are" in chromium.text("#state"), "the page to notice")
    assert re.fullmatch(r"the proxy does not respond; the values are (0|\S+ \S+) old", chromium.text("#state"))
    assert chromium.run("return document.title").startswith("✕ no response: watchmux ")
    assert chromium.run("return getComputedStyle(document.querySelector('main')).opacity") == "0.45"
    busy.start()
    until(lambda: chromium.text("#state") == "serving", "the page to come back")
    assert chromium.run("return document.title").startswith("watchmux ")
    assert chromium.run("return getComputedStyle(document.querySelector('main')).opacity") == "1"
    # Nothing is watched now: no reduction is shown, and not "0x".
    assert chromium.text("#reduction") == "\u2013"


def test_the_page_fetches_only_from_its_proxy(chromium: Browser, busy: ProxyProcess) -> None:
    shown(chromium, busy)
    names = chromium.run("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names
    assert all(name.startswith(f"http://127.0.0.1:{busy.metrics_port}/") for name in names)


def test_the_report_fits_and_is_legible(chromium: Browser, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    names = ("events its clients got", "the proxy's CPU time", "bytes sent")
    rows = [
        Row(name=name, unit=Unit.BYTES, before=2.0**40, after=2.0**35, note="by etcd's own count") for name in names
    ]
    page.write_text(render_report(comparison(rows=rows), "1.2.3"))
    wider = "return [...document.querySelectorAll('html, .card')].filter(e => e.scrollWidth > e.clientWidth).length"
    sizes = (
        "return Math.min(...Array.from(document.querySelectorAll('svg'), e => e.clientWidth / e.viewBox.baseVal.width))"
    )
    for width in (390, 1280):
        chromium.look(width, 844)
        chromium.open(f"file://{page}")
        assert chromium.run(wider) == 0
        assert chromium.run(sizes) > 0.9, "labels are not much smaller than the page's text"
