"""The Watch service: from a client's stream to the core and back.

A `WatchCall` is one client's Watch stream: it reads WatchRequests, turns them into inputs of the engine, and is the
session's outlet for answers and events. Events do not pass through its methods: the engine's fan-out writes them
directly to `connection` and `stream`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from coalesce.inputs import CreateRequest, Identity
from coalesce.model import Session
from proto import etcd_errors
from proto.fields import ScanError
from proto.framing import PREFIX_BYTES, FramingError, Status
from proto.http2 import Stream
from proto.pacing import PacedMessageReader
from proto.plain_request import PROGRESS, plain_cancel, plain_create
from proxy.listening.calls import CallRefusal, ConnectionHandle, Headers, RequestHead, ServerCall
from proxy.watch.settings import WatchSettings
from proxy.watch.unusual import create_request, parse

if TYPE_CHECKING:
    from proxy.listening.connection import ServerConnection
    from proxy.watch.engine import Engine

PATH = b"/etcdserverpb.Watch/Watch"

DRAIN_TEXT = "watchmux: shutting down, connect to another endpoint"
FAILED_TEXT = "watchmux: internal error, connect again"
WAITING_TEXT = "watchmux: too many bytes of watch requests are waiting on all streams together (%d)"

CREATE_WORK = 6
CANCEL_WORK = 4
PROGRESS_WORK = 3
BYTES_PER_WORK = 512
"""Cost of a request in the unit of `listening.turns`: a fixed cost per kind, plus one per BYTES_PER_WORK bytes after
decompression. 512 filters, the most expensive content, take four microseconds."""

CALLS_PER_WORK = 50
"""Streams examined per unit of work."""

STREAM_SHARE = 60
"""Work for one stream before the other streams of its connection get a turn."""

ANSWERS_UNREAD_MAX = 16
"""Answers queued for a client that does not read; at this number its requests stay unread. etcd uses the same number
(ctrlStreamBufLen in api/v3rpc/watch.go)."""

DRAIN_SLICE_S = 0.05
DRAIN_SLICE_SESSIONS = 100
"""Minimum number of sessions ended per slice: a hundred clients that reconnect at once are not a problem."""


class WatchService:
    """The handler factory of the Watch method, and the set of its open sessions."""

    def __init__(self, engine: Engine, settings: WatchSettings | None = None) -> None:
        self.engine = engine
        self.settings = settings or WatchSettings()
        self.calls: set[WatchCall] = set()
        self.refused_at = {"sessions_per_connection_max": 0, "request_bytes_max": 0, "requests_waiting_bytes_max": 0}
        """Streams refused or ended, by the limit that was reached."""
        self.unread_bytes = 0
        """Current bytes of requests on all streams that are unread or incomplete."""
        self.draining = False
        self.problem = ""
        """Why no stream is served; "" if they are."""

    def open(self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool) -> WatchCall:
        """Accept a Watch stream. Raises CallRefusal if it is not a gRPC call, for a limit, or when there is no leader.

        `end_stream` is ignored: a client that has half-closed its stream still receives events.
        """
        del end_stream
        head = RequestHead.parse(headers)
        carrier = cast("ServerConnection", connection)
        if self.draining:
            raise CallRefusal(200, Status.UNAVAILABLE, DRAIN_TEXT)
        if self.problem:
            raise CallRefusal(200, Status.UNAVAILABLE, self.problem)
        if carrier.sessions >= self.settings.sessions_per_connection_max:
            self.refused_at["sessions_per_connection_max"] += 1
            limit = self.settings.sessions_per_connection_max
            text = f"watchmux: too many watch streams on one connection ({limit})"
            raise CallRefusal(200, Status.RESOURCE_EXHAUSTED, text)
        if identity_of(head).has_leader and self.engine.has_no_leader():
            raise CallRefusal(200, Status.UNAVAILABLE, etcd_errors.NO_LEADER)
        return WatchCall(self, carrier, stream, head)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of requests that wait, here or in the core."""
        return self.unread_bytes + self.engine.core.stats.line_bytes

    def bound_waiting(self, call: WatchCall) -> None:
        """End one stream if waiting requests exceed the bound: `call`, which added some, or the one with the most."""
        limit = self.settings.requests_waiting_bytes_max
        if self.waiting_bytes <= limit:
            return
        # If `call` has its share of the bound or more, it is ended itself, so that all streams are rarely searched.
        if call.waiting_bytes * len(self.calls) < limit:
            call.connection.turns.spend(1 + len(self.calls) // CALLS_PER_WORK)
            call = max(self.calls, key=lambda one: one.waiting_bytes)
        self.refused_at["requests_waiting_bytes_max"] += 1
        call.leave(Status.RESOURCE_EXHAUSTED, WAITING_TEXT % limit)

    def end_all(self) -> None:
        """End every session because the core has failed; the new core does not know them."""
        for call in tuple(self.calls):
            if call.session is not None:
                self.engine.abandon(call.session)
            call.end(Status.UNAVAILABLE, FAILED_TEXT)

    async def drain(self, over_s: float) -> None:
        """End every session UNAVAILABLE, spread over `over_s` seconds so that clients do not reconnect all at once."""
        self.draining = True
        from random import shuffle  # loaded for a drain only

        calls = list(self.calls)
        shuffle(calls)
        slices = max(1, int(over_s / DRAIN_SLICE_S))
        size = max(DRAIN_SLICE_SESSIONS, math.ceil(len(calls) / slices))
        while calls:
            for call in calls[-size:]:
                call.leave(Status.UNAVAILABLE, DRAIN_TEXT)
            del calls[-size:]
            if calls:
                await asyncio.sleep(DRAIN_SLICE_S)


class WatchCall:
    """One client's Watch stream: the handler of its HTTP/2 stream and the outlet of its session."""

    __slots__ = (
        "_answers_unread",
        "_call",
        "_decompress",
        "_ended",
        "_held_bytes",
        "_owed",
        "_queued",
        "_requests",
        "_service",
        "connection",
        "session",
        "stalled",
        "stream",
    )

    def __init__(self, service: WatchService, connection: ServerConnection, stream: Stream, head: RequestHead) -> None:
        self.connection = connection
        self.stream = stream
        self.stalled = False
        """Sent data waits in the stream. The core knows, and delivers nothing more until `drained`."""
        self._service = service
        self._call = ServerCall(connection, stream)
        self._decompress = head.decompress
        self._requests: PacedMessageReader | None = None
        """Requests that wait, or the received part of one; None between requests, as nearly always."""
        self._queued = False
        """The connection will call `go_on` on this stream's turn."""
        self._ended = False
        """The client has half-closed the stream."""
        self._owed = 0
        """Bytes received and not yet credited: while its requests wait, a client may not send more of them."""
        self._held_bytes = 0
        """Its part of the service's `unread_bytes`."""
        self._answers_unread = 0
        """Answers sent that wait in the stream, or some of which wait."""
        self.session: Session | None = service.engine.open_session(self, identity_of(head))
        service.calls.add(self)
        connection.sessions += 1
        self._call.end_after(head.timeout_s)

    # the stream's handler

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Handle requests at once, as far as this turn and the session allow; the rest later."""
        h2 = self.connection.h2
        if self.session is None:
            h2.consumed(self.stream, flow_size)
            return
        requests = self._requests
        size = len(data) - PREFIX_BYTES
        if (
            requests is None
            and 0 <= size <= self._service.settings.request_bytes_max
            and data.startswith(b"\0" + size.to_bytes(4, "big"))
            and self.connection.turns.left > 0
            and not self._must_wait
        ):
            # One whole request, as nearly always.
            h2.consumed(self.stream, flow_size)
            self._request(data[PREFIX_BYTES:])
            if end_stream:
                self._end_requests()
            return
        if requests is None:
            requests = self._requests = PacedMessageReader(self._service.settings.request_bytes_max, self._decompress)
        self._owed += flow_size
        self._ended = end_stream
        requests.add(data)
        if not self._queued:
            if self.connection.turns.left > 0:
                self._go_on_later(self.go_on())
            else:
                self._hold()
                self._go_on_later(True)
        else:
            self._hold()

    def trailers(self, headers: Headers) -> None:
        """Handle request trailers: a half-close."""
        del headers
        self._end_requests()

    def go_on(self) -> bool:
        """Handle waiting requests, as far as this turn and the session allow; True if more are left for the next."""
        self._queued = False
        again = self._take_requests()
        self._hold()
        return again

    def take_requests(self) -> None:
        """Continue with requests: the session's queue has room again."""
        self._go_on_later(self._requests is not None)

    def drained(self) -> None:
        """Continue: the client has read everything that was sent."""
        self.stalled = False
        self._answers_unread = 0
        if self.session is not None:
            self._service.engine.drained(self.session, self.connection.h2.room(self.stream))
            self.take_requests()
        else:
            # The end of the call was the last to be sent; see `ServerCall.end`.
            self.stream.owner = None

    def closed(self, code: int | None) -> None:
        """Clean up after a stream that the client cancelled or that was lost with its connection."""
        del code
        self._call.closed()
        self._forget()

    # the session's outlet

    def send(self, messages: Sequence[bytes]) -> bool:
        """Send framed control answers. False if the stream is blocked, so that some of them wait in it."""
        if self._call.write(*messages):
            return True
        self._answers_unread += len(messages)
        return False

    def end(self, status: int, text: str) -> None:
        """End the stream; the core has already dropped the session."""
        self.session = None
        self._call.end(status, text)
        self._leave_service()

    # internals

    def leave(self, status: int, text: str) -> None:
        """End the stream from this side and close the session."""
        self._call.end(status, text)
        self._forget()

    def _forget(self) -> None:
        session, self.session = self.session, None
        self._leave_service()
        if session is not None:
            self._service.engine.close(session)

    def _leave_service(self) -> None:
        # Credit the connection's window, which its other streams need.
        owed, self._owed = self._owed, 0
        self.connection.h2.consumed(None, owed)
        self._requests = None
        self._hold()
        if self in self._service.calls:
            self._service.calls.discard(self)
            self.connection.sessions -= 1

    def _end_requests(self) -> None:
        """Record the half-close: the client sends no more requests but still receives events."""
        self._ended = True
        if self._requests is not None and not self._queued:
            self._go_on_later(True)

    # requests that wait

    @property
    def waiting_bytes(self) -> int:
        """Bytes of this stream's requests that wait, here or in the core."""
        return self._held_bytes + (0 if self.session is None else self.session.line_bytes)

    @property
    def _must_wait(self) -> bool:
        """Requests have to wait until the client reads or etcd answers: then `drained` or `take_requests` is called."""
        session = self.session
        assert session is not None, "the session is open"
        if session.line_full:
            return True
        # Queued requests will be answered as well.
        return self.stalled and self._answers_unread + len(session.queue or ()) >= ANSWERS_UNREAD_MAX

    def _go_on_later(self, more: bool) -> None:
        if more and not self._queued and self.session is not None:
            self._queued = True
            self.connection.go_on_later(self)

    def _take_requests(self) -> bool:
        requests, turns = self._requests, self.connection.turns
        enough = max(0, turns.left - STREAM_SHARE)
        try:
            while requests is not None and self.session is not None:
                if self._must_wait:
                    self._credit(requests.unread_bytes)
                    return False
                if turns.left <= enough:
                    self._credit(requests.unread_bytes)
                    return True
                worked_bytes = requests.worked_bytes
                message = requests.next()
                if requests.worked_bytes - worked_bytes >= BYTES_PER_WORK:
                    turns.spend((requests.worked_bytes - worked_bytes) // BYTES_PER_WORK)
                if message is not None:
                    self._request(message)
                elif not requests.busy:
                    self._all_taken(requests)
                    return False
        except FramingError as error:
            if error.code is Status.RESOURCE_EXHAUSTED:
                self._service.refused_at["request_bytes_max"] += 1
            self.leave(error.code, error.text)
        return False

    def _all_taken(self, requests: PacedMessageReader) -> None:
        """No complete request waits: credit the client, so that it can send the rest of one it has begun."""
        self._credit(0)
        if requests.empty:
            self._requests = None
        elif self._ended:
            self.leave(Status.INTERNAL, "the request stream ended inside a message")

    def _credit(self, unread_bytes: int) -> None:
        """Credit the client for the bytes that were handled."""
        taken = self._owed - unread_bytes
        if taken > 0:
            self._owed = unread_bytes
            self.connection.h2.consumed(self.stream, taken)
            self.connection.schedule_flush()

    def _hold(self) -> None:
        """Update the count of bytes that it holds."""
        held_bytes = 0 if self._requests is None else self._requests.held_bytes
        self._service.unread_bytes += held_bytes - self._held_bytes
        self._held_bytes = held_bytes
        if held_bytes:
            self._service.bound_waiting(self)

    def _request(self, message: bytes) -> None:
        session = self.session
        if session is None:
            return
        plain = plain_create(message)
        if plain is not None:
            self._create(session, CreateRequest(*plain))
        elif message == PROGRESS:
            self._progress(session)
        elif (watch_id := plain_cancel(message)) is not None:
            self._cancel(session, watch_id)
        else:
            self._unusual(session, message)

    def _unusual(self, session: Session, message: bytes) -> None:
        try:
            request = parse(message)
        except ScanError:
            self.leave(Status.INTERNAL, "the message is not a WatchRequest")
            return
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            self._create(session, create_request(request.create_request))
        elif kind == "cancel_request":
            self._cancel(session, request.cancel_request.watch_id)
        elif kind == "progress_request":
            self._progress(session)
        else:
            # Other kinds are ignored, as in etcd (api/v3rpc/watch.go, recvLoop): a later etcd may have more.
            self.connection.turns.spend(PROGRESS_WORK)

    def _create(self, session: Session, request: CreateRequest) -> None:
        self.connection.turns.spend(CREATE_WORK)
        self._service.engine.create(session, request)
        if session.line_bytes:
            self._service.bound_waiting(self)

    def _cancel(self, session: Session, watch_id: int) -> None:
        self.connection.turns.spend(CANCEL_WORK)
        self._service.engine.cancel(session, watch_id)

    def _progress(self, session: Session) -> None:
        self.connection.turns.spend(PROGRESS_WORK)
        self._service.engine.progress(session)


def identity_of(head: RequestHead) -> Identity:
    """Return a client's identity: its token, and whether its watches require a leader ("hasleader").

    The metadata names are those of etcd's api/v3rpc/rpctypes/metadatafields.go and md.go.
    """
    metadata = head.metadata
    token = metadata.get(b"token")
    if token is None:
        token = metadata.get(b"authorization")
    has_leader = metadata.get(b"hasleader") == b"true"
    return _NOBODY[has_leader] if token is None else Identity(token, has_leader)


# The identities of clients without a token, shared by all of them.
_NOBODY = (Identity(None, False), Identity(None, True))
