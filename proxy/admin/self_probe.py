"""The self-probe: the proxy makes a Watch call on itself to detect that it hangs, for /livez and grpc.health.v1.

Every few seconds it opens an in-memory connection to the listener, with an ordinary HTTP/2 client, and requests a watch
from an impossible (negative) revision. The core refuses it at once, without etcd and without a permission. This shows
that the path from a request to its answer works: the connection, the inbox of the engine, the core, and the writes at
the end of the turn. The counters of requests, creates and refusals include the probes (`watchmux_probes_total`).

Three unanswered probes in a row mean that the proxy hangs. A timer of the same event loop judges a probe when the next
one is due, so a process that was stopped or starved of CPU is not reported as hung; if the loop is blocked completely,
HTTP probes get no answer anyway. An unreachable etcd does not count: before the first answer from etcd the proxy has no
header to refuse with, so no probes run. Nor do they run during a drain.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, cast

from proto.framing import MessageReader, decode_message, frame
from proto.http2 import Connection, DataReceived, Event, HeadersReceived, Role
from proto.plain_request import encode_create
from proxy import logs
from proxy.listening.connection import ServerConnection
from proxy.watch.service import FAILED_TEXT, PATH

if TYPE_CHECKING:
    from proxy.admin.health import Health
    from proxy.listening.listener import Listener
    from proxy.watch.engine import Engine

HUNG_AFTER = 3
"""Consecutive unanswered probes that mean a hang: a single one may have another cause."""

HEADERS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", PATH),
    (b":authority", b"localhost"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
    (b"user-agent", b"watchmux-probe"),
]
IMPOSSIBLE = encode_create(b"", start_revision=-1)
ANSWER_BYTES_MAX = 64 * 1024

log = logs.logger("probe")


class LoopbackConnection(ServerConnection):
    """The proxy's side: an ordinary connection that is not one of the listener's, whose limits and drain ignore it."""

    of_client = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport."""
        self._transport = cast(asyncio.Transport, transport)
        self.peer = "the proxy itself"


class ProbeRun(asyncio.Transport):
    """One probe: an in-memory connection, and its client. The proxy's writes arrive in the next turn of the loop."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.answered = False
        self.problem = "no answer"
        """Why the probe is not answered (yet)."""
        self.delay_s = 0.0
        """From the request to the answer, in seconds, for /metrics."""
        self._began_at = time.perf_counter()
        self._messages = MessageReader(ANSWER_BYTES_MAX)
        self._h2 = Connection(Role.CLIENT)
        self._server = LoopbackConnection(listener)
        self._server.connection_made(self)

    def ask(self) -> None:
        """Make the call."""
        self._h2.start()
        request = frame(IMPOSSIBLE)
        self._h2.send(self._h2.open(HEADERS), (request,), len(request))
        self._pass_on()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the proxy."""
        asyncio.get_running_loop().call_soon(self._received, bytes(data))

    def is_closing(self) -> bool:
        """Whether the connection is closed."""
        return self._server._transport is None

    def pause_reading(self) -> None:
        """Do nothing: the client sends no further requests."""

    def resume_reading(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the connection, as a client does that disconnects."""
        if not self.is_closing():
            self._server.connection_lost(None)

    abort = close

    def _received(self, data: bytes) -> None:
        for event in self._h2.receive(data):
            self._event(event)
        self._pass_on()
        if self.answered:
            self.close()

    def _pass_on(self) -> None:
        pieces = self._h2.output()
        if pieces and not self.is_closing():
            self._server.data_received(b"".join(pieces))

    def _event(self, event: Event) -> None:
        """Take any answer: the refusal, or the end of the call with a status other than that of a failed core."""
        if isinstance(event, DataReceived):
            answered = bool(self._messages.feed(event.data))
        elif isinstance(event, HeadersReceived):
            headers = dict(event.headers)
            failed = decode_message(headers.get(b"grpc-message", b"")) == FAILED_TEXT
            answered = b"grpc-status" in headers and not failed
            self.problem = "the core failed" if failed else self.problem
        else:
            return
        if answered and not self.answered:
            self.answered = True
            self.delay_s = time.perf_counter() - self._began_at


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
        self._run: ProbeRun | None = None
        self._failures = 0
        """Failures of the core at the last check."""
        self._unanswered = 0
        """Consecutive unanswered probes."""
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the timer in the running event loop."""
        self._timer = asyncio.get_running_loop().call_later(self._interval_s, self._due)

    def stop(self) -> None:
        """Stop the timer and end the current probe."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._drop()

    def _due(self) -> None:
        self.judge()
        try:
            self.attempt()
        except Exception:
            # Counts as an unanswered probe.
            log.exception("self-probe could not be sent")
        self.start()

    def attempt(self) -> None:
        """Send one probe."""
        if not self._health.draining and self._engine.core.header is not None:
            self.made += 1
            self._run = ProbeRun(self._listener)
            self._run.ask()

    def judge(self) -> None:
        """Check the result of the latest probe."""
        run = self._run
        failed = self._engine.stats.failures > self._failures
        self._failures = self._engine.stats.failures
        if run is not None and run.answered and not failed:
            self._unanswered = 0
            self.delay_s = run.delay_s
        elif run is not None or failed:
            self.failed += 1
            self._unanswered += 1
            problem = "the core failed" if run is None or run.answered else run.problem
            log.warning("self-probe was not answered", problem=problem, in_a_row=self._unanswered)
        else:
            self._unanswered = 0
        self._drop()
        hung = ""
        if self._unanswered >= HUNG_AFTER:
            hung = f"the proxy hangs: {self._unanswered} self-probes in a row were not answered"
        self._health.set_hung(hung)

    def _drop(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()
