"""The watch client on real sockets, against a scripted server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from proto.framing import Status, frame
from proto.pb import kv_pb2, rpc_pb2
from proto.scan import WatchResponse
from tests.etcd.server import free_port
from tests.upstream.recorder import RecordedLog, Recorder, watching
from tests.upstream.scripted import ScriptedCall, scripted
from tests.upstream.stories import Opened, request
from tests.waiting import until_async
from upstream.settings import ConnectionSettings, UpstreamSettings
from upstream.watching.call import MANY_CLIENTS
from upstream.watching.feed import WITHOUT_EVENTS_MAX
from upstream.watching.stream import OpenedWatch

NO_LEADER = "etcdserver: no leader"


def requests(call: ScriptedCall) -> list[str]:
    """Return the requests of a Watch call in words."""
    return [request(message) for message in call.messages]


async def test_trunks_of_one_token_share_a_stream_with_hasleader() -> None:
    async with scripted() as etcd:
        seen = Recorder()
        a, b, mine = Opened(b"a"), Opened(b"b", start_revision=14), Opened(b"mine", token=b"secret")
        async with watching(etcd.endpoint, seen) as client:
            for watch in (a, b, mine):
                client.open(watch)
            await until_async(lambda: all(map(seen.created, (a, b, mine))), "three watches")
            plain, tokened = etcd.watches()
            assert requests(plain) == ["create a from 0", "create b from 0"]
            assert plain.metadata[b"hasleader"] == b"true"
            assert plain.metadata[b":authority"] == etcd.endpoint.encode()
            assert b"token" not in plain.metadata
            assert tokened.metadata[b"token"] == b"secret"
            assert (client.stream_count, client.watch_count) == (2, 3)
            assert (client.server or ())[:2] == (etcd.endpoint, "3.5.30")
            client.close(mine)
            await until_async(lambda: tokened.ended, "the stream of the token to end")
            assert tokened.ended == "CANCEL"
            client.close(a)
            await until_async(lambda: "cancel 0" in requests(plain), "the cancel")
        await until_async(lambda: not etcd.connections, "the connection to be closed")


async def test_watches_resume_pipelined_after_a_broken_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.watching.registrations.REGISTERED_MAX", 100)
    async with scripted() as etcd:
        seen = Recorder()
        watches = [Opened(b"w%d" % number) for number in range(300)]
        async with watching(etcd.endpoint, seen) as client:
            for watch in watches:
                client.open(watch)
            await until_async(lambda: seen.created(watches[-1]), "the watches")
            first = etcd.watches()[0]
            first.answer(7, 12, [11, 12])
            first.answer(8, 13, [13, 13])
            await until_async(lambda: seen.revisions(watches[8]), "the events")
            etcd.revision = 20
            # No create is answered before all have arrived: they do not wait for each other.
            held: list[tuple[ScriptedCall, rpc_pb2.WatchRequest]] = []

            def hold(call: ScriptedCall, message: rpc_pb2.WatchRequest) -> None:
                held.append((call, message))
                if len(held) == len(watches):
                    for one in held:
                        etcd.answer_watch(*one)

            etcd.on_watch = hold
            etcd.drop()
            await until_async(lambda: len(held) == len(watches), "all creates")
            await until_async(lambda: len(seen.headers) > len(watches), "the answers")
            second = etcd.watches()[1:]
            # They have to catch up, and do not wait for each other's responses.
            assert len(second) == 16
            words = [request for call in second for request in requests(call)]
            assert {"create w6 from 10", "create w7 from 13", "create w8 from 14"} <= set(words)
            [call] = [call for call in second if "create w8 from 14" in requests(call)]
            call.answer(requests(call).index("create w8 from 14"), 20, [13, 13, 15])
            await until_async(lambda: seen.revisions(watches[8]) == [13, 13, 15], "the event after the break")
            assert (seen.breaks, seen.resumes, client.breaks) == (1, 2, 1)
            assert all(sum(response.created for response in seen.of(watch)) == 1 for watch in watches)


@pytest.mark.parametrize(
    ("version", "ordered"),
    [
        ("3.4.23", False),
        ("3.4.31", True),
        ("3.5.12", False),
        ("3.5.13", True),
        ("3.6.0-rc.1", True),
        ("3.7.0", True),
        ("4.0", True),
        ("anything", False),
    ],
)
async def test_manual_progress_is_asked_only_of_versions_that_order_it(version: str, ordered: bool) -> None:
    async with scripted() as etcd:
        etcd.version = version
        seen = Recorder()
        a = Opened(b"a")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            assert client.ordered_progress is ordered
            client.request_progress(1)
            if ordered:
                await until_async(lambda: seen.progress(a) == 10, "the proof")
            else:
                # A bookmark under its own id is in order everywhere.
                etcd.watches()[0].answer(0, 12)
                await until_async(lambda: len(seen.of(a)) == 2, "the bookmark")
                await until_async(lambda: len(etcd.watches()[0].messages) > 1, "the probe")
                assert requests(etcd.watches()[0]) == ["create a from 0", "probe"]


@pytest.mark.parametrize(
    ("refusal", "ordered"),
    [((3, "etcdserver: user name is empty"), True), ((16, "x"), True), ((12, "unknown service"), False)],
)
async def test_server_that_refuses_its_status(refusal: tuple[int, str], ordered: bool) -> None:
    async with scripted() as etcd:
        etcd.status_refusal = refusal
        seen = Recorder()
        a = Opened(b"a")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            assert client.ordered_progress is ordered


async def test_no_leader_goes_to_another_endpoint() -> None:
    async with scripted() as cut_off, scripted() as whole:
        seen = Recorder()
        a = Opened(b"a")
        async with watching(f"{cut_off.endpoint},{whole.endpoint}", seen) as client:
            await seen.open(client, a)
            assert (client.server or ())[:2] == (cut_off.endpoint, "3.5.30")
            cut_off.leader = 0
            cut_off.watches()[0].end(14, NO_LEADER)
            await until_async(lambda: (client.server or ())[:2] == (whole.endpoint, "3.5.30"), "the other endpoint")
            await until_async(lambda: whole.watches(), "its stream")
            assert whole.watches()[0].metadata[b"hasleader"] == b"true"
            assert seen.leaderless == 0


async def test_no_leader_anywhere_is_reported_and_watches_continue() -> None:
    async with scripted() as one, scripted() as two:
        seen = Recorder()
        log = RecordedLog()
        a = Opened(b"a")
        dead = f"127.0.0.1:{free_port()}"
        async with watching(f"{one.endpoint},{two.endpoint},{dead}", seen, log=log) as client:
            await seen.open(client, a)
            one.leader = two.leader = 0
            one.watches()[0].end(14, NO_LEADER)
            await until_async(lambda: seen.leaderless, "no_leader")
            assert client.leaderless
            await until_async(lambda: len(one.watches() + two.watches()) == 2, "a stream without hasleader")
            [plain] = [call for call in one.watches() + two.watches() if b"hasleader" not in call.metadata]
            await until_async(lambda: plain.messages, "its create")
            plain.answer(0, 11, [11])
            await until_async(lambda: seen.revisions(a) == [11], "an event without a leader")
            two.leader = 1
            await until_async(lambda: not client.leaderless, "the leader's return")
            assert (client.server or ())[:2] == (two.endpoint, "3.5.30")
            await until_async(
                lambda: any(b"hasleader" in call.metadata for call in two.watches()[-1:]), "a stream with hasleader"
            )
            assert seen.leaderless == 1
            assert any("no leader" in problem for problem in log.problems())


async def test_a_learner_is_not_used() -> None:
    async with scripted() as learner, scripted() as voter:
        learner.is_learner = True
        log = RecordedLog()
        async with watching(f"{learner.endpoint},{voter.endpoint}", Recorder(), log=log) as client:
            await until_async(lambda: (client.server or ())[:2] == (voter.endpoint, "3.5.30"), "the voter")
            assert "learner" in log.problems()[0]


@pytest.mark.parametrize(
    ("status", "text"),
    [(16, "etcdserver: invalid auth token"), (7, "etcdserver: permission denied"), (12, "unknown service")],
)
async def test_a_stream_refused_for_good_loses_its_watches_alone(
    status: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("upstream.watching.state.LOST_MAX", 1)
    async with scripted() as etcd:
        seen = Recorder()
        a, mine, too = Opened(b"a"), Opened(b"mine", token=b"bad"), Opened(b"too", token=b"bad")
        etcd.on_call = lambda call: call.end(status, text) if b"token" in call.metadata else None
        async with watching(etcd.endpoint, seen) as client:
            client.open(a)
            client.open(mine)
            client.open(too)
            await until_async(lambda: len(seen.losses) == 2, "the losses")
            assert seen.losses == [(mine, status, text), (too, status, text)]
            await until_async(lambda: seen.created(a), "the other watch")
            assert seen.breaks == 0
            assert client.watch_count == 1


async def test_token_whose_create_is_never_answered_is_given_up() -> None:
    """etcd waits without end when it cannot know a token yet; watches of other tokens are not affected."""
    async with scripted() as etcd:
        answer = etcd.answer_watch
        etcd.on_watch = lambda call, asked: None if call.metadata.get(b"token") == b"dead" else answer(call, asked)
        seen = Recorder()
        dead, good, plain = Opened(b"a", token=b"dead"), Opened(b"b", token=b"good"), Opened(b"c")
        async with watching(etcd.endpoint, seen, UpstreamSettings(create_timeout_s=0.5)) as client:
            await seen.open(client, good, plain)
            client.open(dead)
            await until_async(lambda: seen.losses, "the loss")
            assert seen.losses == [(dead, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")]
            for call in etcd.watches()[:2]:
                call.answer(0, 11, [11])
            await until_async(lambda: seen.revisions(good) == seen.revisions(plain) == [11], "the events of the others")


async def test_endpoint_without_watch_service_is_left_for_another() -> None:
    async with scripted() as other, scripted() as etcd:
        other.on_call = lambda call: call.end(12, "unknown service")
        seen = Recorder()
        a = Opened(b"a")
        async with watching(f"{other.endpoint},{etcd.endpoint}", seen) as client:
            await seen.open(client, a)
            assert (client.server or ())[:2] == (etcd.endpoint, "3.5.30")
            assert seen.losses == []


async def test_a_create_that_is_not_answered_is_reported() -> None:
    """Without a token no watch is given up; log, metric and readiness report it once, and its end."""
    log = RecordedLog()
    async with scripted() as etcd:
        seen = Recorder()
        etcd.on_watch = lambda _call, _request: None
        a = Opened(b"a")
        reported: list[str] = []
        async with watching(
            etcd.endpoint, seen, UpstreamSettings(create_timeout_s=0.05), log, lambda: reported.append(client.problem)
        ) as client:
            client.open(a)
            await until_async(lambda: reported, "the report")
            assert "has not answered watch create requests" in reported[0]
            (call,) = etcd.watches()
            call.answer(0, 10, created=True)
            await until_async(lambda: client.problem == "", "the end of it")
            assert seen.created(a)
            assert [event for event, _ in log.lines].count("etcd does not answer requests for watches") == 1
            assert client.timeouts["create_timeout_s"] == 1


async def test_paused_backfill_is_not_read_and_blocks_no_other_watch() -> None:
    async with scripted() as etcd:
        seen = Recorder()
        window = 64 * 1024
        settings = UpstreamSettings(connection=ConnectionSettings(stream_window_bytes=window))
        trunk, fill = Opened(b"t"), Opened(b"f", start_revision=1, is_backfill=True)
        async with watching(etcd.endpoint, seen, settings) as client:
            client.open(trunk)
            client.open(fill)
            await until_async(lambda: seen.created(fill) and seen.created(trunk), "the watches")
            client.pause(fill)
            tcall, fcall = etcd.watches()
            revisions = list(range(1, 10_001))
            for first in range(0, 10_000, 100):
                fcall.answer(0, 10_000, revisions[first : first + 100])
            tcall.answer(0, 20, [20])
            await until_async(lambda: seen.revisions(trunk) == [20], "the trunk's event")
            assert seen.revisions(fill) == []
            assert fcall.stream.blocked
            client.resume(fill)
            await until_async(lambda: len(seen.revisions(fill)) == 10_000, "the backfill's events")
            assert seen.revisions(fill) == revisions
            assert not fcall.stream.blocked


async def test_what_follows_in_a_read_waits_while_a_backfill_pauses() -> None:
    class Full(Recorder):
        client: Any = None

        def received(self, watch: Any, response: Any) -> None:
            super().received(watch, response)
            if response.events and response.events[0].revision == 1:
                self.client.pause(watch)

    async with scripted() as etcd:
        seen = Full()
        fill = Opened(b"f", start_revision=1, is_backfill=True)
        async with watching(etcd.endpoint, seen) as client:
            seen.client = client
            await seen.open(client, fill)
            [call] = etcd.watches()
            revisions = list(range(1, 1001))
            for first in range(0, 1000, 100):
                call.answer(0, 1000, revisions[first : first + 100])
            await until_async(lambda: seen.revisions(fill) != [], "the first events")
            assert len(seen.revisions(fill)) < 1000
            client.resume(fill)
            await until_async(lambda: len(seen.revisions(fill)) == 1000, "the other events")
            assert seen.revisions(fill) == revisions


class Ordered(Recorder):
    """Records the events of all watches in order."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[tuple[OpenedWatch, int]] = []

    def received(self, watch: OpenedWatch, response: WatchResponse) -> None:
        super().received(watch, response)
        self.order += [(watch, event.revision) for event in response.events]


class Unwritten:
    """A `Cork`: after an event for many clients, what it caused is written when the test says so."""

    part = 2 * MANY_CLIENTS

    def __init__(self) -> None:
        self.behind = False
        self.waiting: list[Callable[[], None]] = []

    def cork(self) -> None:
        pass

    def uncork(self) -> None:
        pass

    def when_written(self, do: Callable[[], None]) -> None:
        self.waiting.append(do)


async def test_events_for_many_wait_until_earlier_ones_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a turn that lasts long the events for few, who are many as well, would wait too.
    monkeypatch.setattr("upstream.watching.call.TURN_S", 3600.0)
    async with scripted() as etcd:
        seen, cork = Ordered(), Unwritten()
        many, few = Opened(b"a", watchers=cork.part + 1), Opened(b"b", watchers=cork.part)
        async with watching(etcd.endpoint, seen, cork=cork) as client:
            client.open(many)
            client.open(few)
            await until_async(lambda: seen.created(few), "two watches")
            [call] = etcd.watches()
            cork.behind = True
            for watch_id, revision in ((0, 11), (1, 12), (0, 13), (1, 14)):
                call.send_raw(frame(event_of(watch_id, revision)))
            await until_async(lambda: seen.order == [(few, 12), (few, 14)], "the events for few")
            await until_async(lambda: len(cork.waiting) == 1, "the others to wait")
            cork.behind = False
            cork.waiting.pop()()
            await until_async(lambda: seen.order[2:] == [(many, 11), (many, 13)], "the events for many")
            assert not cork.waiting


async def test_events_for_many_clients_wait_in_a_long_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.watching.call.TURN_S", -1.0)
    async with scripted() as etcd:
        seen = Ordered()
        many, few = Opened(b"a", watchers=MANY_CLIENTS), Opened(b"b", watchers=MANY_CLIENTS - 1)
        async with watching(etcd.endpoint, seen) as client:
            client.open(many)
            client.open(few)
            await until_async(lambda: seen.created(few), "two watches")
            [call] = etcd.watches()
            sent = [(0, 11), (0, 12), (1, 13), (0, 14), (1, 15)]
            call.send_raw(b"".join(frame(event_of(watch_id, revision)) for watch_id, revision in sent))
            await until_async(lambda: len(seen.order) == 5, "all events")
            assert seen.order == [(few, 13), (few, 15), (many, 11), (many, 12), (many, 14)]


async def test_answers_to_many_creates_take_several_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if one read brings them; an event that follows them in the read waits for a part of them only."""
    monkeypatch.setattr("upstream.watching.call.TURN_S", -1.0)
    turn, turns, event_after = 0, Counter[int](), -1

    class Counted(Recorder):
        def received(self, watch: OpenedWatch, response: WatchResponse) -> None:
            nonlocal event_after
            super().received(watch, response)
            if response.events:
                event_after = turns.total()
            else:
                turns[turn] += 1

    async with scripted() as etcd:
        seen = Counted()
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, Opened(b"live"))
            [call] = etcd.watches()
            creates: list[rpc_pb2.WatchRequest] = []
            etcd.on_watch = lambda _, create: creates.append(create)
            for number in range(500):
                client.open(Opened(b"%d" % number))
            await until_async(lambda: len(creates) == 500, "the creates")
            turns.clear()
            call.send_raw(b"".join(map(frame, [*(created_of(1 + number) for number in range(500)), event_of(0, 12)])))
            for turn in range(1_000):  # noqa: B007  # `received` reads it
                await asyncio.sleep(0)
                if turns.total() == 500:
                    break
            assert turns.total() == 500
            assert max(turns.values()) <= WITHOUT_EVENTS_MAX
            assert 0 <= event_after < 500


def created_of(watch_id: int) -> bytes:
    """Return the answer to a create."""
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=11, raft_term=1)
    return rpc_pb2.WatchResponse(header=header, watch_id=watch_id, created=True).SerializeToString()


def event_of(watch_id: int, revision: int) -> bytes:
    """Return a response with one event."""
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=revision, raft_term=1)
    events = [kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k", mod_revision=revision))]
    return rpc_pb2.WatchResponse(header=header, watch_id=watch_id, events=events).SerializeToString()


def events_of(watch_id: int, value_bytes: Sequence[int], revision: int = 12) -> bytes:
    """Return an encoded response of one revision with events of these sizes."""
    kvs = [kv_pb2.KeyValue(key=b"k", mod_revision=revision, value=bytes(size)) for size in value_bytes]
    events = [kv_pb2.Event(kv=kv) for kv in kvs]
    header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=revision, raft_term=1)
    return rpc_pb2.WatchResponse(header=header, watch_id=watch_id, events=events).SerializeToString()


async def test_no_large_response_overtakes_one_in_the_same_frame() -> None:
    """etcd has a frame for each response; grpc's C core, which the bundled store uses, and some proxies join them."""
    async with scripted() as etcd:
        seen, watch = Recorder(), Opened(b"a")
        created = rpc_pb2.WatchResponse(header=rpc_pb2.ResponseHeader(cluster_id=1, revision=10), created=True)
        sent = [created.SerializeToString(), events_of(0, [90_000]), event_of(0, 13)]
        etcd.on_watch = lambda call, _: call.send_raw(b"".join(map(frame, sent)))
        async with watching(etcd.endpoint, seen) as client:
            client.open(watch)
            await until_async(lambda: seen.revisions(watch) == [12, 13], "the events")
            [call] = etcd.watches()
            call.send_raw(frame(event_of(0, 14)) + frame(events_of(0, [90_000], 15)))
            await until_async(lambda: seen.revisions(watch) == [12, 13, 14, 15], "the events, in order")


@pytest.mark.parametrize("sizes", [[90_000], [50_000] * 20], ids=["one event", "one revision"])
async def test_a_response_above_the_limit_ends_its_watch_alone(sizes: list[int]) -> None:
    """The rest of the response is skipped: its stream and the other watches on it are not affected."""
    async with scripted() as etcd:
        seen = Recorder()
        a, b = Opened(b"a"), Opened(b"b")
        async with watching(etcd.endpoint, seen, UpstreamSettings(watch_message_bytes_max=80_000)) as client:
            client.open(a)
            await seen.open(client, b)
            (call,) = etcd.watches()
            call.send(events_of(0, sizes))
            call.answer(1, 13, [13])
            await until_async(lambda: seen.losses, "the loss")
            [(watch, status, text)] = seen.losses
            assert (watch, status) == (a, 8)
            assert "80000 bytes" in text
            call.answer(1, 14, [14])
            await until_async(lambda: seen.revisions(b) == [13, 14], "the events of the other watch")
            assert seen.revisions(a) == []
            assert not call.ended


@pytest.mark.parametrize("garbage", [frame(b"\xff\xff"), b"\x07\x00\x00\x00\x01x", b"\x01\x00\x00\x00\x01x"])
async def test_an_unreadable_response_is_a_break(garbage: bytes) -> None:
    async with scripted() as etcd:
        seen = Recorder()
        a = Opened(b"a")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, a)
            etcd.watches()[0].send_raw(garbage)
            await until_async(lambda: len(etcd.watches()) == 2 and etcd.watches()[1].messages, "a second try")
            etcd.watches()[1].answer(0, 11, [11])
            await until_async(lambda: seen.revisions(a) == [11], "the event")


async def test_a_server_that_stops_answering_is_noticed() -> None:
    async with scripted() as etcd, scripted() as other:
        seen = Recorder()
        log = RecordedLog()
        a = Opened(b"a")
        settings = UpstreamSettings(connection=ConnectionSettings(keepalive_s=0.1, keepalive_timeout_s=0.1))
        async with watching(f"{etcd.endpoint},{other.endpoint}", seen, settings, log) as client:
            await seen.open(client, a)
            etcd.connections[0].frozen = True
            etcd.mute = True
            await until_async(lambda: (client.server or ())[:2] == (other.endpoint, "3.5.30"), "the other endpoint")
            assert "not even to a PING" in log.problems()[0]


async def test_silent_endpoint_delays_no_other() -> None:
    async with scripted() as silent, scripted() as etcd:
        silent.mute = True
        settings = UpstreamSettings(connection=ConnectionSettings(connect_timeout_s=3600), status_timeout_s=3600)
        async with watching(f"{silent.endpoint},{etcd.endpoint}", Recorder(), settings) as client:
            await until_async(lambda: (client.server or ())[:2] == (etcd.endpoint, "3.5.30"), "the other")


async def test_listener_may_call_the_client_from_a_callback() -> None:
    class Eager(Recorder):
        client: Any = None
        more: Opened | None = None

        def received(self, watch: Any, response: Any) -> None:
            super().received(watch, response)
            if response.events and self.more is None:
                self.more = Opened(b"more", start_revision=2)
                self.client.close(watch)
                self.client.open(self.more)
                self.client.request_progress(1)

    async with scripted() as etcd:
        seen = Eager()
        a = Opened(b"a")
        async with watching(etcd.endpoint, seen) as client:
            seen.client = client
            await seen.open(client, a)
            call = etcd.watches()[0]
            etcd.on_watch = etcd.answer_watch
            call.answer(0, 11, [11])
            # Events that follow each other would be passed on together.
            call.answer(0, 11)
            call.answer(0, 12, [12])
            await until_async(lambda: seen.more is not None and seen.progress(seen.more), "the proof")
            assert seen.revisions(a) == [11]


async def test_revision_regressed_lowers_the_newest_revision() -> None:
    async with scripted() as etcd:
        seen = Recorder()
        async with watching(etcd.endpoint, seen) as client:
            await until_async(lambda: client.connected, "the connection")
            assert client.newest_revision == 10
            client.revision_regressed(3)
            etcd.revision = 3
            ahead = Opened(b"a", start_revision=8)
            await seen.open(client, ahead)
            assert requests(etcd.watches()[0]) == ["create a from 0"]
