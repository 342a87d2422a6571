"""Limits of listener, calls and HTTP/1 at their edge: everything up to the limit is accepted, the excess is counted.

docs/evidence/limits.md names the test of each limit; those of HTTP/2 are in tests/http2/test_floods.py.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from proto.framing import Status, frame
from proto.http2 import Http2Limits
from proto.http2.events import LimitReached
from proto.http2.frames import PREFACE
from proto.pb import rpc_pb2
from proxy.admin.monitor import Monitor
from proxy.auth.reads import AuthReader, ReaderSettings
from proxy.listening.calls import ClientHandle
from proxy.listening.connection import ServerConnection
from proxy.listening.http1 import Http1Settings
from proxy.listening.settings import REFUSED_AT, ListenerSettings
from proxy.passthrough.settings import PassthroughSettings, PassthroughStats
from proxy.passthrough.unread import UnreadBytes
from proxy.passthrough.waiting import NO_CONNECTION
from proxy.watch.settings import WatchSettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.server import HOST, EtcdServer
from tests.proxy.admin.test_metrics import scrape, value
from tests.proxy.auth.test_reads import FakeSession, now
from tests.proxy.listening.echo import ECHO, Rig, rig_of
from tests.proxy.listening.test_http1 import ask, get
from tests.proxy.passthrough.test_passthrough import echo_server, passing
from tests.upstream.scripted import scripted
from tests.waiting import LIMIT_S, until_async
from upstream.endpoints import parse_endpoints
from upstream.pool import Pool

SETTINGS, ACK = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0)), bytes((0, 0, 0, 4, 1, 0, 0, 0, 0))
PING = bytes((0, 0, 8, 6, 0, 0, 0, 0, 0)) + b"12345678"
A_LITTLE_S = 0.001
TIMES = ListenerSettings(
    first_bytes_timeout_s=100,
    settings_timeout_s=200,
    keepalive_interval_s=300,
    keepalive_timeout_s=400,
    idle_timeout_s=1000,
)


Silent = tuple[ServerConnection, asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def silent(rig: Rig, opening: bytes) -> AsyncIterator[Silent]:
    """Connect, send something, and then nothing more."""
    reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
    try:
        writer.write(opening)
        await until_async(lambda: rig.listener.connections, "the connection")
        (connection,) = rig.listener.connections
        if opening:
            pending = 0 if ACK in opening else 1
            await until_async(lambda: connection.h2.settings_pending == pending and not connection.dirty, "the opening")
            await reader.readexactly(9)
        yield connection, reader, writer
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("limit", "opening", "since"),
    [
        ("first_bytes_timeout_s", b"", "opened_at"),
        ("settings_timeout_s", PREFACE + SETTINGS, "opened_at"),
        ("keepalive_timeout_s", PREFACE + SETTINGS + ACK, "pinged_at"),
        ("idle_timeout_s", PREFACE + SETTINGS + ACK, "idle_since"),
    ],
)
async def test_times_of_a_connection(limit: str, opening: bytes, since: str) -> None:
    async with rig_of(TIMES) as rig, silent(rig, opening) as (connection, _reader, _writer):
        if limit == "keepalive_timeout_s":
            due = connection.h2.now + 300
            connection.sweep(due - A_LITTLE_S)
            assert connection.times.pinged_at is None
            connection.sweep(due)
            assert connection.times.pinged_at == due
        at = getattr(connection.times, since) + getattr(TIMES, limit)
        connection.sweep(at - A_LITTLE_S)
        assert not +rig.listener.stats.timed_out
        if limit == "idle_timeout_s":
            connection.times.pinged_at = None
        connection.sweep(at + A_LITTLE_S)
        assert +rig.listener.stats.timed_out == {limit: 1}
        if limit == "idle_timeout_s":
            # It has received GOAWAY, and may still send.
            assert connection.h2.going_away
        else:
            await until_async(lambda: not rig.listener.connections, "it to be closed")


async def test_the_final_goaway_follows_an_unanswered_ping() -> None:
    """`drain_ping_s` bounds the wait for the second GOAWAY."""
    async with (
        rig_of(ListenerSettings(drain_ping_s=0.05)) as rig,
        silent(rig, PREFACE + SETTINGS + ACK) as (connection, reader, _writer),
    ):
        connection.go_away()
        assert not connection.h2.ending
        said = await asyncio.wait_for(reader.read(), LIMIT_S)
        assert connection.h2.ending
        assert said.count(bytes((0, 0, 8, 7, 0, 0, 0, 0, 0))) == 2


async def test_a_connection_stays_open_for_the_reason_to_be_read() -> None:
    """After `reason_s` the connection is closed, even if the client still sends."""
    async with (
        rig_of(ListenerSettings(reason_s=0.05)) as rig,
        silent(rig, PREFACE + SETTINGS + ACK) as (_connection, reader, writer),
    ):
        writer.write(PING[:4] + b"\1" + PING[5:8] + b"\1" + PING[9:])
        said = b""
        while b"PING on a stream" not in said:
            said += await asyncio.wait_for(reader.read(100), LIMIT_S)
        await until_async(lambda: not rig.listener.connections, "it to be closed")
        assert +rig.listener.stats.cut_off == {"PROTOCOL_ERROR": 1}


async def test_unread_bytes_beyond_the_limit_pause_reading() -> None:
    async with (
        rig_of(ListenerSettings(unread_bytes_max=20_000)) as rig,
        silent(rig, PREFACE + SETTINGS + ACK) as (connection, _reader, _writer),
    ):
        connection.pause_writing()
        connection._hold([b"x" * 15_000, b"x" * 5_000])
        assert not connection._read_paused
        assert rig.listener.stats.not_read == 0
        connection._hold([b"x"])
        connection._hold([b"x"])
        assert connection._read_paused
        assert rig.listener.stats.not_read == 1
        connection.resume_writing()
        assert not connection._read_paused


@pytest.mark.parametrize(("pings", "turns"), [(5, 0), (6, 1)])
async def test_turn_work_max_spreads_input_over_turns(pings: int, turns: int) -> None:
    async with (
        rig_of(ListenerSettings(http2=Http2Limits(turn_work_max=5), keepalive_min_s=None)) as rig,
        silent(rig, PREFACE + SETTINGS + ACK) as (connection, _reader, _writer),
    ):
        connection.data_received(PING * pings)
        assert connection.h2.behind == bool(turns)
        await until_async(lambda: not connection.h2.behind, "all of it")
        assert rig.listener.stats.in_turns == turns


async def test_streams_refused_at_a_limit_are_counted() -> None:
    limits = Http2Limits(max_streams=2, header_list_bytes_max=1000)
    async with rig_of(ListenerSettings(http2=limits)) as rig, await rig.connect() as client:
        calls = [client.call(ECHO) for _ in range(3)]
        assert (await calls[2].end(), calls[2].reset) == ((None, ""), 7)
        calls[0].send(b"x", end=True)
        await calls[0].end()
        large = client.call(ECHO, [("x", "y" * 1000)])
        assert (await large.end(), large.reset) == ((None, ""), 11)
        refused = rig.listener.stats.refused_at
        assert +refused == {"max_concurrent_streams": 1, "header_list_bytes_max": 1}
        # A client that keeps to its windows cannot cause this.
        (connection,) = rig.listener.connections
        connection._handle([LimitReached("initial_window")])
        assert refused["initial_window"] == 1
        assert set(refused) == set(REFUSED_AT.values())


def created(size: int) -> bytes:
    """A create request of so many bytes."""
    bare = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"", watch_id=7)).ByteSize()
    create = rpc_pb2.WatchCreateRequest(key=b"k" * (size - bare - 2), watch_id=7)
    request = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
    assert len(request) == size
    return request


async def test_the_size_of_a_watch_request(etcd: EtcdServer) -> None:
    async with (
        proxy_for(etcd, watch=WatchSettings(request_bytes_max=100)) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        monitor = Monitor(proxy, "")
        stream = client.watch()
        stream.raw.send(created(100))
        assert (await stream.created()).watch_id == 7
        assert value(scrape(monitor), "watchmux_limit_refusals_total", limit="request_bytes_max") == 0
        other = client.watch()
        other.raw.send(created(101))
        status, text = await other.raw.end()
        assert (status, "101 vs. 100 bytes" in text) == (Status.RESOURCE_EXHAUSTED, True)
        assert value(scrape(monitor), "watchmux_limit_refusals_total", limit="request_bytes_max") == 1


async def test_calls_that_wait_for_an_etcd() -> None:
    async with scripted() as etcd:
        etcd.mute = True
        async with passing(etcd.endpoint, bounds=PassthroughSettings(waiting_max=2)) as running:
            port = int(running.address.rpartition(":")[2])
            async with await RawClient.connect(port) as client:
                calls = [client.call("/any.Service/Wait") for _ in range(3)]
                assert await calls[2].end() == (Status.UNAVAILABLE, NO_CONNECTION)
                stats = running.passthrough.stats
                assert (running.passthrough.waiting, stats.unavailable) == (2, 1)
                assert stats.refused_at["waiting_max"] == 1


async def test_requests_kept_to_be_sent_again() -> None:
    bounds = PassthroughSettings(resend_bytes_max=1000, resend_bytes_total_max=2000)
    body = frame(bytes(5000))
    async with echo_server() as (echo, address), passing(address, echo, bounds=bounds) as running:
        await until_async(lambda: running.pool.pick() is not None, "the server")
        stats = running.passthrough.stats
        async with await RawClient.connect(int(running.address.rpartition(":")[2])) as client:
            first, second, third = (client.call("/any.Service/Stream") for _ in range(3))
            for number, call in enumerate((first, second), 1):
                call.send_raw(body[:1000])
                await until_async(lambda number=number: stats.resend_bytes == 1000 * number, "it")  # type: ignore[misc]
            assert stats.not_kept_at == {"resend_bytes_max": 0, "resend_bytes_total_max": 0}
            third.send_raw(body[:1])
            await until_async(lambda: stats.not_kept_at["resend_bytes_total_max"] == 1, "the third not to be kept")
            first.send_raw(body[1000:1001])
            await until_async(lambda: stats.not_kept_at["resend_bytes_max"] == 1, "the first to be too large")
            assert stats.resend_bytes == 1000
            for call, sent in ((first, 1001), (second, 1000), (third, 1)):
                call.send_raw(body[sent:], end=True)
                assert await call.end() == (0, "")
        assert stats.not_kept_at == {"resend_bytes_max": 2, "resend_bytes_total_max": 1}


class Unread:
    """A call whose client does not read."""

    def __init__(self, owner: UnreadBytes, connection: ClientHandle) -> None:
        self.owner = owner
        self.connection = connection
        self.size = 0
        self.lost = False

    def leave(self, size: int) -> None:
        self.size += size
        self.owner.charge(self, size)

    def abort_unread(self) -> None:
        self.lost = True
        self.owner.release(self, self.size)


def test_answers_that_are_not_read() -> None:
    stats = PassthroughStats()
    owner = UnreadBytes(PassthroughSettings(unread_bytes_per_connection_max=100, unread_bytes_max=150), stats)
    one, other = (cast(ClientHandle, object()) for _ in range(2))
    calls = [Unread(owner, one), Unread(owner, one), Unread(owner, other)]
    calls[0].leave(60)
    calls[1].leave(40)
    calls[2].leave(50)
    assert not any(call.lost for call in calls)
    # One byte more in total: the call with most unread bytes is ended.
    calls[2].leave(1)
    assert [call.lost for call in calls] == [True, True, False]
    assert stats.refused_at["unread_bytes_max"] == 2
    # One byte more on one connection: the call that adds it is ended.
    calls[2].leave(49)
    late = Unread(owner, other)
    assert not calls[2].lost
    late.leave(1)
    assert (late.lost, calls[2].lost) == (True, False)
    assert stats.refused_at["unread_bytes_per_connection_max"] == 1
    assert (stats.unread, stats.unread_bytes) == (3, 100)


async def test_reads_that_are_not_answered_in_time() -> None:
    async with scripted() as etcd:
        etcd.on_message = lambda _call, _message: None
        pool = Pool(parse_endpoints(etcd.endpoint))
        pool.start()
        reader = AuthReader(pool, ReaderSettings(timeout_s=0.05))
        reader.read(now(FakeSession()))
        await until_async(lambda: reader.failed["DEADLINE_EXCEEDED"], "a read to be given up")
        reader.stop()
        await pool.stop()


@pytest.mark.parametrize(
    ("settings", "status"),
    [
        (Http1Settings(), 400),
        (Http1Settings(opening_timeout_s=0.05), 408),
        (Http1Settings(connect_timeout_s=0.05), 502),
        (Http1Settings(connections_max=0), 503),
    ],
)
async def test_http1_that_is_refused_is_counted(
    settings: Http1Settings, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swallowed(_factory: Any, connected: socket.socket, *_arguments: Any) -> None:
        with connected:
            await asyncio.Event().wait()

    monkeypatch.setattr("proxy.listening.http1.open_transport", swallowed)
    said = {400: b"get /\r\n\r\n", 408: b"GE"}.get(status, get("/version"))
    async with scripted() as etcd, passing(etcd.endpoint) as running:
        running.http1.settings = settings
        answer = await ask(running.address, said)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert {key: count for key, count in running.http1.refused.items() if count} == {status: 1}
