"""The health service: grpc.health.v1 as a load balancer or a probe asks it, and the state it tells.

The answer is honest: serving means that the upstream is reachable, that the proxy is not draining, and that a watch
through itself is answered (proxy/admin/self_probe.py). It is given from the same event loop that serves the watches, so
a proxy whose loop does not turn does not answer at all, as a probe should see.
The messages come from grpcio's health package, without grpc itself: the proxy process never loads that.
"""

from __future__ import annotations

from google.protobuf.message import DecodeError
from grpc_health.v1.health_pb2 import (  # type: ignore[import-untyped]  # the package has no type stubs
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListResponse,
)

from proto.framing import FramingError, MessageReader, Status, frame
from proto.http2 import Stream
from proxy.listening.calls import ConnectionHandle, Headers, RequestHead, ServerCall

CHECK = b"/grpc.health.v1.Health/Check"
LIST = b"/grpc.health.v1.Health/List"
WATCH = b"/grpc.health.v1.Health/Watch"

REQUEST_BYTES_MAX = 4096
"""A request names one service: more is not one."""

NO_REQUEST = "the request message is missing"

SERVICES = ("", "etcdserverpb.Watch", "grpc.health.v1.Health")
"""What can be asked for: the whole (the name etcd itself registers), and what the proxy answers by itself."""

SERVING: int = HealthCheckResponse.SERVING
NOT_SERVING: int = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN: int = HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The state of the proxy, and who wants to hear of its changes."""

    def __init__(self) -> None:
        self.upstream_reachable = False
        self.draining = False
        self.problem = ""
        """What keeps it from serving though etcd is there; "" when nothing does."""
        self.hung = ""
        """How it was found to hang; "" when it does not."""
        self._told: bool | None = None
        self._watchers: set[HealthCall] = set()

    @property
    def serving(self) -> bool:
        """The upstream answers, and the proxy means to stay, and nothing is wrong with it."""
        return self.upstream_reachable and not (self.draining or self.hung or self.problem)

    @property
    def reason(self) -> str:
        """Why it is not serving, for people; empty when it is."""
        if self.draining:
            return "draining"
        if self.hung:
            return self.hung
        return self.problem if self.upstream_reachable else "etcd is not reachable"

    def set_upstream(self, reachable: bool, problem: str = "") -> None:
        """Note whether the upstream answers, and what is wrong though it does."""
        self.upstream_reachable = reachable
        self.problem = problem
        self._tell()

    def set_hung(self, text: str) -> None:
        """Note how the proxy was found to hang, or "" that it does not (any more)."""
        self.hung = text
        self._tell()

    def set_draining(self) -> None:
        """Note that the proxy is about to leave."""
        self.draining = True
        self._tell()

    def _tell(self) -> None:
        if self.serving != self._told:
            self._told = self.serving
            for call in tuple(self._watchers):
                call.tell()

    def status_of(self, service: str) -> int | None:
        """The status of one service; None when there is no such service."""
        if service not in SERVICES:
            return None
        return SERVING if self.serving else NOT_SERVING

    def open(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> HealthCall | None:
        """Take a request stream: the handler factory of this service's paths. Raises Refusal as RequestHead.parse."""
        head = RequestHead.parse(headers)
        call = ServerCall(connection, stream)
        if end_stream:
            call.end(Status.INTERNAL, NO_REQUEST)
            return None
        call.end_after(head.timeout_s)
        return HealthCall(self, call, head)

    def leave_all(self) -> None:
        """End every Watch call: who watches has been told NOT_SERVING."""
        while self._watchers:
            self._watchers.pop().call.end(Status.UNAVAILABLE, "watchmux: shutting down")

    def join(self, call: HealthCall) -> None:
        """Tell `call` of every change from now on."""
        self._watchers.add(call)

    def leave(self, call: HealthCall) -> None:
        """Tell `call` no more."""
        self._watchers.discard(call)


class HealthCall:
    """One call to the health service, whichever of its three methods."""

    __slots__ = ("asked", "call", "health", "path", "service", "unframer")

    def __init__(self, health: Health, call: ServerCall, head: RequestHead) -> None:
        self.health = health
        self.call = call
        self.path = head.path
        self.unframer = MessageReader(REQUEST_BYTES_MAX, head.decompress)
        self.asked = False
        """The request has come; a second one is none of ours to answer."""
        self.service = ""

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Take the request; answer as soon as it is whole."""
        self.call.connection.h2.consumed(self.call.stream, flow_size)
        self.call.connection.touch()
        if self.call.ended:
            return
        try:
            messages = self.unframer.feed(data)
        except FramingError as error:
            self._end(error.code, error.text)
            return
        if messages and not self.asked:
            self.asked = True
            self._answer(messages[0])
        elif end_stream and not self.asked:
            self._end(Status.INTERNAL, NO_REQUEST)

    def trailers(self, headers: Headers) -> None:
        """Take request trailers: an end like any other."""
        del headers
        if not self.asked:
            self._end(Status.INTERNAL, NO_REQUEST)

    def drained(self) -> None:
        """Nothing waits for room here: a status is a few bytes, and only the latest counts."""

    def closed(self, code: int | None) -> None:
        """Forget the call."""
        del code
        self.health.leave(self)
        self.call.closed()

    def tell(self) -> None:
        """Send the status as it is now (Watch)."""
        status = self.health.status_of(self.service)
        self._send(SERVICE_UNKNOWN if status is None else status)

    def _answer(self, message: bytes) -> None:
        try:
            self.service = HealthCheckRequest.FromString(message).service
        except DecodeError:
            self._end(Status.INTERNAL, "the request is not a HealthCheckRequest")
            return
        if self.path == WATCH:
            self.health.join(self)
            self.tell()
        elif self.path == LIST:
            status = SERVING if self.health.serving else NOT_SERVING
            statuses = {name: HealthCheckResponse(status=status) for name in SERVICES}
            self.call.write(frame(HealthListResponse(statuses=statuses).SerializeToString()))
            self._end(Status.OK)
        elif (found := self.health.status_of(self.service)) is None:
            self._end(Status.NOT_FOUND, "unknown service")
        else:
            self._send(found)
            self._end(Status.OK)

    def _send(self, status: int) -> None:
        self.call.write(frame(HealthCheckResponse(status=status).SerializeToString()))

    def _end(self, status: int, text: str = "") -> None:
        self.health.leave(self)
        self.call.end(status, text)
