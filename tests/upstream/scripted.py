"""A scripted etcd on a real socket, for behaviour that a real etcd cannot be made to show on demand.

It speaks HTTP/2 and gRPC with the project's own `proto`, in the server role, and answers Maintenance.Status and watches
in the normal way unless a test overrides that.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import cast

from proto.framing import MessageReader, encode_message, frame
from proto.http2 import (
    Connection,
    DataReceived,
    ErrorCode,
    GoAwayReceived,
    Headers,
    HeadersReceived,
    Http2Limits,
    PingAcknowledged,
    Role,
    Stream,
    StreamReset,
)
from proto.pb import kv_pb2, rpc_pb2

WATCH = "/etcdserverpb.Watch/Watch"
STATUS = "/etcdserverpb.Maintenance/Status"


class ScriptedCall:
    """One call at the scripted server."""

    def __init__(self, connection: ScriptedConnection, stream: Stream, headers: Headers) -> None:
        self.connection = connection
        self.stream = stream
        self.headers = headers
        self.metadata = dict(headers)
        self.path = self.metadata[b":path"].decode()
        self.messages: list[bytes] = []
        # How it ended from the client's side: "end" (half-closed) or the name of the reset code.
        self.ended = ""
        self._unframer = MessageReader(1 << 20)
        self._started = False
        self.next_id = 0

    def take(self, data: bytes) -> list[bytes]:
        """Take DATA."""
        messages = self._unframer.feed(data)
        self.messages += messages
        return messages

    def send(self, message: bytes) -> None:
        """Send a message."""
        self.send_raw(frame(message))

    def send_raw(self, data: bytes) -> None:
        """Send bytes of the body."""
        self.start()
        self.connection.http2.send(self.stream, (data,), len(data))
        self.connection.flush()

    def start(self, status: bytes = b"200") -> None:
        """Send the response headers."""
        if not self._started:
            self._started = True
            headers = [(b":status", status), (b"content-type", b"application/grpc")]
            self.connection.http2.send_headers(self.stream, headers)

    def end(self, status: int = 0, text: str = "") -> None:
        """End it with trailers, or as trailers only."""
        trailers = [(b"grpc-status", b"%d" % status), (b"grpc-message", encode_message(text))]
        if not self._started:
            trailers = [(b":status", b"200"), (b"content-type", b"application/grpc"), *trailers]
        self.connection.http2.send_headers(self.stream, trailers, end_stream=True)
        self.connection.flush()

    def reset(self, code: ErrorCode) -> None:
        """Reset it."""
        self.connection.http2.reset(self.stream, code)
        self.connection.flush()

    def answer(
        self, watch_id: int, revision: int, events: Sequence[int] = (), *, created: bool = False, canceled: bool = False
    ) -> None:
        """Send a watch response; `events` are revisions."""
        response = rpc_pb2.WatchResponse(
            header=rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=revision, raft_term=1),
            watch_id=watch_id,
            created=created,
            canceled=canceled,
            events=[kv_pb2.Event(kv=kv_pb2.KeyValue(key=b"k", mod_revision=mod)) for mod in events],
        )
        self.send(response.SerializeToString())


class ScriptedConnection(asyncio.Protocol):
    """One connection to the scripted server."""

    def __init__(self, server: ScriptedEtcd) -> None:
        self.server = server
        self.http2 = Connection(Role.SERVER, server.limits)
        self.transport: asyncio.Transport | None = None
        self.frozen = False
        self.said_goodbye = False
        # The payloads of acknowledged PINGs.
        self.acknowledged: list[bytes] = []
        # The number of reads.
        self.heard = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.server.connections.append(self)
        if not self.server.mute:
            self.http2.start()
            self.flush()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.server.connections.remove(self)

    def data_received(self, data: bytes) -> None:
        self.heard += 1
        if self.frozen or self.server.mute or self.server.deaf:
            return
        for event in self.http2.receive(data):
            if isinstance(event, HeadersReceived):
                self._on_headers(event)
            elif isinstance(event, DataReceived):
                self._on_data(event)
            elif isinstance(event, StreamReset) and event.stream.owner is not None:
                event.stream.owner.ended = event.code.name
            elif isinstance(event, GoAwayReceived):
                self.said_goodbye = True
            elif isinstance(event, PingAcknowledged):
                self.acknowledged.append(event.payload)
        self.flush()

    def _on_headers(self, event: HeadersReceived) -> None:
        call = event.stream.owner = ScriptedCall(self, event.stream, event.headers)
        if call.path == STATUS:
            self.server.asked.append(call)
            return
        self.server.calls.append(call)
        self.server.on_call(call)

    def _on_data(self, event: DataReceived) -> None:
        call: ScriptedCall = event.stream.owner
        self.http2.consumed(event.stream, event.flow_size)
        for message in call.take(event.data):
            if call.path == STATUS:
                self.server.on_status(call)
            else:
                self.server.on_message(call, message)
        if event.end_stream:
            call.ended = "end"

    def flush(self) -> None:
        """Write the queued output."""
        assert self.transport is not None
        self.transport.writelines(self.http2.output())
        if self.http2.closed:
            self.transport.close()

    def go_away(self, last_id: int) -> None:
        """Send GOAWAY with a last id."""
        self.http2._last_accepted = last_id
        self.http2.go_away(last=True)
        self.flush()


class ScriptedEtcd:
    """See the module. Attributes may be changed at any time."""

    def __init__(self) -> None:
        self.version = "3.5.30"
        self.revision = 10
        self.leader = 1
        self.is_learner = False
        # A status code and text that Status is refused with.
        self.status_refusal: tuple[int, str] | None = None
        self.limits = Http2Limits()
        # Accepts connections and sends nothing.
        self.mute = False
        # Sends its SETTINGS, and ignores all that arrives.
        self.deaf = False
        self.connections: list[ScriptedConnection] = []
        self.calls: list[ScriptedCall] = []
        # Calls of Maintenance.Status, the first on each new connection; they are not in `calls`.
        self.asked: list[ScriptedCall] = []
        self.on_status: Callable[[ScriptedCall], None] = self.answer_status
        self.on_call: Callable[[ScriptedCall], None] = lambda _: None
        self.on_message: Callable[[ScriptedCall, bytes], None] = self.answer
        self.on_watch: Callable[[ScriptedCall, rpc_pb2.WatchRequest], None] = self.answer_watch
        self.port = 0

    @property
    def endpoint(self) -> str:
        """The address at which it listens."""
        return f"127.0.0.1:{self.port}"

    def watches(self) -> list[ScriptedCall]:
        """Return the Watch calls so far."""
        return [call for call in self.calls if call.path == WATCH]

    def answer(self, call: ScriptedCall, message: bytes) -> None:
        """Answer in the normal way."""
        if call.path == WATCH:
            self.on_watch(call, rpc_pb2.WatchRequest.FromString(message))
        else:
            call.send(message)
            call.end()

    def answer_watch(self, call: ScriptedCall, request: rpc_pb2.WatchRequest) -> None:
        """Answer a WatchRequest as an etcd without writes does."""
        create = request.create_request
        if request.HasField("create_request") and b"" < create.range_end <= create.key:
            call.answer(-1, self.revision, created=True, canceled=True)
        elif request.HasField("create_request"):
            watch_id, call.next_id = call.next_id, call.next_id + 1
            call.answer(watch_id, self.revision, created=True)
        elif request.HasField("cancel_request"):
            call.answer(request.cancel_request.watch_id, self.revision, canceled=True)
        else:
            call.answer(-1, self.revision)

    def answer_status(self, call: ScriptedCall) -> None:
        """Answer Maintenance.Status."""
        if self.status_refusal is not None:
            call.end(*self.status_refusal)
            return
        header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=1, revision=self.revision, raft_term=1)
        status = rpc_pb2.StatusResponse(
            header=header, version=self.version, leader=self.leader, isLearner=self.is_learner
        )
        call.send(status.SerializeToString())
        call.end()

    def drop(self) -> None:
        """Break all connections."""
        for connection in list(self.connections):
            assert connection.transport is not None
            connection.transport.abort()


@asynccontextmanager
async def scripted(
    tls: ssl.SSLContext | None = None, path: str | None = None, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[ScriptedEtcd]:
    """Run a scripted etcd on a loopback port (0: a free one), or on a unix socket."""
    etcd = ScriptedEtcd()
    loop = asyncio.get_running_loop()
    if path is not None:
        server: asyncio.Server = await loop.create_unix_server(lambda: ScriptedConnection(etcd), path, ssl=tls)
    else:
        server = await loop.create_server(lambda: ScriptedConnection(etcd), host, port, ssl=tls)
        etcd.port = server.sockets[0].getsockname()[1]
    try:
        yield etcd
    finally:
        server.close()
        etcd.drop()
