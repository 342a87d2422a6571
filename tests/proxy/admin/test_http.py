"""The HTTP/1.1 server of the admin port: answers, errors, limits; raw bytes over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.admin import http
from proxy.admin.http import AdminResponse, HttpServer, MakePage
from tests.waiting import LIMIT_S, until_async

LARGE = b"x" * (8 << 20)


def fails() -> AdminResponse:
    raise ValueError("a defect")


class Slow:
    """A page that is made over several turns of the loop."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self.begun = self.cancelled = 0

    async def page(self) -> AdminResponse:
        self.begun += 1
        try:
            await self.ready.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return AdminResponse(b"slow")


async def fails_later() -> AdminResponse:
    await asyncio.sleep(0)
    raise ValueError("a defect")


PAGES: dict[str, MakePage] = {
    "/": lambda: AdminResponse(b"hello"),
    "/fails": fails,
    "/fails-later": fails_later,
    "/large": lambda: AdminResponse(LARGE),
}


@asynccontextmanager
async def serving(idle_s: float = 60.0, slow: Slow | None = None) -> AsyncIterator[tuple[HttpServer, int]]:
    server = HttpServer(PAGES if slow is None else {**PAGES, "/slow": slow.page}, idle_s)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop()


async def ask(port: int, request: bytes) -> bytes:
    """Send bytes and return everything that is answered until the server closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), LIMIT_S)
    except ConnectionResetError:
        return b""
    finally:
        writer.close()


def answered(request: bytes) -> bytes:
    async def run() -> bytes:
        async with serving() as (_, port):
            return await ask(port, request)

    return asyncio.run(run())


CLOSE = b"Host: a\r\nConnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("request_line", "status", "body"),
    [
        (b"GET / HTTP/1.1", b"200 OK", b"hello"),
        (b"GET /?since=1 HTTP/1.1", b"200 OK", b"hello"),
        (b"HEAD / HTTP/1.1", b"200 OK", b""),
        (b"GET /none HTTP/1.1", b"404 Not Found", b"404: not found\n"),
        (b"POST / HTTP/1.1", b"405 Method Not Allowed", b"405: only GET and HEAD\n"),
        (b"GET /fails HTTP/1.1", b"500 Internal Server Error", b"500: the page failed; see the log\n"),
        (b"GET /fails-later HTTP/1.1", b"500 Internal Server Error", b"500: the page failed; see the log\n"),
    ],
)
def test_each_request_gets_its_answer(request_line: bytes, status: bytes, body: bytes) -> None:
    head, _, found = answered(request_line + b"\r\n" + CLOSE).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert found == body


def test_requests_of_one_connection_are_answered_in_order() -> None:
    more = b"GET /none HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc"
    text = answered(more + more + b"GET / HTTP/1.1\r\n" + CLOSE)
    assert [part[:3] for part in text.split(b"HTTP/1.1 ")[1:]] == [b"404", b"404", b"200"]


async def test_requests_after_a_slow_page_wait_for_it() -> None:
    slow = Slow()
    async with serving(slow=slow) as (server, port):
        more = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
        waiting = asyncio.ensure_future(ask(port, more + more + b"GET / HTTP/1.1\r\n" + CLOSE))
        await until_async(lambda: slow.begun == 1, "the first page to begin")
        # Other connections are answered meanwhile.
        assert (await ask(port, b"GET / HTTP/1.1\r\n" + CLOSE)).endswith(b"hello")
        assert slow.begun == 1
        slow.ready.set()
        bodies = [part.partition(b"\r\n\r\n")[2] for part in (await waiting).split(b"HTTP/1.1 ")[1:]]
        assert bodies == [b"slow", b"slow", b"hello"]
        await until_async(lambda: not server.connections, "the connections to close")


async def test_a_client_that_leaves_ends_the_making_of_its_page() -> None:
    slow = Slow()
    async with serving(slow=slow) as (server, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n")
        await until_async(lambda: slow.begun == 1, "the page to begin")
        (connection,) = server.connections
        connection.close()
        await until_async(lambda: slow.cancelled == 1, "the page to be cancelled")
        writer.close()


@pytest.mark.parametrize(
    "request_bytes", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"a" * http.REQUEST_BYTES_MAX]
)
def test_a_bad_or_too_large_request_gets_one_error(request_bytes: bytes) -> None:
    text = answered(request_bytes)
    assert text.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 431 "))
    assert text.count(b"HTTP/1.1 ") == 1


async def test_answers_wait_for_a_client_that_does_not_read() -> None:
    """The proxy keeps at most one large answer for it, however many it asks for."""
    async with serving() as (server, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n" * 20 + b"GET / HTTP/1.1\r\n" + CLOSE)
        await until_async(lambda: len(server.connections) == 1, "the connection")
        (connection,) = server.connections
        await until_async(lambda: not connection._reading, "the answers to wait")
        assert connection._transport.get_write_buffer_size() < 2 * len(LARGE)
        received = await asyncio.wait_for(reader.read(), LIMIT_S)
        assert received.count(b"HTTP/1.1 200 OK") == 21
        writer.close()


def test_a_connection_without_a_request_is_closed() -> None:
    async def run() -> bytes:
        async with serving(idle_s=0.05) as (_, port):
            return await ask(port, b"GET / HTTP/1.1\r\n")

    assert asyncio.run(run()) == b""


async def test_one_connection_too_many_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 2)
    async with serving() as (server, port):
        kept = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
        await until_async(lambda: len(server.connections) == 2, "two connections")
        assert await ask(port, b"GET") == b""
        await until_async(lambda: len(server.connections) == 2, "two connections again")
        for _, writer in kept:
            writer.close()
