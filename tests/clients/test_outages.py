"""clientv3 while no etcd is reachable: failed calls through one proxy, and through two."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable

import pytest

from tests.clients.clientv3 import Clientv3, Line
from tests.e2e.scenario import run
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.faults.relay import Relay, relay_to
from tests.proxy_process import ProxyProcess
from tests.waiting import until

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

LOST_S = 12
"""How long one of two proxies is without its etcd: longer than its calls may wait, so that they are refused."""


PUTS_MAX = 40


def failed(summary: Line) -> dict[str, int]:
    """Return the calls that failed, by their error."""
    kinds = [one for one in summary.values() if isinstance(one, dict)]
    assert kinds
    return {text: count for one in kinds for text, count in one["errors"].items()}


def broke_under_way(text: str) -> bool:
    """Return whether a call had been sent when its connection broke: without a proxy a write fails so as well."""
    return any(part in text for part in ("the connection was lost", "closed the connection", "error reading from"))


def _kill_etcd(etcd: EtcdServer, _proxy: ProxyProcess) -> None:
    etcd.kill()
    etcd.start()


def _restart_proxy(_etcd: EtcdServer, proxy: ProxyProcess) -> None:
    proxy.stop()
    proxy.start()


def _kill_proxy(_etcd: EtcdServer, proxy: ProxyProcess) -> None:
    proxy.kill()
    proxy.start()


@pytest.mark.parametrize("fault", [_kill_etcd, _restart_proxy, _kill_proxy])
def test_outage_fails_only_calls_under_way(fault: Callable[[EtcdServer, ProxyProcess], None]) -> None:
    """Puts, gets, transactions, a watch, a lease and a lock of one client; as directly, no write is done twice."""
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        with Clientv3("outage", proxy.endpoint) as use:
            until(lambda: proxy.metric("watchmux_calls_total") > 100, "calls")
            fault(etcd, proxy)
            before = proxy.metric("watchmux_calls_total")
            until(lambda: proxy.metric("watchmux_calls_total") > before + 100, "calls again")
            use.finish()
        lost = failed(use.summary())
        assert [text for text in lost if fault is _restart_proxy or not broke_under_way(text)] == []
        keys = json.loads(etcd.ctl("get", "--prefix", "p/", "-w", "json").stdout)["kvs"]
        assert {key["version"] for key in keys} == {1}
        assert use.summary()["watch"]["errors"] == use.summary()["keepalives"]["errors"] == {}


def test_restart_of_etcd_fails_no_call() -> None:
    """As directly (17 of 17): each create and update, in turn, waits until etcd is back."""
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        etcd.stop()
        flags = ("--mode=kubernetes", "--workers=17", "--calls=1", "--timeout=30")
        with Clientv3("load", proxy.endpoint, *flags) as load:
            load.until(lambda line: line["kind"] == "started", "the load")
            until(lambda: proxy.metric("watchmux_calls_waiting") == 17, "the creates to wait")
            etcd.start()
            load.wait()
        summary = load.summary()
        assert failed(summary) == {}
        assert summary["creates"]["done"] == summary["updates"]["done"] == 17
        assert summary["tries_most"] == 1
        assert proxy.metric("watchmux_calls_unavailable_total") == 0


async def _with_one_of_two_cut(workers: int, timeout_s: float) -> tuple[Line, int]:
    """Return the summary of a load through two proxies, and how many calls the cut one has refused."""
    loop = asyncio.get_running_loop()
    with EtcdServer() as etcd:
        async with relay_to(etcd.client_port) as way:
            return await loop.run_in_executor(None, _load, loop, etcd, way, workers, timeout_s)


def _load(
    loop: asyncio.AbstractEventLoop, etcd: EtcdServer, way: Relay, workers: int, timeout_s: float
) -> tuple[Line, int]:
    with ProxyProcess(way.endpoint) as cut, ProxyProcess(etcd.endpoint) as whole:
        flags = (f"--workers={workers}", f"--timeout={timeout_s}", "--seconds=60", "--pause=0.05")
        with Clientv3("load", f"{cut.endpoint},{whole.endpoint}", *flags) as load:
            until(lambda: min(one.metric("watchmux_calls_total") for one in (cut, whole)) > 10, "calls on both")
            loop.call_soon_threadsafe(way.cut)
            until(lambda: cut.metric("watchmux_calls_unavailable_total") > workers, "refusals", LOST_S + 10)
            loop.call_soon_threadsafe(way.mend)
            before = cut.metric("watchmux_calls_total")
            until(lambda: cut.metric("watchmux_calls_total") > before + 10, "calls on both")
            load.finish()
        return load.summary(), int(cut.metric("watchmux_calls_unavailable_total"))


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
def test_etcdctl_goes_on_at_the_other_proxy(binary: EtcdBinary) -> None:
    """Its own limit is 5 s for a command, the same as the calls' wait."""
    with (
        EtcdServer() as etcd,
        ProxyProcess(f"{HOST}:{free_port()}") as lost,
        ProxyProcess(etcd.endpoint) as whole,
    ):
        # It starts at the endpoint that answers first.
        for number in range(PUTS_MAX):
            command = [str(binary.etcdctl), f"--endpoints={lost.endpoint},{whole.endpoint}", "put", f"k{number}", "v"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "ETCDCTL_API": "3"})
            assert done.stdout == "OK\n", done.stderr
            if lost.metric("watchmux_calls_total") >= 2:
                break
        assert lost.metric("watchmux_calls_unavailable_total") >= 2


@pytest.mark.parametrize(("workers", "timeout_s"), [(1, 5), (10, 5), (10, 2), (10, 30)])
def test_proxy_without_an_etcd_loses_no_call_of_two(workers: int, timeout_s: float) -> None:
    summary, refused = run(_with_one_of_two_cut(workers, timeout_s), 120)
    assert refused > workers
    assert [text for text in failed(summary) if not broke_under_way(text)] == []
