"""The table of RFC 9113's errors (`cases.py`), as raw bytes over sockets: to the listener, and to a connection to etcd.

Each row also checks other streams: unless it is a connection error, the bystander's stream continues, and only the
row's stream is reset.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import pytest

from proto.framing import Status
from proto.http2 import Connection, ErrorCode, Http2Limits, Role, Stream
from proto.http2.frames import DATA, GOAWAY, HEADERS, PING, RST_STREAM, SETTINGS
from proxy.listening.calls import ConnectionHandle, Handler, Headers, ServerCall
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from tests.e2e.raw_client import HOST
from tests.http2 import cases, cases_headers, cases_page
from tests.http2.cases import (
    ANSWERED,
    BYSTANDER,
    CLOSED_SILENTLY,
    CONNECTION_WINDOW_BYTES,
    ENDED,
    NO_FAULT,
    PROMISED,
    STREAMS_MAX,
    WINDOW_BYTES,
    Case,
)
from tests.http2.wire import PREFACE, REQUEST, RESPONSE, TRAILERS, Peer, data, ping, raw, rst, settings
from upstream.connecting import connect
from upstream.connection import ClientConnection
from upstream.endpoints import parse_endpoint
from upstream.heads import request_headers
from upstream.settings import ConnectionSettings

CASES = (*cases.CASES, *cases_headers.CASES)
SILENT = b"/test.Silent/Silent"
PROBE = b"probe%03d"
ACK = 1


@dataclass
class Socket:
    """A raw peer: the test decides what it sends, and what it receives is split into frames."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    # Encodes header blocks; one for the whole connection.
    scribe: Peer = field(default_factory=lambda: Peer(Connection(Role.SERVER)))
    # (type, flags, stream id, payload) of every frame.
    received: list[tuple[int, int, int, bytes]] = field(default_factory=list)
    over: bool = False
    probes: int = 0

    def say(self, *frames: bytes) -> None:
        self.writer.write(b"".join(frames))

    async def receive(self) -> tuple[int, int, int, bytes] | None:
        """Wait for the next frame; None at the end."""
        try:
            head = await self.reader.readexactly(9)
            payload = await self.reader.readexactly(int.from_bytes(head[:3], "big"))
        except (asyncio.IncompleteReadError, ConnectionError):
            self.over = True
            return None
        frame = (head[3], head[4], int.from_bytes(head[5:], "big"), payload)
        self.received.append(frame)
        return frame

    async def until(self, kind: int, stream_id: int) -> None:
        """Wait for a frame of this type on this stream."""
        while frame := await self.receive():
            if frame[0] == kind and frame[2] == stream_id:
                return
        raise AssertionError(f"no frame of type {kind} on stream {stream_id}: {self.received}")

    async def settle(self) -> None:
        """Wait for all answers to the sent frames: for a PING's answer, twice because handlers may act later; or for
        GOAWAY."""
        for _ in range(2):
            self.probes += 1
            self.say(ping(PROBE % self.probes))
            while frame := await self.receive():
                if frame[0] == GOAWAY or frame == (PING, ACK, 0, PROBE % self.probes):
                    break


def outcome(case: Case, received: list[tuple[int, int, int, bytes]], over: bool) -> str:
    """Return the outcome in the words of the table."""
    ends = [(stream_id, ErrorCode(int.from_bytes(body))) for kind, _, stream_id, body in received if kind == RST_STREAM]
    for kind, _, _, body in received:
        if kind == GOAWAY:
            code = ErrorCode(int.from_bytes(body[4:8]))
            return f"connection {code.name}" if code else CLOSED_SILENTLY
    if over:
        return CLOSED_SILENTLY
    faults = [(stream_id, code) for stream_id, code in ends if code]
    if faults:
        assert len(faults) == 1
        assert faults[0][0] == case.on
        return f"stream {faults[0][1].name}"
    # A response, or the end of a call after its response; answers to PING and SETTINGS.
    answers = [kind for kind, flags, _, body in received if not (kind == PING and flags and body.startswith(b"probe"))]
    return ANSWERED if {HEADERS, PING, SETTINGS, RST_STREAM, DATA} & set(answers) else NO_FAULT


class Held:
    """A handler that consumes nothing and ends the call when the client does, unless it must be silent."""

    def __init__(self, connection: ConnectionHandle, stream: Stream, headers: Headers) -> None:
        self.call = ServerCall(connection, stream)
        self.silent = (b":path", SILENT) in headers

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        del data, flow_size
        if end_stream:
            self.call.end(Status.OK)

    def trailers(self, headers: Headers) -> None:
        del headers
        self.call.end(Status.OK)

    def drained(self) -> None:
        """Nothing waits."""

    def closed(self, code: int | None) -> None:
        del code
        self.call.closed()


def opened(connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool) -> Handler | None:
    """Accept any request."""
    held = Held(connection, stream, headers)
    if end_stream and not held.silent:
        held.call.end(Status.OK)
        return None
    return held


@asynccontextmanager
async def listener_of() -> AsyncIterator[Listener]:
    """Yield a listener with the table's limits."""
    limits = Http2Limits(
        initial_window=WINDOW_BYTES,
        connection_window=CONNECTION_WINDOW_BYTES,
        max_streams=STREAMS_MAX,
        continuations_max=cases.CONTINUATIONS_MAX,
        turn_work_max=1_000,
    )
    listener = Listener(ListenerSettings(http2=limits, keepalive_min_s=None, reason_s=0.01))
    listener.passthrough = opened
    await listener.start(HOST, 0)
    try:
        yield listener
    finally:
        await listener.stop()


async def in_place(peer: Socket) -> None:
    """As a client: open the streams described in `cases.py`."""
    say = peer.scribe
    peer.say(PREFACE, settings(), settings(None, "ACK"))
    peer.say(say.request(cases.OPEN))
    peer.say(say.headers(ENDED, [(n, SILENT if n == b":path" else v) for n, v in REQUEST], "END_STREAM"))
    peer.say(say.request(cases.RESET_BY_PEER), rst(cases.RESET_BY_PEER))
    peer.say(say.request(cases.CLOSED, "END_STREAM"))
    peer.say(say.headers(cases.RESET_BY_US, REQUEST[1:]))
    peer.say(say.request(BYSTANDER), say.request(PROMISED, extra=[(b"content-length", b"5")]))
    await peer.until(HEADERS, cases.CLOSED)
    await peer.settle()


def rows(role: str) -> list[str]:
    """Return the sections that have rows for a role."""
    return list(dict.fromkeys(case.section for case in CASES if getattr(case, role)))


async def judge_section(section: str, role: str, judged: Callable[[Case], Awaitable[str]]) -> None:
    """Run all rows of a section for a role, and compare the answers with the table."""
    chosen = [case for case in CASES if case.section == section and getattr(case, role)]
    found = {case.what: await judged(case) for case in chosen}
    assert found == {case.what: getattr(case, role) for case in chosen}


async def judged_by_the_listener(port: int, case: Case) -> str:
    peer = Socket(*await asyncio.open_connection(HOST, port))
    if case.first:
        peer.say(b"" if case.server == CLOSED_SILENTLY else PREFACE)
    else:
        await in_place(peer)
        peer.received.clear()
    peer.say(*case.sent(peer.scribe))
    await peer.settle()
    found = outcome(case, peer.received, peer.over)
    if found.startswith("connection"):
        # Nothing is sent after GOAWAY, and the connection is closed.
        while await peer.receive():
            pass
        assert peer.received[-1][0] == GOAWAY
    elif found != CLOSED_SILENTLY:
        peer.say(data(BYSTANDER, b"", "END_STREAM"))
        await peer.until(HEADERS, BYSTANDER)
    peer.writer.close()
    return found


@pytest.mark.parametrize("section", rows("server"))
async def test_answers_of_the_listener(section: str) -> None:
    async with listener_of() as listener:
        await judge_section(section, "server", partial(judged_by_the_listener, listener.port))


class Answers:
    """A CallHandler that records the end."""

    def __init__(self) -> None:
        self.ends: list[int] = []

    def on_headers(self, headers: Headers) -> None:
        """Ignore the headers."""

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Do not consume the data."""

    def on_drained(self) -> None:
        """Nothing waits."""

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        del message, trailers
        self.ends.append(status)


class Server:
    """A raw server that accepts connections and leaves them to the test."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[Socket] = asyncio.Queue()
        self.port = 0

    def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted.put_nowait(Socket(reader, writer))


@asynccontextmanager
async def server_of() -> AsyncIterator[Server]:
    """Yield such a server."""
    taking = Server()
    server = await asyncio.start_server(taking.take, HOST, 0)
    taking.port = server.sockets[0].getsockname()[1]
    try:
        yield taking
    finally:
        server.close()


async def calls_in_place(peer: Socket, connection: ClientConnection) -> Answers:
    """As a server: bring our seven calls into the states described in `cases.py`; return the bystander's handler."""
    say = peer.scribe
    answers = Answers()
    calls = {}
    for stream_id in (1, 3, 5, 7, 9, 11, 13):
        headers = request_headers(connection, b"/test.Any/Any")
        handler = answers if stream_id == BYSTANDER else Answers()
        calls[stream_id] = connection.request(headers, handler, end_stream=stream_id == cases.CLOSED)
    await peer.until(HEADERS, PROMISED)
    peer.say(say.headers(cases.OPEN, RESPONSE))
    peer.say(say.headers(ENDED, RESPONSE), say.headers(ENDED, TRAILERS, "END_STREAM"))
    peer.say(rst(cases.RESET_BY_PEER))
    peer.say(say.headers(cases.CLOSED, RESPONSE), say.headers(cases.CLOSED, TRAILERS, "END_STREAM"))
    calls[cases.RESET_BY_US].reset()
    await peer.settle()
    return answers


SIZES = ConnectionSettings(stream_window_bytes=WINDOW_BYTES, connection_window_bytes=CONNECTION_WINDOW_BYTES)


async def judged_by_the_client(server: Server, case: Case) -> str:
    connecting = asyncio.ensure_future(connect(parse_endpoint(f"{HOST}:{server.port}"), None, SIZES))
    peer = await server.accepted.get()
    bystander = Answers()
    if not case.first:
        peer.say(settings(), settings(None, "ACK"))
        await peer.reader.readexactly(len(PREFACE))
        bystander = await calls_in_place(peer, await connecting)
        peer.received.clear()
    else:
        await peer.reader.readexactly(len(PREFACE))
    peer.say(*case.sent(peer.scribe))
    await peer.settle()
    found = outcome(case, peer.received, peer.over)
    if found.startswith("connection"):
        while await peer.receive():
            pass
        last = [frame for frame in peer.received if frame[0] == GOAWAY][-1]
        assert last[3][:4] == bytes(4), "a client accepts no stream of the server"
    elif found != CLOSED_SILENTLY:
        # Without the dynamic table, which the row may have changed unknown to the scribe.
        peer.say(raw(HEADERS, 5, BYSTANDER, b"\x88\x00\x0bgrpc-status\x010"))
        await peer.until(RST_STREAM, BYSTANDER)
        assert bystander.ends == [Status.OK]
    done = (await asyncio.gather(connecting, return_exceptions=True))[0]
    assert isinstance(done, ClientConnection) != case.first
    if isinstance(done, ClientConnection):
        done.close()
    peer.writer.close()
    return found


@pytest.mark.parametrize("section", rows("client"))
async def test_answers_of_the_connection_to_etcd(section: str) -> None:
    async with server_of() as server:
        await judge_section(section, "client", partial(judged_by_the_client, server))


def test_row_names_are_unique() -> None:
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_http2_cases_page_is_up_to_date() -> None:
    """`python -m tests.http2.cases_page` updates it."""
    assert cases_page.PAGE.read_text() == cases_page.page(CASES)
