"""The server side of gRPC calls: parsing request heads, sending responses, ending calls.

The listener works with HTTP/2 streams; Watch, health and the listener's refusals work with gRPC calls. This module is
the layer between them: it parses a request head (method, content type, deadline, encoding, metadata), writes response
heads and trailers, and answers requests that are not gRPC. Pass-through does not use it for its calls: it forwards
heads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from proto.framing import Status, decode_timeout, encode_message
from proto.http2 import Connection, ErrorCode, Stream

Headers = list[tuple[bytes, bytes]]

TIMEOUT = b"grpc-timeout"
RESPONSE_HEAD: Headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
PROBLEM_TRAILER = b"watchmux-problem"
"""Trailer with the detailed reason for a refusal by the proxy, percent-encoded as `grpc-message` is."""

ACCEPTED_ENCODINGS = (b"identity", b"gzip")
UNREAD_END_GRACE_S = 5.0
"""How long a client that has stopped reading may take to read the end of its call; then the stream is reset."""

DEADLINE_TEXT: Final = "context deadline exceeded"
"""The text of DEADLINE_EXCEEDED; Go's context package has it."""


class ResponseSide(Protocol):
    """What a passed-through call needs of its client's HTTP/2 connection; `proto.http2.Connection` implements it."""

    def send_headers(self, stream: Stream, headers: Headers, end_stream: bool = False) -> None:
        """Send a response head or trailers."""

    def send(self, stream: Stream, pieces: Sequence[bytes], size: int, end_stream: bool = False) -> bool:
        """Send a part of the body; False: the client's stream is blocked."""

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Reset the stream."""

    def consumed(self, stream: Stream | None, size: int) -> None:
        """Credit flow control for received bytes."""

    def credit_stream(self, stream: Stream, size: int) -> None:
        """Credit the stream only."""


class ClientHandle(Protocol):
    """The client's side of a passed-through call: a connection, or the calls that share one answer."""

    @property
    def h2(self) -> ResponseSide:
        """Where the response goes."""

    def schedule_flush(self) -> None:
        """Schedule a write of what is queued in `h2`."""


class ConnectionHandle(Protocol):
    """A handler's view of its stream's connection; `listening.connection.ServerConnection` implements it."""

    h2: Connection
    dirty: bool
    bulky: bool

    def schedule_flush(self) -> None:
        """Schedule a write of what is queued in `h2` for the end of this turn of the event loop."""


class Handler(Protocol):
    """The handler of one stream. The listener calls it from the event loop, never nested in the handler's own calls.

    A handler that receives `data` must call `h2.consumed(stream, flow_size)` once it has room for more.
    """

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Handle inbound DATA; `flow_size` is its size in the flow-control windows."""

    def trailers(self, headers: Headers) -> None:
        """Handle request trailers, which also end the client's side."""

    def drained(self) -> None:
        """Called when everything sent so far is written: the stream is no longer blocked."""

    def closed(self, code: int | None) -> None:
        """Called when the stream was reset with `code`, or its connection was lost (None). Nothing can be sent."""


HandlerFactory = Callable[[ConnectionHandle, Stream, Headers, bool], Handler | None]
"""(connection, stream, request headers, end_stream) -> the stream's handler; None if it is answered already."""


class CallRefusal(Exception):
    """A request that is refused before it becomes a gRPC call.

    Attributes: `http_status` (200 for a refusal in gRPC terms), `status` and `text` for gRPC clients, and `problem`,
    sent in the trailer `watchmux-problem`: the reason for operators, where clients depend on the exact `text`.
    """

    def __init__(self, http_status: int, status: Status, text: str, problem: str = "") -> None:
        super().__init__(text)
        self.http_status = http_status
        self.status = status
        self.text = text
        self.problem = problem


def deadline_exceeded() -> CallRefusal:
    """Return the refusal of a call whose deadline is over."""
    return CallRefusal(200, Status.DEADLINE_EXCEEDED, DEADLINE_TEXT)


@dataclass(slots=True, frozen=True)
class RequestHead:
    """The parsed head of one gRPC request."""

    path: bytes
    timeout_s: float | None = None
    encoding: bytes = b"identity"
    metadata: dict[bytes, bytes] = field(default_factory=dict)
    """The first value of each header that is not HTTP/2's or gRPC's own."""

    @property
    def decompress(self) -> Literal["gzip"] | None:
        """The request's compression, as an argument for MessageReader."""
        return "gzip" if self.encoding == b"gzip" else None

    @classmethod
    def parse(cls, headers: Headers) -> RequestHead:
        """Parse a request head. Raises CallRefusal if it is not gRPC or uses an unsupported encoding.

        The statuses are those of grpc-go's server (internal/transport/http2_server.go, operateHeaders).
        """
        path = method = content_type = b""
        timeout_s: float | None = None
        encoding = b"identity"
        metadata: dict[bytes, bytes] = {}
        for name, value in headers:
            if name == b":path":
                path = value
            elif name == b":method":
                method = value
            elif name == b"content-type":
                content_type = value
            elif name == TIMEOUT:
                timeout_s = _timeout(value)
            elif name == b"grpc-encoding":
                encoding = value
            elif name[:1] != b":":
                metadata.setdefault(name, value)
        if method != b"POST":
            raise CallRefusal(405, Status.INTERNAL, f"a gRPC call is a POST, not {_shown(method)}")
        if not is_grpc(content_type):
            raise CallRefusal(415, Status.INVALID_ARGUMENT, f"invalid gRPC request content-type {_shown(content_type)}")
        if encoding not in ACCEPTED_ENCODINGS:
            text = f"grpc-encoding {_shown(encoding)} is not supported: use identity or gzip"
            raise CallRefusal(200, Status.UNIMPLEMENTED, text)
        return cls(path, timeout_s, encoding, metadata)


def is_grpc(content_type: bytes) -> bool:
    """Return whether a content type is gRPC's: application/grpc, alone or followed by + or ; (gRPC over HTTP/2)."""
    base = b"application/grpc"
    lowered = content_type.lower()
    return lowered.startswith(base) and lowered[len(base) : len(base) + 1] in (b"", b"+", b";")


def _timeout(value: bytes) -> float:
    try:
        return decode_timeout(value)
    except ValueError:
        raise CallRefusal(400, Status.INTERNAL, f"malformed grpc-timeout {_shown(value)}") from None


def _shown(value: bytes) -> str:
    """Format a peer's bytes for an error text: truncated and printable."""
    return repr(value[:64].decode("ascii", "backslashreplace"))


class ServerCall:
    """One gRPC call on one stream, with the methods to answer it.

    The response head is sent with the first message, so that a call that fails at once gets a trailers-only response.
    """

    __slots__ = ("connection", "ended", "started", "stream", "timer")

    def __init__(self, connection: ConnectionHandle, stream: Stream) -> None:
        self.connection = connection
        self.stream = stream
        self.started = False
        """The response head is queued."""
        self.ended = False
        """The trailers are queued, or the stream is closed: nothing more may be sent."""
        self.timer: asyncio.TimerHandle | None = None

    def end_after(self, timeout_s: float | None) -> None:
        """End the call with DEADLINE_EXCEEDED after the client's grpc-timeout; None: never.

        The handler is notified by `closed`, as of any end that it did not cause itself.
        """
        if timeout_s is not None:
            self.timer = asyncio.get_running_loop().call_later(timeout_s, self._deadline_over)

    def _deadline_over(self) -> None:
        self.timer = None
        if not self.ended:
            handler: Handler = self.stream.owner
            self.end(Status.DEADLINE_EXCEEDED, DEADLINE_TEXT)
            handler.closed(None)

    def start(self) -> None:
        """Queue the response head, unless it is queued already."""
        if not self.started:
            self.started = True
            self.connection.h2.send_headers(self.stream, RESPONSE_HEAD)

    def write(self, *framed: bytes) -> bool:
        """Send messages that already have their gRPC prefixes. Returns False if the stream is blocked."""
        if self.ended:
            return True
        self.start()
        self.connection.schedule_flush()
        return self.connection.h2.send(self.stream, framed, sum(map(len, framed)))

    def end(self, status: int, text: str = "", extra: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """End the call with a gRPC status: trailers, or a trailers-only response if nothing was sent.

        They queue behind what the client has not read yet; a client that does not read at all gets a reset instead.
        """
        if self.ended:
            return
        self._over()
        trailers = status_trailers(status, text)
        trailers.extend(extra)
        self.connection.h2.send_headers(self.stream, trailers if self.started else RESPONSE_HEAD + trailers, True)
        self.started = True
        self.connection.schedule_flush()
        if self.stream.blocked:
            asyncio.get_running_loop().call_later(UNREAD_END_GRACE_S, self._reset_unread)
        else:
            # Break the reference cycle of the stream and its handler.
            self.stream.owner = None

    def _reset_unread(self) -> None:
        if self.connection.h2.streams.get(self.stream.id) is self.stream:
            self.connection.h2.reset(self.stream, ErrorCode.CANCEL)
            self.connection.schedule_flush()
            self.stream.owner = None

    def closed(self) -> None:
        """Note that the stream is closed."""
        self._over()

    def _over(self) -> None:
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def status_trailers(status: int, text: str, problem: str = "") -> Headers:
    """Return the trailers of a gRPC status, without `grpc-message` and `watchmux-problem` where these are empty."""
    trailers = [(b"grpc-status", b"%d" % status)]
    if text:
        trailers.append((b"grpc-message", encode_message(text)))
    if problem:
        trailers.append((PROBLEM_TRAILER, encode_message(problem)))
    return trailers


def refuse(connection: ClientHandle, stream: Stream, refusal: CallRefusal) -> None:
    """Refuse a request with both an HTTP status and a gRPC status."""
    headers: Headers = [(b":status", b"%d" % refusal.http_status)]
    if refusal.http_status == 200:
        headers.append((b"content-type", b"application/grpc"))
        if refusal.status == Status.UNIMPLEMENTED:
            headers.append((b"grpc-accept-encoding", b",".join(ACCEPTED_ENCODINGS)))
    headers.extend(status_trailers(refusal.status, refusal.text, refusal.problem))
    connection.h2.send_headers(stream, headers, True)
    connection.schedule_flush()


def unknown_method(connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool) -> None:
    """Refuse a request for a method that has no handler (UNIMPLEMENTED)."""
    del end_stream
    path = dict(headers).get(b":path", b"")
    text = f"unknown method {path[:200].decode('ascii', 'backslashreplace')}"
    refuse(connection, stream, CallRefusal(200, Status.UNIMPLEMENTED, text))
