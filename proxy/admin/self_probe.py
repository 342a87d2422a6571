"""The proxy watches through itself, so that one that hangs is found out: /livez and grpc.health.v1 go by this.

Every few seconds a connection is made to the listener in memory, on which a client of our own speaks HTTP/2 as any
other does, and one Watch call is made on it. It asks for

- a watch from a revision that cannot be (negative): refused by the core at once, so whatever stands between a request
  and its answer is seen to work, idle or not;
- where a range is watched that had events lately: a watch of that range from its newest event on. It joins inside the
  window, gets its `created` and that event through the fan-out like everybody else, and is cancelled.

Neither costs etcd anything: a refusal needs nobody, and a start inside the window no upstream watch. All requests of a
probe are taken in one step of the event loop, in which the watch begins and ends: nobody who counts watches ever sees
one of these, and what it adds to counters is taken off again (`ProbeCounters`).

Three probes in a row without their answers: the proxy hangs. A probe is judged when the next one is due, by a timer of
the same loop, so a process that was stopped or starved of CPU is not blamed for the time it did not have; and one whose
loop does not turn at all answers nobody, which is what a probe over HTTP sees then. An etcd that is away is no reason:
before the first answer of etcd the proxy has nothing to refuse with, and rests. So it does while it drains.
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
"""Probes without an answer, one after the other, that mean a hang: one may fall into a moment of trouble."""

EVENT_BYTES_MAX = 64 * 1024
"""The newest event's response is asked for again only if it is no larger: a probe is cheap."""

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
    """What probes have added to counters of the core, the engine and the listener, which are about clients."""

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
        """Add (sign 1) or take off (-1) what the counters of `sources` stand at."""
        for field in fields(self):
            value = next(getattr(source, field.name) for source in sources if hasattr(source, field.name))
            setattr(self, field.name, getattr(self, field.name) + sign * value)


class LoopbackTransport(asyncio.Transport):
    """The proxy's end of a connection in memory: what it writes reaches the client in the next turn of the loop."""

    def __init__(self, client: ProbeRun) -> None:
        super().__init__()
        self._client = client
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Pass bytes on."""
        asyncio.get_running_loop().call_soon(self._client.received, bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Nothing waits here."""

    def is_closing(self) -> bool:
        """Whether it is closed."""
        return self._closing

    def pause_reading(self) -> None:
        """The client asks no more than it is answered."""

    def resume_reading(self) -> None:
        """As above."""

    def close(self) -> None:
        """Close."""
        self._closing = True

    def abort(self) -> None:
        """Close."""
        self._closing = True


class LoopbackConnection(ServerConnection):
    """The proxy's side of it: a connection like any other, but that no limit, count or drain is about it."""

    __slots__ = ()

    inside = True

    def __init__(self, listener: Listener) -> None:
        super().__init__(listener)
        # All that is asked is taken in one step.
        self.turns = Turns(0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = "the proxy itself"

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell the handler that its stream is gone: at once, whoever else is leaving, so that no count shows it."""
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
    """One probe: the client of one connection in memory."""

    def __init__(self, listener: Listener) -> None:
        self.answered = False
        """Everything that was asked for has come."""
        self.problem = "no answer"
        """Why it is not answered (yet)."""
        self.delay_s = 0.0
        """From the requests to the last answer; what /metrics shows."""
        self._began_at = time.perf_counter()
        self._awaited = 0
        """Answers still to come."""
        self._refusals = 0
        self._event_awaited = False
        self._unframer = MessageReader(EVENT_BYTES_MAX * 4)
        self._h2 = Connection(Role.CLIENT)
        self._server = LoopbackConnection(listener)
        self._server.connection_made(LoopbackTransport(self))

    def ask(self, newest: report.NewestEvent | None) -> None:
        """Make the call with all of its requests, in one step."""
        requests = [_create(rpc_pb2.WatchCreateRequest(start_revision=-1))]
        self._awaited = 1
        if newest is not None:
            # `fragment` puts it into a group that it shares with few others, or nobody: theirs stay as they are.
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
        """Take bytes of the proxy."""
        for event in self._h2.receive(data):
            self._event(event)
        if not self.answered and not self._awaited:
            if self._event_awaited:
                self.problem = "the newest event did not come"
            else:
                self.answered = True
                self.delay_s = time.perf_counter() - self._began_at
        self._pass_on()

    def close(self) -> None:
        """Close the connection, as a client that goes away."""
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
                # Of the watch that should have been: as good an answer.
                self._awaited = 0
                self._event_awaited = False

    def _status(self, headers: dict[bytes, bytes]) -> None:
        """Take the end of the call: a refusal for a good reason is an answer too."""
        if b"grpc-status" not in headers:
            return
        text = decode_message(headers.get(b"grpc-message", b""))
        if text == FAILED_TEXT:
            self.problem = "the core failed"
        else:
            self._awaited = 0
            self._event_awaited = False


class SelfProbe:
    """Makes an attempt every `interval_s` seconds and tells the health service what comes of them."""

    def __init__(self, listener: Listener, engine: Engine, health: Health, interval_s: float) -> None:
        self.made = 0
        """Attempts since the start."""
        self.failed = 0
        """Those that had no answer."""
        self.delay_s = 0.0
        """Of the newest attempt that was answered."""
        self._listener = listener
        self._engine = engine
        self._health = health
        self._interval_s = interval_s
        self._attempt: ProbeRun | None = None
        self._uncounted = ProbeCounters()
        self._core = engine.core
        """The core that has been counted so far; one that begins anew counts from 0."""
        self._failures = 0
        """Of the core, when the attempt was made."""
        self._in_vain = 0
        """Attempts without an answer since the last one that had it."""
        self._timer: asyncio.TimerHandle | None = None

    @property
    def sessions(self) -> int:
        """Watch streams of its own that are open now."""
        return int(self._attempt is not None)

    def uncounted(self) -> ProbeCounters:
        """What to take off the counters for what they say to be about clients."""
        if self._core is not self._engine.core:
            self._core = self._engine.core
            requests, sent = self._uncounted.requests, self._uncounted.delivered_bytes
            self._uncounted = ProbeCounters(requests=requests, delivered_bytes=sent)
        return self._uncounted

    def start(self) -> None:
        """Start, in the running event loop."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._ring)

    def stop(self) -> None:
        """Stop."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop()

    def _ring(self) -> None:
        self.judge()
        try:
            self.attempt()
        except Exception:
            # A probe that cannot be made is one without an answer.
            log.exception("the proxy cannot watch through itself")
        self.start()

    def attempt(self) -> None:
        """Make one."""
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
        """See what became of the latest attempt."""
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
            log.warning("the proxy's watch through itself was not answered", problem=problem, in_a_row=self._in_vain)
        else:
            self._in_vain = 0
        self._drop()
        hung = ""
        if self._in_vain >= HUNG_AFTER:
            hung = f"the proxy hangs: {self._in_vain} watches through itself were not answered"
        self._health.set_hung(hung)

    def _drop(self) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            attempt.close()


def _create(request: rpc_pb2.WatchCreateRequest) -> rpc_pb2.WatchRequest:
    return rpc_pb2.WatchRequest(create_request=request)


def _cancel(watch_id: int) -> rpc_pb2.WatchRequest:
    return rpc_pb2.WatchRequest(cancel_request=rpc_pb2.WatchCancelRequest(watch_id=watch_id))
