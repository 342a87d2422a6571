"""The listener: the listening socket, its connections, and the routing of streams to handlers.

The path of a new request selects a handler factory; requests without a route go to pass-through. A single connection is
implemented in `connection`.

Everything here runs on the event loop's thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic
from typing import TYPE_CHECKING

from proto.http2 import Stream
from proxy import logs
from proxy.listening.call_metrics import CallMetrics
from proxy.listening.calls import CallRefusal, Handler, HandlerFactory, Headers, refuse, unknown_method
from proxy.listening.connection import CLOSE_GRACE_S, ServerConnection
from proxy.listening.fd_passing import ConnectionChannel, ConnectionReceiver
from proxy.listening.late_acks import LateAcknowledgements
from proxy.listening.leaving import ClosedStreamReaper
from proxy.listening.settings import ListenerSettings, ListenerStats
from proxy.listening.sockets import Listening, listen
from proxy.listening.turns import TurnBudget, in_parts
from proxy.listening.write_queue import WriteQueue

if TYPE_CHECKING:
    import ssl

    from proxy.listening.handshake import Acceptor

SWEEP_S_MAX = 2.5
"""Maximum time between two checks of the connections' timeouts."""

BACKLOG = 1024
"""Connections the kernel holds until they are accepted: a thousand clients that reconnect at once."""

REFUSALS_LOG_S = 10.0
"""Minimum time between two log messages about refused connections; each has their number."""

log = logs.logger("listener")

Http1Factory = Callable[[asyncio.Transport, bytes], asyncio.Protocol]
"""(transport, bytes read so far) -> the protocol that takes over the connection."""


class Listener:
    """A listening socket, its connections, and the routes of their streams."""

    def __init__(self, settings: ListenerSettings | None = None) -> None:
        self.settings = settings or ListenerSettings()
        self.routes: dict[bytes, HandlerFactory] = {}
        self.passthrough: HandlerFactory = unknown_method
        """The handler factory for requests without a route."""
        self.http1: Http1Factory | None = None
        """The protocol factory for connections that are not HTTP/2; None: they are closed."""
        self.stats = ListenerStats()
        self.calls = CallMetrics(self.now)
        """Calls of clients by method, code and duration."""
        self.connections: set[ServerConnection] = set()
        """Connections that are open, or whose streams are not all cleaned up yet."""
        self.leaving = ClosedStreamReaper(self.settings.leaving_per_turn)
        self.turns = TurnBudget(self.settings.http2.turn_work_max)
        self.late = LateAcknowledgements()
        self.handed_on: Callable[[], int] = int
        """Returns the number of file descriptors of HTTP/1 connections, on both sides."""
        self._acceptor: Acceptor | None = None
        self.draining = False
        self._refusals_logged_at = -REFUSALS_LOG_S
        self._refusals_logged = 0
        self.output = WriteQueue(self.stats)
        self._listening: Listening | None = None
        self._servers: list[asyncio.Server] = []
        self._receiver: ConnectionReceiver | None = None
        """Takes the connections that another process accepts."""
        self._port = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = inf
        """When the next sweep is due."""
        self._put_off = False
        """The last sweep was late and did nothing."""
        self._all_gone: asyncio.Event = asyncio.Event()

    async def start(
        self,
        host: str,
        port: int,
        tls: ssl.SSLContext | None = None,
        path: str = "",
        listening: Listening | None = None,
    ) -> None:
        """Listen at host:port (0: any free one) or on the unix socket `path`, with TLS if given. Raises OSError.

        `listening`: sockets that listen already, instead of an address, or connections that another process accepts.
        """
        self._loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return ServerConnection(self)

        self._listening = listening = listening or await listen(host, port, path, BACKLOG)
        self._port = listening.port
        sockets = () if isinstance(listening, ConnectionChannel) else listening.sockets
        if tls is not None:
            from proxy.listening.handshake import Acceptor  # imports ssl, which a proxy without TLS does not need

            self._acceptor = Acceptor(self, tls, sockets, connection)
        else:
            serve = self._loop.create_unix_server if listening.is_unix else self._loop.create_server
            self._servers = [await serve(connection, sock=one, backlog=BACKLOG) for one in sockets]
        if isinstance(listening, ConnectionChannel):
            self._receiver = ConnectionReceiver(
                listening, connection, self._acceptor.take if self._acceptor is not None else None
            )
        self._sweep()

    @property
    def is_full(self) -> bool:
        """The maximum of connections is reached."""
        return self.open >= self.settings.connections_max

    @property
    def open(self) -> int:
        """Connections of clients, including handshakes in progress; those of HTTP/1 count twice."""
        return len(self.connections) + self.handshakes + self.handed_on()

    @property
    def taken(self) -> int:
        """Connections taken from the process that accepts them for this one."""
        return self._receiver.taken if self._receiver is not None else 0

    def refused(self) -> None:
        """Count a refused connection, and log refusals at intervals."""
        self.stats.refused += 1
        now = self.now()
        if now >= self._refusals_logged_at + REFUSALS_LOG_S:
            more, self._refusals_logged = self.stats.refused - self._refusals_logged, self.stats.refused
            self._refusals_logged_at = now
            limit = self.settings.connections_max
            to_do = "raise --connections-max, or find who opens them: watchmux status HOST:PORT --clients"
            log.warning(
                "too many client connections; refusing new ones", refused=more, connections_max=limit, to_do=to_do
            )

    @property
    def handshakes(self) -> int:
        """TLS handshakes in progress."""
        return 0 if self._acceptor is None else len(self._acceptor)

    @property
    def tls(self) -> bool:
        """Whether its clients speak TLS."""
        return self._acceptor is not None

    @property
    def port(self) -> int:
        """The port it listens on, 0 for a unix socket. Valid after `start`."""
        return self._port

    @property
    def streams(self) -> int:
        """Open streams of all connections."""
        return sum(len(connection.h2.streams) for connection in self.connections)

    def now(self) -> float:
        """The clock of the connections, in seconds; connections read it themselves for each read."""
        return monotonic()

    def opened(self, connection: ServerConnection) -> None:
        """Add a new connection."""
        self.connections.add(connection)
        self.stats.accepted += 1

    def gone(self, connection: ServerConnection) -> None:
        """Remove a closed connection."""
        self.connections.discard(connection)
        if not self.connections:
            self._all_gone.set()

    def route(self, connection: ServerConnection, stream: Stream, headers: Headers, end_stream: bool) -> Handler | None:
        """Create the handler of a new request stream."""
        self.stats.requests += 1
        path = b""
        for name, value in headers:
            if name == b":path":
                path = value
                break
        if connection.of_client:
            self.calls.begin(path, stream)
        factory = self.routes.get(path, self.passthrough)
        try:
            return factory(connection, stream, headers, end_stream)
        except CallRefusal as refusal:
            refuse(connection, stream, refusal)
            return None

    def _sweep(self) -> None:
        settings = self.settings
        now = monotonic()
        spans = [settings.first_bytes_timeout_s, settings.settings_timeout_s, settings.keepalive_timeout_s]
        spans += [span for span in (settings.keepalive_interval_s, settings.idle_timeout_s) if span is not None]
        interval_s = min(SWEEP_S_MAX, min(spans) / 4)
        # After a pause of the process, read first what clients sent meanwhile; but only once in a row.
        self._put_off = not self._put_off and now > self._sweep_at + interval_s
        if not self._put_off:
            in_parts(self.connections, lambda connection: connection.sweep(now))
        self._sweep_at = now + interval_s
        self._sweeper = self._loop.call_later(interval_s, self._sweep)

    def stop_accepting(self) -> None:
        """Close the listening socket; connections stay open."""
        for server in self._servers:
            server.close()
        if self._acceptor is not None:
            self._acceptor.close()
        if self._receiver is not None:
            self._receiver.close()
        if self._listening is not None:
            self._listening.remove_file()

    def go_away(self) -> None:
        """Start draining: accept no new connections, and send GOAWAY on all existing ones."""
        self.draining = True
        self.stop_accepting()
        in_parts(self.connections, ServerConnection.go_away)

    async def wait_gone(self, limit_s: float) -> bool:
        """Wait at most `limit_s` seconds until the last connection is closed; return whether it is."""
        if self.connections:
            self._all_gone.clear()
            try:
                async with asyncio.timeout(limit_s):
                    await self._all_gone.wait()
            except TimeoutError:
                return False
        return True

    async def stop(self) -> None:
        """Close everything now."""
        self.stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._acceptor is not None:
            await self._acceptor.stop()
        for connection in tuple(self.connections):
            connection.abort()
        await self.wait_gone(CLOSE_GRACE_S)
