"""One HTTP/2 connection to one upstream etcd, and the calls on it.

An asyncio.Protocol around `proto.http2` in its client role: plain TCP, TLS or a unix socket. It uses callbacks instead
of futures and has no task of its own, because its calls are watches that receive thousands of messages and
passed-through calls whose frames are only forwarded. Everything runs in the event loop's thread. The output that
callbacks write while bytes are being received is sent in one write afterwards.

Timers: the server must acknowledge our SETTINGS; while calls are open, a PING follows silence, and a PING without any
answer ends the connection. This detects a server that vanished without closing the connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, cast

from proto.framing import Status
from proto.http2 import (
    LATE_ACK_S_MAX,
    UPDATE_AND_PING_BYTES,
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    Event,
    GoAwayReceived,
    GoingAway,
    Headers,
    HeadersKind,
    HeadersReceived,
    Http2Limits,
    PeerSettings,
    Role,
    Stream,
    StreamDrained,
    StreamReset,
    TooManyStreams,
)
from proto.http2.frames import FRAME_HEADER_BYTES
from upstream.answer_due import AnswerDue
from upstream.batching import EventBatches
from upstream.endpoints import Endpoint
from upstream.errors import Unreachable, closed_early, explain_connect, not_http2
from upstream.heads import STATUS_OF_RESET, number, status_of
from upstream.interfaces import CallHandler, Cork
from upstream.settings import ConnectionSettings

_PING: Final = b"watchmux"
_FIRST_BYTES_MAX: Final = 512
_SETTINGS_FRAME: Final = 4
# From this stream id on a connection takes no new calls. Ids end at 2^31 (RFC 9113 5.1.1); the rest is a reserve for
# calls that begin meanwhile.
_STREAM_ID_WORN: Final = 2**30


class NotSent(Exception):
    """A call could not be started on this connection; no part of it was sent."""


@dataclass(slots=True, eq=False, repr=False)
class UpstreamCall:
    """One call: a stream and its handler."""

    connection: ClientConnection
    stream: Stream
    handler: CallHandler
    # It has ended: by its trailers, by a reset of either side, or with the connection.
    ended: bool = False
    # The HTTP status of the response; 0 before its headers arrive.
    http_status: int = 0
    # Bytes passed to the handler that it has not acknowledged by `consumed`.
    owed: int = 0
    # The code of the RST_STREAM that ended it, if one did.
    reset_code: ErrorCode | None = None
    # The server has not processed it, so it can safely be sent again (RFC 9113 8.7).
    unprocessed: bool = False
    # It was not processed because the server was closing the connection (GOAWAY) when the call arrived.
    rotated: bool = False

    @property
    def blocked(self) -> bool:
        """Some output still waits for flow control or for the transport."""
        return self.stream.blocked

    def write(self, pieces: Sequence[bytes], size: int, end: bool = False) -> bool:
        """Send bytes of the body, `size` in all; `end` half-closes. False: wait for `on_drained` before more."""
        if self.ended:
            return True
        done = self.connection.http2.send(self.stream, pieces, size, end)
        self.connection.schedule_flush()
        return done

    def end(self) -> None:
        """Half-close: no more data follows."""
        self.write((), 0, end=True)

    def reset(self, code: ErrorCode = ErrorCode.CANCEL) -> None:
        """End the call at once; its handler gets no more callbacks."""
        if not self.ended:
            self.ended = True
            self.connection.call_reset(self, code)

    def consumed(self, size: int) -> None:
        """Return `size` bytes of flow control, so that the server may send as many more. Not needed at the end."""
        if not self.ended:
            self.owed -= size
            self.connection.http2.consumed(self.stream, size)
            self.connection.schedule_flush()


class ClientConnection(asyncio.Protocol):
    """See the module. Made by `connect`."""

    def __init__(
        self,
        endpoint: Endpoint,
        secure: bool,
        settings: ConnectionSettings,
        loop: asyncio.AbstractEventLoop,
        on_closed: Callable[[ClientConnection], None] | None = None,
    ) -> None:
        self.endpoint = endpoint
        self.secure = secure
        # Called once when the connection takes no more calls: it closed, or the server sent GOAWAY. May be replaced.
        self.on_closed = on_closed
        # It takes calls.
        self.healthy = False
        # Why it ended; None while it is open or after our own `close`.
        self.failure: Unreachable | None = None
        # It takes no more calls because the server closed it in good order, or because its stream ids are used up.
        self.ended_well = False
        # Calls whose response headers have arrived.
        self.answered = 0
        # Called when a call has ended, or the server raised its limit of streams: another call may fit.
        self.on_room: Callable[[], None] | None = None
        # When it was opened, in loop time; set by `Connections`.
        self.opened_at = 0.0
        # The server closed it because of our PINGs: the next connection must send fewer.
        self.pinged_too_often = False
        # Held while a read is dispatched, unless it is a single DATA frame.
        self.cork: Cork | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        limits = Http2Limits(
            initial_window=settings.stream_window_bytes, connection_window=settings.connection_window_bytes
        )
        self.http2 = Connection(Role.CLIENT, limits.with_floods_at(settings.useless_frames_max))
        self.answer_due = AnswerDue(self.http2.streams)
        self.batches = EventBatches(settings.batch_interval_s, loop)
        self._settings = settings
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        # The first bytes from the server, until its SETTINGS: they identify a server that does not speak HTTP/2.
        self._first: bytes | None = b""
        # Bytes are being received: output is flushed afterwards.
        self._receiving = False
        self._flush_scheduled = False
        # `flush_now` has written output in this turn of the loop.
        self._flushed_early = False
        # When bytes last arrived, in the time of the loop.
        self.heard_at = 0.0
        # When the unanswered PING was sent; None once any bytes arrived after it.
        self._pinged_at: float | None = None
        self._keepalive: asyncio.TimerHandle | None = None
        # The acknowledgement of a PING of etcd that is due later.
        self._late_ack: asyncio.TimerHandle | None = None
        self._settings_timer: asyncio.TimerHandle | None = None
        self._over = False

    # Callbacks from asyncio.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start HTTP/2."""
        # A cast: uvloop's transports have no common base class with asyncio's.
        transport = self._transport = self.batches.transport = cast("asyncio.Transport", transport)
        transport.set_write_buffer_limits(self._settings.write_high_bytes, self._settings.write_low_bytes)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            what = "it does not offer HTTP/2 over TLS (ALPN h2)"
            self._fail(Unreachable(self.endpoint.text, what, "use etcd's client port"))
            return
        self.heard_at = self._loop.time()
        self.http2.start()
        self._flush()
        self._settings_timer = self._loop.call_later(self._settings.settings_timeout_s, self._check_settings)
        self._keepalive = self._loop.call_later(self._settings.keepalive_s, self._check_alive)

    def data_received(self, data: bytes) -> None:
        """Receive bytes from the server, notify the calls, and write the resulting output."""
        if self._over:
            return
        self.heard_at = self._loop.time()
        self.answer_due.since = None
        # Not by comparing times: on a fast network the answer arrives in the same tick of the loop's clock.
        self._pinged_at = None
        stream = self.http2.receive_data(data)
        if stream is None:
            self._receive(data)
            return
        self._receiving = True
        try:
            size = len(data) - FRAME_HEADER_BYTES
            call: UpstreamCall | None = stream.owner
            if call is None:
                self.http2.consumed(stream, size)
            else:
                call.owed += size
                call.handler.on_data(data[FRAME_HEADER_BYTES:], size)
        finally:
            self._receiving = False
        if self._flush_scheduled:
            self._flush()

    def _receive(self, data: bytes) -> None:
        """Receive anything but one whole DATA frame."""
        if len(data) == UPDATE_AND_PING_BYTES and self._acknowledge(data):
            return
        if self._first is not None:
            self._first = (self._first + data)[:_FIRST_BYTES_MAX]
            # The first frame must be SETTINGS (RFC 9113 3.4); the type follows the three bytes of length.
            if len(self._first) > 3 and self._first[3] != _SETTINGS_FRAME:
                self._fail(not_http2(self.endpoint.text, self.secure, self._first))
                return
        self._receiving = True
        cork = self.cork
        if cork is not None:
            cork.cork()
        try:
            self._dispatch(self.http2.receive(data))
        finally:
            self._receiving = False
            if cork is not None:
                cork.uncork()
        self._flush()

    def _acknowledge(self, data: bytes) -> bool:
        """Handle what etcd, a grpc-go server, answers to DATA: a PING that measures the bandwidth; False: it is none.

        Acknowledged at once, each call would have one, and cost a read and a write more. As for clients,
        `Connection.receive_update_and_ping` decides which can wait: not while much is sent.
        """
        self.http2.now = self.heard_at
        acknowledgement = self.http2.receive_update_and_ping(data)
        if acknowledgement is None:
            return False
        if acknowledgement:
            self.http2.append(acknowledgement)
            self._flush()
        elif self._late_ack is None:
            self._late_ack = self._loop.call_later(LATE_ACK_S_MAX, self._acknowledge_late)
        return True

    def _acknowledge_late(self) -> None:
        self._late_ack = None
        self.http2.acknowledge_late(self._loop.time())
        # etcd sends no PING for a call that comes meanwhile; the next call shows whether it hangs.
        self.answer_due.since = None
        self.schedule_flush()

    def pause_writing(self) -> None:
        """Stop sending: the kernel's buffer is full."""
        self.http2.pause()

    def resume_writing(self) -> None:
        """Send again: the kernel's buffer has room."""
        self._dispatch(self.http2.resume())
        self._flush()

    def eof_received(self) -> bool:
        """Close: the server has closed its side."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """End every call."""
        if self.failure is None and not self._over:
            if not self.ready.done():
                self.failure = (
                    explain_connect(exc, self.endpoint.text, self.secure)
                    if exc is not None and not isinstance(exc, ConnectionError)
                    else closed_early(self.endpoint.text, self.secure)
                )
            else:
                text = f"the connection was lost ({exc})" if exc is not None else "the server closed the connection"
                self.failure = Unreachable(self.endpoint.text, text, "check that etcd runs there")
        self._finish()
        self._transport = self.batches.transport = None

    # For the calls.

    @property
    def open_calls(self) -> int:
        """The number of calls that have not ended."""
        return len(self.http2.streams)

    @property
    def room(self) -> int:
        """How many more calls can be started now: 0 or less when the server's limit of streams is reached."""
        return self.http2.peer_max_streams - len(self.http2.streams) if self.healthy else 0

    def owes_answer(self, now: float) -> bool:
        """Whether the server may hang, see `answer_due`; not while it waits for the acknowledgement of its PING."""
        if not self.answer_due.is_overdue(now):
            return False
        if self._late_ack is None:
            return True
        self._late_ack.cancel()
        self._acknowledge_late()
        return False

    def request(self, headers: Headers, handler: CallHandler, end_stream: bool = False) -> UpstreamCall:
        """Start a call; `headers` are complete, with the pseudo-headers first (`heads.request_headers` makes them).

        Raises NotSent when the connection is closed or full.
        """
        if not self.healthy:
            raise NotSent("the connection is closed")
        try:
            stream = self.http2.open(headers, end_stream)
        except (GoingAway, TooManyStreams) as error:
            raise NotSent(str(error) or type(error).__name__) from None
        call = UpstreamCall(self, stream, handler)
        stream.owner = call
        self.answer_due.call_sent(self._loop.time())
        self.schedule_flush()
        if stream.id >= _STREAM_ID_WORN:
            self.ended_well = True
            what = "its stream ids are used up"
            self.retire(Unreachable(self.endpoint.text, what, "no action needed: a new connection follows"))
        return call

    def schedule_flush(self) -> None:
        """Write the queued output at the end of this read, or of this turn of the loop."""
        if not self._flush_scheduled:
            self._flush_scheduled = True
            if not self._receiving:
                self._loop.call_soon(self._flush)

    def flush_now(self) -> None:
        """Write the queued output now; output queued later in this turn of the loop is written at its end."""
        if self._flush_scheduled and not self._receiving and not self._flushed_early:
            self._flushed_early = True
            self._write_output()

    def call_reset(self, call: UpstreamCall, code: ErrorCode) -> None:
        """Reset the stream of a call that we have ended; see `UpstreamCall.reset`."""
        self._release(call, code)
        if not self._over:
            self._make_room()

    def close(self, reason: Unreachable | None = None) -> None:
        """Close now: send GOAWAY, and end every call with UNAVAILABLE and `reason`."""
        if self._over:
            return
        self.failure = self.failure or reason
        if self._transport is not None:
            if not self.http2.closed:
                self.http2.go_away(last=True)
            self._flush()
            self._transport.close()
        self._finish()

    def retire(self, reason: Unreachable) -> None:
        """Take no more calls, and close when the last open call has ended."""
        if not self._over:
            self._report_closed(reason)
            self._close_when_done()

    def abort(self, reason: Unreachable) -> None:
        """Drop the connection without GOAWAY; unwritten output is lost."""
        if not self._over:
            self._fail(reason)

    # Inside.

    def _dispatch(self, events: list[Event]) -> None:
        for event in events:
            if isinstance(event, DataReceived):
                self._on_data(event)
            elif isinstance(event, HeadersReceived):
                self._on_headers(event)
            elif isinstance(event, StreamDrained):
                call = event.stream.owner
                if call is not None:
                    call.handler.on_drained()
            elif isinstance(event, StreamReset):
                self._on_reset(event)
            elif isinstance(event, PeerSettings):
                self._on_settings()
            elif isinstance(event, GoAwayReceived):
                self._on_go_away(event)
            elif isinstance(event, ConnectionFailed):
                what = f"the server violated HTTP/2 ({event.code.name}: {event.reason})"
                limit = "useless_frames_max" if event.code is ErrorCode.ENHANCE_YOUR_CALM else ""
                failure = Unreachable(self.endpoint.text, what, "use etcd's client port", limit)
                self.failure = self.failure or failure

    def _on_data(self, event: DataReceived) -> None:
        call: UpstreamCall | None = event.stream.owner
        if call is None:
            self.http2.consumed(event.stream, event.flow_size)
            return
        if event.flow_size:
            call.owed += event.flow_size
            call.handler.on_data(event.data, event.flow_size)
        if event.end_stream and not call.ended:
            self._end(call, *status_of([], call.http_status), [])

    def _on_headers(self, event: HeadersReceived) -> None:
        call: UpstreamCall | None = event.stream.owner
        if call is None or event.kind is HeadersKind.INFORMATIONAL:
            return
        headers = event.headers
        if event.kind is HeadersKind.RESPONSE:
            call.http_status = number(headers, b":status")
            self.answered += 1
        if event.end_stream:
            self._end(call, *status_of(headers, call.http_status), headers)
        elif event.kind is HeadersKind.RESPONSE:
            call.handler.on_headers(headers)

    def _on_reset(self, event: StreamReset) -> None:
        call: UpstreamCall | None = event.stream.owner
        if call is None:
            return
        code = event.code
        call.reset_code = code
        call.unprocessed = code is ErrorCode.REFUSED_STREAM and event.by_peer
        last_id = self.http2.peer_last_id
        call.rotated = call.unprocessed and last_id is not None and event.stream.id > last_id
        status = STATUS_OF_RESET.get(code, Status.INTERNAL)
        text = f"the stream was reset ({code.name}{': ' + event.reason if event.reason else ''})"
        self._end(call, status, text, [])

    def _on_settings(self) -> None:
        if not self.ready.done():
            self._first = None
            self.healthy = True
            self.ready.set_result(None)
        elif self.on_room is not None:
            self.on_room()

    def _on_go_away(self, event: GoAwayReceived) -> None:
        debug = event.debug[:200].decode("utf-8", "replace")
        self.ended_well = event.code is ErrorCode.NO_ERROR
        self.pinged_too_often = event.code is ErrorCode.ENHANCE_YOUR_CALM and debug == "too_many_pings"
        what = f"the server is closing the connection ({event.code.name}{': ' + debug if debug else ''})"
        self._report_closed(Unreachable(self.endpoint.text, what, "check whether etcd is being restarted"))
        self._close_when_done()

    def _end(self, call: UpstreamCall, status: int, message: str, trailers: Headers) -> None:
        """Notify a call's handler that it has ended, and end our side of the stream."""
        call.ended = True
        # The server has ended its side before we ended ours (RFC 9113 8.1).
        self._release(call, ErrorCode.NO_ERROR)
        call.handler.on_end(status, message, trailers)
        self._make_room()

    def _release(self, call: UpstreamCall, code: ErrorCode) -> None:
        """Reset the stream of a call that has ended, unless both sides have ended it."""
        call.stream.owner = None
        if not self._over:
            self.http2.reset(call.stream, code)
            # The other calls need the connection's window, even if this call's handler still holds data.
            self.http2.consumed(None, call.owed)
            self.schedule_flush()

    def _make_room(self) -> None:
        """Another call may fit, or the connection may close."""
        self._close_when_done()
        if self.on_room is not None:
            self.on_room()

    def _close_when_done(self) -> None:
        """Close the connection after GOAWAY or `retire` once its open calls have ended."""
        if not self.healthy and self.ready.done() and not self._over and not self.http2.streams:
            self._loop.call_soon(self.close)

    def _flush(self) -> None:
        """Write all queued output now."""
        self._flush_scheduled = self._flushed_early = False
        self._write_output()

    def _write_output(self) -> None:
        transport = self._transport
        if transport is None or self._over:
            return
        pieces = self.http2.output()
        if len(pieces) == 1:
            transport.write(pieces[0])
        elif pieces:
            transport.writelines(pieces)
        if self.http2.closed:
            transport.close()
            self._finish()

    def _check_settings(self) -> None:
        self._settings_timer = None
        if self.http2.settings_pending and not self._over:
            what = f"it did not acknowledge our SETTINGS in {self._settings.settings_timeout_s:g} s"
            self._fail(Unreachable(self.endpoint.text, what, "use etcd's client port", "settings_timeout_s"))

    def _check_alive(self) -> None:
        if self._over:
            return
        now = self._loop.time()
        settings = self._settings
        if self._pinged_at is not None and now - self._pinged_at >= settings.keepalive_timeout_s:
            what = f"no answer for {now - self.heard_at:.0f} s, not even to a PING"
            self._fail(Unreachable(self.endpoint.text, what, "check etcd and the network", "keepalive_timeout_s"))
            return
        due = self.heard_at + settings.keepalive_s
        if self._pinged_at is None and now >= due:
            # Only while calls are open: etcd counts PINGs on an idle connection as abuse.
            if self.http2.streams and self.ready.done():
                self._pinged_at = now
                self.http2.ping(_PING)
                self._flush()
            due = now + settings.keepalive_s
        wait_s = (due if self._pinged_at is None else self._pinged_at + settings.keepalive_timeout_s) - now
        self._keepalive = self._loop.call_later(wait_s, self._check_alive)

    def _fail(self, failure: Unreachable) -> None:
        """End at once, without GOAWAY: this server would not read it."""
        self.failure = self.failure or failure
        if self._transport is not None:
            self._transport.abort()
        self._finish()

    def _finish(self) -> None:
        """Stop the timers, end the calls and notify `on_closed`, once."""
        if self._over:
            return
        self._over = True
        self.healthy = False
        for timer in (self._keepalive, self._settings_timer, self._late_ack):
            if timer is not None:
                timer.cancel()
        failure = self.failure or Unreachable(self.endpoint.text, "the connection was closed", "try again")
        if not self.ready.done():
            self.ready.set_exception(failure)
            # Retrieve it: `connect` may have been cancelled, and asyncio would log the exception as never retrieved.
            self.ready.exception()
        streams = list(self.http2.streams.values())
        # Otherwise these calls would count as open for ever, and the pool would keep the connection for them.
        self.http2.streams.clear()
        for stream in streams:
            if (call := stream.owner) is not None:
                self._end(call, Status.UNAVAILABLE, str(failure), [])
        self._report_closed(failure)

    def _report_closed(self, failure: Unreachable) -> None:
        self.healthy = False
        self.failure = self.failure or failure
        on_closed, self.on_closed = self.on_closed, None
        if on_closed is not None:
            on_closed(self)
