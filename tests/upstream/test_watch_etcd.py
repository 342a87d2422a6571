"""The watch client against real etcds: it passes on all events, through stops, crashes and compactions."""

from __future__ import annotations

import asyncio

import pytest

from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event
from tests.e2e.running import direct
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.cluster import cluster
from tests.etcd.server import EtcdServer
from tests.faults.relay import relay_to
from tests.upstream.recorder import RecordedLog, Recorder, watching
from tests.upstream.stories import Opened
from tests.waiting import until_async
from upstream.connecting import connect
from upstream.endpoints import parse_endpoint
from upstream.unary import call_unary


def decoded(event: Event) -> kv_pb2.Event:
    """Return an event as a message."""
    return rpc_pb2.WatchResponse.FromString(event.encoded).events[0]


@pytest.mark.parametrize("etcd_binary", etcds(), ids=lambda binary: binary.name)
async def test_events_prev_kv_and_the_past(etcd: EtcdServer, etcd_binary: EtcdBinary) -> None:
    async with direct(etcd) as writer:
        first = await writer.put(b"a", b"1")
        seen = Recorder()
        now, past = Opened(b"a", prev_kv=True), Opened(b"", b"\x00", start_revision=first)
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, now, past)
            second = await writer.put(b"a", b"2")
            await until_async(lambda: seen.revisions(now) == [second], "the event")
            await until_async(lambda: seen.revisions(past) == [first, second], "the past")
            event = decoded(seen.of(now)[-1].events[0])
            assert (event.kv.value, event.prev_kv.value) == (b"2", b"1")
            assert not decoded(seen.of(past)[-1].events[-1]).HasField("prev_kv")
            assert (client.server or ())[:2] == (etcd.endpoint, etcd_binary.name)
            assert client.ordered_progress is etcd_binary.ordered_progress
            client.close(now)
            client.close(past)
            await until_async(lambda: etcd.watchers() == 0, "etcd to have no watchers")


@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_nothing_is_lost_over_a_restart(etcd: EtcdServer, how: str) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        log = RecordedLog()
        all_keys = Opened(b"k", b"l")
        quiet = Opened(b"quiet")
        async with watching(etcd.endpoint, seen, log=log) as client:
            await seen.open(client, all_keys, quiet)
            written = [await writer.put(b"k%d" % number) for number in range(20)]
            await asyncio.to_thread(etcd.stop if how == "stop" else etcd.kill)
            await until_async(lambda: not client.connected, "the break")
            await asyncio.to_thread(etcd.start)
            # Before the client is back, or while it comes back.
            written += [await writer.put(b"k%d" % number) for number in range(20)]
            written.append(await writer.put(b"quiet"))
            await until_async(lambda: client.connected, "the next connection")
            written += [await writer.put(b"k%d" % number) for number in range(20)]
            await until_async(lambda: seen.revisions(quiet) == [written[40]], "the event of the quiet watch")
            del written[40]
            await until_async(lambda: len(seen.revisions(all_keys)) >= 60, "all events")
            assert seen.revisions(all_keys) == written
            assert seen.losses == []
            assert [response.created for response in seen.of(quiet)] == [True, False]
            assert log.problems()


async def test_progress_is_proven_and_true(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        busy, quiet = Opened(b"k", b"l"), Opened(b"quiet")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, busy, quiet)
            for number in range(30):
                last = await writer.put(b"k%d" % number)
                client.request_progress(1)
                await until_async(lambda last=last: seen.progress(quiet) >= last, "the proof")  # type: ignore[misc] # bound at once
                # All events up to the proven revision have been received.
                assert seen.revisions(busy)[-1] == last
            # A resume starts from now, not above the newest revision, so that progress is answered without a write.
            await asyncio.to_thread(etcd.kill)
            await asyncio.to_thread(etcd.start)
            await until_async(lambda: client.connected, "the next connection")
            seen.proven.clear()

            def proven() -> bool:
                client.request_progress(1)
                return seen.progress(busy) == seen.progress(quiet) == last

            await until_async(proven, "proofs after a restart")
            fill = Opened(b"k", b"l", start_revision=2, is_backfill=True)
            client.open(fill)
            await until_async(lambda: seen.revisions(fill) == seen.revisions(busy), "the backfill")

            def proven_fill() -> bool:
                client.request_progress(1)
                return seen.progress(fill) == last

            await until_async(proven_fill, "the backfill's proof")


async def test_compaction_ends_only_watches_that_need_the_revisions(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        for number in range(20):
            last = await writer.put(b"k%d" % number)
        await writer.compact(last - 5)
        seen = Recorder()
        old, edge, live = (
            Opened(b"k", b"l", start_revision=2),
            Opened(b"k", b"l", start_revision=last - 5),
            Opened(b"k", b"l"),
        )
        async with watching(etcd.endpoint, seen) as client:
            for watch in (old, edge, live):
                client.open(watch)
            await until_async(lambda: seen.of(old) and seen.of(old)[-1].canceled, "the cancel")
            assert seen.of(old)[-1].compact_revision == last - 5
            await until_async(lambda: len(seen.revisions(edge)) == 6, "the event at the compact revision and on")
            assert client.watch_count == 2
            last = await writer.put(b"k")
            await until_async(lambda: seen.revisions(live) == [last], "the live watch")
            # The cancelled id does not suppress progress.
            client.request_progress(1)
            await until_async(lambda: seen.progress(live) == last, "the proof")
            await until_async(lambda: etcd.watchers() == 2, "the dead watch to be gone")


async def test_watches_that_sleep_through_a_compaction(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        asleep, proven, busy = Opened(b"asleep"), Opened(b"proven", token=b"x"), Opened(b"busy", token=b"x")
        async with relay_to(etcd.client_port) as way, watching(way.endpoint, seen) as client:
            await seen.open(client, asleep)
            await writer.put(b"asleep")
            await until_async(lambda: seen.revisions(asleep), "its event")
            await seen.open(client, proven, busy)
            for _ in range(5):
                last = await writer.put(b"busy")
            await until_async(lambda: len(seen.revisions(busy)) == 5, "the events")
            # As if the proof for the watch that will be idle had been lost with the connection.
            registration = client._state.registration(asleep)
            assert registration is not None
            position = registration.next_revision
            client.request_progress(1)
            await until_async(lambda: seen.progress(proven) == seen.progress(asleep) == last, "the proofs")
            registration.next_revision = position
            way.cut()
            await until_async(lambda: not client.connected, "the break")
            await writer.put(b"busy")
            await writer.compact(last)
            last = await writer.put(b"proven")
            way.mend()
            await until_async(lambda: seen.revisions(proven) == [last], "the event of the watch that was proven")
            await until_async(lambda: seen.of(asleep)[-1].canceled, "the cancel")
            assert seen.of(asleep)[-1].compact_revision == last - 2
            assert seen.revisions(busy) == [last - 6 + n for n in range(6)]
            assert seen.losses == []


async def test_a_large_revision_comes_in_one_piece(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        live = Opened(b"k", b"l")
        async with watching(etcd.endpoint, seen) as client:
            await seen.open(client, live)
            value = bytes(200_000)
            for number in range(100):
                await writer.put(b"k%03d" % number, value)
            # All of it again in deletes with previous values: 20 MB, with a read limit of a default client of 4 MB.
            await until_async(lambda: len(seen.revisions(live)) == 100, "the puts")
            past = Opened(b"k", b"l", start_revision=2, prev_kv=True, is_backfill=True)
            gone = Opened(b"k", b"l", prev_kv=True)
            await seen.open(client, gone)
            done = await asyncio.to_thread(etcd.ctl, "del", "--prefix", "k")
            assert done.stdout.strip() == "100"
            await until_async(lambda: seen.revisions(gone), "the deletes")
            [response] = [response for response in seen.of(gone) if response.events]
            assert len(response.events) == 100
            assert not response.fragment
            assert sum(len(event.encoded) for event in response.events) > 20_000_000
            client.open(past)
            await until_async(lambda: len(seen.revisions(past)) == 200, "the past")
            assert seen.revisions(past) == seen.revisions(live)


async def test_two_thousand_watches_are_created_in_one_go_and_resume(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        watches = [Opened(b"k%d" % number) for number in range(2000)]
        async with watching(etcd.endpoint, seen) as client:
            for watch in watches:
                client.open(watch)
            await until_async(lambda: all(map(seen.created, watches)), "all watches")
            assert etcd.watchers() == 2000
            assert client.stream_count == 1
            await asyncio.to_thread(etcd.kill)
            await asyncio.to_thread(etcd.start)
            last = await writer.put(b"k1999")
            await until_async(lambda: seen.revisions(watches[-1]) == [last], "the event")
            await until_async(lambda: etcd.watchers() == 2000, "all watches again")
            for watch in watches[:1000]:
                client.close(watch)
            await until_async(lambda: etcd.watchers() == 1000, "half of the watches to be gone")
        await until_async(lambda: etcd.watchers() == 0, "the rest to be gone")


async def test_streams_use_their_own_token(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        await writer.put(b"a")
        for line in ("user add root:r", "user grant-role root root", "role add reader", "user add u:p"):
            await asyncio.to_thread(etcd.ctl, *line.split())
        await asyncio.to_thread(etcd.ctl, "role", "grant-permission", "reader", "read", "a")
        await asyncio.to_thread(etcd.ctl, "user", "grant-role", "u", "reader")
        await asyncio.to_thread(etcd.ctl, "auth", "enable")
        connection = await connect(parse_endpoint(etcd.endpoint), None)
        request = rpc_pb2.AuthenticateRequest(name="u", password="p").SerializeToString()
        answer, _ = await call_unary(connection, "/etcdserverpb.Auth/Authenticate", request)
        connection.close()
        token = rpc_pb2.AuthenticateResponse.FromString(answer).token.encode()
        seen = Recorder()
        mine, beyond = Opened(b"a", token=token), Opened(b"b", token=token)
        stranger, fake = Opened(b"a"), Opened(b"a", token=b"no such token")
        async with watching(etcd.endpoint, seen) as client:
            for watch in (mine, beyond, stranger, fake):
                client.open(watch)
            await until_async(lambda: len(seen.losses) == 3, "the refusals")
            losses = {id(watch): (status, text) for watch, status, text in seen.losses}
            assert losses[id(beyond)] == (7, "etcdserver: permission denied")
            assert losses[id(stranger)] == (3, "etcdserver: user name is empty")
            assert losses[id(fake)] == (16, "etcdserver: invalid auth token")
            assert client.ordered_progress
            await until_async(lambda: seen.created(mine), "the watch that may")
            await asyncio.to_thread(etcd.ctl, "--user=root:r", "put", "a", "b")
            await until_async(lambda: seen.revisions(mine), "its event")


@pytest.mark.parametrize("etcd_binary", etcds(), ids=lambda binary: binary.name)
async def test_ordered_progress_is_known_with_auth_on(etcd: EtcdServer, etcd_binary: EtcdBinary) -> None:
    """Newer releases refuse their status without a token; older ones return it."""
    for line in ("user add root:r", "user grant-role root root", "auth enable"):
        etcd.ctl(*line.split())
    async with watching(etcd.endpoint, Recorder()) as client:
        await until_async(lambda: client.connected, "the connection")
        assert client.ordered_progress is etcd_binary.ordered_progress


async def test_a_real_etcd_without_a_leader() -> None:
    async with cluster(2) as members, direct(members.members[0]) as writer:
        one, two = members.members
        seen = Recorder()
        a = Opened(b"a")
        async with watching(f"{one.endpoint},{two.endpoint}", seen) as client:
            await seen.open(client, a)
            first = await writer.put(b"a")
            await until_async(lambda: seen.revisions(a) == [first], "the event")
            await asyncio.to_thread(two.kill)
            await until_async(lambda: seen.leaderless, "the news that there is no leader")
            await until_async(lambda: client.connected, "a connection without a leader")
            assert client.leaderless
            assert client.server is not None
            assert client.server[0] == one.endpoint
            await asyncio.to_thread(two.start)
            await until_async(lambda: not client.leaderless, "the leader's return")
            second = await writer.put(b"a")
            await until_async(lambda: seen.revisions(a) == [first, second], "the next event")
            assert seen.leaderless == 1
            assert seen.losses == []
