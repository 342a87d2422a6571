"""The connections to one endpoint: as many as calls need, replaced when they end in good order, closed when idle."""

from __future__ import annotations

import asyncio

import pytest

from proto.http2 import ErrorCode, Http2Limits
from tests.upstream.recorder import RecordedLog
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.upstream.test_pool import ECHO, hold, pooled, up
from tests.waiting import until_async
from upstream.pool import Pool
from upstream.settings import UpstreamSettings
from upstream.unary import call_unary

LEASE = "/etcdserverpb.Lease/LeaseKeepAlive"


def hold_leases(etcd: ScriptedEtcd) -> list[ScriptedCall]:
    """Have a server keep lease streams open and answer all other calls; return the open streams."""
    held: list[ScriptedCall] = []
    etcd.on_message = lambda call, message: held.append(call) if call.path == LEASE else etcd.answer(call, message)
    return held


async def end_all(held: list[ScriptedCall], tasks: list[asyncio.Task[object]]) -> None:
    """Answer the held calls, and wait for their end."""
    for call in held:
        call.send(b"")
        call.end()
    await asyncio.gather(*tasks)


def leases(pool: Pool, count: int) -> list[asyncio.Task[object]]:
    """Open this many lease streams."""
    return [asyncio.create_task(pool.unary(LEASE, b"x")) for _ in range(count)]


def go_away_after(etcd: ScriptedEtcd, requests: int) -> None:
    """Have a server close each connection after this many requests, as nginx does: later ones are not processed."""

    def count(call: ScriptedCall) -> None:
        http2 = call.connection.http2
        if call.stream.id >= 2 * requests and not http2.going_away:
            # Requests that arrived in the same read were processed.
            call.connection.go_away(http2.last_stream_id)

    etcd.on_call = count


@pytest.mark.parametrize("places", [1, 4, 50])
async def test_long_calls_do_not_use_up_the_places_of_others(places: int) -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        etcd.limits = Http2Limits(max_streams=places)
        held = hold_leases(etcd)
        await up(pool, 1)
        kept = leases(pool, 60)
        await until_async(lambda: len(held) == 60, "the leases")
        for _ in range(3):
            assert (await pool.unary(ECHO, b"x", timeout_s=5))[0] == b"x"
        assert 60 / places <= pool.connection_count <= 60 / places + 3
        await end_all(held, kept)


async def test_the_proxys_own_calls_always_have_a_place() -> None:
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=8)
        held = hold_leases(etcd)
        async with pooled(etcd.endpoint, settings=UpstreamSettings(connections_per_endpoint_max=2)) as pool:
            await up(pool, 1)
            kept: list[asyncio.Task[object]] = []
            # Passed-through calls pick like other calls.
            while True:
                connection = pool.pick()
                if connection is None and pool.connection_count == 2:
                    break
                if connection is None:
                    connection = await pool.wait_available(5)
                kept.append(asyncio.create_task(call_unary(connection, LEASE, b"x")))
                sent = len(kept)
                await until_async(lambda sent=sent: len(held) == sent, "the call")  # type: ignore[misc] # bound at once
            # One place of each connection is reserved.
            assert len(held) == 14
            assert (await pool.unary(ECHO, b"x", timeout_s=5))[0] == b"x"
            assert pool.connection_count == 2
            await end_all(held, kept)


async def test_connections_that_end_in_good_order_cost_no_call() -> None:
    """A server that closes each connection after 20 requests, as nginx does after 1,000."""
    log = RecordedLog()
    async with scripted() as etcd, pooled(etcd.endpoint, log=log) as pool:
        go_away_after(etcd, 20)
        await up(pool, 1)

        async def client() -> None:
            for _ in range(50):
                assert (await pool.unary(ECHO, b"x", timeout_s=5))[0] == b"x"
                assert pool.down is None

        async with asyncio.timeout(10):
            await asyncio.gather(*(client() for _ in range(10)))
        # Ten clients: up to nine requests arrive in the same read as the last one.
        assert pool.rotated >= 500 // 29
        assert log.problems() == []
        assert len(etcd.calls) == 500


async def test_calls_continue_after_goaway() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        held = hold_leases(etcd)
        await up(pool, 1)
        kept = leases(pool, 1)
        await until_async(lambda: held, "the lease")
        etcd.connections[0].go_away(held[0].stream.id)
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert len(etcd.connections) == 2
        await end_all(held, kept)
        await until_async(lambda: len(etcd.connections) == 1, "the first to be closed")


@pytest.mark.parametrize("answers", [False, True])
async def test_server_that_only_sends_goaway_is_retried_with_backoff(answers: bool) -> None:
    """This is not rotation: such a server never answers more than the status request, if that."""
    log = RecordedLog()

    def end(call: ScriptedCall) -> None:
        if answers:
            etcd.answer_status(call)
        call.connection.go_away(call.stream.id if answers else 0)

    async with scripted() as etcd:
        etcd.on_status = end
        async with pooled(etcd.endpoint, log=log) as pool:
            await until_async(lambda: pool.down is not None, "the failure")
            assert pool.rotated <= 2
            assert "is closing the connection" in log.problems()[0]


async def test_a_connection_whose_stream_ids_run_out_is_replaced() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        held = hold_leases(etcd)
        await up(pool, 1)
        kept = leases(pool, 1)
        await until_async(lambda: held, "the lease")
        worn = pool.pick()
        assert worn is not None
        worn.http2._last_id = 2**30 - 3
        for _ in range(4):
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert pool.pick() is not worn
        assert pool.rotated == 1
        assert len(etcd.connections) == 2
        await end_all(held, kept)
        await until_async(lambda: len(etcd.connections) == 1, "the worn one to be closed")


async def test_surplus_connections_are_closed() -> None:
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=4)
        held = hold_leases(etcd)
        async with pooled(etcd.endpoint, settings=UpstreamSettings(surplus_idle_s=0.05)) as pool:
            await up(pool, 1)
            kept = leases(pool, 20)
            await until_async(lambda: len(held) == 20, "the leases")
            assert pool.connection_count >= 5
            await end_all(held, kept)
            await until_async(lambda: pool.connection_count == 1, "the others to be closed")
            await until_async(lambda: len(etcd.connections) == 1, "the same at the server")
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"


async def test_lack_of_places_and_its_end_are_reported() -> None:
    log = RecordedLog()
    settings = UpstreamSettings(connections_per_endpoint_max=1, place_wait_s=0.05)
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=2)
        held = hold_leases(etcd)
        async with pooled(etcd.endpoint, settings=settings, log=log) as pool:
            await up(pool, 1)
            kept = leases(pool, 2)
            await until_async(lambda: len(held) == 2, "the leases")
            told: list[str] = []
            pool.when_available(lambda: told.append(pool.full))
            assert pool.pick() is None
            await until_async(lambda: any(told), "the report")
            assert pool.full.startswith(
                "calls wait for a place at etcd, which allows no more streams on 1 connections; raise"
            )
            assert "etcd allows no more streams; calls or watches wait" in [event for event, _ in log.lines]
            await end_all(held, kept)
            await until_async(lambda: pool.pick() is not None, "a place")
            assert pool.full == ""


async def test_a_connection_that_cannot_be_added_is_tried_again() -> None:
    log = RecordedLog()
    async with scripted() as etcd, pooled(etcd.endpoint, log=log) as pool:
        etcd.limits = Http2Limits(max_streams=2)
        held = hold_leases(etcd)
        await up(pool, 1)
        etcd.on_status = lambda call: call.connection.transport.abort()  # type: ignore[union-attr]  # it is there
        kept = leases(pool, 4)
        await until_async(log.problems, "the failure")
        assert len(held) == 2
        etcd.on_status = etcd.answer_status
        await until_async(lambda: len(held) == 4, "the others")
        await end_all(held, kept)


async def test_a_broken_connection_costs_only_its_own_calls() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        etcd.limits = Http2Limits(max_streams=4)
        held = hold(etcd)
        await up(pool, 1)
        kept = [asyncio.create_task(pool.unary(ECHO, b"x")) for _ in range(7)]
        await until_async(lambda: len(held) == 7, "the calls")
        first = held[0].connection
        assert first.transport is not None
        first.transport.abort()
        lost = [task for task, call in zip(kept, held, strict=True) if call.connection is first]
        outcomes = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(outcome, Exception) for outcome in outcomes)
        assert pool.down is None
        await end_all(
            [call for call in held if call.connection is not first], [task for task in kept if task not in lost]
        )
        etcd.on_message = etcd.answer
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"


async def test_call_refused_at_the_stream_limit_is_sent_again() -> None:
    """REFUSED_STREAM at the limit: the server's SETTINGS may be newer than those the client knows."""
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        refused: list[ScriptedCall] = []

        def refuse_one(call: ScriptedCall) -> None:
            if not refused:
                refused.append(call)
                call.reset(ErrorCode.REFUSED_STREAM)

        etcd.on_call = refuse_one
        await up(pool, 1)
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert len(etcd.calls) == 2
