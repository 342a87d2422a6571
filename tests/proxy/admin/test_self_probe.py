"""The self-probe: it detects a hang, adds no load on etcd, and has no false positives."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.admin.port import Admin
from proxy.admin.self_probe import HUNG_AFTER
from proxy.admin.snapshot import Snapshot, SnapshotSource
from proxy.config.values import Address
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.e2e.test_auth import token_of, with_users
from tests.etcd.binaries import EtcdBinary
from tests.etcd.server import EtcdServer
from tests.proxy.admin.test_admin import fetch
from tests.proxy.admin.test_health import NOT_SERVING, SERVING, check
from tests.proxy.cli.test_cli_serve import served
from tests.waiting import until, until_async

PROBES = (
    *("probes_total", "probes_failed_total", "probe_delay_s", "uptime_s", "written_bytes_total"),
    *("requests_total", "creates_total", "creates_refused_total"),
)


@asynccontextmanager
async def proxy_and_client(etcd: EtcdServer) -> AsyncIterator[tuple[Proxy, RawClient]]:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        yield proxy, client


def counts(proxy: Proxy) -> dict[str, object]:
    """Return a snapshot without the numbers that count probes."""
    seen = msgspec.to_builtins(SnapshotSource(proxy, "").take())
    return {name: value for name, value in seen.items() if name not in PROBES}


async def probe(proxy: Proxy, failing: int = 0) -> None:
    """Run a probe and judge it: it must be answered, unless `failing`."""
    made, failed = proxy.probe.made, proxy.probe.failed
    proxy.probe.attempt()
    attempt = proxy.probe._run
    if failing:
        # Three turns of the event loop suffice for an answer.
        for _ in range(3):
            turn = asyncio.Event()
            asyncio.get_running_loop().call_soon(turn.set)
            await turn.wait()
    else:
        assert attempt is not None
        await until_async(lambda: attempt.answered, f"the answers to a probe ({attempt.problem})")
    proxy.probe.judge()
    assert (proxy.probe.made - made, proxy.probe.failed - failed) == (int(attempt is not None), failing)


async def test_an_idle_proxy_is_probed_without_any_upstream_watch(etcd: EtcdServer) -> None:
    async with proxy_and_client(etcd) as (proxy, _):
        before = counts(proxy)
        for _ in range(5):
            await probe(proxy)
        assert counts(proxy) == before
        assert proxy.upstream.watch_count == proxy.engine.core.stats.upstreams_opened == 0
        seen = SnapshotSource(proxy, "").take()
        assert seen.probes_total == seen.requests_total == seen.creates_total == seen.creates_refused_total == 5
        assert seen.sessions == 0, "an answered probe is closed at once"


async def test_a_probe_needs_no_permissions(etcd_binary: EtcdBinary) -> None:
    with EtcdServer(etcd_binary) as etcd:
        with_users(etcd)
        async with proxy_and_client(etcd) as (proxy, client):
            stream = client.watch([("token", await token_of(client, "u1"))])
            stream.create(b"a/", b"a0")
            assert (await stream.next()).created
            reads = proxy.reader.reads
            await probe(proxy)
            assert proxy.reader.reads == reads


def inbox_is_stuck(proxy: Proxy) -> None:
    proxy.engine._busy = True


def nothing_is_written(proxy: Proxy) -> None:
    proxy.listener.output.flush_soon = lambda *_: None  # type: ignore[method-assign]  # the fault


def nothing_is_answered(proxy: Proxy) -> None:
    proxy.engine._carry_out = {**proxy.engine._carry_out, **dict.fromkeys(_kinds(proxy, "Send"), _ignore)}


def _kinds(proxy: Proxy, name: str) -> list[type]:
    return [kind for kind in proxy.engine._carry_out if kind.__name__ == name]


def _ignore(_effect: object) -> None:
    """Do nothing."""


HANGS: dict[str, Callable[[Proxy], None]] = {
    fault.__name__: fault for fault in (inbox_is_stuck, nothing_is_written, nothing_is_answered)
}


@pytest.mark.parametrize("name", HANGS)
async def test_a_hang_is_detected_and_reported_everywhere(name: str, etcd: EtcdServer) -> None:
    async with proxy_and_client(etcd) as (proxy, client), direct(etcd) as store:
        admin = Admin(proxy, Address("127.0.0.1", 0), "")
        await admin.start()
        stream = client.watch()
        stream.create(b"h")
        assert (await stream.next()).created
        await store.put(b"h", b"1")
        assert (await stream.next()).events
        await probe(proxy)
        engine, whole = proxy.engine, dict(proxy.engine._carry_out)
        HANGS[name](proxy)
        for _ in range(HUNG_AFTER - 1):
            await probe(proxy, failing=1)
            assert (await fetch(admin, "/livez"))[0] == 200, "one or two are not a hang"
        await probe(proxy, failing=1)
        status, text = await fetch(admin, "/livez")
        assert (status, text) == (503, "the proxy hangs: 3 self-probes in a row were not answered\n")
        assert (await fetch(admin, "/readyz"))[0] == 503
        # The hang ends.
        engine._busy = False
        engine._carry_out = whole
        vars(proxy.listener.output).pop("flush_soon", None)
        proxy.listener.output._dirty.clear()
        await probe(proxy)
        assert await check(client) == SERVING
        assert (await fetch(admin, "/livez")) == (200, "ok\n")
        assert SnapshotSource(proxy, "").take().probes_failed_total == HUNG_AFTER
        await admin.stop()


async def test_a_core_that_fails_repeatedly_is_detected(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, failures=2 * HUNG_AFTER) as proxy, await RawClient.connect(proxy.port) as client:
        await until_async(lambda: proxy.health.serving and proxy.engine.core.header, "the proxy to find etcd")
        engine: Any = proxy.engine

        def broken(*_: object) -> list[object]:
            raise ArithmeticError("on purpose")

        for attempts in (1, 0):
            # First the core fails at the probe, later at another input in between.
            for _ in range(HUNG_AFTER):
                engine.core.create = engine.core.create_admitted = engine.core.expire = broken
                if not attempts:
                    engine._input(engine.core.expire)
                    # A new core was started.
                    assert "create" not in vars(engine.core)
                await probe(proxy, failing=1)
            assert proxy.health.hung
            assert await check(client) == NOT_SERVING
            for step in ("create", "create_admitted", "expire"):
                vars(engine.core).pop(step, None)
            await probe(proxy)
            assert await check(client) == SERVING


async def test_other_problems_are_not_a_hang(etcd: EtcdServer) -> None:
    async with proxy_for("127.0.0.1:1") as alone:
        # Without etcd there is no header to answer with.
        for _ in range(HUNG_AFTER):
            alone.probe.attempt()
            alone.probe.judge()
        assert (alone.probe.made, alone.health.hung) == (0, "")
    async with proxy_and_client(etcd) as (proxy, _):
        # A limit that leaves no room is not a fault of the proxy, and the limit's metric does not count it.
        proxy.engine.set_limits(replace(proxy.engine.core.limits, watches_max=1))
        await probe(proxy)
        assert not any(proxy.engine.core.stats.refused_at.values())
        proxy.health.set_draining()
        for _ in range(HUNG_AFTER):
            proxy.probe.attempt()
            proxy.probe.judge()
        assert (proxy.probe.made, proxy.health.hung, proxy.health.reason) == (1, "", "draining")


def test_a_stopped_process_is_not_hung_a_blocked_one_is_silent(tmp_path: Path, etcd: EtcdServer) -> None:
    def probed(at_least: int) -> Callable[[], bool]:
        return lambda: msgspec.json.decode(proxy.get("/v1/status")[1], type=Snapshot).probes_total >= at_least

    with served(tmp_path, f"--endpoints={etcd.endpoint}", "--probe-interval=50ms") as proxy:
        until(probed(5), "probes")
        proxy.process.send_signal(signal.SIGSTOP)
        address = str(proxy.serving()["metrics"]).removeprefix("http://").removesuffix("/metrics")
        host, _, port = address.rpartition(":")
        with socket.create_connection((host, int(port))) as asking:
            asking.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
            asking.settimeout(1.0)
            with pytest.raises(TimeoutError):
                asking.recv(1)
            proxy.process.send_signal(signal.SIGCONT)
            asking.settimeout(10.0)
            assert asking.recv(64).startswith(b"HTTP/1.1 200")
        seen = msgspec.json.decode(proxy.get("/v1/status")[1], type=Snapshot)
        until(probed(seen.probes_total + HUNG_AFTER), "probes afterwards")
        seen = msgspec.json.decode(proxy.get("/v1/status")[1], type=Snapshot)
        # On a busy machine a single probe may be late; so many in a row that the process counts as hung may not.
        assert seen.probes_failed_total < HUNG_AFTER
        assert (seen.serving, seen.sessions, seen.watches) == (True, 0, 0)
        assert seen.creates_total == seen.requests_total == seen.probes_total
        assert proxy.end() == 0


async def test_etcd_refuses_the_request_of_a_probe_too(etcd: EtcdServer) -> None:
    """etcd refuses the impossible revision of the probe with the same response as the proxy."""
    _, _, port = etcd.endpoint.rpartition(":")
    async with await RawClient.connect(int(port)) as client:
        stream = client.watch()
        stream.create(b"", start_revision=-1)
        answer = await stream.next()
        assert (answer.created, answer.canceled, answer.watch_id) == (True, True, -1)
