"""The pool: round-robin over working endpoints, and no call twice that a server may have processed."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proto.etcd_errors import LEARNER, NO_LEADER
from proto.framing import Status
from proto.http2 import ErrorCode, Http2Limits
from tests.etcd.server import free_port
from tests.upstream.recorder import RecordedLog
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.waiting import until_async
from upstream.connection import ClientConnection
from upstream.endpoints import parse_endpoints
from upstream.errors import CallFailed
from upstream.pool import Pool
from upstream.settings import ConnectionSettings, UpstreamSettings

ECHO = "/test/Echo"


@asynccontextmanager
async def pooled(
    *endpoints: str, log: RecordedLog | None = None, settings: UpstreamSettings | None = None
) -> AsyncIterator[Pool]:
    """Run a pool."""
    pool = Pool(parse_endpoints(endpoints), settings=settings, log=log)
    pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


async def up(pool: Pool, count: int) -> None:
    """Wait until this many endpoints are connected."""
    await until_async(
        lambda: sum(slot.connections is not None for slot in pool._slots) == count, f"{count} connections"
    )


def connections(pool: Pool) -> list[ClientConnection]:
    """Return the connections that take calls."""
    return [each for slot in pool._slots if slot.connections is not None for each in slot.connections]


async def failure(pool: Pool, **extra: Any) -> CallFailed:
    """Make a call that must fail."""
    with pytest.raises(CallFailed) as error:
        await pool.unary(ECHO, b"x", **extra)
    return error.value


async def test_calls_go_round_the_endpoints() -> None:
    async with scripted() as one, scripted() as two, pooled(one.endpoint, two.endpoint) as pool:
        await up(pool, 2)
        for number in range(6):
            answer, _ = await pool.unary(ECHO, b"%d" % number)
            assert answer == b"%d" % number
        assert (len(one.calls), len(two.calls)) == (3, 3)


async def test_a_call_right_after_the_start_waits_for_a_connection() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        assert pool.pick() is None
        assert pool.down is None
        assert (await pool.unary(ECHO, b"early"))[0] == b"early"


async def test_dead_endpoint_is_left_out_and_logged_once() -> None:
    log = RecordedLog()
    async with scripted() as etcd, pooled(f"127.0.0.1:{free_port()}", etcd.endpoint, log=log) as pool:
        await up(pool, 1)
        for _ in range(4):
            await pool.unary(ECHO, b"x")
        await until_async(log.problems, "the warning")
        await until_async(lambda: pool._slots[0]._backoff._delay_s > 0.2, "some more attempts")
        assert len(log.problems()) == 1
        assert "connection refused" in log.problems()[0]
        assert pool.down is None


async def test_pool_without_working_endpoints_fails_fast_and_recovers() -> None:
    told: list[bool] = []
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        pool.when_available(lambda: told.append(pool.pick() is not None))
        await until_async(lambda: told == [True], "the connection")
        etcd.drop()
        # The first retry after a loss is immediate: no listener gets a report that the endpoint is down.
        await until_async(lambda: told == [True, True], "another connection")
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"
    dead = f"127.0.0.1:{free_port()}"
    async with pooled(dead) as pool:
        error = await failure(pool, timeout_s=5)
        assert error.status == Status.UNAVAILABLE
        assert f"no etcd can be reached: {dead}: connection refused" in error.text
        assert pool.down is not None


async def test_no_answer_from_anywhere_is_a_deadline() -> None:
    async with scripted() as silent:
        silent.mute = True
        async with pooled(silent.endpoint) as pool:
            error = await failure(pool, timeout_s=0.05)
            assert error.status == Status.DEADLINE_EXCEEDED


@pytest.mark.parametrize(
    ("status", "text", "options", "again"),
    [
        (14, "x", {}, True),
        # The member has not processed the call.
        (14, NO_LEADER, {}, True),
        (14, LEARNER, {}, True),
        (9, LEARNER, {}, True),
        (14, NO_LEADER, {"has_leader": True}, True),
        (9, "x", {}, True),
        (7, "x", {}, False),
        (16, "x", {}, False),
        (3, "x", {}, False),
        (8, "too many", {}, True),
        (8, "grpc: received message larger than max (2 vs. 1)", {}, False),
    ],
)
async def test_failures_that_are_retried_at_another_endpoint(
    status: int, text: str, options: dict[str, Any], again: bool
) -> None:
    async with scripted() as bad, scripted() as good, pooled(bad.endpoint, good.endpoint) as pool:
        bad.on_message = lambda call, _: call.end(status, text)
        await up(pool, 2)
        if again:
            assert (await pool.unary(ECHO, b"x", **options))[0] == b"x"
            assert len(good.calls) == 1
        else:
            error = await failure(pool, **options)
            assert (error.status, error.text) == (status, text)
            assert good.calls == []
        assert len(bad.calls) == 1
        assert (b"hasleader" in bad.calls[0].metadata) == options.get("has_leader", False)


async def test_unprocessed_call_is_sent_again() -> None:
    async with scripted() as bad, scripted() as good, pooled(bad.endpoint, good.endpoint) as pool:
        bad.on_call = lambda call: call.reset(ErrorCode.REFUSED_STREAM)
        await up(pool, 2)
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        good.on_call = bad.on_call
        error = await failure(pool)
        assert error.status == Status.UNAVAILABLE
        assert len(bad.calls) + len(good.calls) == 4


def hold(etcd: ScriptedEtcd) -> list[ScriptedCall]:
    """Have a server answer no call; return the open calls."""
    held: list[ScriptedCall] = []
    etcd.on_message = lambda call, _: held.append(call)
    return held


async def test_calls_wait_when_connections_are_at_their_limit() -> None:
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=1)
        held = hold(etcd)
        async with pooled(etcd.endpoint, settings=UpstreamSettings(connections_per_endpoint_max=2)) as pool:
            await up(pool, 1)
            calls = [asyncio.create_task(pool.unary(ECHO, b"x")) for _ in range(2)]
            await until_async(lambda: len(held) == 2, "both calls")
            assert len(etcd.connections) == 2
            assert pool.pick() is None
            # The proxy's own calls may have one connection more.
            own = asyncio.create_task(pool.unary(ECHO, b"x"))
            await until_async(lambda: len(held) == 3, "the third call")
            error = await failure(pool, timeout_s=0.05)
            assert error.status == Status.DEADLINE_EXCEEDED
            waits = asyncio.create_task(pool.wait_available(5))
            held[0].send(b"y")
            held[0].end()
            assert await waits is not None
            for call in held[1:]:
                call.send(b"y")
                call.end()
            assert [answer for answer, _ in await asyncio.gather(*calls, own)] == [b"y"] * 3


async def test_lost_connections_with_open_calls_are_not_kept() -> None:
    """A connection has tables of some hundred objects, and etcd may restart every day of a proxy's life."""
    lost = weakref.WeakSet[ClientConnection]()
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        etcd.on_message = lambda *_: None
        for times in range(1, 4):
            await until_async(lambda: any(each not in lost for each in connections(pool)), "a new connection")
            lost.update(connections(pool))
            call = asyncio.create_task(failure(pool))
            await until_async(lambda times=times: len(etcd.calls) == times, "the call")  # type: ignore[misc] # bound at once
            etcd.drop()
            assert (await call).status == Status.UNAVAILABLE
        etcd.mute = True
        await up(pool, 0)
        gc.collect()
        assert not lost


async def test_the_last_failure_keeps_no_frames() -> None:
    """The frames of the failed attempt refer to its connection."""
    async with pooled(f"127.0.0.1:{free_port()}") as pool:
        await until_async(lambda: pool.down is not None, "a failure")
        assert pool.down is not None
        assert pool.down.__traceback__ is None


async def test_goaway_brings_a_new_connection() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        await up(pool, 1)
        before = pool.pick()
        etcd.connections[0].go_away(0)
        await until_async(lambda: pool.pick() not in (None, before), "another connection")
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        await until_async(lambda: len(etcd.connections) == 1, "the first to be closed")


async def test_server_that_refuses_pings_gets_fewer() -> None:
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        for seconds in (10, 20, 40):
            await up(pool, 1)
            before = pool.pick()
            assert before is not None
            assert before._settings.keepalive_s == seconds
            etcd.connections[-1].http2.go_away(code=ErrorCode.ENHANCE_YOUR_CALM, debug=b"too_many_pings")
            etcd.connections[-1].flush()
            await until_async(lambda before=before: pool.pick() not in (None, before), "the next connection")  # type: ignore[misc] # bound at once


async def test_an_idle_connection_is_not_pinged() -> None:
    """etcd counts PINGs without calls as abuse and closes the connection."""
    settings = UpstreamSettings(connection=ConnectionSettings(keepalive_s=0.02, keepalive_timeout_s=0.02))
    async with scripted() as etcd, pooled(etcd.endpoint, settings=settings) as pool:
        await up(pool, 1)
        connection = pool.pick()
        assert connection is not None
        held: list[ScriptedCall] = []
        etcd.on_message = lambda call, _: held.append(call)
        etcd.connections[0].frozen = True
        start = asyncio.get_running_loop().time()
        await until_async(lambda: asyncio.get_running_loop().time() > start + 0.1, "five intervals")
        assert connection.healthy
        error = await failure(pool)
        assert error.status == Status.UNAVAILABLE
        assert "not even to a PING" in error.text


async def test_scripted_etcd_answers() -> None:
    """The scripted server itself: it echoes every call except watches and status."""
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        assert isinstance(etcd, ScriptedEtcd)
        assert (await pool.unary("/x/Y", b"z"))[0] == b"z"


@pytest.mark.parametrize("known", ["at once", "by an answer"])
@pytest.mark.parametrize("why", ["learner", "no leader"])
async def test_members_that_do_not_serve_get_no_calls(why: str, known: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A learner that is promoted, or a member that has a leader again, is used again."""
    # Also the time in which the status must be answered, on a busy machine too.
    monkeypatch.setattr("upstream.slot._LOOK_S", 0.5)

    def spoil(etcd: ScriptedEtcd, bad: bool) -> None:
        etcd.is_learner = bad and why == "learner"
        etcd.leader = 0 if bad and why == "no leader" else 1
        text = LEARNER if why == "learner" else NO_LEADER
        etcd.on_message = (lambda call, _: call.end(Status.UNAVAILABLE, text)) if bad else etcd.answer

    log = RecordedLog()
    async with scripted() as bad, scripted() as good, pooled(bad.endpoint, good.endpoint, log=log) as pool:
        spoil(bad, known == "at once")
        await up(pool, 2)
        spoil(bad, True)
        for _ in range(10):
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert len(bad.calls) == (0 if known == "at once" else 1)
        assert any(why in problem for problem in log.problems())
        assert why in pool.states()[0].problem
        spoil(bad, False)
        await until_async(lambda: pool.states()[0].problem == "", "it to be used again")
        for _ in range(4):
            await pool.unary(ECHO, b"x")
        assert len(bad.calls) >= 2


async def test_member_that_does_not_serve_is_used_as_the_last_resort() -> None:
    """etcd's own answer reaches the client; and a learner serves some calls."""
    async with scripted() as learner, pooled(learner.endpoint, f"127.0.0.1:{free_port()}") as pool:
        learner.is_learner = True
        await up(pool, 1)
        assert (await pool.unary(ECHO, b"x"))[0] == b"x"


@pytest.mark.parametrize("text", ["etcdserver: request timed out", "etcdserver: request timed out, waiting for leader"])
async def test_member_whose_calls_time_out_is_checked(text: str) -> None:
    """A member that is cut off answers calls without `hasleader` after seconds, with this text."""
    async with scripted() as bad, scripted() as good, pooled(bad.endpoint, good.endpoint) as pool:
        await up(pool, 2)
        asked = len(bad.asked)
        bad.leader = 0
        bad.on_message = lambda call, _: call.end(Status.UNAVAILABLE, text)
        while not bad.calls:
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        await until_async(lambda: pool.states()[0].problem, "it to be left out")
        for _ in range(6):
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert len(bad.calls) == 1
        assert len(bad.asked) - asked <= 3
