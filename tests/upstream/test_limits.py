"""Limits towards etcd at their edge: timeouts and messages that are too large, and that they are counted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proto.framing import Status
from proto.http2 import Http2Limits
from proto.pb import kv_pb2, rpc_pb2
from tests.http2 import wire
from tests.upstream.recorder import Recorder, watching
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.upstream.stories import Opened
from tests.upstream.test_pool import ECHO, failure, pooled, up
from tests.waiting import until_async
from upstream.errors import CallFailed
from upstream.pool import Pool
from upstream.settings import CONNECTION_LIMITS, WATCH_LIMITS, ConnectionSettings, UpstreamSettings

SHORT_S = 0.05


def impatient(limit: str) -> UpstreamSettings:
    """Settings with one short time."""
    if limit not in CONNECTION_LIMITS:
        return UpstreamSettings(**{limit: SHORT_S})  # type: ignore[arg-type]  # a time
    times = {limit: SHORT_S, "keepalive_s": SHORT_S}
    return UpstreamSettings(connection=ConnectionSettings(**times))  # type: ignore[arg-type]  # as above


def deaf_to(*paths: str) -> Callable[[ScriptedEtcd], None]:
    """A server that never answers these calls."""

    def become(etcd: ScriptedEtcd) -> None:
        etcd.on_message = lambda call, message: None if call.path in paths else etcd.answer(call, message)

    return become


def mute(etcd: ScriptedEtcd) -> None:
    """A server that accepts connections and sends nothing."""
    etcd.mute = True


async def test_silent_endpoint_is_given_up_and_counted() -> None:
    async with scripted() as etcd:
        mute(etcd)
        settings = impatient("connect_timeout_s")
        async with (
            pooled(etcd.endpoint, settings=settings) as pool,
            watching(etcd.endpoint, Recorder(), settings) as client,
        ):
            await until_async(lambda: pool.timeouts["connect_timeout_s"], "the pool")
            await until_async(lambda: client.timeouts["connect_timeout_s"], "the watch client")
            assert set(pool.timeouts) == set(CONNECTION_LIMITS)
            assert set(client.timeouts) == set(WATCH_LIMITS)


async def test_server_that_ignores_settings_is_given_up_and_counted() -> None:
    async with scripted() as etcd:
        etcd.deaf = True
        async with pooled(etcd.endpoint, settings=impatient("settings_timeout_s")) as pool:
            await until_async(lambda: pool.timeouts["settings_timeout_s"], "the pool")
            assert set(+pool.timeouts) == {"settings_timeout_s"}


async def test_server_that_answers_no_ping_is_given_up_and_counted() -> None:
    async with scripted() as etcd:
        deaf_to(ECHO)(etcd)
        settings = impatient("keepalive_timeout_s")
        async with pooled(etcd.endpoint, settings=settings) as pool:
            await up(pool, 1)
            call = asyncio.create_task(failure(pool))
            await until_async(lambda: etcd.calls, "the call")
            for connection in etcd.connections:
                connection.frozen = True
            assert (await call).status == Status.UNAVAILABLE
            await until_async(lambda: pool.timeouts["keepalive_timeout_s"] == 1, "it to be counted")
        seen = Recorder()
        async with watching(etcd.endpoint, seen, settings) as client:
            watch = Opened(b"a")
            await seen.open(client, watch)
            for connection in etcd.connections:
                connection.frozen = True
            await until_async(lambda: client.timeouts["keepalive_timeout_s"] == 1, "it to be counted")


async def answer_late(pool: Pool, etcd: ScriptedEtcd, count: int) -> None:
    """Give up this many calls, and have the stalled server answer them all at once, in three frames each."""
    connection = pool.pick()
    assert connection is not None
    first = connection.http2._last_id + 2 if connection.http2._last_id else 1
    calls = [asyncio.create_task(pool.unary(ECHO, b"x")) for _ in range(count)]
    await until_async(lambda: connection.http2._last_id >= first + 2 * count - 2, "the calls")
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    late = b"".join(wire.data(stream_id, b"late") for stream_id in range(first, first + 2 * count, 2))
    (server,) = [each for each in etcd.connections if each.heard]
    assert server.transport is not None
    server.transport.write(late * 3)


async def test_late_answers_of_calls_given_up_cost_nothing() -> None:
    """etcd stalls, thousands of calls time out, and etcd still answers them."""
    async with scripted() as etcd, pooled(etcd.endpoint) as pool:
        # This etcd ignores resets.
        etcd.limits = Http2Limits().with_floods_at(1_000_000)
        deaf_to(ECHO)(etcd)
        await up(pool, 1)
        lease = asyncio.create_task(pool.unary("/test/Lease", b"x", timeout_s=60))
        etcd.on_message, others = lambda call, _: held.append(call), etcd.on_message
        held: list[ScriptedCall] = []
        await until_async(lambda: held, "the call that others have open")
        etcd.on_message = others
        await answer_late(pool, etcd, 4_800)
        assert (await pool.unary("/test/Other", b"y"))[0] == b"y"
        held[0].send(b"z")
        held[0].end()
        assert (await lease)[0] == b"z"
        assert not +pool.timeouts


@pytest.mark.parametrize(("count", "lives"), [(50, True), (51, False)])
async def test_server_that_sends_useless_frames(count: int, lives: bool) -> None:
    settings = UpstreamSettings(connection=ConnectionSettings(useless_frames_max=50))
    async with scripted() as etcd, pooled(etcd.endpoint, settings=settings) as pool:
        await up(pool, 1)
        (server,) = etcd.connections
        assert server.transport is not None
        server.transport.write(wire.ping() * count)
        if lives:
            assert (await pool.unary(ECHO, b"y"))[0] == b"y"
        else:
            await until_async(lambda: pool.timeouts["useless_frames_max"] == 1, "it to be counted")


@pytest.mark.parametrize("limit", ["status_timeout_s", "create_timeout_s"])
async def test_unanswered_requests_of_the_watch_client_are_counted(limit: str) -> None:
    async with scripted() as etcd:
        if limit == "status_timeout_s":
            etcd.on_status = lambda _: None
        else:
            etcd.on_watch = lambda _call, _request: None
        seen = Recorder()
        async with watching(etcd.endpoint, seen, impatient(limit)) as client:
            client.open(Opened(b"a", token=b"t"))
            await until_async(lambda: client.timeouts[limit], limit)
            assert set(+client.timeouts) == {limit}


@pytest.mark.parametrize(("size", "taken"), [(1000, True), (1001, False)])
async def test_the_size_of_an_answer_to_us(size: int, taken: bool) -> None:
    def answer(call: ScriptedCall, _message: bytes) -> None:
        call.send(bytes(size))
        call.end()

    async with (
        scripted() as etcd,
        pooled(etcd.endpoint, settings=UpstreamSettings(unary_message_bytes_max=1000)) as pool,
    ):
        etcd.on_message = answer
        if taken:
            assert (await pool.unary(ECHO, b"x"))[0] == bytes(size)
        else:
            error: CallFailed = await failure(pool)
            assert (error.status, "1001 vs. 1000 bytes" in error.text) == (Status.RESOURCE_EXHAUSTED, True)


@pytest.mark.parametrize("taken", [True, False])
async def test_the_size_of_a_watch_response(taken: bool) -> None:
    """The limit counts the events of one revision, which are held until the last of them arrives."""
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=12, raft_term=1)
    event = kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k", mod_revision=12, value=bytes(50_000)))
    response = rpc_pb2.WatchResponse(header=header, events=[event] * 3).SerializeToString()
    one = len(rpc_pb2.WatchResponse(events=[event]).SerializeToString())
    limit = 2 * one - (not taken)
    async with scripted() as etcd:
        seen = Recorder()
        watch = Opened(b"a")
        async with watching(etcd.endpoint, seen, UpstreamSettings(watch_message_bytes_max=limit)) as client:
            await seen.open(client, watch)
            (call,) = etcd.watches()
            call.send(response)
            if taken:
                await until_async(lambda: seen.revisions(watch) == [12] * 3, "the events")
            else:
                await until_async(lambda: seen.losses, "the loss")
            assert bool(seen.losses) is not taken
