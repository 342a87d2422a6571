"""The watch client against real etcds: it passes on all events, through stops, crashes and compactions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

from proto.pb import kv_pb2, rpc_pb2
from proto.scan import Event
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer, free_port
from tests.upstream.recorder import RecordedLog, Recorder, watching
from tests.upstream.stories import Opened
from tests.waiting import run, until_async
from upstream.connection import ClientConnection, connect
from upstream.endpoints import parse_endpoint
from upstream.unary import call_unary

KV = "/etcdserverpb.KV"


class Writer:
    """Writes to an etcd on a connection of its own."""

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._connection: ClientConnection | None = None

    async def _call(self, path: str, message: bytes) -> bytes:
        if self._connection is None or not self._connection.healthy:
            self._connection = await connect(parse_endpoint(self._etcd.endpoint), None)
        answer, _ = await call_unary(self._connection, path, message, timeout_s=20)
        return answer

    async def put(self, key: bytes, value: bytes = b"v") -> int:
        """Put a key; return the revision."""
        answer = await self._call(f"{KV}/Put", rpc_pb2.PutRequest(key=key, value=value).SerializeToString())
        return rpc_pb2.PutResponse.FromString(answer).header.revision

    async def put_many(self, keys: Sequence[bytes], value: bytes = b"v") -> int:
        """Put several keys in one revision."""
        puts = [rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value)) for key in keys]
        answer = await self._call(f"{KV}/Txn", rpc_pb2.TxnRequest(success=puts).SerializeToString())
        return rpc_pb2.TxnResponse.FromString(answer).header.revision

    async def delete(self, key: bytes, range_end: bytes) -> int:
        """Delete a range in one revision."""
        request = rpc_pb2.DeleteRangeRequest(key=key, range_end=range_end)
        answer = await self._call(f"{KV}/DeleteRange", request.SerializeToString())
        return rpc_pb2.DeleteRangeResponse.FromString(answer).header.revision

    async def compact(self, revision: int) -> None:
        """Compact at a revision."""
        await self._call(f"{KV}/Compact", rpc_pb2.CompactionRequest(revision=revision).SerializeToString())

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()


class Gate:
    """A TCP proxy to an etcd, which can be cut while the etcd keeps running."""

    def __init__(self, etcd: EtcdServer) -> None:
        self._etcd = etcd
        self._open = True
        self._writers: set[asyncio.StreamWriter] = set()
        self.endpoint = ""

    def cut(self) -> None:
        """Break all connections and accept no new ones."""
        self._open = False
        for writer in self._writers:
            writer.transport.abort()

    def repair(self) -> None:
        """Accept connections again."""
        self._open = True

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        if not self._open:
            writer.close()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._etcd.client_port)
        self._writers |= {writer, back}
        await asyncio.gather(self._pass(reader, back), self._pass(there, writer))
        self._writers -= {writer, back}

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
        except ConnectionError:
            pass
        writer.close()

    @property
    def empty(self) -> bool:
        """No connection goes through."""
        return not self._writers


@asynccontextmanager
async def gate(etcd: EtcdServer) -> AsyncIterator[Gate]:
    """Run a gate in front of an etcd."""
    way = Gate(etcd)
    server = await asyncio.start_server(way.serve, "127.0.0.1", 0)
    way.endpoint = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield way
    server.close()
    await until_async(lambda: way.empty, "the gate to be empty")


def decoded(event: Event) -> kv_pb2.Event:
    """Return an event as a message."""
    return rpc_pb2.WatchResponse.FromString(event.encoded).events[0]


def with_writer(etcd: EtcdServer, story: Callable[[Writer], Coroutine[Any, Any, None]]) -> None:
    """Run a story that writes."""

    async def closing() -> None:
        writer = Writer(etcd)
        try:
            await story(writer)
        finally:
            writer.close()

    run(closing(), 40)


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
def test_events_prev_kv_and_the_past(binary: EtcdBinary) -> None:
    with EtcdServer(binary) as etcd:

        async def story(writer: Writer) -> None:
            first = await writer.put(b"a", b"1")
            seen = Recorder()
            now, past = Opened(b"a", prev_kv=True), Opened(b"", b"\x00", start_revision=first)
            async with watching(etcd.endpoint, seen) as client:
                client.open(now)
                client.open(past)
                await until_async(lambda: seen.created(now) and seen.created(past), "the watches")
                second = await writer.put(b"a", b"2")
                await until_async(lambda: seen.revisions(now) == [second], "the event")
                await until_async(lambda: seen.revisions(past) == [first, second], "the past")
                event = decoded(seen.of(now)[-1].events[0])
                assert (event.kv.value, event.prev_kv.value) == (b"2", b"1")
                assert not decoded(seen.of(past)[-1].events[-1]).HasField("prev_kv")
                assert (client.server or ())[:2] == (etcd.endpoint, binary.name)
                assert client.ordered_progress is binary.ordered_progress
                client.close(now)
                client.close(past)
                await until_async(lambda: etcd.watchers() == 0, "etcd to have no watchers")

        with_writer(etcd, story)


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_nothing_is_lost_over_a_restart(etcd: EtcdServer, how: str) -> None:
    async def story(writer: Writer) -> None:
        seen = Recorder()
        log = RecordedLog()
        all_keys = Opened(b"k", b"l")
        quiet = Opened(b"quiet")
        async with watching(etcd.endpoint, seen, log=log) as client:
            client.open(all_keys)
            client.open(quiet)
            await until_async(lambda: seen.created(all_keys) and seen.created(quiet), "the watches")
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

    with_writer(etcd, story)


def test_progress_is_proven_and_true(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
        seen = Recorder()
        busy, quiet = Opened(b"k", b"l"), Opened(b"quiet")
        async with watching(etcd.endpoint, seen) as client:
            client.open(busy)
            client.open(quiet)
            await until_async(lambda: seen.created(busy) and seen.created(quiet), "the watches")
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

    with_writer(etcd, story)


def test_compaction_ends_only_watches_that_need_the_revisions(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
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

    with_writer(etcd, story)


def test_watches_that_sleep_through_a_compaction(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
        seen = Recorder()
        asleep, proven, busy = Opened(b"asleep"), Opened(b"proven", token=b"x"), Opened(b"busy", token=b"x")
        async with gate(etcd) as way, watching(way.endpoint, seen) as client:
            client.open(asleep)
            await until_async(lambda: seen.created(asleep), "the watch")
            await writer.put(b"asleep")
            await until_async(lambda: seen.revisions(asleep), "its event")
            client.open(proven)
            client.open(busy)
            await until_async(lambda: seen.created(proven) and seen.created(busy), "the others")
            for _ in range(5):
                last = await writer.put(b"busy")
            await until_async(lambda: len(seen.revisions(busy)) == 5, "the events")
            # As if the proof for the watch that will be idle had been lost with the connection.
            standing = client._state.registration(asleep)
            assert standing is not None
            position = standing.next_revision
            client.request_progress(1)
            await until_async(lambda: seen.progress(proven) == seen.progress(asleep) == last, "the proofs")
            standing.next_revision = position
            way.cut()
            await until_async(lambda: not client.connected, "the break")
            await writer.put(b"busy")
            await writer.compact(last)
            last = await writer.put(b"proven")
            way.repair()
            await until_async(lambda: seen.revisions(proven) == [last], "the event of the watch that was proven")
            await until_async(lambda: seen.of(asleep)[-1].canceled, "the cancel")
            assert seen.of(asleep)[-1].compact_revision == last - 2
            assert seen.revisions(busy) == [last - 6 + n for n in range(6)]
            assert seen.losses == []

    with_writer(etcd, story)


def test_a_large_revision_comes_in_one_piece(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
        seen = Recorder()
        live = Opened(b"k", b"l")
        async with watching(etcd.endpoint, seen) as client:
            client.open(live)
            await until_async(lambda: seen.created(live), "the watch")
            value = bytes(200_000)
            for number in range(100):
                await writer.put(b"k%03d" % number, value)
            # All of it again in deletes with previous values: 20 MB, with a read limit of a default client of 4 MB.
            await until_async(lambda: len(seen.revisions(live)) == 100, "the puts")
            past = Opened(b"k", b"l", start_revision=2, prev_kv=True, is_backfill=True)
            gone = Opened(b"k", b"l", prev_kv=True)
            client.open(gone)
            await until_async(lambda: seen.created(gone), "the watch with prev_kv")
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

    with_writer(etcd, story)


def test_two_thousand_watches_are_created_in_one_go_and_resume(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
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

    with_writer(etcd, story)


def test_one_of_two_endpoints_is_dead(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
        seen = Recorder()
        log = RecordedLog()
        a = Opened(b"a")
        dead = f"127.0.0.1:{free_port()}"
        async with watching(f"{dead},{etcd.endpoint}", seen, log=log) as client:
            client.open(a)
            await until_async(lambda: seen.created(a), "the watch")
            last = await writer.put(b"a")
            await until_async(lambda: seen.revisions(a) == [last], "the event")
            assert log.problems() == [
                f"{dead}: connection refused; check that etcd runs and listens on that address and port"
            ]

    with_writer(etcd, story)


def test_streams_use_their_own_token(etcd: EtcdServer) -> None:
    async def story(writer: Writer) -> None:
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

    with_writer(etcd, story)


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
def test_ordered_progress_is_known_with_auth_on(binary: EtcdBinary) -> None:
    """Newer releases refuse their status without a token; older ones return it."""
    with EtcdServer(binary) as etcd:
        for line in ("user add root:r", "user grant-role root root", "auth enable"):
            etcd.ctl(*line.split())

        async def story() -> None:
            async with watching(etcd.endpoint, Recorder()) as client:
                await until_async(lambda: client.connected, "the connection")
                assert client.ordered_progress is binary.ordered_progress

        run(story(), 40)


class Member(EtcdServer):
    """One of two members: without the other member it has no leader."""

    members: Sequence[Member] = ()

    def arguments(self) -> list[str]:
        cluster = ",".join(f"m{member.peer_port}=http://127.0.0.1:{member.peer_port}" for member in self.members)
        replaced = {"--name": f"m{self.peer_port}", "--initial-cluster": cluster}
        arguments = [text for text in super().arguments() if text.partition("=")[0] not in replaced]
        return [*arguments, *(f"{name}={value}" for name, value in replaced.items())]


def test_a_real_etcd_without_a_leader() -> None:
    one, two = Member(), Member()
    one.members = two.members = (one, two)

    async def story(writer: Writer) -> None:
        await asyncio.gather(asyncio.to_thread(one.start), asyncio.to_thread(two.start))
        seen = Recorder()
        a = Opened(b"a")
        async with watching(f"{one.endpoint},{two.endpoint}", seen) as client:
            client.open(a)
            await until_async(lambda: seen.created(a), "the watch")
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

    try:
        with_writer(one, story)
    finally:
        one.__exit__(None, None, None)
        two.__exit__(None, None, None)
