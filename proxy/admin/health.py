"""The gRPC health service (grpc.health.v1) for load balancers and probes, and the health state behind it.

SERVING means that etcd is reachable, the proxy is not draining, and the self-probe is answered
(proxy/admin/self_probe.py). The service runs on the same event loop as the watches, so a proxy whose event loop is
blocked does not answer at all, and probes time out.
"""

from __future__ import annotations

from collections.abc import Callable

from proto.fields import ScanError
from proto.framing import FramingError, MessageReader, Status, frame
from proto.http2 import Stream
from proto.messages import decode_health_request, encode_health, encode_health_list
from proxy.listening.calls import ConnectionHandle, Headers, RequestHead, ServerCall

CHECK = b"/grpc.health.v1.Health/Check"
LIST = b"/grpc.health.v1.Health/List"
WATCH = b"/grpc.health.v1.Health/Watch"

REQUEST_BYTES_MAX = 4096
"""Maximum size of a request, which contains only the name of a service."""

BUNDLED_STORE = "no etcd is configured: serving the bundled store"
"""What the log, the status and the health checks say of a proxy without endpoints."""

NO_REQUEST = "the request message is missing"

SERVICES = ("", "etcdserverpb.Watch", "grpc.health.v1.Health")
"""The known services: the whole server ("", the name that etcd registers), and those the proxy implements itself."""

SERVING = 1
NOT_SERVING = 2
SERVICE_UNKNOWN = 3
"""A HealthCheckResponse's status (grpc/health/v1/health.proto)."""


class Health:
    """The health state of the proxy, and the Watch calls that are notified of its changes."""

    def __init__(self) -> None:
        self.upstream_reachable = False
        self.draining = False
        self.problem = ""
        """Why the proxy cannot serve although etcd is reachable; "" if it can."""
        self.hung = ""
        """The evidence that the proxy hangs; "" if it does not."""
        self._reported: bool | None = None
        self.on_change: Callable[[], None] = lambda: None
        """Called when the proxy begins or ceases to serve."""
        self._watchers: set[HealthCall] = set()

    @property
    def serving(self) -> bool:
        """Whether etcd is reachable, and the proxy neither drains, hangs nor has another problem."""
        return self.upstream_reachable and not (self.draining or self.hung or self.problem)

    @property
    def reason(self) -> str:
        """Why the proxy is not serving, as text for people; "" if it is."""
        if self.draining:
            return "draining"
        if self.hung:
            return self.hung
        return self.problem or ("" if self.upstream_reachable else "etcd is not reachable")

    def set_upstream(self, reachable: bool, problem: str = "") -> None:
        """Set whether etcd is reachable, and the problem that prevents serving although it is."""
        self.upstream_reachable = reachable
        self.problem = problem
        self._notify()

    def set_hung(self, text: str) -> None:
        """Set the evidence that the proxy hangs; "" if it does not, or no longer."""
        self.hung = text
        self._notify()

    def set_draining(self) -> None:
        """Set that the proxy is draining."""
        self.draining = True
        self._notify()

    def _notify(self) -> None:
        if self.serving != self._reported:
            self._reported = self.serving
            self.on_change()
            for call in tuple(self._watchers):
                call.notify()

    def status_of(self, service: str) -> int | None:
        """Return the status of one service; None if the service is unknown."""
        if service not in SERVICES:
            return None
        return SERVING if self.serving else NOT_SERVING

    def open(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> HealthCall | None:
        """Open a call: the handler factory of this service's paths. Raises Refusal as RequestHead.parse."""
        head = RequestHead.parse(headers)
        call = ServerCall(connection, stream)
        if end_stream:
            call.end(Status.INTERNAL, NO_REQUEST)
            return None
        call.end_after(head.timeout_s)
        return HealthCall(self, call, head)

    def leave_all(self) -> None:
        """End every Watch call; each has already received NOT_SERVING."""
        while self._watchers:
            self._watchers.pop().call.end(Status.UNAVAILABLE, "watchmux: shutting down")

    def join(self, call: HealthCall) -> None:
        """Notify `call` of every change from now on."""
        self._watchers.add(call)

    def leave(self, call: HealthCall) -> None:
        """Stop notifying `call`."""
        self._watchers.discard(call)


class HealthCall:
    """One call to the health service, for any of its three methods."""

    __slots__ = ("asked", "call", "health", "path", "service", "unframer")

    def __init__(self, health: Health, call: ServerCall, head: RequestHead) -> None:
        self.health = health
        self.call = call
        self.path = head.path
        self.unframer = MessageReader(REQUEST_BYTES_MAX, head.decompress)
        self.asked = False
        """The request has arrived; further messages are ignored."""
        self.service = ""

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Receive request data; answer as soon as the request is complete."""
        self.call.connection.h2.consumed(self.call.stream, flow_size)
        self.call.connection.schedule_flush()
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
        """Handle request trailers as the end of the request."""
        del headers
        if not self.asked:
            self._end(Status.INTERNAL, NO_REQUEST)

    def drained(self) -> None:
        """Do nothing: a status is a few bytes, and only the latest one matters."""

    def closed(self, code: int | None) -> None:
        """Forget the call."""
        del code
        self.health.leave(self)
        self.call.closed()

    def notify(self) -> None:
        """Send the current status (Watch)."""
        status = self.health.status_of(self.service)
        self._send(SERVICE_UNKNOWN if status is None else status)

    def _answer(self, message: bytes) -> None:
        try:
            self.service = decode_health_request(message)
        except ScanError:
            self._end(Status.INTERNAL, "the request is not a HealthCheckRequest")
            return
        if self.path == WATCH:
            self.health.join(self)
            self.notify()
        elif self.path == LIST:
            status = SERVING if self.health.serving else NOT_SERVING
            self.call.write(frame(encode_health_list(SERVICES, status)))
            self._end(Status.OK)
        elif (found := self.health.status_of(self.service)) is None:
            self._end(Status.NOT_FOUND, "unknown service")
        else:
            self._send(found)
            self._end(Status.OK)

    def _send(self, status: int) -> None:
        self.call.write(frame(encode_health(status)))

    def _end(self, status: int, text: str = "") -> None:
        self.health.leave(self)
        self.call.end(status, text)
