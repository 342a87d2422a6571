"""Pass-through: every call that is not a watch, relayed between a client's connection and etcd's at frame level.

A call is two HTTP/2 streams; the relay moves what arrives on one to the other: heads, DATA as received, trailers.
Messages are not cut, decoded or decompressed, so bytes, metadata, user-agent and compression stay the client's, and
unknown methods work like any other. There is no task, future or timer per call; the client and etcd enforce deadlines,
since both read `grpc-timeout` themselves.

Flow control is end to end: bytes are credited to the side they came from once the other side has taken them, so a slow
reader of a 100 MB snapshot delays only its sender, and at most one window of it waits here. Bytes that wait for clients
that do not read are bounded (`proxy/passthrough/unread.py`).

A call that no server has processed is resent on another connection, once per endpoint, and so is a read whose
connection is lost before the body of its response. A call that may have been processed and may be a write is never
resent. While no etcd can be reached, a call waits (`proxy/passthrough/holding.py`), as it would in a direct client; if
it waits too long, it ends with UNAVAILABLE and a text that shows clientv3 that the call was not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

from proto.framing import PREFIX_BYTES, FramingError, Status, decode_timeout, encode_timeout
from proto.http2 import ErrorCode, Stream
from proxy.listening.calls import (
    RESPONSE_HEAD,
    TIMEOUT,
    CallRefusal,
    ClientHandle,
    Headers,
    refuse,
    status_trailers,
)
from proxy.passthrough.answers import MessageBoundary, trailers_of
from proxy.passthrough.holding import HeldCalls, in_a_loop
from proxy.passthrough.settings import PassthroughSettings, PassthroughStats
from proxy.passthrough.sharing import SharedRead
from proxy.passthrough.unread import UnreadBytes
from upstream.connection import ClientConnection, NotSent, UpstreamCall
from upstream.heads import HOPS_MAX, loop_text, next_hop
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
"""Calls that only read; clientv3 retries the same ones (client/v3/retry.go)."""

CLIENTV3 = b"client-api-version"
"""Metadata of every call of clientv3 since 3.5 (client/v3/ctx.go), whose interceptor retries calls."""

PSEUDO_HEADERS_MAX = 4
"""Pseudo-header fields of a request other than CONNECT: method, scheme, path, authority (RFC 9113 8.3.1)."""

HEADER_FIELD_BYTES = 32
"""Bytes that each field of a kept head counts for besides its own (RFC 9113 6.5.2)."""


class Passthrough:
    """The handler factory for all requests without a route."""

    def __init__(self, pool: Pool, settings: PassthroughSettings | None = None) -> None:
        self.settings = settings or PassthroughSettings()
        self.stats = PassthroughStats()
        self._pool = pool
        self.held = HeldCalls(pool, self.settings, self.stats)
        self.unread = UnreadBytes(self.settings, self.stats)

    def configure(self, settings: PassthroughSettings) -> None:
        """Use other settings from now on."""
        self.settings = self.held.settings = self.unread.settings = settings

    def now(self) -> float:
        """Return the loop's time."""
        return asyncio.get_running_loop().time()

    @property
    def waiting(self) -> int:
        """Number of calls that wait for a connection."""
        return len(self.held)

    def __call__(self, connection: ClientHandle, stream: Stream, headers: Headers, end_stream: bool) -> Relay | None:
        """Handle a new request stream.

        Raises CallRefusal: UNAVAILABLE if the call can neither be sent nor held, FAILED_PRECONDITION in a loop.
        """
        return self._begin(Relay(self, connection, stream, headers, end_stream))

    def relay(self, connection: ClientHandle, stream: Stream, headers: Headers) -> Relay:
        """Return the relay of a new call whose request follows; it is not begun. Raises CallRefusal in a loop."""
        relay = Relay(self, connection, stream, headers, False)
        return self._checked(relay) if relay.hops else relay

    def _begin(self, relay: Relay) -> Relay:
        self.stats.calls += 1
        self.begin(self._checked(relay))
        return relay

    def _checked(self, relay: Relay) -> Relay:
        if relay.hops >= HOPS_MAX:
            text = loop_text(relay.hops, (state.endpoint for state in self._pool.states()))
            raise in_a_loop(self.stats, text)
        return relay

    def begin(self, relay: Relay) -> None:
        """Send a call, or let it wait for a connection. Raises CallRefusal (UNAVAILABLE) if it can do neither."""
        upstream = self._pool.pick()
        if upstream is None or not relay.start(upstream):
            self.held.hold(relay)

    def retry(self, relay: Relay) -> None:
        """Resend a call on another connection, or let it wait for one, or end it."""
        self.stats.resent += 1
        upstream = self._pool.pick()
        if upstream is not None and relay.start(upstream):
            return
        try:
            self.held.hold(relay)
        except CallRefusal as refusal:
            relay.refuse(refusal)

    def is_unserved(self, call: UpstreamCall, status: int, message: str) -> bool:
        """Return whether a member refused a call because it is not serving, while another one is."""
        return self._pool.answered(call.connection, status, message)

    def slot_freed(self) -> None:
        """Start a waiting call in place of one that is over."""
        if self.stats.waiting_bytes:
            self.held.serve()


class RelayObserver(Protocol):
    """Decides when the call of a relay begins, and is notified of what identical calls wait for."""

    def received(self, relay: Relay) -> None:
        """The request is complete, or larger than what is kept of a request."""

    def begin(self, relay: Relay, upstream: ClientConnection) -> bool:
        """A connection is available to a call that waited for one. False: the connection cannot take it."""

    def head_received(self, relay: Relay) -> None:
        """The response has begun: etcd has read what it answers."""

    def held(self, relay: Relay) -> None:
        """The call waits for a connection."""

    def over(self, relay: Relay) -> None:
        """The call is over."""


class Relay:
    """One call, and the handler of both its streams: the client's and etcd's.

    `done` is True once the client's stream is answered completely or closed; nothing is sent on it after that.
    """

    __slots__ = (
        "_answered",
        "_boundary",
        "_call",
        "_foreign",
        "_owed_client",
        "_owed_stream",
        "_owed_upstream",
        "_owner",
        "_request",
        "_request_bytes",
        "_request_over",
        "_unread",
        "came_at",
        "collects_request",
        "connection",
        "deadline",
        "done",
        "headers",
        "hops",
        "observer",
        "read",
        "repeated",
        "stream",
        "tries_left",
        "waiting_bytes",
    )

    def __init__(
        self, owner: Passthrough, connection: ClientHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> None:
        self.done = False
        self.observer: RelayObserver | None = None
        # The observer is asked to begin the call when the request is complete.
        self.collects_request = False
        # The observer's: the read that this call alone makes.
        self.read: SharedRead[Relay] | None = None
        self._owner = owner
        self.connection = connection
        self.stream = stream
        # The number of proxies that the call has passed through.
        self.hops, self.headers = next_hop(headers)
        self._call: UpstreamCall | None = None
        # The response's head was sent to the client.
        self._answered = False
        # The first server's response broke off after its head, and the second server's response is not an etcd's.
        self._foreign = False
        # The client has ended its side.
        self._request_over = end_stream
        # The request so far, while it may have to be (re)sent; None if it is too large or no longer needed.
        self._request: list[bytes] | None = []
        self._request_bytes = 0
        # Flow-control bytes not credited yet, because the other side has not taken them.
        self._owed_client = 0
        self._owed_upstream = 0
        # Bytes of the response that the client has not read. Of a translated one, their number differs from etcd's.
        self._unread = 0
        # Like `_owed_client`, for bytes received while the call waits: credited to the connection, not to the stream.
        self._owed_stream = 0
        # Loop time. The fields below are set when the call has to wait. No deadline: None.
        self.came_at = owner.now()
        self.deadline: float | None = None
        self.repeated = False
        # Bytes counted while it waits.
        self.waiting_bytes = 0
        # None: all messages that were forwarded so far were whole, each in one piece.
        self._boundary: MessageBoundary | None = None
        # How often it may be sent again.
        self.tries_left = 3

    def begin(self, upstream: ClientConnection) -> bool:
        """Start the call after it waited for a connection. False: the connection cannot take it."""
        return self.start(upstream) if self.observer is None else self.observer.begin(self, upstream)

    def start(self, upstream: ClientConnection) -> bool:
        """Start the call on an upstream connection with the request so far. False: the connection cannot take it."""
        authority = upstream.endpoint.authority
        scheme = b"https" if upstream.secure else b"http"
        headers = self.headers.copy()
        # Pseudo-headers are first (RFC 9113 8.3).
        for index, (name, _) in enumerate(headers[:PSEUDO_HEADERS_MAX]):
            if name == b":scheme":
                headers[index] = (name, scheme)
            elif name == b":authority":
                headers[index] = (name, authority)
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
        """Prepare to wait for a connection; return the bytes kept meanwhile."""
        if self.observer is not None:
            self.observer.held(self)
        self.repeated = any(name == CLIENTV3 for name, _ in self.headers)
        return self.keep()

    def keep(self) -> int:
        """Read the deadline and credit the client for its request, which is kept for a while; return the bytes kept."""
        if self.deadline is None:
            self.deadline = self._read_deadline()
        self.connection.h2.consumed(None, self._owed_client)
        self._owed_stream, self._owed_client = self._owed_stream + self._owed_client, 0
        self.connection.schedule_flush()
        head = sum(len(name) + len(value) + HEADER_FIELD_BYTES for name, value in self.headers)
        return head + self._request_bytes

    def _read_deadline(self) -> float | None:
        """The end of the client's grpc-timeout in loop time; None if there is none, or a malformed one."""
        for name, value in self.headers:
            if name == TIMEOUT:
                try:
                    return self.came_at + decode_timeout(value)
                except FramingError:
                    return None
        return None

    @property
    def body(self) -> bytes | None:
        """The request, if it is complete and all of it is kept, and no response has begun; otherwise None."""
        request = self._request
        if request is None or not self._request_over or self._answered:
            return None
        return request[0] if len(request) == 1 else b"".join(request)

    def copy_for(self, client: ClientHandle) -> Relay:
        """Return a relay of the same request for another client, without a deadline; it is not begun."""
        headers = [field for field in self.headers if field[0] != TIMEOUT]
        twin = self._remake(client, headers)
        twin.hops, twin.headers = self.hops, headers
        twin.collects_request = True
        twin.data(self.body or b"", 0, True)
        return twin

    def _remake(self, client: ClientHandle, headers: Headers) -> Relay:
        return Relay(self._owner, client, Stream(0, 0, 0), headers, True)

    # The client's side: a Handler.

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Forward a part of the request."""
        if self.done:
            self.connection.h2.consumed(self.stream, flow_size)
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
        if call is None and self.collects_request:
            self._owed_client += flow_size
            if self.observer is not None and (
                end_stream or self._request_bytes > self._owner.settings.resend_bytes_max
            ):
                self.observer.received(self)
        elif call is None:
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
        """End the request; gRPC has no request trailers."""
        del headers
        self.data(b"", 0, True)

    def drained(self) -> None:
        """Credit etcd's stream: the client has read the response so far."""
        owed = self._settle()
        if self.done:
            self._leave_stream()
        elif self._call is not None and owed:
            self._call.consumed(owed)

    def closed(self, code: int | None) -> None:
        """Cancel the call at etcd: the client has cancelled it or disconnected."""
        del code
        self._give_up()
        self._settle()
        call, self._call = self._call, None
        if call is not None:
            call.reset(ErrorCode.CANCEL)
            self._owner.slot_freed()

    def cut_short(self, refusal: CallRefusal) -> None:
        """End the call on both sides with a status, unless a message of its response is incomplete."""
        if self._boundary is not None and self._boundary.inside:
            return
        call, self._call = self._call, None
        self.refuse(refusal)
        if call is not None:
            call.reset(ErrorCode.CANCEL)

    def abort_unread(self) -> None:
        """Reset the call on both sides: too many bytes are unread."""
        self.connection.h2.reset(self.stream, ErrorCode.ENHANCE_YOUR_CALM)
        self.connection.schedule_flush()
        self.stream.owner = None
        self.closed(None)

    # etcd's side: a CallHandler.

    def on_headers(self, headers: Headers) -> None:
        """Forward the response's head."""
        call, repeated, self._answered = self._call, self._answered, True
        # A call with an observer is a read.
        if self.observer is None and not self._reads:
            self._forget_request()
        # If the call was resent after a head, the client keeps the first head; it is equivalent.
        if not self.done and not repeated:
            self.connection.h2.send_headers(self.stream, headers)
            self.connection.schedule_flush()
        elif call is not None and call.http_status != 200:
            self._foreign = True
        if self.observer is not None:
            self.observer.head_received(self)

    def on_data(self, data: bytes, flow_size: int) -> None:
        """Forward a part of the response; etcd is credited when the client has read it."""
        call = self._call
        assert call is not None
        if self.done or self._foreign:
            call.consumed(flow_size)
            return
        self._forget_request()
        if self._boundary is not None:
            self._boundary.feed(data)
        elif len(data) != PREFIX_BYTES + int.from_bytes(data[1:PREFIX_BYTES], "big"):
            self._boundary = MessageBoundary()
            self._boundary.feed(data)
        self._pass_on(call, (data,), len(data), flow_size)

    def _pass_on(self, call: UpstreamCall, pieces: Sequence[bytes], size: int, flow_size: int) -> None:
        """Send `size` bytes to the client; credit `flow_size` to etcd when the client has read them."""
        if self.connection.h2.send(self.stream, pieces, size):
            call.consumed(flow_size)
        else:
            self._owed_upstream += flow_size
            if size:
                self._unread += size
                self._owner.unread.charge(self, size)
        self.connection.schedule_flush()

    def on_drained(self) -> None:
        """Credit the client's stream: etcd has accepted the request so far."""
        self._give_back_client()

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        """End the client's stream as etcd's ended, or resend the call if that is safe."""
        call, self._call = self._call, None
        assert call is not None
        if self.done:
            return
        lost = call.reset_code is None and not trailers
        harmless = (
            call.unprocessed
            or (lost and self._request_over and self._reads)
            # Called for each status that is not OK: the pool learns from it which members are not serving.
            or (status != Status.OK and self._owner.is_unserved(call, status, message) and not self._answered)
        )
        if harmless and self._request is not None and self.tries_left:
            # A connection that was closed in an orderly way does not count as a failed try.
            self.tries_left -= not call.rotated
            self._owner.retry(self)
            return
        self._give_up()
        h2, stream = self.connection.h2, self.stream
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
        self.connection.schedule_flush()
        self._leave_stream()
        self._owner.slot_freed()

    # Internal, and for `HeldCalls`.

    def refuse(self, refusal: CallRefusal) -> None:
        """End a call that never reached etcd, or got no complete response from it."""
        self._give_up()
        if self._answered:
            trailers = status_trailers(refusal.status, refusal.text, refusal.problem)
            self.connection.h2.send_headers(self.stream, trailers, True)
            self.connection.schedule_flush()
        else:
            refuse(self.connection, self.stream, refusal)
        self._leave_stream()

    def _end_broken(self, status: int, message: str) -> None:
        """Report that the upstream connection was lost, in the form that the response so far allows."""
        h2, stream = self.connection.h2, self.stream
        trailers = status_trailers(status, message)
        if not self._answered:
            h2.send_headers(stream, RESPONSE_HEAD + trailers, True)
        elif self._boundary is not None and self._boundary.inside:
            # After a partial message only a reset is possible (gRPC over HTTP/2).
            h2.reset(stream, ErrorCode.INTERNAL_ERROR)
            self._settle()
        else:
            h2.send_headers(stream, trailers, True)

    @property
    def _reads(self) -> bool:
        for name, value in self.headers:
            if name == b":path":
                return value in IDEMPOTENT_METHODS
        return False

    def _settle(self) -> int:
        """Stop counting the client's unread bytes; return the flow-control bytes to credit to etcd for them."""
        unread, self._unread = self._unread, 0
        if unread:
            self._owner.unread.release(self, unread)
        owed, self._owed_upstream = self._owed_upstream, 0
        return owed

    def _leave_stream(self) -> None:
        """Break the reference cycle with the client's stream, which is over."""
        if not self.stream.blocked:
            self.stream.owner = None

    def _give_up(self) -> None:
        self.done = True
        if self.observer is not None:
            observer, self.observer = self.observer, None
            observer.over(self)
        if self.waiting_bytes:
            self._owner.held.leave(self)
        self._forget_request()
        # The client's other calls need the connection's window, even if etcd has not taken these bytes.
        owed, self._owed_client = self._owed_client, 0
        if owed:
            self.connection.h2.consumed(None, owed)

    def _bound_request(self) -> None:
        """Drop the kept request if it exceeds a limit on kept bytes."""
        settings, stats = self._owner.settings, self._owner.stats
        too_large = self._request_bytes > settings.resend_bytes_max
        if too_large or stats.resend_bytes > settings.resend_bytes_total_max:
            if self._request is not None:
                stats.not_kept_at["resend_bytes_max" if too_large else "resend_bytes_total_max"] += 1
            self._forget_request()

    def _forget_request(self) -> None:
        """Drop the kept request: it is not resent any more."""
        if self._request is not None:
            self._request = None
            self._owner.stats.resend_bytes -= self._request_bytes

    def _give_back_client(self) -> None:
        call = self._call
        if call is not None and (self._owed_client or self._owed_stream) and not call.blocked and not self.done:
            owed, self._owed_client = self._owed_client, 0
            self.connection.h2.consumed(self.stream, owed)
            if self._owed_stream:
                owed, self._owed_stream = self._owed_stream, 0
                self.connection.h2.credit_stream(self.stream, owed)
            self.connection.schedule_flush()
