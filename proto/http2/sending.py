"""The sending half of an HTTP/2 connection: one output queue, and the flow-control windows for sending.

Theory of operation. Everything that may be sent at once is appended to the output, in call order; the shell takes it
with `output()` and writes it with one call. Only DATA can be delayed: by its stream's window, by the connection's
window, or because the transport is paused. Then the stream is *blocked*: its pieces wait in its own queue, and later
data and trailers of the stream queue after them. A blocked stream whose own window is open is *waiting*: it is in the
round robin, which sends one frame per stream in turn once the connection's window or the transport opens. A blocked
stream whose own window is used up is not in the round robin; its WINDOW_UPDATE, or a change of the initial window, puts
it back.

Invariant: the round robin is empty, or the connection's window is used up, or the transport is paused.

`send` is the hot path of a fan-out proxy. Its fast path compares three numbers, packs nine bytes and appends the given
pieces without copying them, so that one payload can be in the output of a thousand connections.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from enum import Enum
from itertools import compress
from typing import TypeAlias

from proto.http2 import frames
from proto.http2.compression import HeaderEncoder
from proto.http2.errors import ErrorCode, StreamMisuse
from proto.http2.events import Event, StreamDrained
from proto.http2.limits import (
    FRAME_BYTES_MIN,
    FRAME_BYTES_SENT_MAX,
    WINDOW_BYTES_DEFAULT,
    WINDOW_BYTES_MAX,
    Http2Limits,
)
from proto.http2.streams import Stream, StreamState

Piece: TypeAlias = bytes | memoryview
"""A run of output bytes; a view if it is a part of a larger piece."""

OPEN = StreamState.OPEN
HALF_CLOSED_LOCAL = StreamState.HALF_CLOSED_LOCAL
HALF_CLOSED_REMOTE = StreamState.HALF_CLOSED_REMOTE
CLOSED = StreamState.CLOSED

_pack_header = frames.FRAME_HEADER.pack
CROSSING_FRAMES = 2
"""Frames that a peer may send for a stream before it learns that we ended it: a WINDOW_UPDATE, a RST_STREAM."""

# Frame size that disables the fast path: nothing fits.
_SHUT = -1


class Role(Enum):
    """Which side of the connection we are: a client opens streams, a server answers them."""

    CLIENT = "client"
    SERVER = "server"


class StreamBatch:
    """A batch of streams of one connection, with the frame headers of the last message size.

    Most messages of a busy range have the same size, so their frame headers are the same bytes. Without this cache the
    headers would take most of the memory of the pending output: one of 9 bytes is an object of 48.
    """

    __slots__ = ("_heads", "_size", "counts", "streams")

    def __init__(self, streams: Sequence[Stream]) -> None:
        self.streams = streams
        """One stream for each message, so that a stream may occur several times."""
        self.counts = Counter(streams)
        """The number of messages for each stream."""
        self._size = -1
        self._heads: list[bytes] = []

    def frame_headers(self, size: int) -> list[bytes]:
        """Return the headers of DATA frames of this size, one for each message; do not change the list."""
        if size != self._size:
            word = size << 8
            self._size = size
            self._heads = [_pack_header(word, 0, stream.id) for stream in self.streams]
        return self._heads


class SendSide:
    """The sending windows, the data that waits for them, and the output that is ready to be written."""

    __slots__ = (
        "_encoder",
        "_explained",
        "_forgiving",
        "_frame_bytes_live",
        "_granted",
        "_header_lists",
        "_out",
        "_paused",
        "_peer_frame_bytes",
        "_peer_initial_window",
        "_reset_ids",
        "_round_robin",
        "_server",
        "behind",
        "closed",
        "ending",
        "limits",
        "now",
        "role",
        "send_window",
        "streams",
    )

    def __init__(self, role: Role, limits: Http2Limits) -> None:
        self.role = role
        self.limits = limits
        # The connection has ended: the shell writes the rest of the output and closes the transport.
        self.closed = False
        # No stream will be added; when the last one ends, the connection is closed.
        self.ending = False
        # The open streams by id.
        self.streams: dict[int, Stream] = {}
        # Bytes the peer lets us send on all streams together.
        self.send_window = WINDOW_BYTES_DEFAULT
        # Total bytes that the peer has added to that window, and the number of header lists written: see `progress`.
        self._granted = WINDOW_BYTES_DEFAULT
        self._header_lists = 0
        self._server = role is Role.SERVER
        self._out: list[Piece] = []
        self._paused = False
        # Maximum payload of a frame that we send: the peer's SETTINGS_MAX_FRAME_SIZE, but at most FRAME_BYTES_SENT_MAX.
        self._peer_frame_bytes = FRAME_BYTES_MIN
        # The same while data may be sent; _SHUT while the transport is paused or after the connection has ended.
        self._frame_bytes_live = FRAME_BYTES_MIN
        # The send window of a new stream (the peer's SETTINGS_INITIAL_WINDOW_SIZE).
        self._peer_initial_window = WINDOW_BYTES_DEFAULT
        self._encoder = HeaderEncoder()
        self._round_robin: deque[Stream] = deque()
        # Ids of streams reset by us, oldest first: late frames for them are not an error of the peer.
        self._reset_ids: dict[int, None] = {}
        # Number of frames for closed streams that are still expected, because we ended the streams.
        self._explained = 0
        # The shell's clock in seconds, as last set by the shell; for the age of streams.
        self.now = 0.0
        # A flood counter is above zero.
        self._forgiving = False
        # Received frames wait because they were too much work for one turn: `receive(b"")` handles them.
        self.behind = False

    def output(self) -> list[Piece]:
        """Take the bytes that are ready to be written, in order; [] if there are none. The caller owns the list."""
        out, self._out = self._out, []
        if self._forgiving and not self._paused and not self.behind:
            self._forgive()
        return out

    def send(self, stream: Stream, pieces: Sequence[bytes], size: int, end_stream: bool = False) -> bool:
        """Send DATA: the pieces joined, `size` bytes in all.

        Returns True if everything is in the output, False if some of it has to wait (then `stream.blocked` is True
        until `StreamDrained`). On a stream that has ended (reset, or its connection is closed) data is dropped and the
        result is True, because nothing waits. Raises StreamMisuse after an earlier end_stream.
        """
        if (
            size <= stream.send_window
            and size <= self.send_window
            and size <= self._frame_bytes_live
            and not stream.blocked
            and not stream.ending
        ):
            stream.send_window -= size
            self.send_window -= size
            out = self._out
            out.append(_pack_header(size << 8, 1 if end_stream else 0, stream.id))
            out += pieces
            if end_stream:
                stream.ending = True
                stream.report_end(())
                self._sent_end(stream)
            return True
        return self._send_waiting(stream, pieces, size, end_stream)

    def send_each(self, together: StreamBatch, columns: Sequence[Sequence[bytes]], size: int) -> Sequence[int]:
        """Send a message of `size` bytes on each of many streams, except where it would have to wait.

        `columns`: the first pieces of all messages, then the second ones, and so on, in the order of the streams.
        Returns the indices of the messages that were not sent; the caller passes those to `send`. This is the fast path
        of `send`, with the common work of all streams done once: with 50 streams 195 ns each instead of 360 (`python -m
        tests.bench.lanes`).
        """
        streams = together.streams
        if size > self._frame_bytes_live or size * len(streams) > self.send_window:
            return range(len(streams))
        full: set[Stream] = set()
        for stream, count in together.counts.items():
            window = stream.send_window - size * count
            if window < 0 or stream.blocked or stream.ending:
                full.add(stream)
            else:
                stream.send_window = window
        columns = (together.frame_headers(size), *columns)
        left: list[int] = []
        if full:
            left = [place for place, stream in enumerate(streams) if stream in full]
            going = [stream not in full for stream in streams]
            columns = [list(compress(column, going)) for column in columns]
        count = len(columns[0])
        output: list[Piece] = [b""] * (count * len(columns))
        for place, column in enumerate(columns):
            output[place :: len(columns)] = column
        self._out += output
        self.send_window -= size * count
        return left

    def frame(self, stream: Stream, message: bytes, size: int) -> bytes | None:
        """Return a DATA frame of `size` bytes without queuing it; the caller must write it before anything else.

        None, with nothing changed: the output is not empty, or the data has to wait, or a flood counter is above zero
        and `output` must lower it. Then the caller uses `send`.
        """
        if (
            self._out
            or self._forgiving
            or size > stream.send_window
            or size > self.send_window
            or size > self._frame_bytes_live
            or stream.blocked
            or stream.ending
        ):
            return None
        stream.send_window -= size
        self.send_window -= size
        return _pack_header(size << 8, 0, stream.id) + message

    def send_headers(self, stream: Stream, headers: Sequence[tuple[bytes, bytes]], end_stream: bool = False) -> None:
        """Send a header list: informational or final response, or (with end_stream) trailers.

        Trailers queue after the stream's unsent data. Does nothing on a stream that has ended.
        Raises StreamMisuse after an earlier end_stream, or for a list without end_stream after unsent data.
        """
        if stream.state is CLOSED or self.closed:
            return
        if stream.ending:
            raise StreamMisuse(f"headers on stream {stream.id} after its end")
        if stream.blocked:
            if not end_stream:
                raise StreamMisuse(f"headers that are not trailers after unsent data on stream {stream.id}")
            stream.trailers = list(headers)
            stream.ending = True
            stream.report_end(headers)
            return
        stream.started = True
        self._write_headers(stream, headers, end_stream)
        if end_stream:
            stream.ending = True
            stream.report_end(headers)
            self._sent_end(stream)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """End a stream at once with RST_STREAM and drop its unsent data. Does nothing if the stream has ended.

        The only way to end a stream in the middle of a gRPC message.
        """
        if stream.state is CLOSED or self.closed:
            return
        stream.report_reset(code)
        self._reset_id(stream.id, code)
        self._explained += CROSSING_FRAMES
        self._forget(stream)

    def pause(self) -> None:
        """Stop sending DATA, because the transport's write buffer is full. Control frames still go to the output."""
        self._paused = True
        self._frame_bytes_live = _SHUT

    def resume(self) -> list[Event]:
        """Send DATA again, because the transport's write buffer has drained. Returns StreamDrained events."""
        events: list[Event] = []
        self._paused = False
        if not self.closed:
            self._frame_bytes_live = self._peer_frame_bytes
            self._serve(events)
        return events

    def room(self, stream: Stream) -> int:
        """Return how many bytes of DATA the windows of a stream and of the connection let through now."""
        return max(0, min(stream.send_window, self.send_window))

    def progress(self) -> int:
        """Return a number that grows with each header list and each byte of DATA; `send` does not have to count it."""
        return self._granted - self.send_window + self._header_lists

    @property
    def paused(self) -> bool:
        """True between `pause` and `resume`."""
        return self._paused

    def _send_waiting(self, stream: Stream, pieces: Sequence[bytes], size: int, end_stream: bool) -> bool:
        if stream.state is CLOSED or self.closed:
            return True
        if stream.ending:
            raise StreamMisuse(f"data on stream {stream.id} after its end")
        stream.ending = end_stream
        if end_stream:
            stream.report_end(())
        if size:
            if stream.queue is None:
                stream.queue = deque()
            stream.queue.extend(pieces)
            stream.unsent += size
        if stream.blocked:
            return False
        while stream.unsent:
            size = min(stream.unsent, stream.send_window, self.send_window, self._frame_bytes_live)
            if size <= 0:
                stream.blocked = True
                self._wait(stream)
                return False
            self._write_data(stream, size)
        self._finish(stream)
        return True

    def _wait(self, stream: Stream) -> None:
        """Put a blocked stream into the round robin, unless its own window is used up."""
        if stream.send_window > 0 and not stream.waiting:
            stream.waiting = True
            self._round_robin.append(stream)

    def _serve(self, events: list[Event]) -> None:
        """Send for the waiting streams, one frame each in turn, until the connection's window is used up (5.2.1)."""
        queue = self._round_robin
        while queue and self.send_window > 0 and self._frame_bytes_live > 0:
            stream = queue.popleft()
            stream.waiting = False
            # It may have been reset, or its window lowered, since it was queued.
            size = min(stream.unsent, stream.send_window, self.send_window, self._frame_bytes_live)
            if size <= 0:
                continue
            self._write_data(stream, size)
            if stream.unsent:
                self._wait(stream)
            else:
                stream.blocked = False
                self._finish(stream)
                events.append(StreamDrained(stream))

    def _write_data(self, stream: Stream, size: int) -> None:
        """Move `size` bytes, at least one, from the stream's queue to the output as one frame."""
        queue = stream.queue
        assert queue is not None
        stream.send_window -= size
        self.send_window -= size
        stream.unsent -= size
        last = stream.ending and not stream.unsent and stream.trailers is None
        out = self._out
        out.append(_pack_header(size << 8, 1 if last else 0, stream.id))
        offset = stream.queue_offset
        while size:
            piece = queue[0]
            left = len(piece) - offset
            if left > size:
                # A view, not a copy: a large payload is split once for each of the streams that share it.
                out.append(memoryview(piece)[offset : offset + size])
                offset += size
                break
            out.append(memoryview(piece)[offset:] if offset else piece)
            queue.popleft()
            offset = 0
            size -= left
        stream.queue_offset = offset

    def _finish(self, stream: Stream) -> None:
        """Write the trailers or the end after the stream's data, all of which is in the output now."""
        queue = stream.queue
        if queue is not None:
            stream.queue = None
        if stream.trailers is not None:
            trailers, stream.trailers = stream.trailers, None
            self._write_headers(stream, trailers, True)
        elif queue is None:
            # Only an end, or an empty message: an empty frame needs no window (6.9).
            self._out.append(_pack_header(0, 1 if stream.ending else 0, stream.id))
        if stream.ending:
            self._sent_end(stream)

    def _write_headers(self, stream: Stream, headers: Sequence[tuple[bytes, bytes]], end_stream: bool) -> None:
        # Encoded only when it is written: the compression state depends on the order on the wire (4.3).
        block = self._encoder.encode(headers)
        self._header_lists += 1
        if len(block) <= self._peer_frame_bytes:
            flags = frames.END_HEADERS | frames.END_STREAM if end_stream else frames.END_HEADERS
            self._out.append(_pack_header(len(block) << 8 | frames.HEADERS, flags, stream.id) + block)
        else:
            self._out += frames.header_block(stream.id, block, end_stream, self._peer_frame_bytes)

    def _sent_end(self, stream: Stream) -> None:
        """Change the stream's state after our END_STREAM."""
        self._explained += CROSSING_FRAMES
        if stream.state is HALF_CLOSED_REMOTE:
            self._forget(stream)
        elif self._server:
            # The response is complete but the request is still open: ask the client to stop sending (8.1).
            self._reset_id(stream.id, ErrorCode.NO_ERROR)
            self._forget(stream)
        else:
            stream.state = HALF_CLOSED_LOCAL

    def _reset_id(self, stream_id: int, code: ErrorCode) -> None:
        self._out.append(frames.rst_stream(stream_id, code))
        ids = self._reset_ids
        ids[stream_id] = None
        if len(ids) > self.limits.resets_remembered:
            # Half at a time, so that the cost per reset does not grow with their number.
            self._reset_ids = dict.fromkeys(list(ids)[len(ids) // 2 :])

    def _forget(self, stream: Stream) -> None:
        """Drop a closed stream and its unsent data."""
        stream.state = CLOSED
        # Disables the fast path; later sends on this stream are dropped.
        stream.ending = True
        stream.blocked = False
        stream.unsent = 0
        stream.queue = None
        stream.trailers = None
        self.streams.pop(stream.id, None)
        if self.ending and not self.streams:
            self._shut()

    def _shut(self) -> None:
        self.closed = True
        self._frame_bytes_live = _SHUT

    def _change_frame_bytes(self, size: int) -> None:
        """Apply the peer's SETTINGS_MAX_FRAME_SIZE, but at most FRAME_BYTES_SENT_MAX."""
        size = min(size, FRAME_BYTES_SENT_MAX)
        self._peer_frame_bytes = size
        if not self._paused and not self.closed:
            self._frame_bytes_live = size

    def _change_initial_window(self, size: int) -> None:
        """Apply the peer's SETTINGS_INITIAL_WINDOW_SIZE to the windows of all streams, but not the connection's.

        Windows may become negative. Raises OverflowError if one would exceed 2^31-1 (6.9.2).
        """
        delta = size - self._peer_initial_window
        self._peer_initial_window = size
        for stream in self.streams.values():
            stream.send_window += delta
            if stream.send_window > WINDOW_BYTES_MAX:
                raise OverflowError
            if stream.blocked:
                self._wait(stream)

    def _forgive(self) -> None:
        """Lower the flood counters, which the receiving half implements."""
        raise NotImplementedError
