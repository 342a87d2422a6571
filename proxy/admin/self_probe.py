"""The self-probe: the proxy watches through itself to detect that it hangs, for /livez and grpc.health.v1.

Every few seconds it opens an in-memory connection to the listener, with an ordinary HTTP/2 client, and makes one Watch
call on it. The call requests

- a watch from an impossible (negative) revision, which the core refuses at once: this shows that the whole path from a
  request to its answer works, whether the proxy is idle or not;
- if a watched range had events recently: a watch of that range from its newest event. It starts inside the history,
  receives `created` and that event through the normal fan-out, and is cancelled.

Neither needs etcd: the core refuses the first one, and a start inside the history needs no upstream watch. All requests
of a probe are processed in one step of the event loop, in which the watch begins and ends, so gauges never include it,
and its share of the counters is subtracted (`ProbeCounters`).

Three unanswered probes in a row mean that the proxy hangs. A timer of the same event loop judges a probe when the next
one is due, so a process that was stopped or starved of CPU is not reported as hung; if the loop is blocked completely,
HTTP probes get no answer anyway. An unreachable etcd does not count: before the first answer from etcd the proxy has no
header to refuse with, so no probes run. Nor do they run during a drain.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, cast

from coalesce import report
from proto.fields import ScanError
from proto.framing import FramingError, MessageReader, decode_message, frame
from proto.http2 import Connection, DataReceived, Event, HeadersReceived, Role
from proto.pb import rpc_pb2
from proto.scan import scan_watch_response
from proxy import logs
from proxy.listening.connection import ServerConnection
from proxy.listening.turns import Turns
from proxy.watch.service import FAILED_TEXT, PATH

if TYPE_CHECKING:
    from proxy.admin.health import Health
    from proxy.listening.listener import Listener
    from proxy.watch.engine import Engine

HUNG_AFTER = 3
"""Consecutive unanswered probes that mean a hang: a single one may have another cause."""

EVENT_BYTES_MAX = 64 * 1024
"""The probe requests the newest event only if its response is at most this large, to stay cheap."""

HEADERS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH),
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"watchmux-probe"),
]

log = logs.logger("probe")


@dataclass(slots=True)
class ProbeCounters:
    """The share of probes in the counters of the core, the engine and the listener, which count clients only."""

    creates: int = 0
    refused: int = 0
    cancels: int = 0
    joins_history: int = 0
    replays: int = 0
    delivered: int = 0
    delivered_events: int = 0
    delivered_bytes: int = 0
    requests: int = 0

    def add(self, sources: tuple[Any, ...], sign: int) -> None:
        """Add (sign 1) or subtract (-1) the current counters of `sources`."""
        for field in fields(self):
            value = next(getattr(source, field.name) for source in sources if hasattr(source, field.name))
            setattr(self, field.name, getattr(self, field.name) + sign * value)


class LoopbackTransport(asyncio.Transport):
    """The proxy's end of an in-memory connection: its writes reach the client in the next turn of the event loop."""

    def __init__(self, client: ProbeRun) -> None:
        super().__init__()
        self._client = client
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Pass bytes to the client."""
        asyncio.get_running_loop().call_soon(self._client.received, bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Do nothing: there is no buffer."""

    def is_closing(self) -> bool:
        """Whether the connection is closed."""
        return self._closing

    def pause_reading(self) -> None:
        """Do nothing: the client sends no further requests."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close."""
        self._closing = True

    def abort(self) -> None:
        """Close."""
        self._closing = True


class LoopbackConnection(ServerConnection):
    """The proxy's side: an ordinary connection, except that limits, counters and drains ignore it."""

    __slots__ = ()

    inside = True

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        # All requests are processed in one step.
        self.turns = Turns(0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = "the proxy itself"

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the streams' handlers at once, not in turns as for other connections, so that no counter shows them."""
        del exc
        self._transport = None
        self._closing_since = self._listener.now()
        for stream in tuple(self.h2.streams.values()):
            owner, stream.owner = stream.owner, None
            if owner is not None:
                owner.closed(None)

    def _write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)


class ProbeRun:
    """One probe: the client of one in-memory connection."""

    def __init__(self, listener: Listener) -> None:
        self.answered = False
        """All expected answers have arrived."""
        self.problem = "no answer"
        """Why the probe is not answered (yet)."""
        self.delay_s = 0.0
        """From the requests to the last answer, in seconds, for /metrics."""
        self._began_at = time.perf_counter()
        self._awaited = 0
        """Answers still expected."""
        self._refusals = 0
        self._event_awaited = False
        self._unframer = MessageReader(EVENT_BYTES_MAX * 4)
        self._h2 = Connection(Role.CLIENT)
        self._server = LoopbackConnection(listener)
        self._server.connection_made(LoopbackTransport(self))

    def ask(self, newest: report.NewestEvent | None) -> None:
        """Make the call with all its requests, in one step."""
        requests = [_create(rpc_pb2.WatchCreateRequest(start_revision=-1))]
        self._awaited = 1
        if newest is not None:
            # `fragment` puts the watch into a group with few other watches, or none, whose state stays as it is.
            create = rpc_pb2.WatchCreateRequest(
                key=newest.key, range_end=newest.range_end, start_revision=newest.revision, fragment=True
            )
            requests += [_create(create), _cancel(0)]
            self._awaited += 2
            self._event_awaited = True
        self._h2.start()
        stream = self._h2.open(HEADERS)
        for request in requests:
            framed = frame(request.SerializeToString())
            self._h2.send(stream, (framed,), len(framed))
        self._pass_on()

    def received(self, data: bytes) -> None:
        """Receive bytes from the proxy."""
        for event in self._h2.receive(data):
            self._event(event)
        if not self.answered and not self._awaited:
            if self._event_awaited:
                self.problem = "the newest event did not arrive"
            else:
                self.answered = True
                self.delay_s = time.perf_counter() - self._began_at
        self._pass_on()

    def close(self) -> None:
        """Close the connection, as a disconnecting client does."""
        self._server.connection_lost(None)

    def _pass_on(self) -> None:
        pieces = self._h2.output()
        if pieces:
            self._server.data_received(b"".join(pieces))

    def _event(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._h2.consumed(event.stream, event.flow_size)
            try:
                for message in self._unframer.feed(event.data):
                    self._response(message)
            except (FramingError, ScanError) as error:
                self.problem = f"the answer cannot be read: {error}"
        elif isinstance(event, HeadersReceived):
            self._status(dict(event.headers))

    def _response(self, message: bytes) -> None:
        response = scan_watch_response(message)
        if response.events:
            self._event_awaited = False
            return
        self._awaited -= 1
        if response.created and response.canceled:
            self._refusals += 1
            if self._refusals > 1:
                # The second watch was refused too: also an answer.
                self._awaited = 0
                self._event_awaited = False

    def _status(self, headers: dict[bytes, bytes]) -> None:
        """Handle the end of the call: a proper refusal counts as an answer too."""
        if b"grpc-status" not in headers:
            return
        text = decode_message(headers.get(b"grpc-message", b""))
        if text == FAILED_TEXT:
            self.problem = "the core failed"
        else:
            self._awaited = 0
            self._event_awaited = False


class SelfProbe:
    """Runs a probe every `interval_s` seconds and reports hangs to the health service."""

    def __init__(self, listener: Listener, engine: Engine, health: Health, interval_s: float) -> None:
        self.made = 0
        """Probes since the start."""
        self.failed = 0
        """Unanswered probes."""
        self.delay_s = 0.0
        """Response time of the latest answered probe, in seconds."""
        self._listener = listener
        self._engine = engine
        self._health = health
        self._interval_s = interval_s
        self._attempt: ProbeRun | None = None
        self._uncounted = ProbeCounters()
        self._core = engine.core
        """The core that `_uncounted` refers to; a restarted core counts from 0."""
        self._failures = 0
        """Failures of the core at the last check."""
        self._in_vain = 0
        """Consecutive unanswered probes."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def sessions(self) -> int:
        """Watch streams of the probe that are open now."""
        return int(self._attempt is not None)

    def uncounted(self) -> ProbeCounters:
        """Return the probes' share, to be subtracted from the counters."""
        if self._core is not self._engine.core:
            self._core = self._engine.core
            requests, sent = self._uncounted.requests, self._uncounted.delivered_bytes
            self._uncounted = ProbeCounters(requests=requests, delivered_bytes=sent)
        return self._uncounted

    def start(self) -> None:
        """Start the timer in the running event loop."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._ring)

    def stop(self) -> None:
        """Stop the timer and end the current probe."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop()

    def _ring(self) -> None:
        self.judge()
        try:
            self.attempt()
        except Exception:
            # Counts as an unanswered probe.
            log.exception("self-probe could not be sent")
        self.start()

    def attempt(self) -> None:
        """Send one probe."""
        if self._health.draining or self._engine.core.header is None:
            return
        self.made += 1
        self._attempt = attempt = ProbeRun(self._listener)
        core = self._engine.core
        newest = report.newest_event(core, EVENT_BYTES_MAX)
        sources = (core.stats, self._engine.stats, self._listener.stats)
        uncounted = self.uncounted()
        uncounted.add(sources, -1)
        try:
            attempt.ask(newest)
        finally:
            uncounted.add(sources, 1)

    def judge(self) -> None:
        """Check the result of the latest probe."""
        attempt = self._attempt
        failed = self._engine.stats.failures > self._failures
        self._failures = self._engine.stats.failures
        if attempt is not None and attempt.answered and not failed:
            self._in_vain = 0
            self.delay_s = attempt.delay_s
        elif attempt is not None or failed:
            self.failed += 1
            self._in_vain += 1
            problem = "the core failed" if attempt is None or attempt.answered else attempt.problem
            log.warning("self-probe was not answered", problem=problem, in_a_row=self._in_vain)
        else:
            self._in_vain = 0
        self._drop()
        hung = ""
        if self._in_vain >= HUNG_AFTER:
            hung = f"the proxy hangs: {self._in_vain} self-probes in a row were not answered"
        self._health.set_hung(hung)

    def _drop(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()


def _create(request: rpc_pb2.WatchCreateRequest) -> rpc_pb2.WatchRequest:
    return rpc_pb2.WatchRequest(create_request=request)


def _cancel(watch_id: int) -> rpc_pb2.WatchRequest:
    return rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=watch_id))
