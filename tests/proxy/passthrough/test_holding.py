"""Calls that wait while no etcd can be reached: how long, how many, and how they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proto.framing import Status, decode_message, decode_timeout, frame
from proto.http2 import Http2Limits
from proxy.passthrough import holding
from proxy.passthrough import waiting as deciding
from proxy.passthrough.settings import MIB, PassthroughSettings
from proxy.passthrough.waiting import NO_CONNECTION
from tests.e2e.raw_client import RawClient
from tests.e2e.scenario import run
from tests.etcd.server import HOST, free_port
from tests.proxy.passthrough.test_passthrough import PUT, Running, passing
from tests.upstream.scripted import ScriptedConnection, ScriptedEtcd, scripted
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

RANGE = "/etcdserverpb.KV/Range"


@asynccontextmanager
async def answering(port: int) -> AsyncIterator[ScriptedEtcd]:
    """Run a scripted etcd at a port."""
    etcd = ScriptedEtcd()
    server = await asyncio.get_running_loop().create_server(lambda: ScriptedConnection(etcd), HOST, port)
    try:
        yield etcd
    finally:
        server.close()
        etcd.drop()


@asynccontextmanager
async def waiting(bounds: PassthroughSettings | None = None) -> AsyncIterator[tuple[Running, RawClient, int]]:
    """Yield a pass-through whose endpoint is known to be dead, a client of it, and the endpoint's port."""
    port = free_port()
    async with passing(f"{HOST}:{port}", bounds=bounds) as running:
        await until_async(lambda: running.pool.down, "the endpoint to have failed")
        async with connected(running) as client:
            yield running, client, port


@asynccontextmanager
async def connected(running: Running) -> AsyncIterator[RawClient]:
    """Yield a client that has received the proxy's SETTINGS."""
    async with await RawClient.connect(int(running.address.rpartition(":")[2])) as client:
        await until_async(lambda: client.h2.remote_settings.initial_window_size > 65_535, "the proxy's settings")
        yield client


async def test_call_waits_until_etcd_is_reachable() -> None:
    async with waiting() as (running, client, port):
        call = client.call(PUT, [("grpc-timeout", "20S")])
        call.send(b"value", end=True)
        await until_async(lambda: running.passthrough.waiting == 1, "the call to wait")
        assert running.passthrough.stats.waiting_bytes > len(b"value")
        async with answering(port) as etcd:
            assert await call.end() == (Status.OK, "")
            assert call.messages == [b"value"]
            assert [one.path for one in etcd.calls] == [PUT]
            left = dict(etcd.calls[0].headers)[b"grpc-timeout"]
            assert 10 < decode_timeout(left) < 20
        stats = running.passthrough.stats
        assert (running.passthrough.waiting, stats.waiting_bytes, stats.resend_bytes) == (0, 0, 0)
        assert (stats.calls, stats.unavailable) == (1, 0)


async def test_call_is_refused_after_call_wait() -> None:
    async with waiting(PassthroughSettings(call_wait_s=0.3)) as (running, client, port):
        began = asyncio.get_running_loop().time()
        call = client.call(PUT)
        call.send(b"value", end=True)
        assert await call.end() == (Status.UNAVAILABLE, NO_CONNECTION)
        assert asyncio.get_running_loop().time() - began >= 0.29
        problem = decode_message(call.headers["watchmux-problem"].encode())
        assert problem.startswith(f"no etcd can be reached: {HOST}:{port}: connection refused")
        stats = running.passthrough.stats
        assert (stats.unavailable, stats.refused_at["call_wait_s"]) == (1, 1)
        assert (running.passthrough.waiting, stats.waiting_bytes, stats.resend_bytes) == (0, 0, 0)


async def test_call_of_clientv3_leaves_time_for_the_next_endpoint() -> None:
    async with waiting() as (_, client, _):
        began = asyncio.get_running_loop().time()
        call = client.call(PUT, [("grpc-timeout", "1800m"), ("client-api-version", "3.5")])
        call.send(b"value", end=True)
        assert await call.end() == (Status.UNAVAILABLE, NO_CONNECTION)
        assert asyncio.get_running_loop().time() - began >= 0.59


async def test_call_of_another_client_waits_for_its_deadline() -> None:
    async with waiting() as (running, client, _):
        call = client.call(PUT, [("grpc-timeout", "300m")])
        call.send(b"value", end=True)
        assert await call.end() == (Status.DEADLINE_EXCEEDED, "context deadline exceeded")
        assert running.passthrough.stats.unavailable == 0


async def test_call_without_time_and_the_next_ones_are_refused() -> None:
    """The timer of the first call is due at once, while the others arrive."""
    async with waiting() as (_, client, _):
        calls = [client.call(PUT, [("grpc-timeout", "1n")], end=True) for _ in range(20)]
        for call in calls:
            status, _ = await call.end()
            assert status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)


async def test_without_call_wait_a_call_is_refused_at_once() -> None:
    async with waiting(PassthroughSettings(call_wait_s=0)) as (_, client, _):
        assert await client.call(PUT, end=True).end(4) == (Status.UNAVAILABLE, NO_CONNECTION)


async def test_call_wait_can_be_changed_while_calls_come() -> None:
    async with waiting() as (running, client, _):
        before = client.call(PUT)
        await until_async(lambda: running.passthrough.waiting == 1, "the call to wait")
        running.passthrough.configure(PassthroughSettings(call_wait_s=0))
        assert await client.call(PUT, end=True).end(4) == (Status.UNAVAILABLE, NO_CONNECTION)
        assert not before.over


def test_refusals_are_logged_at_intervals(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        async with waiting(PassthroughSettings(call_wait_s=0)) as (_, client, _):
            for _ in range(20):
                await client.call(PUT, end=True).end()

    run(scenario())
    assert capsys.readouterr().out.count("calls were refused") == 1


async def test_call_whose_client_disconnects_stops_waiting() -> None:
    async with waiting() as (running, client, port):
        stats = running.passthrough.stats
        calls = [client.call(PUT) for _ in range(3)]
        for call in calls:
            call.send(b"value", end=True)
        await until_async(lambda: running.passthrough.waiting == 3, "the calls to wait")
        calls[1].cancel()
        await until_async(lambda: running.passthrough.waiting == 2, "the call to leave")
        async with connected(running) as other:
            other.call(PUT).send(b"other", end=True)
            await until_async(lambda: running.passthrough.waiting == 3, "the call to wait")
        await until_async(lambda: running.passthrough.waiting == 2, "the client to leave")
        async with answering(port) as etcd:
            assert [await calls[number].end() for number in (0, 2)] == [(0, ""), (0, "")]
            assert len(etcd.calls) == 2
        assert (stats.waiting_bytes, stats.resend_bytes) == (0, 0)


async def test_bytes_of_waiting_calls_are_bounded() -> None:
    async with waiting(PassthroughSettings(waiting_bytes_max=10_000)) as (running, client, port):
        stats = running.passthrough.stats
        first, second = client.call(PUT), client.call(PUT)
        first.send_raw(bytes(8_000))
        await until_async(lambda: stats.waiting_bytes > 8_000, "its bytes to be counted")
        second.send_raw(bytes(3_000))
        assert await second.end() == (Status.UNAVAILABLE, NO_CONNECTION)
        assert stats.refused_at["waiting_bytes_max"] == 1
        assert running.passthrough.waiting == 1
        # A call's head counts too.
        third = client.call(PUT, [("note", "x" * 3_000)])
        assert await third.end() == (Status.UNAVAILABLE, NO_CONNECTION)
        first.cancel()
        await until_async(lambda: stats.waiting_bytes == 0, "it to be given back")
        async with answering(port):
            assert (await client.unary(PUT, b"value")).status == 0


async def test_waiting_bodies_leave_the_connection_its_window() -> None:
    body = frame(bytes(200 * 1024))
    async with waiting() as (running, client, port):
        stats, calls = running.passthrough.stats, []
        for number in range(1, 101):
            call = client.call(PUT)
            calls.append(call)
            await until_async(lambda: client.h2.outbound_flow_control_window >= len(body), "its window")
            call.send_raw(body, end=True)
            bytes_of_all = number * len(body)
            await until_async(lambda size=bytes_of_all: stats.waiting_bytes >= size, "the body")  # type: ignore[misc]
        assert stats.waiting_bytes > 16 * MIB
        async with answering(port):
            for call in calls:
                assert await call.end() == (0, "")


async def test_call_keeps_its_window_after_waiting() -> None:
    async with waiting() as (running, client, port):
        call = client.call(PUT)
        message = frame(bytes(1_000_000))
        size = client.h2.local_flow_control_window(call.id)
        call.send_raw(message[:size])
        await until_async(lambda: running.passthrough.stats.waiting_bytes > size, "the window to be full")
        assert client.h2.local_flow_control_window(call.id) == 0
        async with answering(port):
            sent = size
            while sent < len(message):
                await until_async(lambda: client.h2.local_flow_control_window(call.id), "the window to open")
                part = message[sent : sent + client.h2.local_flow_control_window(call.id)]
                sent += len(part)
                call.send_raw(part, end=sent == len(message))
            assert await call.end() == (0, "")
            assert call.messages[0] == message[5:]


async def test_many_waiting_calls_are_sent_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "TURN_CALLS_MAX", 7)
    async with waiting() as (running, client, port):
        calls = [client.call(PUT, end=True) for _ in range(50)]
        await until_async(lambda: running.passthrough.waiting == 50, "the calls to wait")
        async with answering(port) as etcd:
            etcd.on_message = lambda *_: None
            # None of them ends: an end would start the next one.
            await until_async(lambda: len(etcd.calls) == 50, "the calls")
            for one in etcd.calls:
                one.end()
            for call in calls:
                assert await call.end() == (0, "")


async def test_many_calls_are_refused_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holding, "TURN_CALLS_MAX", 7)
    async with waiting(PassthroughSettings(call_wait_s=0.1)) as (running, client, _):
        calls = [client.call(PUT, end=True) for _ in range(50)]
        for call in calls:
            assert await call.end() == (Status.UNAVAILABLE, NO_CONNECTION)
        assert running.passthrough.stats.unavailable == 50


async def test_call_waiting_for_a_free_stream_keeps_its_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deciding, "CHECK_INTERVAL_MIN_S", 0.05)
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=1)
        etcd.on_message = lambda *_: None
        one = UpstreamSettings(connections_per_endpoint_max=1)
        async with passing(etcd.endpoint, settings=one, bounds=PassthroughSettings(call_wait_s=0.1)) as running:
            await until_async(lambda: running.pool.pick(), "the etcd")
            async with connected(running) as client:
                first = client.call(PUT)
                await until_async(lambda: etcd.calls, "the first call")
                second = client.call(PUT, [("grpc-timeout", "500m")], end=True)
                assert await second.end() == (Status.DEADLINE_EXCEEDED, "context deadline exceeded")
                third = client.call(PUT, [("grpc-timeout", "10S")], end=True)
                await until_async(lambda: running.passthrough.waiting == 1, "the third to wait")
                etcd.on_call = lambda call: call.end()
                etcd.calls[0].end()
                assert await first.end() == (0, "")
                assert await third.end() == (0, "")
                assert running.passthrough.stats.unavailable == 0


@pytest.mark.parametrize("sent", [True, False])
async def test_call_of_a_lost_connection_leaves_time_for_a_retry(sent: bool) -> None:
    """A read that was under way when the connection broke, and a call that waited for a free stream."""
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=1)
        etcd.on_message = lambda *_: None
        one = UpstreamSettings(connections_per_endpoint_max=1)
        async with passing(etcd.endpoint, settings=one) as running, connected(running) as client:
            await until_async(lambda: running.pool.pick(), "the etcd")
            if not sent:
                client.call(PUT, end=True)
                await until_async(lambda: etcd.calls, "the first call")
            call = client.call(RANGE, [("grpc-timeout", "4500m"), ("client-api-version", "3.5")])
            call.send(b"", end=True)
            await until_async(lambda: etcd.calls if sent else running.passthrough.waiting, "the read")
            etcd.mute = True
            etcd.drop()
            assert await call.end() == (Status.UNAVAILABLE, NO_CONNECTION)


async def test_read_that_breaks_and_finds_no_etcd_ends_in_trailers() -> None:
    """The client already has the response's head: a second one would be an HTTP/2 protocol error."""
    async with scripted() as etcd, passing(etcd.endpoint, bounds=PassthroughSettings(call_wait_s=0.2)) as running:
        await until_async(lambda: running.pool.pick(), "the etcd")
        async with connected(running) as client:
            etcd.on_message = lambda call, _: call.start()
            call = client.call(RANGE)
            call.send(b"", end=True)
            await until_async(lambda: call.headers, "the head of the answer")
            etcd.mute = True
            etcd.drop()
            assert await call.end() == (Status.UNAVAILABLE, NO_CONNECTION)
            assert call.trailers["watchmux-problem"]
            assert ":status" not in call.trailers
