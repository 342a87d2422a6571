"""HTTP/1 connections: forwarded to etcd byte for byte, except for one field that counts proxies.

etcd serves its JSON gateway, /version, /health and /metrics on its client port, so their users can use the proxy's
address like etcd's. Only the start of the first request is parsed, to distinguish HTTP/1 from garbage and to refuse a
loop of proxies; watches through the JSON gateway are therefore not merged. Connections that begin with a request for
/proxy/metrics or /proxy/health are answered by the proxy itself, as etcd's grpc-proxy does. Backpressure goes both
ways: while one side does not read, the other side is not read.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, cast

from proxy import logs
from upstream.endpoints import Endpoint
from upstream.errors import BadTls
from upstream.heads import HOPS_MAX, loop_text
from upstream.settings import NEXT_ADDRESS_S
from upstream.transport import addresses_of, connected_to, first_of, open_transport

if TYPE_CHECKING:
    from upstream.tls import FileContext

METHOD = re.compile(rb"[A-Z]{1,16}( |$)")
"""The method of a request line, complete or not (RFC 9112 3)."""

REQUEST_LINE_BYTES_MAX = 8 * 1024
"""Bytes after which the proxy no longer waits for the end of the first request line. Go's clients and etcd accept more;
such a connection is forwarded without counting its proxies."""

HOPS_FIELD = re.compile(rb"watchmux-hops: *(\d{1,2}) *\r?\n", re.IGNORECASE)
"""The field that counts proxies; a proxy writes it right after the request line."""

OWN_PAGE = re.compile(rb"[A-Z]+ /proxy/(metrics|health)[ ?]")
"""A request for a page of the proxy's own (etcd server/proxy/grpcproxy: PathProxyMetrics, PathProxyHealth)."""

OWN_PATH_BYTES_MAX = len(b"/proxy/metrics ")
"""Bytes of a request target that decide whether it is such a page."""

PROTOCOLS = ("http/1.1",)
"""The protocols offered to etcd by ALPN."""

log = logs.logger("http1")

Choose = Callable[[], Endpoint]
"""Returns the endpoint for the next connection."""


class OwnServer(Protocol):
    """Serves the proxy's own pages."""

    @property
    def connections(self) -> int:
        """The number of its open connections."""

    def __call__(self) -> asyncio.Protocol:
        """Return a protocol for one more connection."""

    def close(self) -> None:
        """Close all connections."""


@dataclass(slots=True, frozen=True)
class Http1Settings:
    """Limits of HTTP/1 connections."""

    connect_timeout_s: float = 5.0
    """How long connecting to etcd may take; then the client gets 502."""

    opening_timeout_s: float = 10.0
    """How long a client may take to send its method; then it gets 408."""

    connections_max: int = 1_000
    """Maximum concurrent HTTP/1 connections; further ones get 503."""

    hub_connections_max: int = 64
    """Maximum concurrent HTTP/1 connections of a worker to the hub, for the proxy's own pages; further ones get 503."""


class Http1:
    """Creates the protocols for connections that are not HTTP/2."""

    def __init__(
        self,
        choose: Choose,
        tls: FileContext | None = None,
        settings: Http1Settings | None = None,
        refusal: str = "",
    ) -> None:
        """`refusal`: the reason for refusing all connections; empty if they are forwarded."""
        self.settings = settings or Http1Settings()
        self.connections: set[ClientSide] = set()
        self.upstreams: set[UpstreamSide] = set()
        self.refused = dict.fromkeys(_REASONS, 0)
        """Connections refused by the proxy, by HTTP status."""
        self._choose = choose
        self.refusal = refusal
        self.own: OwnServer | None = None
        """Answers connections that ask for a page of the proxy's own; None: they are forwarded too."""
        self.hub: Endpoint | None = None
        """Of a worker: where such connections are forwarded to. The hub has the numbers of all processes."""
        self._tls = tls
        # The same with HTTP/1 in ALPN, created when first needed.
        self._spoken: FileContext | None = None

    @property
    def next_endpoint(self) -> str:
        """The endpoint for the next connection."""
        return self._choose().text

    @property
    def has_own_pages(self) -> bool:
        """Whether the proxy has pages of its own."""
        return self.own is not None or self.hub is not None

    def descriptors(self) -> int:
        """Return the number of file descriptors of its connections, those of clients and those to etcd."""
        return len(self.connections) + len(self.upstreams) + (self.own.connections if self.own is not None else 0)

    def __call__(self, transport: asyncio.Transport, opening: bytes) -> asyncio.Protocol:
        """Take over `transport`; `opening` is what was read from it so far. Return the protocol for what follows."""
        client = ClientSide(self, transport)
        self.connections.add(client)
        if len(self.connections) > self.settings.connections_max:
            client.refuse(503, "too many HTTP/1 connections")
        else:
            client.data_received(opening)
        return client.successor or client

    async def dial(self, client: ClientSide) -> None:
        """Connect `client` to etcd; it gets a 502 if that fails."""
        hub = self.hub if client.asks_hub else None
        endpoint = hub or self._choose()

        def factory() -> UpstreamSide:
            return UpstreamSide(self, client)

        try:
            async with asyncio.timeout(self.settings.connect_timeout_s):
                servers = [partial(connected_to, server) for server in await addresses_of(endpoint)]
                connected = await first_of(servers, NEXT_ADDRESS_S, socket.socket.close)
                await open_transport(factory, connected, self._context(endpoint), endpoint.host)
        except (OSError, TimeoutError, BadTls) as error:
            log.warning(
                "cannot forward an HTTP/1 connection", endpoint=endpoint.text, problem=str(error) or "timed out"
            )
            client.refuse(502, f"{'the hub' if hub else 'etcd'} at {endpoint.text} cannot be reached")

    def _context(self, endpoint: Endpoint) -> ssl.SSLContext | None:
        """Return the TLS context for an endpoint, None without TLS. Raises BadTls.

        The context for gRPC calls cannot be used: its ALPN offers HTTP/2.
        """
        if not endpoint.uses_tls(self._tls is not None):
            return None
        if self._spoken is None:
            from upstream.tls import client_context  # only with TLS

            self._spoken = self._tls.speaking(PROTOCOLS) if self._tls else client_context(protocols=PROTOCOLS)
        return self._spoken.newest()

    def stop(self) -> None:
        """Abort all connections on both sides; a TLS close would wait for the peer's close_notify."""
        if self.own is not None:
            self.own.close()
        for side in (*self.connections, *self.upstreams):
            if side.transport is not None:
                side.transport.abort()


class _ProxiedSide(asyncio.Protocol):
    """One of the two connections; its bytes go to `other`."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: _ProxiedSide | None = None
        self.at_end = False
        """The peer sends no more bytes."""

    def pause_writing(self) -> None:
        """Stop reading from the other side: this one's write buffer is full."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read from the other side again."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.resume_reading()

    def eof_received(self) -> bool:
        """Forward the end of one direction; close when both have ended."""
        self.at_end, other = True, self.other
        if other is None or other.transport is None or other.at_end or not other.transport.can_write_eof():
            return False
        other.transport.write_eof()
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side after its pending output."""
        del exc
        self.transport = None
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class UpstreamSide(_ProxiedSide):
    """The connection to etcd."""

    def __init__(self, owner: Http1, client: ClientSide) -> None:
        super().__init__()
        self.other = client
        self._owner = owner

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send what the client has sent so far, and start forwarding."""
        self.transport = cast(asyncio.Transport, transport)
        self._owner.upstreams.add(self)
        assert isinstance(self.other, ClientSide)
        self.other.joined(self)

    def data_received(self, data: bytes) -> None:
        """Forward bytes from etcd to the client."""
        if self.other is not None and self.other.transport is not None:
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove this connection and close the client's."""
        self._owner.upstreams.discard(self)
        super().connection_lost(exc)


class ClientSide(_ProxiedSide):
    """The client's connection."""

    def __init__(self, owner: Http1, transport: asyncio.Transport) -> None:
        super().__init__()
        self.transport = transport
        self._owner = owner
        # Bytes received before the connection to etcd was established.
        self._opening = b""
        self._dialling: asyncio.Task[None] | None = None
        self.asks_hub = False
        """It is forwarded to the hub."""
        self.successor: asyncio.Protocol | None = None
        """The protocol that answers the connection instead, if it asks for a page of the proxy's own."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(owner.settings.opening_timeout_s, self.refuse, 408, "no request received")

    def data_received(self, data: bytes) -> None:
        """Forward bytes to etcd; connect to it first, if they begin with an HTTP/1 method."""
        if self.other is not None:
            if self.other.transport is not None:
                self.other.transport.write(data)
            return
        self._opening += data
        if self._dialling is not None or self.transport is None:
            return
        found = METHOD.match(self._opening)
        if found is None:
            self.refuse(400, "neither HTTP/2 nor HTTP/1")
        elif self._owner.has_own_pages and OWN_PAGE.match(self._opening):
            self._ask_own()
        elif found[1] and self._owner.refusal and (b"\n" in self._opening or not self._may_be_own()):
            self.refuse(501, self._owner.refusal)
        elif b"\n" in self._opening or len(self._opening) > REQUEST_LINE_BYTES_MAX:
            hops, self._opening = next_hop(self._opening)
            if hops >= HOPS_MAX:
                self.refuse(508, loop_text(hops, [self._owner.next_endpoint]))
                return
            self._dial()

    def _dial(self) -> None:
        assert self.transport is not None
        self._timer.cancel()
        self.transport.pause_reading()
        self._dialling = asyncio.get_running_loop().create_task(self._owner.dial(self))

    def _ask_own(self) -> None:
        """Let the proxy answer, or its hub."""
        if self._owner.own is not None:
            self._hand_over(self._owner.own())
        elif sum(each.asks_hub for each in self._owner.connections) >= self._owner.settings.hub_connections_max:
            self.refuse(503, "too many HTTP/1 connections")
        else:
            self.asks_hub = True
            self._dial()

    def _may_be_own(self) -> bool:
        """Whether the path read so far may still become that of a page of the proxy's own."""
        path = self._opening.partition(b" ")[2]
        return self._owner.has_own_pages and (b"/proxy/".startswith(path[:7]) and len(path) < OWN_PATH_BYTES_MAX)

    def _hand_over(self, successor: asyncio.Protocol) -> None:
        """Let `successor` answer this connection."""
        transport, self.transport, self.successor = self.transport, None, successor
        assert transport is not None
        self._timer.cancel()
        self._owner.connections.discard(self)
        transport.set_protocol(successor)
        successor.connection_made(transport)
        successor.data_received(self._opening)

    def joined(self, upstream: UpstreamSide) -> None:
        """Start forwarding: the connection to etcd is established."""
        self.other = upstream
        if self.transport is None or upstream.transport is None:
            if upstream.transport is not None:
                upstream.transport.close()
            return
        upstream.transport.write(self._opening)
        self._opening = b""
        self.transport.resume_reading()

    def refuse(self, status: int, text: str) -> None:
        """Answer with an error of the proxy's own, and close."""
        if self.transport is not None:
            self._owner.refused[status] += 1
            body = f"watchmux: {text}\n".encode()
            head = f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: text/plain\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.close()

    def close(self) -> None:
        """Close after the pending output."""
        self._timer.cancel()
        if self.transport is not None:
            self.transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """Remove this connection and close the one to etcd."""
        self._timer.cancel()
        self._owner.connections.discard(self)
        if self._dialling is not None and self.other is None:
            self._dialling.cancel()
        super().connection_lost(exc)


def next_hop(opening: bytes) -> tuple[int, bytes]:
    """Return the number of proxies that a connection has passed through, and its first bytes for the next server."""
    line, end, rest = opening.partition(b"\n")
    found = HOPS_FIELD.match(rest)
    hops = int(found[1]) if found else 0
    if not end:
        return hops, opening
    return hops, b"%sWatchmux-Hops: %d\r\n%s" % (line + end, hops + 1, rest[found.end() :] if found else rest)


_REASONS = {
    400: "Bad Request",
    408: "Request Timeout",
    501: "Not Implemented",
    502: "Bad Gateway",
    503: "Service Unavailable",
    508: "Loop Detected",
}
