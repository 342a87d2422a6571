"""The HTTP/2 connection (RFC 9113), sans-I/O, in the server and the client role.

Theory of operation. The shell passes received bytes to `receive` and acts on the events it returns; it calls the
methods of the sending half (`sending.py`) and, once per turn of its loop, writes the result of `output`. There is no
I/O, no clock and no task in this package. `receive` splits the bytes into frames in one loop, copies only the payloads
that it returns in events, and passes each whole frame to its handler (`receiving.py`; the frames of the connection
itself are handled here). The pieces of an incomplete frame are kept in a list and joined once.

A peer's error never raises an exception: a stream error results in RST_STREAM and `StreamReset`, a connection error in
GOAWAY and `ConnectionFailed`, and all output queued before it is still written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from proto.http2 import frames
from proto.http2.errors import ConnectionFault, ErrorCode, GoingAway, StreamError, TooManyStreams, error_code
from proto.http2.events import (
    ConnectionFailed,
    DataReceived,
    Event,
    GoAwayReceived,
    PeerSettings,
    PingAcknowledged,
    PingReceived,
    StreamReset,
)
from proto.http2.limits import (
    FRAME_BYTES_MAX,
    FRAME_BYTES_MIN,
    HEADER_TABLE_BYTES_DEFAULT,
    JOINED_DATA_BYTES_MAX,
    LATE_ACK_BYTES_MAX,
    LATE_ACK_GAP_S,
    STREAM_ID_MAX,
    WINDOW_BYTES_DEFAULT,
    WINDOW_BYTES_MAX,
    Http2Limits,
)
from proto.http2.receiving import IGNORED, PINGS, SETTINGS, ReceiveSide
from proto.http2.sending import HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE, Role
from proto.http2.streams import Stream

_Handler: TypeAlias = Callable[[Any, bytes, int, int, int, int, list[Event]], None]

# A SETTINGS that changes the windows of this many streams counts as one more SETTINGS. Some client libraries do it a
# few times, as they measure the bandwidth; that is allowed even with all streams open.
STREAMS_PER_SETTINGS = 2_000

# Number of streams whose windows are changed in about five microseconds.
STREAMS_PER_WORK = 100

_unpack_header = frames.FRAME_HEADER.unpack_from
_HEADER_BYTES = frames.FRAME_HEADER_BYTES
_unpack_update_and_ping = frames.UPDATE_AND_PING.unpack
_UPDATE_HEADER, _PING_HEADER, _PING_ACK_HEADER = frames.UPDATE_HEADER, frames.PING_HEADER, frames.PING_ACK_HEADER


class Connection(ReceiveSide):
    """One HTTP/2 connection, in one of the two roles."""

    __slots__ = (
        "_expect_settings",
        "_needed",
        "_partial",
        "_partial_bytes",
        "_preface_left",
        "going_away",
        "peer_last_id",
        "peer_max_streams",
        "settings_pending",
    )

    def __init__(self, role: Role, limits: Http2Limits | None = None) -> None:
        super().__init__(role, limits or Http2Limits())
        # Number of our SETTINGS that the peer has not acknowledged; the shell times them out.
        self.settings_pending = 0
        # Streams the peer lets us open; unlimited until its SETTINGS set a limit (6.5.2).
        self.peer_max_streams = STREAM_ID_MAX
        # The last stream id of the peer's GOAWAY, None before it.
        self.peer_last_id: int | None = None
        # We have sent GOAWAY (step 1 or 2).
        self.going_away = False
        self._preface_left = frames.PREFACE if self._server else b""
        self._expect_settings = True
        # The pieces of an incomplete frame, their total length, and the length at which they are parsed again.
        self._partial: list[bytes] = []
        self._partial_bytes = 0
        self._needed = 0

    @property
    def last_stream_id(self) -> int:
        """The highest stream id so far: the peer's for a server, our own for a client; 0 before the first."""
        return self._last_id

    def start(self) -> None:
        """Queue the first frames of a connection: preface (client), SETTINGS, the connection's window (3.4)."""
        limits = self.limits
        entries = [
            (frames.SETTING_INITIAL_WINDOW_SIZE, limits.initial_window),
            (frames.SETTING_MAX_FRAME_SIZE, limits.max_frame_bytes),
            (frames.SETTING_MAX_HEADER_LIST_SIZE, limits.header_list_bytes_max),
        ]
        if self._server:
            entries.append((frames.SETTING_MAX_CONCURRENT_STREAMS, limits.max_streams))
        else:
            entries.append((frames.SETTING_ENABLE_PUSH, 0))
            self._out.append(frames.PREFACE)
        if limits.header_table_bytes != HEADER_TABLE_BYTES_DEFAULT:
            entries.append((frames.SETTING_HEADER_TABLE_SIZE, limits.header_table_bytes))
        self._out.append(frames.settings(entries))
        self.settings_pending += 1
        more = limits.connection_window - WINDOW_BYTES_DEFAULT
        if more > 0:
            self._out.append(frames.window_update(0, more))
            self.receive_window += more

    def receive(self, data: bytes) -> list[Event]:
        """Take bytes from the peer and return their events, in order. Never raises for anything that a peer sends.

        If the work exceeds `Http2Limits.turn_work_max`, the rest is kept and `behind` is True: call it again with b""
        after other connections have had their turn.
        """
        events: list[Event] = []
        self.work = 0
        if self.closed:
            return events
        partial = self._partial
        if partial:
            partial.append(data)
            self._partial_bytes += len(data)
            if self._partial_bytes < self._needed:
                return events
            data = b"".join(partial)
            partial.clear()
        try:
            done = self._take_frames(data, events)
        except ConnectionFault as fault:
            self._fail(fault, events)
            return events
        if done < len(data):
            partial.append(data[done:] if done else data)
            self._partial_bytes = len(data) - done
        return events

    def defer(self, data: bytes) -> None:
        """Keep bytes of the peer for the next `receive` without parsing them now; `behind` is True."""
        if not self.closed:
            self._partial.append(data)
            self._partial_bytes += len(data)
            self._needed = 0
            self.behind = True

    def receive_data(self, data: bytes) -> Stream | None:
        """Take bytes that are exactly one whole DATA frame: the fast path of `receive`, to be tried first.

        410 ns instead of 1,320 (`python -m tests.bench.lanes`), and no event object to dispatch.

        Returns the stream of the frame; the payload starts at FRAME_HEADER_BYTES and counts for flow control in full.
        None: the bytes are something else, or need more checks. Then nothing has changed; pass them to `receive`.
        """
        size = len(data) - _HEADER_BYTES
        if size <= 0 or self._partial:
            return None
        head, flags, stream_id = _unpack_header(data)
        # No padding and no END_STREAM; the type of DATA is 0.
        if head != size << 8 or flags:
            return None
        stream = self.streams.get(stream_id)
        if (
            stream is None
            or size > stream.receive_window
            or size > self.receive_window
            or size > self.limits.max_frame_bytes
            or stream.state is HALF_CLOSED_REMOTE
            or stream.content_left is not None
            or not stream.headers_seen
            or self._block_id
            or self.closed
        ):
            return None
        stream.receive_window -= size
        self.receive_window -= size
        return stream

    def receive_update_and_ping(self, data: bytes) -> bytes | None:
        """Take a WINDOW_UPDATE of the connection and a PING, UPDATE_AND_PING_BYTES in all: a fast path of `receive`.

        grpc-go answers a read of DATA with these two. Returns the acknowledgement, which the shell writes at once or
        passes to `append`; b"": the shell calls `acknowledge_late` at most LATE_ACK_S_MAX later. None: the bytes are
        something else, or need more checks; then nothing has changed. The flood counters would rise by one and be
        lowered by `output` in the same turn, so both are left out.
        """
        if (
            self._forgiving
            or self._paused
            or self.behind
            or self._partial
            or self._expect_settings
            or self._block_id
            or self._round_robin
            or self.closed
        ):
            return None
        update, increment, ping, payload = _unpack_update_and_ping(data)
        if update != _UPDATE_HEADER or ping != _PING_HEADER:
            return None
        if not 0 < increment <= WINDOW_BYTES_MAX - self.send_window:
            return None
        self.send_window += increment
        self._granted += increment
        if (
            payload == frames.BANDWIDTH_PING
            and self.now - self._acknowledged_at < LATE_ACK_GAP_S
            and increment <= LATE_ACK_BYTES_MAX
            and not self._late_ack
        ):
            self._late_ack = True
            return b""
        self._acknowledged_at = self.now
        acknowledgement: bytes = _PING_ACK_HEADER + payload
        return acknowledgement

    def append(self, frame: bytes) -> None:
        """Add a frame to the output."""
        self._out.append(frame)

    def open(self, headers: Sequence[tuple[bytes, bytes]], end_stream: bool = False) -> Stream:
        """Open a stream with a request (client role).

        Raises TooManyStreams while the peer's limit is reached, GoingAway if this connection accepts no more streams.
        """
        if self.closed or self.ending or self.going_away or self._last_id + 2 > STREAM_ID_MAX:
            raise GoingAway
        if len(self.streams) >= self.peer_max_streams:
            raise TooManyStreams(self.peer_max_streams)
        stream_id = self._last_id + 2 if self._last_id else 1
        self._last_id = stream_id
        stream = Stream(stream_id, self._peer_initial_window, self._own_initial_window)
        stream.started = True
        stream.bodiless = (b":method", b"HEAD") in headers
        self.streams[stream_id] = stream
        self._write_headers(stream, headers, end_stream)
        if end_stream:
            stream.ending = True
            stream.state = HALF_CLOSED_LOCAL
        return stream

    def ping(self, payload: bytes) -> None:
        """Queue a PING of 8 bytes; its acknowledgement is the event PingAcknowledged. Raises ValueError."""
        if len(payload) != 8:
            raise ValueError("a PING carries 8 bytes")
        if not self.closed:
            self._out.append(frames.ping(payload))

    def go_away(self, last: bool = False, code: ErrorCode = ErrorCode.NO_ERROR, debug: bytes = b"") -> None:
        """Shut the connection down gracefully, in two steps (6.8). Open streams continue in both.

        Step 1 (last=False) asks the peer to open no more streams, and still accepts those that are on their way. Step 2
        (last=True), at least a round trip later, names the last accepted stream; higher ones are refused, and `closed`
        becomes True when the last stream has ended.
        """
        if self.closed:
            return
        self.going_away = True
        # In the client role the id is that of the last push, and pushes are disabled.
        last_id = (self._last_id if self._server else 0) if last else STREAM_ID_MAX
        last_id = min(last_id, self._last_accepted)
        self._out.append(frames.go_away(last_id, code, debug))
        if last:
            self._last_accepted = last_id
            self.ending = True
            if not self.streams:
                self._shut()

    def _fail(self, fault: ConnectionFault, events: list[Event]) -> None:
        """End the connection because of a connection error (5.4.1)."""
        last_id = self._last_id if self._server else 0
        self._out.append(frames.go_away(min(last_id, self._last_accepted), fault.code, fault.reason.encode()))
        self._shut()
        self._partial.clear()
        self.behind = False
        events.append(ConnectionFailed(fault.code, fault.reason))

    def _take_frames(self, data: bytes, events: list[Event]) -> int:
        """Handle the whole frames in `data`; return their length in bytes. Raises ConnectionFault."""
        at = self._take_preface(data) if self._preface_left else 0
        end = len(data)
        frame_bytes_max = self.limits.max_frame_bytes
        handlers = _HANDLERS
        if self.behind:
            self.behind = False
        while end - at >= _HEADER_BYTES:
            head, flags, stream_id = _unpack_header(data, at)
            length = head >> 8
            kind = head & 0xFF
            stream_id &= STREAM_ID_MAX
            if self._expect_settings or self._block_id:
                self._check_order(kind, flags, stream_id)
            if length > frame_bytes_max:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, f"frame of {length} bytes")
            body = at + _HEADER_BYTES
            stop = body + length
            if stop > end:
                self._needed = _HEADER_BYTES + length
                return at
            at = stop
            try:
                if kind < len(handlers):
                    handlers[kind](self, data, body, stop, flags, stream_id, events)
                else:
                    # Unknown types belong to extensions and are ignored (5.5).
                    self._count(IGNORED)
            except StreamError as fault:
                self._abort(fault, events)
            if self.closed:
                return end
            if kind == frames.DATA and at < end and events:
                at = self._join_data(data, at, events[-1], self.turn_work_max - self.work)
            if at < end:
                self.work += 1
                if self.work >= self.turn_work_max:
                    self.behind = True
                    break
        self._needed = 0 if self.behind else _HEADER_BYTES
        return at

    def _join_data(self, data: bytes, at: int, event: Event, work_max: int) -> int:
        """Join the next whole frames to the data of `event`, if they bring more of it; return where they end.

        Many small messages of one stream reach its handler at once: thousands of creates of a client, or events. What
        passes on answers in bounded turns counts on parts of JOINED_DATA_BYTES_MAX.
        """
        if type(event) is not DataReceived or event.end_stream or event.stream.content_left is not None:
            return at
        stream = event.stream
        most = left = min(JOINED_DATA_BYTES_MAX - len(event.data), stream.receive_window, self.receive_window)
        stream_id, parts = stream.id, [event.data]
        last = len(data) - _HEADER_BYTES
        while at <= last:
            head, flags, next_id = _unpack_header(data, at)
            size = head >> 8
            # The type of DATA is 0. An empty frame, or one with padding or END_STREAM, needs more checks.
            if next_id != stream_id or flags or head & 0xFF or not 0 < size <= left or at + size > last:
                break
            body = at + _HEADER_BYTES
            at = body + size
            parts.append(data[body:at])
            left -= size
            if len(parts) >= work_max:
                break
        if len(parts) > 1:
            self.work += len(parts) - 1
            event.data = b"".join(parts)
            event.flow_size += most - left
            stream.receive_window -= most - left
            self.receive_window -= most - left
        return at

    def _take_preface(self, data: bytes) -> int:
        """Check the part of the client's preface that has arrived (3.4)."""
        left = self._preface_left
        size = min(len(left), len(data))
        if data[:size] != left[:size]:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "not an HTTP/2 preface")
        self._preface_left = left[size:]
        return size

    def _check_order(self, kind: int, flags: int, stream_id: int) -> None:
        if self._expect_settings:
            if kind != frames.SETTINGS or flags & frames.ACK:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "connection does not begin with SETTINGS")
            self._expect_settings = False
        elif kind != frames.CONTINUATION or stream_id != self._block_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "frame inside a header block")

    def _on_settings(self, data: bytes, body: int, stop: int, flags: int, stream_id: int, events: list[Event]) -> None:
        """SETTINGS (6.5)."""
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if flags & frames.ACK:
            if stop != body:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS acknowledged with a payload")
            self._settings_acknowledged()
            return
        if (stop - body) % 6:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        self._count(SETTINGS)
        for identifier, value in frames.SETTING.iter_unpack(data[body:stop]):
            self._apply_setting(identifier, value)
        # Acknowledged after they are applied, and before anything is sent that depends on them (6.5.3).
        self._out.append(frames.SETTINGS_ACK)
        events.append(PeerSettings())
        self._serve(events)

    def _apply_setting(self, identifier: int, value: int) -> None:
        """Apply one setting of the peer; unknown ones are ignored (6.5.2). Raises ConnectionFault."""
        if identifier == frames.SETTING_INITIAL_WINDOW_SIZE:
            try:
                if value > WINDOW_BYTES_MAX:
                    raise OverflowError
                if value != self._peer_initial_window:
                    # The change visits each stream.
                    self._count(SETTINGS, len(self.streams) // STREAMS_PER_SETTINGS)
                    self.work += len(self.streams) // STREAMS_PER_WORK
                self._change_initial_window(value)
            except OverflowError:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "window above 2^31-1") from None
        elif identifier == frames.SETTING_MAX_FRAME_SIZE:
            if not FRAME_BYTES_MIN <= value <= FRAME_BYTES_MAX:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"MAX_FRAME_SIZE {value}")
            self._change_frame_bytes(value)
        elif identifier == frames.SETTING_HEADER_TABLE_SIZE:
            self._encoder.resize(value)
        elif identifier == frames.SETTING_MAX_CONCURRENT_STREAMS:
            self.peer_max_streams = value
        elif identifier == frames.SETTING_ENABLE_PUSH:
            # A server may send it, but only with 0.
            if value > (1 if self._server else 0):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_PUSH {value}")
        elif identifier == frames.SETTING_ENABLE_CONNECT_PROTOCOL and value > 1:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"ENABLE_CONNECT_PROTOCOL {value}")

    def _settings_acknowledged(self) -> None:
        """The peer has applied our settings: enforce them from now on."""
        if not self.settings_pending:
            self._count(IGNORED)
            return
        self.settings_pending -= 1
        if self.settings_pending:
            return
        self._decoder.table_bytes_max = self.limits.header_table_bytes
        delta = self.limits.initial_window - self._own_initial_window
        if delta:
            self._own_initial_window += delta
            for stream in self.streams.values():
                stream.receive_window += delta

    def _on_ping(self, data: bytes, body: int, stop: int, flags: int, stream_id: int, events: list[Event]) -> None:
        """PING (6.7)."""
        if stop - body != 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "PING of a wrong size")
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        self._count(PINGS)
        if flags & frames.ACK:
            events.append(PingAcknowledged(data[body:stop]))
        else:
            self._out.append(frames.ping(data[body:stop], ack=True))
            events.append(PingReceived())

    def _on_go_away(self, data: bytes, body: int, stop: int, _flags: int, stream_id: int, events: list[Event]) -> None:
        """GOAWAY (6.8): streams up to the last id continue; the peer did not process those above it."""
        if stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if stop - body < 8:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of a wrong size")
        self._count(IGNORED)
        word = frames.WORD.unpack_from
        last_id = word(data, body)[0] & STREAM_ID_MAX
        code = error_code(word(data, body + 4)[0])
        self.peer_last_id = last_id
        events.append(GoAwayReceived(last_id, code, data[body + 8 : stop]))
        if self._server:
            return
        for stream in [stream for stream in self.streams.values() if stream.id > last_id]:
            self._forget(stream)
            events.append(StreamReset(stream, ErrorCode.REFUSED_STREAM, True, "above the last id of GOAWAY"))
        self.ending = True
        if not self.streams:
            self._shut()

    def _on_push_promise(
        self, _data: bytes, _body: int, _stop: int, _flags: int, _stream_id: int, _events: list[Event]
    ) -> None:
        """PUSH_PROMISE (6.6): a client must not send it, and as a client we have disabled it."""
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE")


# By frame type.
_HANDLERS: tuple[_Handler, ...] = (
    Connection._on_data,
    Connection._on_headers,
    Connection._on_priority,
    Connection._on_rst_stream,
    Connection._on_settings,
    Connection._on_push_promise,
    Connection._on_ping,
    Connection._on_go_away,
    Connection._on_window_update,
    Connection._on_continuation,
)
