"""The Watch service: from a client's stream to the core and back.

A `WatchCall` is one client's Watch stream: it reads WatchRequests, turns them into inputs of the engine, and is the
session's outlet, the place where answers and events leave. Events themselves do not pass through its methods: the
engine's fan-out writes them straight to `connection` and `stream`.
"""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from google.protobuf.message import DecodeError

from coalesce.inputs import CreateRequest, Identity
from coalesce.session import Session
from proto.framing import FramingError, Status, Unframer
from proto.http2 import Stream
from proto.pb import rpc_pb2
from proxy.calls import Carrier, Headers, Refusal, RequestHead, ServerCall
from proxy.engine import INSIDE
from upstream.errors import NO_LEADER_TEXT

if TYPE_CHECKING:
    from proxy.engine import Engine
    from proxy.listening.connection import ServerConnection

PATH = b"/etcdserverpb.Watch/Watch"

DRAIN_TEXT = "watchmux: shutting down, connect to another endpoint"
FAILED_TEXT = "watchmux: internal error, connect again"

DRAIN_SLICE_S = 0.05
DRAIN_SLICE_SESSIONS = 100
"""Sessions ended per slice at least: a hundred clients that come back at once are no herd."""


@dataclass(slots=True, frozen=True)
class WatchSettings:
    """What the Watch service allows."""

    request_bytes_max: int = 2 * 1024 * 1024
    """One WatchRequest; etcd's own bound is --max-request-bytes (1.5 MiB) + 512 KiB."""

    sessions_per_connection_max: int = 10_000
    """Watch streams on one connection; one more is refused RESOURCE_EXHAUSTED."""


class WatchService:
    """The handler factory of the Watch method, and the set of its open sessions."""

    def __init__(self, engine: Engine, settings: WatchSettings | None = None) -> None:
        self.engine = engine
        self.settings = settings or WatchSettings()
        self.calls: set[WatchCall] = set()
        self.refused_at = {"sessions_per_connection_max": 0, "request_bytes_max": 0}
        """Streams turned away or ended, by the limit that was reached."""
        self.draining = False

    def open(self, connection: Carrier, stream: Stream, headers: Headers, end_stream: bool) -> WatchCall:
        """Take a request stream. Raises Refusal for what is not a gRPC call, one too many, or no leader to be had.

        A stream whose client has ended its side is still one: the half-close says nothing about what it wants to hear.
        """
        del end_stream
        head = RequestHead.parse(headers)
        carrier = cast("ServerConnection", connection)
        if self.draining:
            raise Refusal(200, Status.UNAVAILABLE, DRAIN_TEXT)
        if carrier.sessions >= self.settings.sessions_per_connection_max:
            self.refused_at["sessions_per_connection_max"] += 1
            limit = self.settings.sessions_per_connection_max
            text = f"watchmux: too many watch streams on one connection ({limit})"
            raise Refusal(200, Status.RESOURCE_EXHAUSTED, text)
        if self.engine.leaderless and identity_of(head).has_leader:
            raise Refusal(200, Status.UNAVAILABLE, NO_LEADER_TEXT)
        return WatchCall(self, carrier, stream, head)

    def end_all(self) -> None:
        """End every session because the core has failed; it knows none of them any more."""
        for call in tuple(self.calls):
            call.end(Status.UNAVAILABLE, FAILED_TEXT)

    async def drain(self, over_s: float) -> None:
        """End every session UNAVAILABLE, spread over `over_s` seconds: clients shall not come back as a herd."""
        self.draining = True
        calls = list(self.calls)
        random.shuffle(calls)
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

    __slots__ = ("_call", "_decompress", "_owed", "_service", "_unframer", "connection", "session", "stalled", "stream")

    def __init__(self, service: WatchService, connection: ServerConnection, stream: Stream, head: RequestHead) -> None:
        self.connection = connection
        self.stream = stream
        self.stalled = False
        """Something sent waits in the stream: the core was told, and nothing more is delivered until `drained`."""
        self._service = service
        self._call = ServerCall(connection, stream)
        self._decompress = head.decompress
        self._unframer: Unframer | None = None
        """Holds the part of a request that has come; None between requests, as nearly always."""
        self._owed = 0
        """Request bytes taken while stalled and not yet credited: who does not read answers may not ask on."""
        identity = INSIDE if connection.inside else identity_of(head)
        self.session: Session | None = service.engine.open_session(self, identity)
        service.calls.add(self)
        connection.sessions += 1
        self._call.end_after(head.timeout_s)

    # the stream's handler

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Take requests."""
        if self.stalled and self.session is not None:
            self._owed += flow_size
        else:
            self.connection.h2.consumed(self.stream, flow_size)
        if self.session is None:
            return
        try:
            unframer = self._unframer or Unframer(self._service.settings.request_bytes_max, self._decompress)
            messages = unframer.feed(data)
            self._unframer = unframer if unframer.pending else None
            for message in messages:
                self._request(message)
        except FramingError as error:
            if error.code is Status.RESOURCE_EXHAUSTED:
                self._service.refused_at["request_bytes_max"] += 1
            self.leave(error.code, error.text)
            return
        except DecodeError:
            self.leave(Status.INTERNAL, "the message is not a WatchRequest")
            return
        if end_stream:
            self._half_closed()

    def trailers(self, headers: Headers) -> None:
        """Take request trailers: a half-close."""
        del headers
        self._half_closed()

    def drained(self) -> None:
        """Go on: the client has taken everything."""
        self.stalled = False
        if self._owed:
            self.connection.h2.consumed(self.stream, self._owed)
            self._owed = 0
        if self.session is not None:
            self._service.engine.drained(self.session)
        else:
            # The end of the call was the last of what waited; see `ServerCall.end`.
            self.stream.owner = None

    def closed(self, code: int | None) -> None:
        """Forget a stream that is gone: cancelled by the client, or lost with its connection."""
        del code
        self._call.closed()
        self._forget()

    # the session's outlet

    def send(self, message: bytes) -> bool:
        """Send one control answer, framed. True: it is out; False: the stream is blocked, and it waits there."""
        return self._call.write(message)

    def end(self, status: int, text: str) -> None:
        """End the stream: the core has forgotten the session."""
        self.session = None
        self._call.end(status, text)
        self._leave_service()

    # its own

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
        # The connection's other streams need its window.
        owed, self._owed = self._owed, 0
        self.connection.h2.consumed(None, owed)
        if self in self._service.calls:
            self._service.calls.discard(self)
            self.connection.sessions -= 1

    def _half_closed(self) -> None:
        if self._unframer is not None:
            self.leave(Status.INTERNAL, "the request stream ended inside a message")

    def _request(self, message: bytes) -> None:
        session = self.session
        if session is None:
            return
        request = rpc_pb2.WatchRequest.FromString(message)
        engine = self._service.engine
        kind = request.WhichOneof("request_union")
        if kind == "create_request":
            engine.create(session, create_request(request.create_request))
        elif kind == "cancel_request":
            engine.cancel(session, request.cancel_request.watch_id)
        elif kind == "progress_request":
            engine.progress(session)
        # Anything else is ignored, as etcd does (api/v3rpc/watch.go, recvLoop): a later etcd may know more kinds.


def create_request(request: rpc_pb2.WatchCreateRequest) -> CreateRequest:
    """The core's form of a WatchCreateRequest; "now" is None from here on."""
    filters = request.filters
    return CreateRequest(
        key=request.key,
        range_end=request.range_end,
        start_revision=request.start_revision or None,
        watch_id=request.watch_id,
        progress_notify=request.progress_notify,
        no_put=rpc_pb2.WatchCreateRequest.NOPUT in filters,
        no_delete=rpc_pb2.WatchCreateRequest.NODELETE in filters,
        prev_kv=request.prev_kv,
        fragment=request.fragment,
    )


def identity_of(head: RequestHead) -> Identity:
    """Who a client says it is: its token, and whether it wants to be told when there is no leader.

    Names as in etcd's api/v3rpc/rpctypes/metadatafields.go and md.go.
    """
    metadata = head.metadata
    token = metadata.get(b"token")
    if token is None:
        token = metadata.get(b"authorization")
    has_leader = metadata.get(b"hasleader") == b"true"
    return _NOBODY[has_leader] if token is None else Identity(token, has_leader)


# What all clients without a token are, one object for all of them.
_NOBODY = (Identity(None, False), Identity(None, True))
