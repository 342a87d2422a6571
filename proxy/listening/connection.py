"""One client's connection: the I/O around `proto.http2.Connection` in its server role.

It does not interpret its streams: events go to the streams' handlers, new requests to the listener's routes, and a
connection that does not open with the HTTP/2 preface is handed to the HTTP/1 side with the bytes read so far.

Writes are batched: code that queues output calls `schedule_flush`, and the write queue flushes the connection once in
a turn of the event loop. Output that the transport does not accept waits here in pieces, so that a client that does not
read costs no more than its windows allow.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from itertools import accumulate
from time import monotonic
from typing import Any, Protocol, cast

from proto.http2 import (
    UPDATE_AND_PING_BYTES,
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    Event,
    HeadersKind,
    HeadersReceived,
    LimitReached,
    Piece,
    PingAcknowledged,
    PingReceived,
    Role,
    Stream,
    StreamDrained,
    StreamReset,
)
from proto.http2.frames import PREFACE
from proxy import logs
from proxy.listening.calls import Headers
from proxy.listening.late_acks import LateAcknowledgements
from proxy.listening.leaving import ClosedStreamReaper
from proxy.listening.pings import TOO_MANY_PINGS, PingPolicy
from proxy.listening.settings import REFUSED_AT, ListenerSettings, ListenerStats
from proxy.listening.sockets import show_address
from proxy.listening.timeouts import PING, ConnectionTimes
from proxy.listening.turns import DeferredHandler, TurnBudget
from proxy.listening.write_queue import WriteQueue

PIECE_BYTES_COPIED = 4096
"""Pieces of output that are larger than this on average are written without being joined."""

USER_AGENT_BYTES = 100
"""Size of the user agent that is kept of a client."""

KEEPALIVE_PING = b"keepaliv"
DRAIN_PING = b"draining"

PART_PIECES_MAX = 1024
"""Maximum pieces joined for one write. Joining needs 80 bytes for each piece meanwhile, as much as a small frame, and
output that the client's buffers do not accept would be in memory twice, as pieces and joined."""

CLOSE_GRACE_S = 5.0
"""How long the client of a closing connection may take to read its remaining output; then the connection is aborted."""

log = logs.logger("listener")


class ConnectionOwner(Protocol):
    """The part of `listener.Listener` that its connections and handshakes use."""

    settings: ListenerSettings
    stats: ListenerStats
    turns: TurnBudget
    leaving: ClosedStreamReaper
    late: LateAcknowledgements
    output: WriteQueue
    http1: Callable[[asyncio.Transport, bytes], asyncio.Protocol] | None
    draining: bool

    @property
    def is_full(self) -> bool: ...

    def now(self) -> float: ...
    def refused(self) -> None: ...
    def opened(self, connection: ServerConnection) -> None: ...
    def gone(self, connection: ServerConnection) -> None: ...
    def route(self, connection: ServerConnection, stream: Stream, headers: Headers, end_stream: bool) -> Any: ...


class ServerConnection(asyncio.Protocol):
    """One client's connection; the `ConnectionHandle` for the handlers of its streams."""

    of_client = True
    """False: it is the self-probe's, whose calls are not counted as those of clients."""

    def __init__(self, listener: ConnectionOwner) -> None:
        self.h2 = Connection(Role.SERVER, listener.settings.http2)
        self.dirty = False
        """A flush is scheduled: for the end of this turn, or for a later one (`WriteQueue`)."""
        self.bulky = False
        """The queued output may be large: write it in parts, without joining all of it first."""
        self.sessions = 0
        """Number of its Watch sessions; maintained by the Watch service."""
        self.peer = ""
        """The client's address, for logs and the status page."""
        self.user_agent = b""
        """That of its first request, cut at USER_AGENT_BYTES."""
        self.turns = listener.turns
        """The work budget of this turn of the loop; handlers charge work beyond that of a frame to it."""
        self._listener = listener
        self._transport: asyncio.Transport | None = None
        self._first_bytes: bytes | None = b""
        """Bytes received before the protocol was known; None from then on."""
        self.times = ConnectionTimes()
        self._pings: PingPolicy | None = None
        """Created at the client's first ping."""
        self._closing_since: float | None = None
        self._client_erred = False
        """The connection is being closed because of a client error."""
        self._write_paused = False
        """The transport's write buffer is full."""
        self._unwritten: list[Piece] = []
        """Output not yet given to the transport, because it was blocked."""
        self._unread_bytes = 0
        """Bytes added to `_unwritten` while blocked: control frames and trailers, since DATA stalls."""
        self._input_deferred = False
        """The input received is handled over several turns of the loop; reading is paused until that is done."""
        self._queued = False
        """The connection is queued for a turn."""
        self._calls: deque[DeferredHandler] = deque()
        """Handlers with requests that wait for a turn."""
        self._read_paused = False
        """Reading is paused because the client is not reading its responses."""

    # called by asyncio

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Accept the new connection, or refuse it if there are too many."""
        listener = self._listener
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=listener.settings.write_buffer_bytes)
        self.h2.now = listener.now()
        self.times.start(self.h2.now)
        self.peer = show_address(transport.get_extra_info("peername"))
        full = listener.is_full
        listener.opened(self)
        if full or listener.draining:
            listener.refused()
            self._first_bytes = None
            self.h2.start()
            self.h2.go_away(True, ErrorCode.ENHANCE_YOUR_CALM, b"too_many_connections")
            self.flush()
            self._close()

    def data_received(self, data: bytes) -> None:
        """Handle bytes from the client."""
        self.h2.now = monotonic()
        if self._first_bytes is not None:
            if not self._detect_protocol(data):
                return
            data, self._first_bytes = self._first_bytes, None
        if self._closing_since is None:
            left = self.turns.left
            if left > 0 and not self._queued:
                if len(data) == UPDATE_AND_PING_BYTES and self._acknowledge(data):
                    return
                # The answers are written at the end of the read: a flush at the end of the turn costs a callback.
                output = self._listener.output
                output.cork()
                try:
                    self._receive(data, left)
                finally:
                    self.schedule_flush()
                    output.uncork()
                return
            self.h2.defer(data)
            self._take_turns()
            self.schedule_flush()

    def pause_writing(self) -> None:
        """Stall the streams: the client does not read what is written."""
        self._write_paused = True
        self.h2.pause()

    def resume_writing(self) -> None:
        """Write the pending output, then resume the streams."""
        self._write_paused = False
        self._write_unwritten()
        if self._write_paused:
            return
        if self._closing_since is not None:
            self._close()
            return
        self._unread_bytes = 0
        if self._read_paused and self._transport is not None and not self._transport.is_closing():
            self._read_paused = False
            if not self._input_deferred:
                self._transport.resume_reading()
        self._handle(self.h2.resume())
        self.schedule_flush()

    def eof_received(self) -> bool:
        """Close when the client has closed its side: HTTP/2 has no half-closed connections."""
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Notify all handlers that their streams are closed, then the listener that the connection is."""
        del exc
        listener = self._listener
        self._transport = None
        self._unwritten.clear()
        self._calls.clear()
        self._closing_since = listener.now()
        listener.leaving.add(self.h2.streams.values(), lambda: listener.gone(self))

    # called by handlers and the engine

    def go_on_later(self, call: DeferredHandler) -> None:
        """Queue `call.go_on` for a turn of this connection."""
        self._calls.append(call)
        self._wait()

    def schedule_flush(self, many: bool = False) -> None:
        """Schedule a write of what is queued for the end of this turn of the event loop; `many`: see `WriteQueue`."""
        if not self.dirty:
            self.dirty = True
            self._listener.output.flush_soon(self, many)

    def flush(self) -> None:
        """Write the queued output: in one write, unless it is large."""
        self.dirty = False
        pieces = self.h2.output()
        transport = self._transport
        if transport is None or transport.is_closing():
            return
        if self._write_paused:
            self._hold(pieces)
        elif self.bulky or len(pieces) > PART_PIECES_MAX:
            self.bulky = False
            self._unwritten += pieces
            self._write_unwritten()
        elif pieces:
            data = b"".join(pieces)
            stats = self._listener.stats
            stats.writes += 1
            stats.written_bytes += len(data)
            transport.write(data)
        if self.h2.closed:
            self._close()

    def write_now(self, stream: Stream, message: bytes, size: int) -> bool:
        """Write one message of `size` bytes without queueing it; return False, doing nothing, if output is pending.

        Fast path: 510 ns instead of 1,150, without the system call (`python -m tests.bench.lanes`).
        """
        transport = self._transport
        if self.dirty or self._write_paused or transport is None or transport.is_closing():
            return False
        data = self.h2.frame(stream, message, size)
        if data is None:
            return False
        stats = self._listener.stats
        stats.writes += 1
        stats.written_bytes += len(data)
        try:
            transport.write(data)
        except Exception:
            log.exception("write failed; dropping the connection", peer=self.peer)
            self.abort()
        return True

    def go_away(self) -> None:
        """Send GOAWAY, in two steps so that no stream the client has just opened is lost (RFC 9113 6.8)."""
        if self._first_bytes is not None:
            self.abort()
            return
        self.h2.go_away()
        self.h2.ping(DRAIN_PING)
        self.schedule_flush()
        asyncio.get_running_loop().call_later(self._listener.settings.drain_ping_s, self._last_go_away)

    def _last_go_away(self) -> None:
        if self._transport is not None and not self.h2.closed:
            self.h2.go_away(True)
            self.schedule_flush()

    def abort(self) -> None:
        """Close at once; output that is written but not sent is lost."""
        if self._transport is not None:
            self._transport.abort()

    def extra_info(self, name: str) -> Any:
        """Return a fact about the transport, as `asyncio.Transport.get_extra_info`; None once it is closed."""
        return None if self._transport is None else self._transport.get_extra_info(name)

    def sweep(self, now: float) -> None:
        """Check the timeouts; the listener calls it every few seconds or more often."""
        if self._closing_since is not None:
            if now - self._closing_since > CLOSE_GRACE_S:
                self.abort()
            return
        due = self.times.due(self._listener.settings, self.h2, now, recognised=self._first_bytes is None)
        if due == PING:
            self.h2.ping(KEEPALIVE_PING)
            self.schedule_flush()
        elif due is not None:
            self._time_out(due)

    # internal

    def _acknowledge(self, data: bytes) -> bool:
        """Handle grpc-go's answer to DATA. Returns False, having done nothing, if `data` is something else.

        Fast path: 910 ns instead of 4,090, without the system call (`python -m tests.bench.lanes`).
        """
        transport = self._transport
        if transport is None or transport.is_closing():
            return False
        acknowledgement = self.h2.receive_update_and_ping(data)
        if acknowledgement is None:
            return False
        self.turns.spend(2)
        if not acknowledgement:
            self._listener.late.add(self, self.h2.now)
        elif self.dirty:
            self.h2.append(acknowledgement)
        else:
            stats = self._listener.stats
            stats.writes += 1
            stats.written_bytes += len(acknowledgement)
            transport.write(acknowledgement)
        self._pinged()
        return True

    def _receive(self, data: bytes, work_max: int) -> None:
        """Handle bytes from the client up to a bound of work; the remainder waits for a turn."""
        h2 = self.h2
        h2.turn_work_max = work_max
        events = h2.receive(data)
        self.turns.spend(h2.work + 1)
        self._handle(events)
        if h2.behind:
            self._take_turns()

    def _take_turns(self) -> None:
        """Defer the remaining input to the next turns of the loop, and pause reading until it is handled."""
        if not self._input_deferred:
            self._input_deferred = True
            self._listener.stats.in_turns += 1
            if self._transport is not None:
                self._transport.pause_reading()
        self._wait()

    def _wait(self) -> None:
        if not self._queued:
            self._queued = True
            self.turns.wait(self)

    def take_turn(self) -> None:
        """Handle some of the deferred input and requests; called by `TurnBudget`."""
        self._queued = False
        transport = self._transport
        if transport is None or transport.is_closing() or self._closing_since is not None:
            return
        turns, calls = self.turns, self._calls
        if self.h2.behind:
            # At most half, so that neither frames nor requests wait for all of the others.
            self._receive(b"", max(1, turns.left // 2 if calls else turns.left))
        while calls and turns.left > 0:
            self._go_on(calls.popleft())
        self.schedule_flush()
        if self.h2.behind:
            self._wait()
        elif self._input_deferred:
            self._input_deferred = False
            if not (self._read_paused or self._client_erred):
                transport.resume_reading()
        if calls:
            self._wait()

    def _go_on(self, call: DeferredHandler) -> None:
        try:
            if call.go_on():
                self._calls.append(call)
        except Exception:
            log.exception("handler failed; resetting its stream", peer=self.peer)
            self._give_up(call.stream)

    def _detect_protocol(self, data: bytes) -> bool:
        """Add to the opening bytes; return whether they are HTTP/2's preface. Others go to the HTTP/1 side."""
        self._first_bytes = opening = (self._first_bytes or b"") + data
        if opening.startswith(PREFACE):
            self.h2.start()
            return True
        if not PREFACE.startswith(opening[: len(PREFACE)]):
            self._hand_over(opening)
        return False

    def _hand_over(self, opening: bytes) -> None:
        listener = self._listener
        transport = self._transport
        assert transport is not None
        if listener.http1 is None:
            listener.stats.failed += 1
            self.abort()
            return
        listener.stats.http1 += 1
        self._transport = None
        listener.gone(self)
        transport.set_protocol(listener.http1(transport, opening))

    def _handle(self, events: list[Event]) -> None:
        for event in events:
            kind = type(event)
            try:
                if kind is DataReceived:
                    self._data(cast(DataReceived, event))
                elif kind is StreamDrained:
                    owner = cast(StreamDrained, event).stream.owner
                    if owner is not None:
                        owner.drained()
                elif kind is HeadersReceived:
                    self._headers(cast(HeadersReceived, event))
                elif kind is StreamReset:
                    self._reset(cast(StreamReset, event))
                elif kind is PingReceived:
                    self._pinged()
                elif kind is LimitReached:
                    self._listener.stats.refused_at[REFUSED_AT[cast(LimitReached, event).limit]] += 1
                elif kind is PingAcknowledged:
                    self.times.pinged_at = None
                    if cast(PingAcknowledged, event).payload == DRAIN_PING:
                        self._last_go_away()
                elif kind is ConnectionFailed:
                    self._failed(cast(ConnectionFailed, event))
            except Exception:
                log.exception("handler failed; resetting its stream", peer=self.peer)
                self._give_up(getattr(event, "stream", None))

    def _write_unwritten(self) -> None:
        """Write the pending output in parts until the transport blocks (it calls `pause_writing` during the write)."""
        rest = self._unwritten
        part_bytes = self._listener.settings.write_buffer_bytes
        while rest and not self._write_paused and self._transport is not None and not self._transport.is_closing():
            part = rest[:PART_PIECES_MAX]
            ends = list(accumulate(map(len, part)))
            # Include the piece that exceeds the bound, so that the transport's buffer counts as full.
            del part[bisect_right(ends, part_bytes) + 1 :]
            del rest[: len(part)]
            size = ends[len(part) - 1]
            stats = self._listener.stats
            stats.writes += 1
            stats.written_bytes += size
            if size < len(part) * PIECE_BYTES_COPIED:
                self._transport.write(b"".join(part))
            else:
                # Not copied: a large answer may be in the buffers of a thousand connections.
                self._transport.writelines(part)

    def _hold(self, pieces: Sequence[Piece]) -> None:
        """Keep the output of a blocked connection; above the bound, stop reading from the client until it reads."""
        self._unwritten.extend(pieces)
        self._unread_bytes += sum(map(len, pieces))
        if self._unread_bytes > self._listener.settings.unread_bytes_max and not self._read_paused:
            self._read_paused = True
            self._listener.stats.not_read += 1
            if self._transport is not None:
                self._transport.pause_reading()

    def _data(self, event: DataReceived) -> None:
        owner = event.stream.owner
        if owner is None:
            self.h2.consumed(event.stream, event.flow_size)
        else:
            owner.data(event.data, event.flow_size, event.end_stream)

    def _headers(self, event: HeadersReceived) -> None:
        stream = event.stream
        if stream.owner is not None:
            stream.owner.trailers(event.headers)
        elif event.kind is HeadersKind.REQUEST:
            if not self.user_agent:
                self.user_agent = _user_agent(event.headers)
            stream.owner = self._listener.route(self, stream, event.headers, event.end_stream)

    def _reset(self, event: StreamReset) -> None:
        event.stream.report_reset(event.code)
        owner = event.stream.owner
        if owner is not None:
            event.stream.owner = None
            owner.closed(int(event.code))

    def _give_up(self, stream: Stream | None) -> None:
        if stream is None or self.h2.closed:
            return
        owner, stream.owner = stream.owner, None
        if stream.id in self.h2.streams:
            self.h2.reset(stream, ErrorCode.INTERNAL_ERROR)
        if owner is not None:
            owner.closed(int(ErrorCode.INTERNAL_ERROR))

    def _failed(self, event: ConnectionFailed) -> None:
        if self._client_erred:
            return
        self._client_erred = True
        self._listener.stats.failed += 1
        calm = event.code is ErrorCode.ENHANCE_YOUR_CALM
        self._listener.stats.cut_off[event.reason if calm else event.code.name] += 1
        log.info("client connection failed", peer=self.peer, code=event.code.name, reason=event.reason)
        self._drop_streams()

    def _pinged(self) -> None:
        settings = self._listener.settings
        if settings.keepalive_min_s is None or self._client_erred:
            return
        if self._pings is None:
            self._pings = PingPolicy(settings.keepalive_min_s)
        if self._pings.too_many(self.h2.now, self.h2.progress(), len(self.h2.streams)):
            self._client_erred = True
            self._listener.stats.failed += 1
            self._listener.stats.cut_off[TOO_MANY_PINGS.decode()] += 1
            log.info("client pings too often; closing its connection", peer=self.peer, least_s=settings.keepalive_min_s)
            self.h2.go_away(True, ErrorCode.ENHANCE_YOUR_CALM, TOO_MANY_PINGS)
            self.flush()
            self._close()

    def _drop_streams(self) -> None:
        self._listener.leaving.add(self.h2.streams.values(), lambda: None)

    def _close(self) -> None:
        """Close once all output is given to the transport; `sweep` bounds how long that may take."""
        if self._closing_since is None:
            self._closing_since = self._listener.now()
            self._drop_streams()
            if self._client_erred and self._transport is not None:
                self._transport.pause_reading()
                asyncio.get_running_loop().call_later(self._listener.settings.reason_s, self.abort)
        if self._transport is not None and not self._unwritten and not self._client_erred:
            self._transport.close()

    def _time_out(self, limit: str) -> None:
        self._listener.stats.timed_out[limit] += 1
        if limit == "idle_timeout_s":
            self.go_away()
            return
        log.info("client connection timed out", peer=self.peer, limit=limit)
        if limit == "settings_timeout_s":
            self.h2.go_away(True, ErrorCode.SETTINGS_TIMEOUT)
            self.flush()
            self._close()
        else:
            self.abort()


def _user_agent(headers: Headers) -> bytes:
    return next((value[:USER_AGENT_BYTES] for name, value in headers if name == b"user-agent"), b"-")
