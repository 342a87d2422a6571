"""Pass-through: every call that is not a watch, switched between a client's connection and etcd's at frame level.

A call is two HTTP/2 streams, and passing it on is moving what arrives on one to the other: heads, DATA as it came, the
trailers. Messages are not cut, decoded or decompressed, so bytes, metadata, user-agent and compression stay the
client's, and methods nobody has heard of work like the others. There is no task, future or timer per call; deadlines
are the client's and etcd's, both of whom read `grpc-timeout` themselves.

Flow control goes end to end: bytes are given back to the side they came from when the other side has taken them, so a
slow reader of a 100 MB snapshot holds up nobody but its sender, and no more than a window of it waits here. What waits
for clients that do not read counts against the window of the connection to etcd, which all clients share, and is
memory: so it has bounds, and a connection that reaches them loses calls.

What no server has looked at is sent again on another connection, once per endpoint, and so is a call that only reads
when its connection breaks before the body of its answer. A call that may have been looked at and may be a write never
is. While no etcd can be reached, a call waits (`proxy/passthrough/holding.py`), as it would in a direct client; when it
has waited for long enough it ends UNAVAILABLE with a text by which clientv3 knows that it was not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from proto.framing import FramingError, Status, decode_timeout, encode_timeout
from proto.http2 import ErrorCode, Stream
from proxy.listening.calls import (
    RESPONSE_HEAD,
    TIMEOUT,
    CallRefusal,
    ConnectionHandle,
    Headers,
    refuse,
    status_trailers,
)
from proxy.passthrough.answers import MessageBoundary, trailers_of
from proxy.passthrough.holding import Holding
from proxy.passthrough.settings import PassthroughSettings, PassthroughStats
from upstream.connection import ClientConnection, NotSent, UpstreamCall
from upstream.pool import Pool

IDEMPOTENT_METHODS = frozenset(
    b"/etcdserverpb." + method
    for method in (
        b"KV/Range",
        b"Lease/LeaseTimeToLive",
        b"Lease/LeaseLeases",
        b"Cluster/MemberList",
        b"Maintenance/Status",
        b"Maintenance/Hash",
        b"Maintenance/HashKV",
        b"Auth/AuthStatus",
        b"Auth/UserGet",
        b"Auth/UserList",
        b"Auth/RoleGet",
        b"Auth/RoleList",
    )
)
"""Calls that change nothing, however often they are made; clientv3 repeats the same ones (client/v3/retry.go)."""

CLIENTV3 = b"client-api-version"
"""Metadata of every call of clientv3 since 3.5 (client/v3/ctx.go), whose interceptor repeats calls."""

HEADER_FIELD_BYTES = 32
"""What a field of a kept head counts for besides its bytes (RFC 9113 6.5.2)."""


class Passthrough:
    """The handler factory for all streams that no route claims."""

    def __init__(self, pool: Pool, settings: PassthroughSettings | None = None) -> None:
        self.settings = settings or PassthroughSettings()
        self.stats = PassthroughStats()
        self._pool = pool
        self.held = Holding(pool, self.settings, self.stats)
        # By client connection: the calls whose client has to read on, and how many bytes those are.
        self._unread: dict[ConnectionHandle, _Unread] = {}

    def go_by(self, settings: PassthroughSettings) -> None:
        """Take other settings, for what comes from now on."""
        self.settings = self.held.settings = settings

    def now(self) -> float:
        """Return the loop's time."""
        return asyncio.get_running_loop().time()

    @property
    def waiting(self) -> int:
        """Calls that wait for a connection."""
        return len(self.held)

    def __call__(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> Relay | None:
        """Take a new request stream. Raises Refusal, UNAVAILABLE, when no upstream can be reached."""
        return self._begin(Relay(self, connection, stream, headers, end_stream))

    def _begin(self, relay: Relay) -> Relay:
        self.stats.calls += 1
        upstream = self._pool.pick()
        if upstream is not None and relay.begin(upstream):
            return relay
        self.held.hold(relay)
        return relay

    def retry(self, relay: Relay) -> None:
        """Send a call that no server has looked at to another connection, or let it wait for one, or end it."""
        self.stats.resent += 1
        upstream = self._pool.pick()
        if upstream is not None and relay.begin(upstream):
            return
        try:
            self.held.hold(relay)
        except CallRefusal as refusal:
            relay.refuse(refusal)

    def is_unserved(self, call: UpstreamCall, status: int, message: str) -> bool:
        """Tell whether a member refused a call because it does not serve, while another one does."""
        return self._pool.answered(call.connection, status, message)

    def charge_unread(self, relay: Relay, size: int) -> None:
        """Count `size` bytes more that a client has to read; reset calls when that is too much."""
        stats = self.stats
        unread = self._unread.setdefault(relay.connection, _Unread())
        unread.relays.add(relay)
        unread.size += size
        stats.unread_bytes += size
        if unread.size > self.settings.unread_bytes_per_connection_max:
            stats.refused_at["unread_bytes_per_connection_max"] += 1
            relay.abort_unread()
        elif stats.unread_bytes > self.settings.unread_bytes_max:
            worst = max(self._unread.values(), key=lambda one: one.size)
            stats.refused_at["unread_bytes_max"] += len(worst.relays)
            for one in tuple(worst.relays):
                one.abort_unread()

    def release_unread(self, relay: Relay, size: int) -> None:
        """Count all that a call's client had to read as read, or as no longer wanted."""
        unread = self._unread[relay.connection]
        unread.relays.discard(relay)
        unread.size -= size
        self.stats.unread_bytes -= size
        if not unread.relays:
            del self._unread[relay.connection]

    def slot_freed(self) -> None:
        """Let a call that waits for room have the place of one that is over."""
        if len(self.held):
            self.held.serve()


class _Unread:
    """What one client connection has to read."""

    __slots__ = ("relays", "size")

    def __init__(self) -> None:
        self.relays: set[Relay] = set()
        self.size = 0


class Relay:
    """One call: the client's stream on one side, etcd's on the other. Handler of both.

    `done` is True from the moment the client's stream is answered in full or gone; nothing is sent on it after that.
    """

    __slots__ = (
        "_answered",
        "_boundary",
        "_call",
        "_foreign",
        "_headers",
        "_owed_client",
        "_owed_stream",
        "_owed_upstream",
        "_owner",
        "_request",
        "_request_bytes",
        "_request_over",
        "_stream",
        "_tries_left",
        "_unread",
        "came_at",
        "connection",
        "deadline",
        "done",
        "repeated",
        "waiting_bytes",
    )

    def __init__(
        self, owner: Passthrough, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> None:
        self.done = False
        self._owner = owner
        self.connection = connection
        self._stream = stream
        self._headers = headers
        self._call: UpstreamCall | None = None
        # The response's head has gone to the client.
        self._answered = False
        # A second server, asked after the first one broke off behind its head, answered as no etcd does.
        self._foreign = False
        # The client has ended its side.
        self._request_over = end_stream
        # What came of the request, while it may have to be sent (again); None when it is too much or no longer needed.
        self._request: list[bytes] | None = []
        self._request_bytes = 0
        # Flow control not given back yet, because the other side has not taken the bytes.
        self._owed_client = 0
        self._owed_upstream = 0
        # Bytes of the answer that the client has yet to read. Of a translated one they are others than etcd sent.
        self._unread = 0
        # The same of what came while it waits: the client's other calls have the connection's window back already.
        self._owed_stream = 0
        # Loop time. What follows is read when it has to wait. No deadline: None.
        self.came_at = owner.now()
        self.deadline: float | None = None
        self.repeated = False
        # What it counts for while it waits.
        self.waiting_bytes = 0
        self._boundary = MessageBoundary()
        self._tries_left = 3

    def begin(self, upstream: ClientConnection) -> bool:
        """Start the call on an upstream connection with what came so far. False: it cannot take it."""
        authority = upstream.endpoint.authority
        scheme = b"https" if upstream.secure else b"http"
        headers = [
            (name, scheme if name == b":scheme" else authority if name == b":authority" else value)
            for name, value in self._headers
        ]
        if self.deadline is not None:
            left = encode_timeout(self.deadline - self._owner.now())
            headers = [(name, left if name == TIMEOUT else value) for name, value in headers]
        request = self._request or []
        ends_at_once = self._request_over and not request
        try:
            self._call = call = upstream.request(headers, self, ends_at_once)
        except NotSent:
            return False
        if not ends_at_once and (request or self._request_over):
            call.write(request, self._request_bytes, self._request_over)
        self._bound_request()
        self._give_back_client()
        return True

    def wait(self) -> int:
        """Get ready to wait for a connection; return the bytes that are kept meanwhile."""
        if self.deadline is None:
            self.deadline = self._read_deadline()
        self.repeated = any(name == CLIENTV3 for name, _ in self._headers)
        self.connection.h2.consumed(None, self._owed_client)
        self._owed_stream, self._owed_client = self._owed_stream + self._owed_client, 0
        self.connection.touch()
        head = sum(len(name) + len(value) + HEADER_FIELD_BYTES for name, value in self._headers)
        return head + self._request_bytes

    def _read_deadline(self) -> float | None:
        """When the client's grpc-timeout is over, in loop time; None without one, and for one that cannot be read."""
        for name, value in self._headers:
            if name == TIMEOUT:
                try:
                    return self.came_at + decode_timeout(value)
                except FramingError:
                    return None
        return None

    # The client's side: a Handler.

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Pass a part of the request on."""
        if self.done:
            self.connection.h2.consumed(self._stream, flow_size)
            return
        if end_stream:
            self._request_over = True
        request, call = self._request, self._call
        if request is not None:
            request.append(data)
            self._request_bytes += len(data)
            self._owner.stats.resend_bytes += len(data)
            if call is not None:
                self._bound_request()
        if call is None:
            self.connection.h2.consumed(None, flow_size)
            self._owed_stream += flow_size
            self._wait_with(len(data))
        else:
            self._owed_client += flow_size
            call.write((data,), len(data), end_stream)
            self._give_back_client()

    def _wait_with(self, size: int) -> None:
        try:
            self._owner.held.grow(self, size)
        except CallRefusal as refusal:
            self.refuse(refusal)

    def trailers(self, headers: Headers) -> None:
        """End the request; gRPC knows no request trailers."""
        del headers
        self.data(b"", 0, True)

    def drained(self) -> None:
        """The client has taken what came: let etcd send on."""
        owed = self._settle()
        if self.done:
            self._leave_stream()
        elif self._call is not None and owed:
            self._call.consumed(owed)

    def closed(self, code: int | None) -> None:
        """The client has given up, or is gone: so is the call."""
        del code
        self._give_up()
        self._settle()
        call, self._call = self._call, None
        if call is not None:
            call.reset(ErrorCode.CANCEL)
            self._owner.slot_freed()

    def abort_unread(self) -> None:
        """Reset the call on both sides: its client has left too much unread."""
        self.connection.h2.reset(self._stream, ErrorCode.ENHANCE_YOUR_CALM)
        self.connection.touch()
        self._stream.owner = None
        self.closed(None)

    # etcd's side: a CallHandler.

    def on_headers(self, headers: Headers) -> None:
        """Pass the response's head on."""
        call, repeated, self._answered = self._call, self._answered, True
        if not self._reads:
            self._forget_request()
        # The client has the head of the answer that broke off before its body; it is as good as this one's.
        if not self.done and not repeated:
            self.connection.h2.send_headers(self._stream, headers)
            self.connection.touch()
        elif call is not None and call.http_status != 200:
            self._foreign = True

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Pass a part of the response on; give it back to etcd when the client has taken it."""
        call = self._call
        assert call is not None
        if self.done or self._foreign:
            call.consumed(flow_size)
            return
        self._forget_request()
        self._boundary.feed(data)
        self._pass_on(call, (data,), len(data), flow_size)

    def _pass_on(self, call: UpstreamCall, pieces: Sequence[bytes], size: int, flow_size: int) -> None:
        """Send `size` bytes to the client; give `flow_size` back to etcd when the client has taken them."""
        if self.connection.h2.send(self._stream, pieces, size):
            call.consumed(flow_size)
        else:
            self._owed_upstream += flow_size
            if size:
                self._unread += size
                self._owner.charge_unread(self, size)
        self.connection.touch()

    def on_drained(self) -> None:
        """etcd has taken what came of the request: let the client send on."""
        self._give_back_client()

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        """End the client's stream as etcd's ended, or send the call again when nobody has looked at it."""
        call, self._call = self._call, None
        assert call is not None
        if self.done:
            return
        lost = call.reset_code is None and not trailers
        harmless = (
            call.unprocessed
            or (lost and self._request_over and self._reads)
            # Asked for each answer that is not OK: this is how the pool learns which members do not serve.
            or (status != Status.OK and self._owner.is_unserved(call, status, message) and not self._answered)
        )
        if harmless and self._request is not None and self._tries_left:
            # A connection that ends in good order has done its part: that is not a failed try.
            self._tries_left -= not call.rotated
            self._owner.retry(self)
            return
        self._give_up()
        h2, stream = self.connection.h2, self._stream
        if trailers and not self._foreign:
            if self._answered:
                trailers = trailers_of(trailers, status, message)
            h2.send_headers(stream, trailers, True)
        elif call.reset_code is not None:
            h2.reset(stream, call.reset_code)
            self._settle()
        elif self._answered and call.http_status != 200 and not self._foreign:
            h2.send(stream, (), 0, True)
        else:
            self._owner.stats.broken += 1
            self._end_broken(status, message)
        self.connection.touch()
        self._leave_stream()
        self._owner.slot_freed()

    # Inside.

    def refuse(self, refusal: CallRefusal) -> None:
        """Answer a call that never reached an upstream, or was not answered by one."""
        self._give_up()
        if self._answered:
            trailers = status_trailers(refusal.status, refusal.text, refusal.problem)
            self.connection.h2.send_headers(self._stream, trailers, True)
            self.connection.touch()
        else:
            refuse(self.connection, self._stream, refusal)
        self._leave_stream()

    def _end_broken(self, status: int, message: str) -> None:
        """The upstream connection is gone: say so, in the one way that is still open."""
        h2, stream = self.connection.h2, self._stream
        trailers = status_trailers(status, message)
        if not self._answered:
            h2.send_headers(stream, RESPONSE_HEAD + trailers, True)
        elif self._boundary.inside:
            # A message that is half sent can only end by a reset (gRPC over HTTP/2).
            h2.reset(stream, ErrorCode.INTERNAL_ERROR)
            self._settle()
        else:
            h2.send_headers(stream, trailers, True)

    @property
    def _reads(self) -> bool:
        return any(name == b":path" and value in IDEMPOTENT_METHODS for name, value in self._headers)

    def _settle(self) -> int:
        """Count what the client had to read as read; return what etcd gets back of its window for that."""
        unread, self._unread = self._unread, 0
        if unread:
            self._owner.release_unread(self, unread)
        owed, self._owed_upstream = self._owed_upstream, 0
        return owed

    def _leave_stream(self) -> None:
        """Let go of the client's stream that is over: the two would hold each other until a garbage collection."""
        if not self._stream.blocked:
            self._stream.owner = None

    def _give_up(self) -> None:
        self.done = True
        self._owner.held.leave(self)
        self._forget_request()
        # The client's other calls need the connection's window, whatever etcd has not taken of this one.
        owed, self._owed_client = self._owed_client, 0
        self.connection.h2.consumed(None, owed)

    def _bound_request(self) -> None:
        """Keep no more of requests that were sent than is allowed."""
        settings, stats = self._owner.settings, self._owner.stats
        too_large = self._request_bytes > settings.resend_bytes_max
        if too_large or stats.resend_bytes > settings.resend_bytes_total_max:
            if self._request is not None:
                stats.not_kept_at["resend_bytes_max" if too_large else "resend_bytes_total_max"] += 1
            self._forget_request()

    def _forget_request(self) -> None:
        """Drop what was kept of the request: it is not sent again."""
        if self._request is not None:
            self._request = None
            self._owner.stats.resend_bytes -= self._request_bytes

    def _give_back_client(self) -> None:
        call = self._call
        if call is not None and (self._owed_client or self._owed_stream) and not call.blocked and not self.done:
            owed, self._owed_client = self._owed_client, 0
            self.connection.h2.consumed(self._stream, owed)
            owed, self._owed_stream = self._owed_stream, 0
            self.connection.h2.credit_stream(self._stream, owed)
            self.connection.touch()
