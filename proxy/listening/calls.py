"""gRPC calls as the server sees them: what a request head says, and how a call is answered and ended.

The listener speaks HTTP/2 streams; Watch, health and the refusals of the listener speak gRPC calls. What lies between
is here, once: reading a request head (method, content type, deadline, encoding, metadata), the response head, the
trailers, and the answers to requests that are not gRPC at all. Pass-through does not use it: it hands heads on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from proto.framing import Status, decode_timeout, encode_message
from proto.http2 import Connection, ErrorCode, Stream

Headers = list[tuple[bytes, bytes]]

TIMEOUT = b"grpc-timeout"
RESPONSE_HEAD: Headers = [(b":status", b"200"), (b"content-type", b"application/grpc")]
PROBLEM_TRAILER = b"watchmux-problem"
"""Says in detail why the proxy refused a call, percent-encoded as `grpc-message` is."""

ACCEPTED_ENCODINGS = (b"identity", b"gzip")
UNREAD_END_GRACE_S = 5.0
"""How long a client that has stopped reading may take to fetch the end of its call before the stream is reset."""


class ConnectionHandle(Protocol):
    """What a handler may ask of the connection its stream came on; `listening.connection.ServerConnection` is one."""

    h2: Connection
    dirty: bool

    def touch(self) -> None:
        """Have what is queued in `h2` written before this turn of the event loop ends."""


class Handler(Protocol):
    """What a stream is given to; the listener calls it, always from the event loop, never nested in its own calls.

    Whoever takes `data` owes `h2.consumed(stream, flow_size)`, when it has room for more.
    """

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Take inbound DATA; `flow_size` is what it weighs in the flow-control windows."""

    def trailers(self, headers: Headers) -> None:
        """Take request trailers, which also end the client's side."""

    def drained(self) -> None:
        """Everything sent so far is out: the stream is not blocked any more."""

    def closed(self, code: int | None) -> None:
        """The stream is gone: reset with `code`, or its connection was lost (None). Nothing can be sent on it."""


HandlerFactory = Callable[[ConnectionHandle, Stream, Headers, bool], Handler | None]
"""(connection, stream, request headers, end_stream) -> who gets the rest of the stream; None when it is answered."""


class CallRefusal(Exception):
    """A request head that cannot become a gRPC call.

    Attributes: `http_status` (200 when the refusal is a gRPC one), `status` and `text` for gRPC clients, and `problem`
    for people where clients go by the text: it is in the trailer `watchmux-problem`.
    """

    def __init__(self, http_status: int, status: Status, text: str, problem: str = "") -> None:
        super().__init__(text)
        self.http_status = http_status
        self.status = status
        self.text = text
        self.problem = problem


@dataclass(slots=True, frozen=True)
class RequestHead:
    """The head of one gRPC request, read."""

    path: bytes
    timeout_s: float | None = None
    encoding: bytes = b"identity"
    metadata: dict[bytes, bytes] = field(default_factory=dict)
    """The first value of each header that is not HTTP/2's or gRPC's own."""

    @property
    def decompress(self) -> Literal["gzip"] | None:
        """What the request's messages may be compressed with, as MessageReader takes it."""
        return "gzip" if self.encoding == b"gzip" else None

    @classmethod
    def parse(cls, headers: Headers) -> RequestHead:
        """Read a request head. Raises Refusal for one that is not gRPC or asks for what is not there.

        Statuses as grpc-go's server answers them (internal/transport/http2_server.go, operateHeaders).
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
    """Tell whether a content type is gRPC's: application/grpc, alone or followed by + or ; (gRPC over HTTP/2)."""
    base = b"application/grpc"
    lowered = content_type.lower()
    return lowered.startswith(base) and lowered[len(base) : len(base) + 1] in (b"", b"+", b";")


def _timeout(value: bytes) -> float:
    try:
        return decode_timeout(value)
    except ValueError:
        raise CallRefusal(400, Status.INTERNAL, f"malformed grpc-timeout {_shown(value)}") from None


def _shown(value: bytes) -> str:
    """A peer's bytes for an error text: short, printable."""
    return repr(value[:64].decode("ascii", "backslashreplace"))


class ServerCall:
    """One gRPC call on one stream: the ways to answer it.

    The response head goes out with the first message, so that a call that fails at once gets a trailers-only answer.
    """

    __slots__ = ("connection", "ended", "started", "stream", "timer")

    def __init__(self, connection: ConnectionHandle, stream: Stream) -> None:
        self.connection = connection
        self.stream = stream
        self.started = False
        """The response head is queued."""
        self.ended = False
        """The trailers are queued, or the stream is gone: nothing may be sent."""
        self.timer: asyncio.TimerHandle | None = None

    def end_after(self, timeout_s: float | None) -> None:
        """End the call DEADLINE_EXCEEDED when its caller's grpc-timeout is over; None: never.

        The handler hears of it as `closed` of the stream, like of any other end that it did not bring about itself.
        """
        if timeout_s is not None:
            self.timer = asyncio.get_running_loop().call_later(timeout_s, self._deadline_over)

    def _deadline_over(self) -> None:
        self.timer = None
        if not self.ended:
            handler: Handler = self.stream.owner
            self.end(Status.DEADLINE_EXCEEDED, "context deadline exceeded")
            handler.closed(None)

    def start(self) -> None:
        """Queue the response head, if it is not yet."""
        if not self.started:
            self.started = True
            self.connection.h2.send_headers(self.stream, RESPONSE_HEAD)

    def write(self, framed: bytes) -> bool:
        """Send one message that already has its gRPC prefix. True: it is on its way; False: the stream is blocked."""
        if self.ended:
            return True
        self.start()
        self.connection.touch()
        return self.connection.h2.send(self.stream, (framed,), len(framed))

    def end(self, status: int, text: str = "", extra: Sequence[tuple[bytes, bytes]] = ()) -> None:
        """End the call with a gRPC status: trailers, or a trailers-only answer when nothing was sent.

        They queue behind what the client has not read yet; a client that does not read at all gets a reset instead.
        """
        if self.ended:
            return
        self._over()
        trailers = status_trailers(status, text)
        trailers.extend(extra)
        self.connection.h2.send_headers(self.stream, trailers if self.started else RESPONSE_HEAD + trailers, True)
        self.started = True
        self.connection.touch()
        if self.stream.blocked:
            asyncio.get_running_loop().call_later(UNREAD_END_GRACE_S, self._reset_unread)
        else:
            # Nothing more comes of it, and the stream and its handler would hold each other.
            self.stream.owner = None

    def _reset_unread(self) -> None:
        if self.connection.h2.streams.get(self.stream.id) is self.stream:
            self.connection.h2.reset(self.stream, ErrorCode.CANCEL)
            self.connection.touch()
            self.stream.owner = None

    def closed(self) -> None:
        """Note that the stream is gone."""
        self._over()

    def _over(self) -> None:
        self.ended = True
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def status_trailers(status: int, text: str, problem: str = "") -> Headers:
    """The trailers of a gRPC status; `grpc-message` is left out when there is no text, and so is `watchmux-problem`."""
    trailers = [(b"grpc-status", b"%d" % status)]
    if text:
        trailers.append((b"grpc-message", encode_message(text)))
    if problem:
        trailers.append((PROBLEM_TRAILER, encode_message(problem)))
    return trailers


def refuse(connection: ConnectionHandle, stream: Stream, refusal: CallRefusal) -> None:
    """Answer a request that never became a call, in HTTP's terms as well as in gRPC's."""
    headers: Headers = [(b":status", b"%d" % refusal.http_status)]
    if refusal.http_status == 200:
        headers.append((b"content-type", b"application/grpc"))
        if refusal.status == Status.UNIMPLEMENTED:
            headers.append((b"grpc-accept-encoding", b",".join(ACCEPTED_ENCODINGS)))
    headers.extend(status_trailers(refusal.status, refusal.text, refusal.problem))
    connection.h2.send_headers(stream, headers, True)
    connection.touch()


def unknown_method(connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool) -> None:
    """Answer a stream that nobody serves."""
    del end_stream
    path = dict(headers).get(b":path", b"")
    text = f"unknown method {path[:200].decode('ascii', 'backslashreplace')}"
    refuse(connection, stream, CallRefusal(200, Status.UNIMPLEMENTED, text))
