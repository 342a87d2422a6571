"""The streams of the watch client: opened again when they end, moved between connections, queued for a place."""

from __future__ import annotations

import asyncio

import pytest

from proto.framing import Status
from proto.http2 import ErrorCode, Http2Limits
from proto.pb import rpc_pb2
from tests.upstream.recorder import RecordedLog, Recorder, watching
from tests.upstream.scripted import ScriptedCall, scripted
from tests.upstream.stories import Opened
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

NO_LEADER = "etcdserver: no leader"


@pytest.mark.parametrize("how", ["status", "reset", "cancelled"])
async def test_a_stream_that_ends_is_opened_again_on_its_connection(how: str) -> None:
    async with scripted() as etcd:
        seen = Recorder()
        a = Opened(b"a")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            first = etcd.watches()[0]
            if how == "status":
                first.end(14, "etcdserver: server stopped")
            elif how == "cancelled":
                first.end(1, "etcdserver: watch canceled")
            else:
                first.reset(ErrorCode.INTERNAL_ERROR)
            await until_async(lambda: len(etcd.watches()) == 2, "a second stream")
            await until_async(lambda: etcd.watches()[1].messages, "its create")
            etcd.watches()[1].answer(0, 11, [11])
            await until_async(lambda: seen.revisions(a) == [11], "the event")
            assert len(etcd.connections) == 1


async def test_a_stream_that_always_ends_is_not_opened_in_a_storm() -> None:
    async with scripted() as etcd:
        seen = Recorder()

        def create_and_end(call: ScriptedCall, message: rpc_pb2.WatchRequest) -> None:
            etcd.answer_watch(call, message)
            call.end(14, "etcdserver: server stopped")

        etcd.on_watch = create_and_end
        async with watching(etcd.endpoint, seen) as client:
            client.open(Opened(b"a"))
            loop = asyncio.get_running_loop()
            start = loop.time()
            await until_async(lambda: len(etcd.watches()) >= 6, "some attempts")
            # 0, 20, 40, 80, 160 ms, each at least half of that.
            assert loop.time() - start > 0.14


@pytest.mark.parametrize("answered", [True, False], ids=["live", "creating"])
async def test_goaway_is_not_a_break(answered: bool) -> None:
    """Open streams continue; new streams start on another connection, as do watches whose stream ends."""
    log = RecordedLog()
    async with scripted() as etcd:
        seen = Recorder()
        a, fill = Opened(b"a"), Opened(b"f", start_revision=1, is_backfill=True)
        if not answered:
            etcd.on_watch = lambda _call, _request: None
        async with watching(etcd.endpoint, seen, log=log) as client:
            client.open(a)
            await until_async(lambda: etcd.watches() and etcd.watches()[0].messages, "the create")
            await until_async(lambda: not answered or seen.created(a), "the watch")
            etcd.on_watch = etcd.answer_watch
            (first,) = etcd.watches()
            first.connection.go_away(2**31 - 1)
            await seen.open(client, fill)
            assert etcd.watches()[1].connection is not first.connection
            if answered:
                first.answer(0, 12, [12])
                await until_async(lambda: seen.revisions(a) == [12], "an event on the first")
            first.end(Status.UNAVAILABLE, "gone")
            await until_async(lambda: len(etcd.watches()) == 3 and seen.created(a), "the watch on the second")
            await until_async(lambda: len(etcd.connections) == 1, "the first to be closed")
            assert (seen.breaks, client.breaks, client.rotated) == (0, 0, 1)
            assert log.problems() == []


async def test_streams_that_a_connection_does_not_take_any_more_move() -> None:
    async with scripted() as etcd:
        seen = Recorder()
        a, b = Opened(b"a"), Opened(b"b", token=b"t")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            went: list[ScriptedCall] = []

            def go_away(call: ScriptedCall) -> None:
                if not went:
                    went.append(call)
                    call.connection.go_away(call.stream.id - 2)

            etcd.on_call = go_away
            await seen.open(client, b)
            assert (client.breaks, seen.losses) == (0, [])


async def test_streams_beyond_the_limit_get_more_connections() -> None:
    """60 tokens and a limit of 8 streams; paused backfills take places as well."""
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=8)
        seen = Recorder()
        fills = [Opened(b"f%d" % number, start_revision=1, is_backfill=True) for number in range(20)]
        watches = [Opened(b"a", token=b"t%d" % number) for number in range(60)]
        async with watching(etcd.endpoint, seen) as client:
            for fill in fills:
                client.open(fill)
                client.pause(fill)
            for watch in watches:
                client.open(watch)
            await until_async(lambda: all(map(seen.created, watches)), "the watches")
            await until_async(lambda: len(etcd.watches()) == 80, "the backfills")
            assert 10 <= client.connection_count <= 13
            assert (client.streams_waiting, client.breaks) == (0, 0)


async def test_streams_that_wait_for_a_place_are_reported() -> None:
    log = RecordedLog()
    async with scripted() as etcd:
        etcd.limits = Http2Limits(max_streams=3)
        seen = Recorder()
        settings = UpstreamSettings(connections_per_endpoint_max=1, place_wait_s=0.05)
        fills = [Opened(b"f%d" % number, start_revision=1, is_backfill=True) for number in range(4)]
        trunk = Opened(b"t")
        reported: list[str] = []
        async with watching(etcd.endpoint, seen, settings, log, lambda: reported.append(client.problem)) as client:
            for watch in (*fills, trunk):
                client.open(watch)
            await until_async(lambda: sum(map(seen.created, fills)) == 2, "two of them")
            assert client.streams_waiting == 3
            await until_async(lambda: any(reported), "the report")
            assert "etcd allows no more streams; calls or watches wait" in [event for event, _ in log.lines]
            # Many clients share a trunk: it precedes backfills that have waited longer.
            client.close(next(fill for fill in fills if seen.created(fill)))
            await until_async(lambda: seen.created(trunk), "the trunk")
            assert sum(map(seen.created, fills)) == 2
            for fill in [fill for fill in fills if seen.created(fill)]:
                client.close(fill)
            await until_async(lambda: sum(map(seen.created, fills)) == 3, "the next one")
            client.close(trunk)
            await until_async(lambda: all(map(seen.created, fills)), "all")
            await until_async(lambda: client.problem == "", "the end of it")
            assert (seen.losses, seen.breaks) == ([], 0)


async def test_a_token_that_ends_its_streams_disconnects_no_other() -> None:
    """Also before the server has answered any other create."""
    async with scripted() as etcd:
        seen = Recorder()
        live, bad = Opened(b"live"), Opened(b"bad", token=b"bad")
        refused: list[ScriptedCall] = []
        held: list[tuple[ScriptedCall, rpc_pb2.WatchRequest]] = []

        def refuse(call: ScriptedCall) -> None:
            if b"token" in call.metadata:
                refused.append(call)
                call.reset(ErrorCode.PROTOCOL_ERROR)

        etcd.on_call = refuse
        etcd.on_watch = lambda call, message: held.append((call, message))
        async with watching(etcd.endpoint, seen) as client:
            client.open(live)
            client.open(bad)
            await until_async(lambda: len(refused) >= 2 and held, "the token to be tried apart")
            etcd.on_watch = etcd.answer_watch
            etcd.answer_watch(*held[0])
            await until_async(lambda: seen.losses, "the loss")
            [(lost, status, _)] = seen.losses
            assert (lost, status) == (bad, Status.UNAUTHENTICATED)
            assert seen.created(live)
            assert (seen.breaks, len(etcd.connections)) == (0, 1)
