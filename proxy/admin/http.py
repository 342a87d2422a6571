"""The HTTP/1.1 server of the admin port: h11 on the event loop.

It answers GET and HEAD of fixed paths. A web framework would take 11 MiB of a process that serves watches.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple, cast

import h11

from proxy import logs
from proxy.listening.sockets import listen

IDLE_S: Final = 75.0
"""How long a connection may stay without a complete request, or a response unread; nginx's keepalive_timeout."""

CONNECTIONS_MAX: Final = 256
"""Open connections; a further one is closed at once. Scrapers, probes and status pages need a few."""

REQUEST_BYTES_MAX: Final = 16 * 1024
"""Size of a request's header; a larger one is answered with an error."""

log = logs.logger("admin")


OK: Final = 200
UNAVAILABLE: Final = 503
REASONS: Final = {
    OK: b"OK",
    400: b"Bad Request",
    404: b"Not Found",
    405: b"Method Not Allowed",
    431: b"Request Header Fields Too Large",
    500: b"Internal Server Error",
    501: b"Not Implemented",
    UNAVAILABLE: b"Service Unavailable",
}
"""Statuses of answers, with their phrases (RFC 9110)."""


class AdminResponse(NamedTuple):
    """An answer: its body, and what describes it."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = OK
    headers: Mapping[str, str] = {}


MakePage = Callable[[], AdminResponse | Awaitable[AdminResponse]]
"""Makes a page at once, or over several turns of the loop."""

Pages = Mapping[str, MakePage]
"""By path."""


class HttpServer:
    """Serves pages on one address."""

    def __init__(self, pages: Pages, idle_s: float = IDLE_S) -> None:
        self.pages = pages
        self.idle_s = idle_s
        self.connections: set[HttpConnection] = set()
        self._servers: list[asyncio.Server] = []

    async def start(self, host: str, port: int, sockets: Sequence[socket.socket] = ()) -> int:
        """Listen, or use `sockets` that listen already; return the port. Raises OSError."""
        serve = asyncio.get_running_loop().create_server
        sockets = sockets or (await listen(host, port, "", CONNECTIONS_MAX)).sockets
        self._servers = [await serve(lambda: HttpConnection(self), sock=one) for one in sockets]
        return int(sockets[0].getsockname()[1])

    async def stop(self) -> None:
        """Close the socket and all connections."""
        for server in self._servers:
            server.close()
        self._servers = []
        for connection in tuple(self.connections):
            connection.close()

    def page(self, method: bytes, path: str) -> AdminResponse | Awaitable[AdminResponse]:
        """Make the answer to a request, or begin to."""
        make = self.pages.get(path)
        if make is None:
            return AdminResponse(b"404: not found\n", status=404)
        if method not in (b"GET", b"HEAD"):
            allow = {"Allow": "GET, HEAD"}
            return AdminResponse(b"405: only GET and HEAD\n", status=405, headers=allow)
        try:
            made = make()
        except Exception:
            return _failed(path)
        return made if isinstance(made, AdminResponse) else _finished(made, path)


async def _finished(making: Awaitable[AdminResponse], path: str) -> AdminResponse:
    try:
        return await making
    except Exception:
        return _failed(path)


def _failed(path: str) -> AdminResponse:
    log.exception("a page of the admin port failed", path=path)
    return AdminResponse(b"500: the page failed; see the log\n", status=500)


class HttpConnection(asyncio.Protocol):
    """One connection; answers its requests one after the other, and only while the client reads."""

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=REQUEST_BYTES_MAX)
        self._request: h11.Request | None = None
        self._reading = True
        # The page that is being made; until then the next request is not read.
        self._making: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the connection, unless there are too many."""
        self._transport = cast(asyncio.Transport, transport)
        connections = self._server.connections
        if len(connections) >= CONNECTIONS_MAX:
            log.warning("too many connections to the admin port", connections_max=CONNECTIONS_MAX)
            self._transport.abort()
        connections.add(self)
        self._idle = asyncio.get_running_loop().call_later(self._server.idle_s, self._transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take bytes of requests."""
        self._http.receive_data(data)
        self._answer_all()

    def eof_received(self) -> bool:
        """Close: nothing more is asked, and all answers are written."""
        return False

    def pause_writing(self) -> None:
        """Make no more answers until the client has read the last ones."""
        self._reading = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        """Answer what has arrived meanwhile."""
        self._reading = True
        if self._making is None:
            self._transport.resume_reading()
            self._answer_all()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        del exc
        self._idle.cancel()
        if self._making is not None:
            self._making.cancel()
        self._server.connections.discard(self)

    def close(self) -> None:
        """Close after the written answers."""
        self._transport.close()

    def _answer_all(self) -> None:
        try:
            while self._reading and self._making is None:
                event = self._http.next_event()
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage):
                    self._answer()
                elif event is h11.NEED_DATA:
                    return
                elif not isinstance(event, h11.Data):
                    self.close()
                    return
        except h11.RemoteProtocolError as error:
            self._refuse(error)

    def _answer(self) -> None:
        request, self._request = self._request, None
        assert request is not None
        path = request.target.partition(b"?")[0].decode("latin-1")
        page = self._server.page(request.method, path)
        if isinstance(page, AdminResponse):
            self._answer_with(page, request)
        else:
            self._transport.pause_reading()
            self._making = asyncio.get_running_loop().create_task(self._answer_later(page, request))

    async def _answer_later(self, page: Awaitable[AdminResponse], request: h11.Request) -> None:
        self._answer_with(await page, request)
        self._making = None
        if self._reading and not self._transport.is_closing():
            self._transport.resume_reading()
            self._answer_all()

    def _answer_with(self, page: AdminResponse, request: h11.Request) -> None:
        self._send(page, request.method == b"HEAD")
        if self._http.our_state is h11.MUST_CLOSE:
            self.close()
        else:
            self._http.start_next_cycle()
        self._idle.cancel()
        self._idle = asyncio.get_running_loop().call_later(self._server.idle_s, self._transport.abort)

    def _refuse(self, error: h11.RemoteProtocolError) -> None:
        """Answer a request that is not valid HTTP/1.1, and close."""
        if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            text = f"{error.error_status_hint}: {error}\n".encode()
            self._send(AdminResponse(text, status=error.error_status_hint), False)
        self.close()

    def _send(self, page: AdminResponse, head_only: bool) -> None:
        headers = [("Content-Type", page.content_type), ("Content-Length", str(len(page.body))), *page.headers.items()]
        response = h11.Response(status_code=page.status, headers=headers, reason=REASONS.get(page.status, b""))
        out = self._http.send(response) or b""
        if not head_only:
            out += self._http.send(h11.Data(page.body)) or b""
        self._transport.write(out + (self._http.send(h11.EndOfMessage()) or b""))
