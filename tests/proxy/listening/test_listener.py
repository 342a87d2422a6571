"""The listener with test handlers: routing, batching of writes, timeouts, limits, drain."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from random import Random

import pytest

from proto.framing import Status, frame
from proto.http2.frames import PREFACE
from proxy.listening.connection import PART_PIECES_MAX
from proxy.listening.settings import ListenerSettings
from tests.e2e.raw_client import HOST, RawStream
from tests.proxy.listening.echo import ECHO, rig_of
from tests.waiting import LIMIT_S, until_async

EMPTY_SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS_ACK = bytes([0, 0, 0, 4, 1, 0, 0, 0, 0])


async def test_a_call_and_its_end() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        call = client.call(ECHO)
        call.send(b"hello")
        assert await call.next() == b"hello"
        call.send_raw(b"", end=True)
        assert await call.end() == (Status.OK, "")
        assert call.headers["content-type"] == "application/grpc"
        assert rig.listener.stats.requests == 1


async def test_a_call_that_ends_at_once_is_trailers_only() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        call = client.call(ECHO, end=True)
        assert await call.end() == (Status.OK, "")
        assert not call.trailers
        assert rig.handlers[0].call.ended


@pytest.mark.parametrize(
    ("head", "http_status", "status"),
    [
        ([(":method", "GET"), (":path", ECHO)], "405", Status.INTERNAL),
        ([(":method", "POST"), (":path", ECHO), ("content-type", "text/plain")], "415", Status.INVALID_ARGUMENT),
        (
            [(":method", "POST"), (":path", "/no.Such/Method"), ("content-type", "application/grpc")],
            "200",
            Status.UNIMPLEMENTED,
        ),
    ],
)
async def test_request_that_is_not_grpc_is_answered(
    head: list[tuple[str, str]], http_status: str, status: Status
) -> None:
    async with rig_of() as rig, await rig.connect() as client:
        pseudo = [pair for pair in head if pair[0][0] == ":"]
        rest = [pair for pair in head if pair[0][0] != ":"]
        stream = client.request([*pseudo, (":scheme", "http"), (":authority", "x"), *rest], end=True)
        assert (await stream.end())[0] == status
        assert stream.headers[":status"] == http_status


async def test_unrouted_paths_go_to_passthrough() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        rig.listener.passthrough = rig.open
        call = client.call("/etcdserverpb.KV/Range")
        call.send(b"x", end=True)
        assert await call.next() == b"x"


async def test_the_deadline_ends_a_call() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        call = client.call(ECHO, [("grpc-timeout", "50m")])
        assert await call.end() == (Status.DEADLINE_EXCEEDED, "context deadline exceeded")
        assert rig.handlers[0].closed_with == [None]


async def test_a_cancel_and_a_lost_connection_reach_the_handlers() -> None:
    async with rig_of() as rig:
        client = await rig.connect()
        first, second = client.call(ECHO), client.call(ECHO)
        first.send(b"x")
        second.send(b"x")
        await second.next()
        first.cancel()
        await until_async(lambda: rig.handlers[0].closed_with == [8], "the cancel")
        await client.close()
        await until_async(lambda: rig.handlers[1].closed_with == [None], "the loss")
        assert rig.handlers[0].closed_with == [8]


async def test_failing_handler_resets_only_its_own_stream() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        bad, good = client.call(ECHO), client.call(ECHO)
        good.send(b"1")
        await good.next()
        bad.send_raw(b"break")
        await bad.end()
        assert bad.reset == 2
        good.send(b"2")
        assert await good.next() == b"2"


async def test_writes_of_one_turn_are_batched() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        calls = [client.call(ECHO) for _ in range(50)]
        for call in calls:
            call.send(b"x")
        for call in calls:
            await call.next()
        before = rig.listener.stats.writes
        for handler in rig.handlers:
            handler.call.write(frame(b"event"))
        for call in calls:
            assert await call.next() == b"event"
        assert rig.listener.stats.writes == before + 1


async def test_output_of_a_read_is_flushed_at_its_end() -> None:
    """Each connection is written once, before other callbacks of this turn; later output is written separately."""
    async with rig_of() as rig, await rig.connect() as client:
        calls = [client.call(ECHO) for _ in range(5)]
        for call in calls:
            call.send(b"x")
            assert await call.next() == b"x"
        before = rig.listener.stats.writes
        rig.listener.output.cork()
        for handler in rig.handlers:
            handler.call.write(frame(b"event"))
        assert rig.listener.stats.writes == before
        rig.listener.output.uncork()
        assert rig.listener.stats.writes == before + 1
        rig.handlers[0].call.write(frame(b"later"))
        assert rig.listener.stats.writes == before + 1
        for call in calls:
            assert await call.next() == b"event"
        assert await calls[0].next() == b"later"


async def test_message_is_written_at_once_unless_output_is_pending() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        call = client.call(ECHO)
        call.send(b"x")
        assert await call.next() == b"x"
        connection = next(iter(rig.listener.connections))
        stream = next(iter(connection.h2.streams.values()))
        stats = rig.listener.stats
        writes, written = stats.writes, stats.written_bytes

        def write(text: bytes) -> bool:
            message = frame(text)
            return connection.write_now(stream, message, len(message))

        assert write(b"now")
        assert (stats.writes, stats.written_bytes) == (writes + 1, written + 9 + 5 + 3)
        rig.handlers[0].call.write(frame(b"queued"))
        assert not write(b"would overtake it")
        connection.flush()
        assert write(b"after it")
        connection.pause_writing()
        assert not write(b"has no room")
        connection.resume_writing()
        connection.flush()
        assert [await call.next() for _ in range(3)] == [b"now", b"queued", b"after it"]


@pytest.mark.parametrize("connections", [1, 8])
async def test_large_output_is_written_before_the_turn_ends(connections: int) -> None:
    """No output is left for the end of the turn."""
    async with rig_of() as rig, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await rig.connect()) for _ in range(connections)]
        calls = [client.call(ECHO) for client in clients]
        for call in calls:
            call.send(b"x")
            assert await call.next() == b"x"
        before = rig.listener.stats.writes
        for handler in rig.handlers:
            handler.call.write(frame(b"event"))
        rig.listener.output.flush()
        assert rig.listener.stats.writes == before + connections
        for call in calls:
            assert await call.next() == b"event"
        assert rig.listener.stats.writes == before + connections


async def test_stream_drains_when_its_window_opens() -> None:
    async with rig_of() as rig, await rig.connect(window=65_535) as client:
        call = client.call(ECHO)
        call.taking = False
        call.send(b"x")
        await call.next()
        assert not rig.handlers[0].call.write(frame(b"y" * 100_000))
        await until_async(lambda: call.held >= 65_535, "the window to be used up")
        assert rig.handlers[0].drains == 0
        call.take()
        assert len(await call.next()) == 100_000
        assert rig.handlers[0].drains == 1


async def test_unread_end_becomes_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.listening.calls.UNREAD_END_GRACE_S", 0.05)
    async with rig_of() as rig, await rig.connect(window=65_535) as client:
        call = client.call(ECHO)
        call.taking = False
        call.send(b"x")
        await call.next()
        rig.handlers[0].call.write(frame(b"y" * 100_000))
        rig.handlers[0].call.end(Status.UNAVAILABLE, "too slow")
        await until_async(lambda: call.reset == 8, "the reset")


@pytest.mark.parametrize(
    "opening", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01\x02\x00", b"\x00", b"PRI * HTTP/2.0\r\n\r\nXX"]
)
async def test_other_protocol_is_closed_without_http1_handler(opening: bytes) -> None:
    async with rig_of() as rig:
        reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
        writer.write(opening)
        try:
            assert await reader.read() == b""
        except ConnectionResetError:
            pass
        finally:
            writer.close()
        assert rig.listener.stats.failed == 1


async def test_other_protocol_is_handed_over_with_all_its_bytes() -> None:
    class Upper(asyncio.Protocol):
        def __init__(self, transport: asyncio.Transport, opening: bytes) -> None:
            self.transport = transport
            self.data_received(opening)

        def data_received(self, data: bytes) -> None:
            self.transport.write(data.upper())

    async with rig_of() as rig:
        rig.listener.http1 = Upper
        reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
        for piece in (b"P", b"ost /v3", b"/kv"):
            writer.write(piece)
        assert await reader.readexactly(11) == b"POST /V3/KV"
        writer.write(b"more")
        assert await reader.readexactly(4) == b"MORE"
        writer.close()
        assert rig.listener.stats.http1 == 1
        assert not rig.listener.connections


async def test_preface_may_arrive_in_single_bytes() -> None:
    async with rig_of() as rig:
        reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
        for byte in PREFACE + EMPTY_SETTINGS:
            writer.write(bytes((byte,)))
            await asyncio.sleep(0)
        data = b""
        while SETTINGS_ACK not in data:
            data += await asyncio.wait_for(reader.read(1000), LIMIT_S)
        writer.close()


async def test_large_output_is_not_joined_for_each_stream() -> None:
    async with rig_of() as rig, await rig.connect() as client:
        calls = [client.call(ECHO) for _ in range(40)]
        for call in calls:
            call.send(b"x")
            await call.next()
        assert client.transport is not None
        client.transport.pause_reading()
        connection = next(iter(rig.listener.connections))
        connection.bulky = True
        large = Random(1).randbytes(1_000_000)
        for handler in rig.handlers:
            handler.call.write(frame(large))
        transport = connection._transport
        assert transport is not None
        await until_async(lambda: connection._write_paused, "the transport to be full")
        assert transport.get_write_buffer_size() < 2_000_000
        assert not rig.handlers[0].call.write(frame(b"later"))
        rig.handlers[1].call.end(Status.OK)
        client.transport.resume_reading()
        for call in calls:
            assert await call.next() == large
        assert await calls[0].next() == b"later"
        assert await calls[1].end() == (Status.OK, "")


@pytest.mark.parametrize(("pieces", "writes"), [(PART_PIECES_MAX, 1), (PART_PIECES_MAX + 2, 2)])
async def test_many_small_pieces_are_written_in_parts(pieces: int, writes: int) -> None:
    async with rig_of() as rig, await rig.connect() as client:
        call = client.call(ECHO)
        call.send(b"x")
        assert await call.next() == b"x"
        before = rig.listener.stats.writes
        # A frame's header is a piece, and so is its message.
        texts = [b"%d" % number for number in range(pieces // 2)]
        for text in texts:
            assert rig.handlers[0].call.write(frame(text))
        assert [await call.next() for _ in texts] == texts
        assert rig.listener.stats.writes == before + writes


async def test_client_that_does_not_read_is_not_read_from() -> None:
    settings = ListenerSettings(unread_bytes_max=20_000, write_buffer_bytes=10_000)
    async with rig_of(settings) as rig, await rig.connect() as client:
        first = client.call(ECHO)
        first.send(b"x")
        await first.next()
        assert client.transport is not None
        client.transport.pause_reading()
        connection = next(iter(rig.listener.connections))
        rig.handlers[0].call.write(frame(b"y" * 10_000_000))
        await until_async(lambda: connection._write_paused, "the transport to be full")
        calls: list[RawStream] = []
        while not connection._read_paused and len(calls) < 20_000:
            calls.append(client.call("/no/method", end=True))
            await asyncio.sleep(0)
        assert connection._read_paused
        client.transport.resume_reading()
        for call in calls:
            assert (await call.end())[0] == Status.UNIMPLEMENTED
        assert len(await first.next()) == 10_000_000
        first.send(b"z")
        assert await first.next() == b"z"


async def test_failed_connection_with_unread_output_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.listening.connection.CLOSE_GRACE_S", 0.2)
    async with rig_of(ListenerSettings(first_bytes_timeout_s=0.4)) as rig:
        client = await rig.connect()
        call = client.call(ECHO)
        call.send(b"x")
        await call.next()
        assert client.transport is not None
        client.transport.pause_reading()
        connection = next(iter(rig.listener.connections))
        connection.bulky = True
        rig.handlers[0].call.write(frame(b"y" * 10_000_000))
        await until_async(lambda: connection._write_paused, "the transport to be full")
        client.transport.write(b"\xff" * 100)
        await until_async(lambda: rig.handlers[0].closed_with == [None], "the failure")
        await until_async(lambda: not rig.listener.connections, "the connection to be dropped")
        client.transport.abort()


@pytest.mark.parametrize("opening", [b"", b"PRI * HTTP/2.0\r\n"])
async def test_half_open_connections_are_closed(opening: bytes) -> None:
    async with rig_of(ListenerSettings(first_bytes_timeout_s=0.1)) as rig:
        reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
        writer.write(opening)
        try:
            assert await asyncio.wait_for(reader.read(), LIMIT_S) == b""
        except ConnectionResetError:
            pass
        finally:
            writer.close()
        assert +rig.listener.stats.timed_out == {"first_bytes_timeout_s": 1}


async def test_settings_must_be_acknowledged() -> None:
    async with rig_of(ListenerSettings(settings_timeout_s=0.1)) as rig:
        reader, writer = await asyncio.open_connection(HOST, rig.listener.port)
        writer.write(PREFACE + EMPTY_SETTINGS)
        data = await asyncio.wait_for(reader.read(), LIMIT_S)
        assert data[-17 + 3] == 7
        assert data[-1] == 4
        writer.close()


async def test_client_that_does_not_answer_pings_is_dropped() -> None:
    settings = ListenerSettings(keepalive_interval_s=0.1, keepalive_timeout_s=0.2)
    async with rig_of(settings) as rig:
        good, dead = await rig.connect(), await rig.connect()
        assert dead.transport is not None
        await until_async(lambda: len(rig.listener.connections) == 2, "both connections")
        dead.transport.pause_reading()
        await until_async(
            lambda: +rig.listener.stats.timed_out == {"keepalive_timeout_s": 1}, "the dead one to be dropped"
        )
        await until_async(lambda: len(rig.listener.connections) == 1, "its connection to be removed")
        assert not good.lost
        await good.close()
        dead.transport.abort()


async def test_a_pause_of_the_proxy_drops_no_client() -> None:
    """While the process is suspended, the client's answer to a ping waits in the socket."""
    settings = ListenerSettings(keepalive_interval_s=0.2, keepalive_timeout_s=0.2)
    async with rig_of(settings) as rig, await rig.connect() as client:
        await until_async(lambda: rig.listener.connections, "the connection")
        (connection,) = rig.listener.connections
        assert client.transport is not None
        client.transport.pause_reading()
        await until_async(lambda: connection.times.pinged_at is not None, "a ping")
        client.transport.resume_reading()
        time.sleep(0.5)  # noqa: ASYNC251 - the pause
        await until_async(lambda: connection.times.pinged_at is None, "the answer")
        assert not +rig.listener.stats.timed_out


async def test_connection_above_the_limit_gets_goaway() -> None:
    async with rig_of(ListenerSettings(connections_max=1)) as rig:
        first = await rig.connect()
        await until_async(lambda: len(rig.listener.connections) == 1, "the first one")
        second = await rig.connect()
        await until_async(lambda: second.lost, "the second one to be refused")
        assert second.goaways[0].additional_data == b"too_many_connections"
        assert rig.listener.stats.refused == 1
        call = first.call(ECHO)
        call.send(b"x", end=True)
        assert await call.next() == b"x"
        await first.close()


async def test_drain_in_two_steps() -> None:
    async with rig_of() as rig:
        client = await rig.connect()
        call = client.call(ECHO)
        call.send(b"x")
        await call.next()
        rig.listener.go_away()
        await until_async(lambda: len(client.goaways) == 2, "both GOAWAYs")
        assert [event.last_stream_id for event in client.goaways] == [2**31 - 1, call.id]
        assert not client.lost
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, rig.listener.port)
        rig.handlers[0].call.write(frame(b"still here"))
        rig.handlers[0].call.end(Status.OK)
        assert await rig.listener.wait_gone(5)
        assert await call.next() == b"still here"
        await until_async(lambda: client.lost, "the connection to close")


async def test_idle_connection_gets_goaway_if_configured() -> None:
    async with rig_of(ListenerSettings(idle_timeout_s=0.1)) as rig:
        client = await rig.connect()
        await until_async(lambda: client.lost, "the idle connection to close")
        assert [int(event.error_code or 0) for event in client.goaways] == [0, 0]
