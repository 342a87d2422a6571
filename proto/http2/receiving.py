"""The receiving half of an HTTP/2 connection: handles each stream's frames, and accounts for what the peer may send.

Every handler gets one whole frame as a range of the received bytes. It changes the state, appends events, and raises a
fault for an error of the peer: `StreamError` ends one stream, `ConnectionFault` the connection. Where RFC 9113 leaves
the choice, an error ends the stream only, because the connection carries other clients' watches.
"""

from __future__ import annotations

from hpack import HPACKError

from proto.http2 import frames
from proto.http2.compression import HeaderDecoder, TooManyFields
from proto.http2.errors import ConnectionFault, ErrorCode, StreamError, error_code
from proto.http2.events import (
    DataReceived,
    Event,
    Headers,
    HeadersKind,
    HeadersReceived,
    LimitReached,
    StreamReset,
)
from proto.http2.headers import MalformedHeaders, check_request, check_response, check_trailers
from proto.http2.limits import (
    HEADER_TABLE_BYTES_DEFAULT,
    LATE_ACK_WINDOW_MIN,
    WINDOW_BYTES_DEFAULT,
    WINDOW_BYTES_MAX,
    Http2Limits,
)
from proto.http2.sending import HALF_CLOSED_LOCAL, HALF_CLOSED_REMOTE, OPEN, Role, SendSide
from proto.http2.streams import Stream

# The flood counters, by index.
RESETS = 0
PINGS = 1
SETTINGS = 2
EMPTY_DATA = 3
TINY_UPDATES = 4
IGNORED = 5
PAUSED_REQUESTS = 6
FLOOD_NAMES = (
    "streams ended badly",
    "PING",
    "SETTINGS",
    "empty DATA",
    "tiny WINDOW_UPDATE",
    "frames without effect",
    "requests without reading the answers",
)

TOO_MANY_FIELDS = "flood: header fields"
REQUEST_WORK = 20
"""Work of a request in addition to its frame, including what its handler does at once."""

RESET_WORK = 6
"""Work of a handler at the end of its stream, in addition to the frame."""

WORK_UNBOUNDED = 1 << 62

_unpack_word = frames.WORD.unpack_from
# Responses whose content-length, if any, is not the length of their own body (RFC 9110 8.6): it is not checked.
_NO_BODY_STATUSES = frozenset({204, 304})


class ReceiveSide(SendSide):
    """Handles frames on streams, and accounts for what the peer may send."""

    __slots__ = (
        "_acknowledged_at",
        "_block_end_stream",
        "_block_frames",
        "_block_id",
        "_decoder",
        "_flood",
        "_flood_max",
        "_forgiven",
        "_last_accepted",
        "_last_id",
        "_late_ack",
        "_own_initial_window",
        "_unreturned",
        "_window_step",
        "receive_window",
        "turn_work_max",
        "work",
    )

    def __init__(self, role: Role, limits: Http2Limits) -> None:
        super().__init__(role, limits)
        # Bytes the peer may still send on all streams together.
        self.receive_window = WINDOW_BYTES_DEFAULT
        # An acknowledgement waits for `acknowledge_late`; and when the last PING of that kind was acknowledged.
        self._late_ack = False
        self._acknowledged_at = 0.0
        # Bytes consumed but not yet returned to the peer by a WINDOW_UPDATE.
        self._unreturned = 0
        # Work of the last `receive`, and the maximum of the next one, which the shell may set.
        self.work = 0
        self.turn_work_max = limits.turn_work_max or WORK_UNBOUNDED
        # Number of unreturned bytes at which a WINDOW_UPDATE is sent.
        self._window_step = max(limits.connection_window, WINDOW_BYTES_DEFAULT) // 2
        # The receive window of a new stream. Until the peer has acknowledged our settings, it may use the default.
        self._own_initial_window = max(limits.initial_window, WINDOW_BYTES_DEFAULT)
        table_bytes = max(limits.header_table_bytes, HEADER_TABLE_BYTES_DEFAULT)
        self._decoder = HeaderDecoder(limits.header_list_bytes_max, table_bytes, limits.header_fields_max)
        # The header block that is arriving: its stream (0: none), whether it ends the stream, its CONTINUATION count.
        self._block_id = 0
        self._block_end_stream = False
        self._block_frames = 0
        # The highest stream id so far: the peer's for a server, our own for a client.
        self._last_id = 0
        # The highest id that we accept from the peer; step 2 of `go_away` lowers it.
        self._last_accepted = WINDOW_BYTES_MAX
        self._flood = [0] * len(FLOOD_NAMES)
        self._flood_max = (
            limits.resets_max,
            limits.pings_max,
            limits.settings_max,
            limits.empty_data_max,
            limits.tiny_updates_max,
            limits.ignored_max,
            limits.paused_requests_max,
        )
        # How much each counter decreases per turn; less for resets, which cause work elsewhere as well.
        self._forgiven = [max(1, limit // 100) for limit in self._flood_max]
        self._forgiven[RESETS] = max(1, limits.resets_max // 500)

    def consumed(self, stream: Stream | None, size: int) -> None:
        """Return `size` flow-controlled bytes to the peer, which may send as many more.

        Always credits the connection, and the stream as long as the peer sends on it. A WINDOW_UPDATE is sent only once
        half a window has accumulated.
        """
        if self.closed or size <= 0:
            return
        self._unreturned += size
        if self._unreturned >= self._window_step:
            self._out.append(frames.window_update(0, self._unreturned))
            self.receive_window += self._unreturned
            self._unreturned = 0
        if stream is not None and (stream.state is OPEN or stream.state is HALF_CLOSED_LOCAL):
            stream.unreturned += size
            if stream.unreturned * 2 >= self.limits.initial_window:
                self._out.append(frames.window_update(stream.id, stream.unreturned))
                stream.receive_window += stream.unreturned
                stream.unreturned = 0

    def credit_stream(self, stream: Stream, size: int) -> None:
        """Credit the stream alone: the connection was credited before, by `consumed(None, size)`."""
        if not self.closed and size > 0 and (stream.state is OPEN or stream.state is HALF_CLOSED_LOCAL):
            stream.unreturned += size
            if stream.unreturned * 2 >= self.limits.initial_window:
                self._out.append(frames.window_update(stream.id, stream.unreturned))
                stream.receive_window += stream.unreturned
                stream.unreturned = 0

    def acknowledge_late(self, now: float) -> None:
        """Queue the acknowledgement that `receive_update_and_ping` has left to this call, unless that has been done."""
        if self._late_ack and not self.closed:
            self._late_ack = False
            self._acknowledged_at = now
            self._out.append(frames.ping(frames.BANDWIDTH_PING, ack=True))

    def _count(self, kind: int, weight: int = 1) -> None:
        """Count a frame that has no use (10.5). Raises ConnectionFault above the limit."""
        flood = self._flood
        flood[kind] += weight
        self._forgiving = True
        if flood[kind] > self._flood_max[kind]:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, f"flood: {FLOOD_NAMES[kind]}")

    def _forgive(self) -> None:
        flood = self._flood
        self._forgiving = False
        for kind, forgiven in enumerate(self._forgiven):
            if flood[kind]:
                flood[kind] = left = max(0, flood[kind] - forgiven)
                if left:
                    self._forgiving = True

    def _is_idle(self, stream_id: int) -> bool:
        """Return whether the id was never used (5.1.1). Even ids are for pushes, which are disabled."""
        return stream_id > self._last_id or not stream_id & 1

    def _abort(self, fault: StreamError, events: list[Event]) -> None:
        """Reset one stream because of a stream error. Reports a reached limit, and the reset if the stream was open."""
        if fault.limit:
            events.append(LimitReached(fault.limit))
        stream = self.streams.get(fault.stream_id)
        if stream is None and fault.code is ErrorCode.STREAM_CLOSED and self._explained:
            self._explained -= 1
        else:
            self._count(RESETS)
        self._reset_id(fault.stream_id, fault.code)
        if stream is not None:
            self._forget(stream)
            events.append(StreamReset(stream, fault.code, False, fault.reason))

    def _on_data(self, data: bytes, body: int, stop: int, flags: int, stream_id: int, events: list[Event]) -> None:
        """DATA (6.1)."""
        length = stop - body
        if flags & frames.PADDED:
            body, stop = _unpad(data, body, stop)
        stream = self.streams.get(stream_id)
        if stream is None and self._is_idle(stream_id):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"DATA on stream {stream_id}, which is not open")
        self.receive_window -= length
        if self.receive_window < 0:
            raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "connection window overrun")
        if stream is None:
            self.consumed(None, length)
            self._late(stream_id)
            return
        size = stop - body
        end_stream = bool(flags & frames.END_STREAM)
        stream.receive_window -= length
        fault = _data_fault(stream, length, size, end_stream)
        if fault is not None:
            self.consumed(None, length)
            raise fault
        if size:
            if stream.content_left is not None:
                stream.content_left -= size
            chunk = data[body:stop]
        else:
            chunk = b""
            if not end_stream:
                self._count(EMPTY_DATA)
        if length != size:
            self.consumed(stream, length - size)
        if size or end_stream:
            events.append(DataReceived(stream, chunk, size, end_stream))
        if end_stream:
            self._received_end(stream)

    def _on_headers(self, data: bytes, body: int, stop: int, flags: int, stream_id: int, events: list[Event]) -> None:
        """HEADERS (6.2)."""
        if flags & frames.PADDED:
            body, stop = _unpad(data, body, stop)
        if flags & frames.PRIORITY_FLAG:
            body += 5
            if body > stop:
                raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "HEADERS without room for its priority")
        if not stream_id or (not stream_id & 1) or (not self._server and self._is_idle(stream_id)):
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"HEADERS on stream {stream_id}")
        end_stream = bool(flags & frames.END_STREAM)
        self._feed(data[body:stop])
        if flags & frames.END_HEADERS:
            self._block_complete(stream_id, end_stream, events)
        else:
            self._block_id = stream_id
            self._block_end_stream = end_stream
            self._block_frames = 0

    def _on_continuation(
        self, data: bytes, body: int, stop: int, flags: int, stream_id: int, events: list[Event]
    ) -> None:
        """CONTINUATION (6.10); the caller has checked that the frame belongs to the current block."""
        if not self._block_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        self._block_frames += 1
        if self._block_frames > self.limits.continuations_max:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, "flood: CONTINUATION")
        self._feed(data[body:stop])
        if flags & frames.END_HEADERS:
            self._block_id = 0
            self._block_complete(stream_id, self._block_end_stream, events)

    def _feed(self, block: bytes) -> None:
        self.work += len(block) >> 3
        try:
            self._decoder.feed(block)
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        except TooManyFields:
            raise ConnectionFault(ErrorCode.ENHANCE_YOUR_CALM, TOO_MANY_FIELDS) from None

    def _block_complete(self, stream_id: int, end_stream: bool, events: list[Event]) -> None:
        """Handle a header list. Even a refused one has been decoded, to keep the compression state (4.3)."""
        try:
            headers = self._decoder.finish()
        except HPACKError as error:
            raise ConnectionFault(ErrorCode.COMPRESSION_ERROR, str(error)) from error
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._server and stream_id > self._last_id:
                self._begin_request(stream_id, headers, end_stream, events)
                return
            if self._server and headers and headers[0][0].startswith(b":"):
                # A request, not late trailers: stream ids must increase (5.1.1).
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"stream {stream_id} opened again")
            self._late(stream_id)
            return
        if headers is None:
            raise StreamError(stream_id, ErrorCode.ENHANCE_YOUR_CALM, "header list too large", "header_list_bytes_max")
        if stream.state is HALF_CLOSED_REMOTE:
            raise StreamError(stream_id, ErrorCode.STREAM_CLOSED, "headers after the end of the stream")
        try:
            kind = self._take_headers(stream, headers, end_stream)
        except MalformedHeaders as error:
            raise StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from error
        events.append(HeadersReceived(stream, headers, end_stream, kind))
        if end_stream:
            self._received_end(stream)

    def _begin_request(self, stream_id: int, headers: Headers | None, end_stream: bool, events: list[Event]) -> None:
        self._last_id = stream_id
        self.work += REQUEST_WORK
        if self._paused:
            self._count(PAUSED_REQUESTS)
        if stream_id > self._last_accepted:
            raise StreamError(stream_id, ErrorCode.REFUSED_STREAM, "going away")
        if len(self.streams) >= self.limits.max_streams:
            raise StreamError(stream_id, ErrorCode.REFUSED_STREAM, "too many streams", "max_streams")
        if headers is None:
            raise StreamError(stream_id, ErrorCode.ENHANCE_YOUR_CALM, "header list too large", "header_list_bytes_max")
        try:
            content_length = check_request(headers)
            if end_stream and content_length:
                raise MalformedHeaders("content-length without content")
        except MalformedHeaders as error:
            raise StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, str(error)) from error
        stream = Stream(stream_id, self._peer_initial_window, self._own_initial_window)
        stream.headers_seen = True
        stream.opened_at = self.now
        stream.content_left = content_length
        if end_stream:
            stream.state = HALF_CLOSED_REMOTE
        self.streams[stream_id] = stream
        events.append(HeadersReceived(stream, headers, end_stream, HeadersKind.REQUEST))

    def _take_headers(self, stream: Stream, headers: Headers, end_stream: bool) -> HeadersKind:
        """Check a header list on an open stream and return its kind. Raises MalformedHeaders."""
        if stream.headers_seen:
            check_trailers(headers)
            if not end_stream:
                raise MalformedHeaders("trailers that do not end the stream")
            if stream.content_left:
                raise MalformedHeaders("less content than content-length")
            return HeadersKind.TRAILERS
        status, content_length = check_response(headers)
        if status < 200:
            if end_stream:
                raise MalformedHeaders("informational response that ends the stream")
            self._count(IGNORED)
            return HeadersKind.INFORMATIONAL
        if content_length is not None and status not in _NO_BODY_STATUSES and not stream.bodiless:
            if end_stream and content_length:
                raise MalformedHeaders("content-length without content")
            stream.content_left = content_length
        stream.headers_seen = True
        return HeadersKind.RESPONSE

    def _on_rst_stream(
        self, data: bytes, body: int, stop: int, _flags: int, stream_id: int, events: list[Event]
    ) -> None:
        """RST_STREAM (6.4)."""
        if stop - body != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        stream = self.streams.get(stream_id)
        if stream is None:
            if self._is_idle(stream_id):
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"RST_STREAM on stream {stream_id}, which is not open")
            self._crossing()
            return
        self.work += RESET_WORK
        if self._server and not stream.started and self.now - stream.opened_at < self.limits.patience_s:
            self._count(RESETS)
        self._forget(stream)
        events.append(StreamReset(stream, error_code(_unpack_word(data, body)[0]), True))

    def _on_window_update(
        self, data: bytes, body: int, stop: int, _flags: int, stream_id: int, events: list[Event]
    ) -> None:
        """WINDOW_UPDATE (6.9)."""
        if stop - body != 4:
            raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        increment = _unpack_word(data, body)[0] & WINDOW_BYTES_MAX
        if not stream_id:
            if not increment:
                raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            window, self.send_window = self.send_window, self.send_window + increment
            self._granted += increment
            if self.send_window > WINDOW_BYTES_MAX:
                raise ConnectionFault(ErrorCode.FLOW_CONTROL_ERROR, "connection window above 2^31-1")
            if self._round_robin:
                self._serve(events)
        else:
            stream = self.streams.get(stream_id)
            if stream is None:
                if self._is_idle(stream_id):
                    raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, f"WINDOW_UPDATE on stream {stream_id}, not open")
                self._crossing()
                return
            if not increment:
                raise StreamError(stream_id, ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of nothing")
            window = stream.send_window
            if window + increment > WINDOW_BYTES_MAX:
                raise StreamError(stream_id, ErrorCode.FLOW_CONTROL_ERROR, "stream window above 2^31-1")
            stream.send_window = window + increment
            if stream.blocked:
                self._wait(stream)
                self._serve(events)
        if self._late_ack and window < LATE_ACK_WINDOW_MIN:
            self.acknowledge_late(self.now)
        if increment < self.limits.tiny_update_bytes:
            self._count(TINY_UPDATES)

    def _on_priority(
        self, _data: bytes, body: int, stop: int, _flags: int, stream_id: int, _events: list[Event]
    ) -> None:
        """PRIORITY (6.3): deprecated, checked and ignored."""
        if not stream_id:
            raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if stop - body != 5 and stream_id in self.streams:
            raise StreamError(stream_id, ErrorCode.FRAME_SIZE_ERROR, "PRIORITY of a wrong size")
        self._count(IGNORED)

    def _late(self, stream_id: int) -> None:
        """Handle a frame for a closed stream: count it if we reset the stream, else reset the stream again (5.1)."""
        if stream_id in self._reset_ids:
            self._crossing()
        else:
            raise StreamError(stream_id, ErrorCode.STREAM_CLOSED, "frame on a closed stream")

    def _crossing(self) -> None:
        """Count a frame for a closed stream, unless it may have been sent before the peer knew that we ended one."""
        if self._explained:
            self._explained -= 1
        else:
            self._count(IGNORED)

    def _received_end(self, stream: Stream) -> None:
        """Change the stream's state after END_STREAM from the peer."""
        if stream.state is HALF_CLOSED_LOCAL:
            self._forget(stream)
        else:
            stream.state = HALF_CLOSED_REMOTE


def _data_fault(stream: Stream, length: int, size: int, end_stream: bool) -> StreamError | None:
    """Check `size` bytes of content (`length` with padding) on a stream; return the fault, if any."""
    if stream.state is HALF_CLOSED_REMOTE:
        return StreamError(stream.id, ErrorCode.STREAM_CLOSED, "data after the end of the stream")
    # An empty frame needs no window; our own settings may have made the window negative (6.9, 6.9.2).
    if length and stream.receive_window < 0:
        return StreamError(stream.id, ErrorCode.FLOW_CONTROL_ERROR, "stream window overrun", "initial_window")
    if not stream.headers_seen:
        return StreamError(stream.id, ErrorCode.PROTOCOL_ERROR, "data before the response's headers")
    left = stream.content_left
    if left is not None and (size > left or (end_stream and size != left)):
        return StreamError(stream.id, ErrorCode.PROTOCOL_ERROR, "content differs from content-length")
    return None


def _unpad(data: bytes, body: int, stop: int) -> tuple[int, int]:
    """Return the range of a frame without its padding (6.1). Raises ConnectionFault."""
    if body == stop:
        raise ConnectionFault(ErrorCode.FRAME_SIZE_ERROR, "padded frame without its padding's length")
    padding = data[body]
    if padding >= stop - body:
        raise ConnectionFault(ErrorCode.PROTOCOL_ERROR, "padding longer than the frame")
    return body + 1, stop - padding
