"""The peer of the connection under test. It uses `hyperframe` and `hpack`, so that our code does not check itself.

Frames go in as bytes; the connection's output (frames) and events are turned into short lines of text, so that a test
is a table of text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hpack import Decoder, Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from proto.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    Event,
    GoAwayReceived,
    HeadersReceived,
    Http2Limits,
    LimitReached,
    PeerSettings,
    PingAcknowledged,
    PingReceived,
    Role,
    StreamDrained,
    StreamReset,
)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
REQUEST = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/etcdserverpb.Watch/Watch"),
    (b":authority", b"127.0.0.1:2379"),
    (b"content-type", b"application/grpc"),
    (b"te", b"trailers"),
]
RESPONSE = [(b":status", b"200"), (b"content-type", b"application/grpc")]
TRAILERS = [(b"grpc-status", b"0")]
INITIAL_WINDOW = 65_535

HEADER_TABLE_SIZE = 0x1
ENABLE_PUSH = 0x2
MAX_CONCURRENT_STREAMS = 0x3
INITIAL_WINDOW_SIZE = 0x4
MAX_FRAME_SIZE = 0x5
MAX_HEADER_LIST_SIZE = 0x6


def raw(kind: int, flags: int, stream_id: int, payload: bytes = b"", length: int | None = None) -> bytes:
    """Build a frame of any type, with a correct or an incorrect length."""
    size = len(payload) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream_id.to_bytes(4, "big") + payload


def data(stream_id: int, payload: bytes, *flags: str, padding: int = 0) -> bytes:
    return DataFrame(
        stream_id, payload, pad_length=padding, flags=[*flags, *(["PADDED"] if padding else [])]
    ).serialize()


def ping(payload: bytes = b"12345678", *flags: str) -> bytes:
    return PingFrame(0, payload, flags=flags).serialize()


def rst(stream_id: int, code: int = ErrorCode.CANCEL) -> bytes:
    return RstStreamFrame(stream_id, code).serialize()


def update(stream_id: int, increment: int) -> bytes:
    return WindowUpdateFrame(stream_id, increment).serialize()


def settings(values: dict[int, int] | None = None, *flags: str) -> bytes:
    return SettingsFrame(0, values or {}, flags=flags).serialize()


def go_away(last_id: int, code: int = ErrorCode.NO_ERROR, debug: bytes = b"") -> bytes:
    return GoAwayFrame(0, last_id, code, debug).serialize()


def priority(stream_id: int) -> bytes:
    return PriorityFrame(stream_id, depends_on=0, stream_weight=1).serialize()


def push_promise(stream_id: int) -> bytes:
    return PushPromiseFrame(stream_id, 2, b"", flags=["END_HEADERS"]).serialize()


class Peer:
    """The peer of one connection: the compression state of both directions, and the conversions to text."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.unread = b""
        self.block = b""

    def block_of(self, fields: Iterable[tuple[bytes, bytes]]) -> bytes:
        return self.encoder.encode(fields)

    def headers(self, stream_id: int, fields: Iterable[tuple[bytes, bytes]], *flags: str, padding: int = 0) -> bytes:
        more = ["PADDED"] if padding else []
        frame = HeadersFrame(stream_id, self.block_of(fields), flags=["END_HEADERS", *flags, *more], pad_length=padding)
        return frame.serialize()

    def request(self, stream_id: int, *flags: str, extra: Sequence[tuple[bytes, bytes]] = ()) -> bytes:
        return self.headers(stream_id, [*REQUEST, *extra], *flags)

    def in_parts(self, stream_id: int, fields: Iterable[tuple[bytes, bytes]], part: int, *flags: str) -> list[bytes]:
        """Return HEADERS and CONTINUATIONs of `part` bytes each."""
        block = self.block_of(fields)
        parts = [block[at : at + part] for at in range(0, len(block), part)] or [b""]
        frames: list[Frame] = [HeadersFrame(stream_id, parts[0], flags=flags)]
        frames += [ContinuationFrame(stream_id, piece) for piece in parts[1:]]
        frames[-1].flags.add("END_HEADERS")
        return [frame.serialize() for frame in frames]

    def receive(self, *pieces: bytes, bytewise: bool = False) -> list[str]:
        """Pass bytes to the connection and return its events as text."""
        whole = b"".join(pieces)
        if not bytewise:
            return event_lines(self.connection.receive(whole))
        events: list[Event] = []
        for at in range(len(whole)):
            events += self.connection.receive(whole[at : at + 1])
        return event_lines(events)

    def frames(self) -> list[Any]:
        """Take the connection's output as hyperframe's frames."""
        self.unread += b"".join(self.connection.output())
        if self.unread.startswith(PREFACE):
            self.unread = self.unread[len(PREFACE) :]
        frames = []
        while self.unread:
            frame, length = Frame.parse_frame_header(memoryview(self.unread[:9]))
            frame.parse_body(memoryview(self.unread[9 : 9 + length]))
            self.unread = self.unread[9 + length :]
            frames.append(frame)
        return frames

    def said(self) -> list[str]:
        """Take the connection's output as text, one line per frame (one line for all parts of a header block)."""
        return [line for frame in self.frames() if (line := self._line(frame))]

    def _line(self, frame: Frame) -> str:
        if isinstance(frame, HeadersFrame | ContinuationFrame):
            self.block += frame.data
            if isinstance(frame, HeadersFrame):
                self.block_ends = "END_STREAM" in frame.flags
            if "END_HEADERS" not in frame.flags:
                return ""
            fields = " ".join(
                f"{name.decode()}={value.decode()}" for name, value in self.decoder.decode(self.block, True)
            )
            self.block = b""
            return f"HEADERS {frame.stream_id} {fields}" + (" END" if self.block_ends else "")
        if isinstance(frame, DataFrame):
            return f"DATA {frame.stream_id} {len(frame.data)}" + (" END" if "END_STREAM" in frame.flags else "")
        if isinstance(frame, RstStreamFrame):
            return f"RST_STREAM {frame.stream_id} {ErrorCode(frame.error_code).name}"
        if isinstance(frame, GoAwayFrame):
            return f"GOAWAY {frame.last_stream_id} {ErrorCode(frame.error_code).name}"
        if isinstance(frame, WindowUpdateFrame):
            return f"WINDOW_UPDATE {frame.stream_id} {frame.window_increment}"
        if isinstance(frame, PingFrame):
            return f"PING {frame.opaque_data.decode('latin-1')}" + (" ack" if "ACK" in frame.flags else "")
        assert isinstance(frame, SettingsFrame)
        return "SETTINGS ack" if "ACK" in frame.flags else f"SETTINGS {frame.settings}"


def event_lines(events: Iterable[Event]) -> list[str]:
    """Return events as text, one line each. Events for metrics are omitted: the output shows the answer to them."""
    return [_event_line(event) for event in events if not isinstance(event, PingReceived | LimitReached)]


def _event_line(event: Event) -> str:
    match event:
        case HeadersReceived(stream, _, end_stream, kind):
            return f"{kind} {stream.id}" + (" END" if end_stream else "")
        case DataReceived(stream, payload, flow_size, end_stream):
            assert flow_size == len(payload)
            return f"data {stream.id} {len(payload)}" + (" END" if end_stream else "")
        case StreamReset(stream, code, by_peer):
            return f"reset {stream.id} {code.name}" + (" by peer" if by_peer else "")
        case StreamDrained(stream):
            return f"drained {stream.id}"
        case PingAcknowledged(payload):
            return f"pong {payload.decode('latin-1')}"
        case PeerSettings():
            return "settings"
        case GoAwayReceived(last_id, code, debug):
            return f"goaway {last_id} {code.name} {debug.decode('latin-1')}".rstrip()
        case ConnectionFailed(code):
            return f"failed {code.name}"
    raise AssertionError(event)


def server(limits: Http2Limits | None = None, peer_settings: dict[int, int] | None = None) -> tuple[Connection, Peer]:
    """Return a server after its handshake, with empty output, and its peer."""
    connection = Connection(Role.SERVER, limits)
    connection.start()
    peer = Peer(connection)
    assert peer.receive(PREFACE, settings(peer_settings), settings(None, "ACK")) == ["settings"]
    peer.said()
    return connection, peer


def client(limits: Http2Limits | None = None, peer_settings: dict[int, int] | None = None) -> tuple[Connection, Peer]:
    """Return a client after its handshake, with empty output, and its peer."""
    connection = Connection(Role.CLIENT, limits)
    connection.start()
    peer = Peer(connection)
    assert peer.receive(settings(peer_settings), settings(None, "ACK")) == ["settings"]
    peer.said()
    return connection, peer
