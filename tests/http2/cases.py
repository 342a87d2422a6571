"""RFC 9113's errors as a table: the bytes that a peer sends, and the answer in each of our two roles.

Every MUST of sections 3.4 to 6 that names a connection error or a stream error is a row, along with similar input that
is not an error; section 8 and RFC 7541 are in `cases_headers.py`. `test_conformance.py` sends each row as raw bytes
over a socket, to the listener and to the connection to etcd; `cases_page.py` writes docs/evidence/http2-cases.md.

When a row's bytes are sent, these streams exist. The client opened them: the peer of the listener, or the connection to
etcd itself:

    1   open both ways; data on it is not consumed
    3   the peer has ended it and we have not (the connection to etcd resets such a stream)
    5   closed by the peer's RST_STREAM
    7   closed by END_STREAM of both
    9   closed by our RST_STREAM
    11  open: the bystander, which must continue even if a row ends another stream
    13  open, with content-length: 5 in the peer's header list; in the client role, not answered yet
    15  and above: idle
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proto.http2.frames import (
    CONTINUATION,
    DATA,
    GOAWAY,
    HEADERS,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
)
from tests.http2 import wire
from tests.http2.wire import REQUEST, TRAILERS, Peer, data, go_away, ping, raw, rst, settings, update

OPEN, ENDED, RESET_BY_PEER, CLOSED, RESET_BY_US, BYSTANDER, PROMISED, IDLE = 1, 3, 5, 7, 9, 11, 13, 15
WINDOW_BYTES = 70_000
"""The receive window of each stream."""
CONNECTION_WINDOW_BYTES = 150_000
STREAMS_MAX = 6
"""The listener's bound; four are open when a row begins."""
CONTINUATIONS_MAX = 64

NO_FAULT = "no error"
ANSWERED = "answered"
CLOSED_SILENTLY = "closed silently"
PROTOCOL = "connection PROTOCOL_ERROR"
SIZE = "connection FRAME_SIZE_ERROR"
FLOW = "connection FLOW_CONTROL_ERROR"
COMPRESSION = "connection COMPRESSION_ERROR"
CALM = "connection ENHANCE_YOUR_CALM"
STREAM_PROTOCOL = "stream PROTOCOL_ERROR"
STREAM_ENDED = "stream STREAM_CLOSED"
STREAM_SIZE = "stream FRAME_SIZE_ERROR"
STREAM_FLOW = "stream FLOW_CONTROL_ERROR"
REFUSED = "stream REFUSED_STREAM"
NOT_HERE = ""
"""The row does not apply to this role."""


@dataclass(frozen=True)
class Case:
    """One row."""

    section: str
    """The section of RFC 9113; one of another RFC has its number first."""

    what: str
    """A description of the bytes; unique within its section."""

    sent: Callable[[Peer], list[bytes]]

    server: str
    """The listener's answer: "connection CODE" (GOAWAY, further input is ignored), "stream CODE" (RST_STREAM of `on`,
    all other streams continue), NO_FAULT, ANSWERED (it was accepted), CLOSED_SILENTLY, or NOT_HERE."""

    client: str
    """The answer of the connection to etcd."""

    on: int = OPEN
    """The stream that is reset, for "stream CODE"."""

    first: bool = False
    """The bytes are the first that the peer sends, instead of preface and SETTINGS."""

    @property
    def name(self) -> str:
        """Section and text."""
        return f"{self.section} {self.what}"


def both(section: str, what: str, outcome: str, *frames: bytes, on: int = OPEN) -> Case:
    """Make a row of fixed bytes with the same answer in both roles."""
    return Case(section, what, lambda _: list(frames), outcome, outcome, on)


def first(what: str, server: str, client: str, *frames: bytes) -> Case:
    """Make a row of the first bytes of a connection."""
    return Case("3.4", what, lambda _: list(frames), server, client, first=True)


def within(what: str, *frames: bytes) -> Case:
    """Make a row of frames inside a header block; PROTOCOL_ERROR in both roles."""
    begin = raw(HEADERS, 0, OPEN, b"")
    return Case("6.10", f"{what} inside a header block", lambda _: [begin, *frames], PROTOCOL, PROTOCOL)


PREFACE_WRONG = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\rX"

STARTS = (
    first("a preface with one wrong byte", CLOSED_SILENTLY, NOT_HERE, PREFACE_WRONG, settings()),
    first("HTTP/1 instead", CLOSED_SILENTLY, NOT_HERE, b"GET / HTTP/1.1\r\n\r\n"),
    first("HTTP/1 as an answer", NOT_HERE, CLOSED_SILENTLY, b"HTTP/1.1 400 Bad Request\r\n\r\n"),
    first("PING before SETTINGS", PROTOCOL, CLOSED_SILENTLY, ping()),
    first("WINDOW_UPDATE before SETTINGS", PROTOCOL, CLOSED_SILENTLY, update(0, 1)),
    first("GOAWAY before SETTINGS", PROTOCOL, CLOSED_SILENTLY, go_away(0)),
    first("an unknown frame before SETTINGS", PROTOCOL, CLOSED_SILENTLY, raw(0xEE, 0, 0)),
    first("the acknowledgement of SETTINGS as the first one", PROTOCOL, PROTOCOL, settings(None, "ACK")),
    first("SETTINGS on a stream as the first one", PROTOCOL, PROTOCOL, raw(SETTINGS, 0, 1)),
    first("SETTINGS of a wrong size as the first one", SIZE, SIZE, raw(SETTINGS, 0, 0, bytes(5))),
)

LAYOUT = (
    both("4.1", "PING with the reserved bit of the stream id", ANSWERED, raw(PING, 0, 1 << 31, b"reserved")),
    both("4.1", "PING with all undefined flags", ANSWERED, raw(PING, 0xFE, 0, b"allflags")),
    both("4.1", "an unknown type on stream 0", NO_FAULT, raw(0xEE, 0xFF, 0, b"anything")),
    both("4.1", "an unknown type on an idle stream", NO_FAULT, raw(0xEE, 0xFF, 99, b"anything")),
    both("4.1", "an unknown type on a closed stream", NO_FAULT, raw(0xEE, 0xFF, CLOSED, b"anything")),
    both("4.2", "DATA of 16,384 bytes", NO_FAULT, data(OPEN, bytes(16_384))),
    both("4.2", "DATA of 16,385 bytes", SIZE, data(OPEN, bytes(16_385))),
    both("4.2", "only the frame header of DATA of 2^24-1 bytes", SIZE, raw(DATA, 0, OPEN, length=2**24 - 1)),
    both("4.2", "HEADERS of 16,385 bytes", SIZE, raw(HEADERS, 4, OPEN, bytes(16_385))),
    both("4.2", "SETTINGS of 16,386 bytes", SIZE, raw(SETTINGS, 0, 0, bytes(16_386))),
    both("4.2", "an unknown type of 16,385 bytes", SIZE, raw(0xEE, 0, 0, bytes(16_385))),
    both("4.3", "a block that is not HPACK", COMPRESSION, raw(HEADERS, 5, OPEN, b"\xff\xff\xff\xff\xff\xff\xff")),
    both("4.3", "a block that ends inside a field", COMPRESSION, raw(HEADERS, 5, OPEN, b"\x40\x05ab")),
    both("4.3", "a block that is not HPACK, on a closed stream", COMPRESSION, raw(HEADERS, 5, RESET_BY_US, b"\x80")),
    both(
        "4.3",
        "a CONTINUATION that is not HPACK",
        COMPRESSION,
        raw(HEADERS, 1, OPEN),
        raw(CONTINUATION, 4, OPEN, b"\x80"),
    ),
    Case(
        "4.3",
        "a list on a stream that we have reset, and one that refers to it",
        lambda peer: [
            peer.headers(RESET_BY_US, [(b"only-here", b"once")], "END_STREAM"),
            peer.headers(OPEN, [(b"only-here", b"once")], "END_STREAM"),
        ],
        ANSWERED,
        ANSWERED,
    ),
)

STATES = (
    both("5.1", "DATA on an idle stream", PROTOCOL, data(IDLE, b"a")),
    both("5.1", "RST_STREAM on an idle stream", PROTOCOL, rst(IDLE)),
    both("5.1", "WINDOW_UPDATE on an idle stream", PROTOCOL, update(IDLE, 1)),
    both("5.1", "CONTINUATION on an idle stream", PROTOCOL, raw(CONTINUATION, 4, IDLE)),
    both("5.1", "PRIORITY on an idle stream", NO_FAULT, wire.priority(IDLE)),
    Case("5.1", "a response on an idle stream", lambda p: [p.headers(IDLE, wire.RESPONSE)], NOT_HERE, PROTOCOL),
    both("5.1", "DATA on an even stream (only a push could open it)", PROTOCOL, data(2, b"a")),
    both("5.1", "RST_STREAM on an even stream", PROTOCOL, rst(2)),
    both("5.1", "WINDOW_UPDATE on an even stream", PROTOCOL, update(2, 1)),
    Case("5.1", "DATA after END_STREAM", lambda _: [data(ENDED, b"a")], STREAM_ENDED, NO_FAULT, ENDED),
    Case("5.1", "HEADERS after END_STREAM", lambda p: [_late(p, ENDED)], STREAM_ENDED, NO_FAULT, ENDED),
    Case("5.1", "a request after END_STREAM", lambda p: [p.request(ENDED)], STREAM_ENDED, NOT_HERE, ENDED),
    both("5.1", "CONTINUATION after END_STREAM", PROTOCOL, raw(CONTINUATION, 4, ENDED)),
    both("5.1", "WINDOW_UPDATE after END_STREAM", NO_FAULT, update(ENDED, 1)),
    both("5.1", "PRIORITY after END_STREAM", NO_FAULT, wire.priority(ENDED)),
    both("5.1", "RST_STREAM after END_STREAM", NO_FAULT, rst(ENDED)),
    both("5.1", "DATA after both ends", STREAM_ENDED, data(CLOSED, b"a"), on=CLOSED),
    Case("5.1", "HEADERS after both ends", lambda p: [_late(p, CLOSED)], STREAM_ENDED, STREAM_ENDED, CLOSED),
    both("5.1", "CONTINUATION after both ends", PROTOCOL, raw(CONTINUATION, 4, CLOSED)),
    both("5.1", "WINDOW_UPDATE after both ends", NO_FAULT, update(CLOSED, 1)),
    both("5.1", "RST_STREAM after both ends", NO_FAULT, rst(CLOSED)),
    both("5.1", "PRIORITY after both ends", NO_FAULT, wire.priority(CLOSED)),
    both("5.1", "DATA after the peer's RST_STREAM", STREAM_ENDED, data(RESET_BY_PEER, b"a"), on=RESET_BY_PEER),
    Case(
        "5.1",
        "HEADERS after the peer's RST_STREAM",
        lambda p: [_late(p, RESET_BY_PEER)],
        STREAM_ENDED,
        STREAM_ENDED,
        RESET_BY_PEER,
    ),
    both("5.1", "WINDOW_UPDATE after the peer's RST_STREAM", NO_FAULT, update(RESET_BY_PEER, 1)),
    both("5.1", "PRIORITY after the peer's RST_STREAM", NO_FAULT, wire.priority(RESET_BY_PEER)),
    both("5.1", "DATA after our RST_STREAM", NO_FAULT, data(RESET_BY_US, b"a")),
    Case("5.1", "HEADERS after our RST_STREAM", lambda p: [_late(p, RESET_BY_US)], NO_FAULT, NO_FAULT),
    both("5.1", "WINDOW_UPDATE after our RST_STREAM", NO_FAULT, update(RESET_BY_US, 1)),
    both("5.1", "RST_STREAM after our RST_STREAM", NO_FAULT, rst(RESET_BY_US)),
    Case("5.1.1", "a request on an even stream", lambda p: [p.request(2)], PROTOCOL, PROTOCOL),
    Case("5.1.1", "ids that skip some", lambda p: [p.request(99, "END_STREAM")], ANSWERED, NOT_HERE),
    Case("5.1.1", "a request below one that was skipped", lambda p: [p.request(19), p.request(17)], PROTOCOL, NOT_HERE),
    Case("5.1.1", "a request on a stream that is closed", lambda p: [p.request(CLOSED)], PROTOCOL, NOT_HERE),
    Case("5.1.1", "a request on a stream that the peer has reset", lambda p: [p.request(5)], PROTOCOL, NOT_HERE),
    Case(
        "5.1.2",
        "as many requests as MAX_CONCURRENT_STREAMS allows",
        lambda p: [p.request(IDLE), p.request(17)],
        NO_FAULT,
        NOT_HERE,
    ),
    Case(
        "5.1.2",
        "one more request",
        lambda p: [p.request(IDLE), p.request(17), p.request(19)],
        REFUSED,
        NOT_HERE,
        on=19,
    ),
    both("5.4.2", "RST_STREAM for a stream that was reset", NO_FAULT, rst(RESET_BY_PEER)),
)


def _late(peer: Peer, stream_id: int) -> bytes:
    """Return trailers for a stream on which nothing more is allowed."""
    return peer.headers(stream_id, [(b"late", b"1")], "END_STREAM")


FRAMES = (
    both("6.1", "DATA on stream 0", PROTOCOL, raw(DATA, 0, 0, b"a")),
    both("6.1", "padding that fills the frame", NO_FAULT, raw(DATA, 8, OPEN, b"\x04abcd")),
    both("6.1", "padding as long as the frame", PROTOCOL, raw(DATA, 8, OPEN, b"\x05abcd")),
    both("6.1", "padding longer than the frame", PROTOCOL, raw(DATA, 8, OPEN, b"\xffabcd")),
    both("6.1", "PADDED without the padding's length", SIZE, raw(DATA, 8, OPEN)),
    both("6.1", "padding as long as the frame, on a closed stream", PROTOCOL, raw(DATA, 8, RESET_BY_US, b"\x05abcd")),
    Case("6.2", "HEADERS on stream 0", lambda p: [raw(HEADERS, 5, 0, p.block_of(REQUEST))], PROTOCOL, PROTOCOL),
    both("6.2", "padding as long as the frame", PROTOCOL, raw(HEADERS, 0xD, OPEN, b"\x05abcd")),
    both("6.2", "PADDED without the padding's length", SIZE, raw(HEADERS, 0xD, OPEN)),
    both("6.2", "PRIORITY without room for it", SIZE, raw(HEADERS, 0x25, OPEN, bytes(4))),
    both("6.2", "PRIORITY without room for it before the padding", SIZE, raw(HEADERS, 0x2D, OPEN, b"\1" + bytes(5))),
    Case(
        "6.2",
        "padding and PRIORITY with a dependency on itself",
        lambda p: [raw(HEADERS, 0x2D, OPEN, b"\2\0\0\0\1\7" + p.block_of(TRAILERS) + b"\0\0")],
        ANSWERED,
        ANSWERED,
    ),
    both("6.3", "PRIORITY on stream 0", PROTOCOL, raw(PRIORITY, 0, 0, bytes(5))),
    both("6.3", "PRIORITY of 4 bytes", STREAM_SIZE, raw(PRIORITY, 0, OPEN, bytes(4))),
    both("6.3", "PRIORITY of 6 bytes", STREAM_SIZE, raw(PRIORITY, 0, OPEN, bytes(6))),
    both("6.3", "PRIORITY of 4 bytes on a stream that cannot be reset", NO_FAULT, raw(PRIORITY, 0, IDLE, bytes(4))),
    both("6.3", "a dependency on itself (an error in RFC 7540 only)", NO_FAULT, raw(PRIORITY, 0, OPEN, b"\0\0\0\1\7")),
    both("6.4", "RST_STREAM on stream 0", PROTOCOL, raw(RST_STREAM, 0, 0, bytes(4))),
    both("6.4", "RST_STREAM of 3 bytes", SIZE, raw(RST_STREAM, 0, OPEN, bytes(3))),
    both("6.4", "RST_STREAM of 5 bytes", SIZE, raw(RST_STREAM, 0, OPEN, bytes(5))),
    both("6.4", "RST_STREAM of 3 bytes on a closed stream", SIZE, raw(RST_STREAM, 0, CLOSED, bytes(3))),
    both("6.4", "RST_STREAM with an unknown code (7)", NO_FAULT, rst(OPEN, 0x4711)),
    both("6.5", "empty SETTINGS", ANSWERED, settings()),
    both("6.5", "SETTINGS on a stream", PROTOCOL, raw(SETTINGS, 0, OPEN)),
    both("6.5", "SETTINGS of 5 bytes", SIZE, raw(SETTINGS, 0, 0, bytes(5))),
    both("6.5", "SETTINGS of 7 bytes", SIZE, raw(SETTINGS, 0, 0, bytes(7))),
    both("6.5", "an acknowledgement with a payload", SIZE, raw(SETTINGS, 1, 0, bytes(6))),
    both("6.5", "an acknowledgement on a stream", PROTOCOL, raw(SETTINGS, 1, OPEN)),
    both("6.5", "an acknowledgement that is not due", NO_FAULT, settings(None, "ACK")),
    both("6.5.2", "ENABLE_PUSH 0", ANSWERED, settings({2: 0})),
    Case("6.5.2", "ENABLE_PUSH 1", lambda _: [settings({2: 1})], ANSWERED, PROTOCOL),
    both("6.5.2", "ENABLE_PUSH 2", PROTOCOL, raw(SETTINGS, 0, 0, b"\0\2\0\0\0\2")),
    both("6.5.2", "INITIAL_WINDOW_SIZE 2^31-1", ANSWERED, settings({4: 2**31 - 1})),
    both("6.5.2", "INITIAL_WINDOW_SIZE 2^31", FLOW, raw(SETTINGS, 0, 0, b"\0\4\x80\0\0\0")),
    both("6.5.2", "INITIAL_WINDOW_SIZE 2^32-1", FLOW, raw(SETTINGS, 0, 0, b"\0\4\xff\xff\xff\xff")),
    both("6.5.2", "MAX_FRAME_SIZE 16,383", PROTOCOL, raw(SETTINGS, 0, 0, b"\0\5\0\0\x3f\xff")),
    both("6.5.2", "MAX_FRAME_SIZE 16,384, then 2^24-1", ANSWERED, settings({5: 16_384}), settings({5: 2**24 - 1})),
    both("6.5.2", "MAX_FRAME_SIZE 2^24", PROTOCOL, raw(SETTINGS, 0, 0, b"\0\5\1\0\0\0")),
    both("6.5.2", "HEADER_TABLE_SIZE 0, then 2^32-1", ANSWERED, settings({1: 0}), settings({1: 2**32 - 1})),
    both("6.5.2", "MAX_HEADER_LIST_SIZE 0", ANSWERED, settings({6: 0})),
    both("6.5.2", "an unknown setting", ANSWERED, raw(SETTINGS, 0, 0, b"\x47\x11\xff\xff\xff\xff")),
    both("6.5.3", "one setting twice: the last value counts", ANSWERED, raw(SETTINGS, 0, 0, b"\0\5\0\0\x40\0" * 2)),
    both("8441 3", "ENABLE_CONNECT_PROTOCOL 2", PROTOCOL, raw(SETTINGS, 0, 0, b"\0\x08\0\0\0\2")),
    both("6.6", "PUSH_PROMISE", PROTOCOL, wire.push_promise(OPEN)),
    both("6.6", "PUSH_PROMISE on stream 0", PROTOCOL, raw(PUSH_PROMISE, 4, 0, b"\0\0\0\2")),
    both("6.6", "PUSH_PROMISE without room for an id", PROTOCOL, raw(PUSH_PROMISE, 4, OPEN, b"\0")),
    both("6.7", "PING", ANSWERED, ping(b"answered")),
    both("6.7", "the acknowledgement of a PING that was not sent", NO_FAULT, ping(b"nobodys.", "ACK")),
    both("6.7", "PING on a stream", PROTOCOL, raw(PING, 0, OPEN, bytes(8))),
    both("6.7", "PING of 0 bytes", SIZE, raw(PING, 0, 0)),
    both("6.7", "PING of 7 bytes", SIZE, raw(PING, 0, 0, bytes(7))),
    both("6.7", "PING of 9 bytes", SIZE, raw(PING, 0, 0, bytes(9))),
    both("6.7", "an acknowledgement of 6 bytes", SIZE, raw(PING, 1, 0, bytes(6))),
    both("6.8", "GOAWAY on a stream", PROTOCOL, raw(GOAWAY, 0, OPEN, bytes(8))),
    both("6.8", "GOAWAY of 7 bytes", SIZE, raw(GOAWAY, 0, 0, bytes(7))),
    both("6.8", "GOAWAY above all streams, with an unknown code", NO_FAULT, go_away(2**31 - 1, 0x4711, b"x")),
    Case("6.8", "GOAWAY below all streams", lambda _: [go_away(0)], NO_FAULT, CLOSED_SILENTLY),
)

WINDOWS = (
    both("6.9", "WINDOW_UPDATE of 0 for the connection", PROTOCOL, raw(WINDOW_UPDATE, 0, 0, bytes(4))),
    both("6.9", "WINDOW_UPDATE of 0 for a stream", STREAM_PROTOCOL, raw(WINDOW_UPDATE, 0, OPEN, bytes(4))),
    both("6.9", "WINDOW_UPDATE of the reserved bit alone", STREAM_PROTOCOL, raw(WINDOW_UPDATE, 0, OPEN, b"\x80\0\0\0")),
    both("6.9", "WINDOW_UPDATE with the reserved bit", NO_FAULT, raw(WINDOW_UPDATE, 0, OPEN, b"\x80\0\0\1")),
    both("6.9", "WINDOW_UPDATE of 3 bytes", SIZE, raw(WINDOW_UPDATE, 0, OPEN, bytes(3))),
    both("6.9", "WINDOW_UPDATE of 5 bytes", SIZE, raw(WINDOW_UPDATE, 0, 0, bytes(5))),
    both("6.9", "WINDOW_UPDATE of 3 bytes on a closed stream", SIZE, raw(WINDOW_UPDATE, 0, CLOSED, bytes(3))),
    both("6.9.1", "a stream's window at 2^31-1", NO_FAULT, update(OPEN, 2**31 - 1 - 65_535)),
    both("6.9.1", "a stream's window at 2^31", STREAM_FLOW, update(OPEN, 2**31 - 65_535)),
    both("6.9.1", "a stream's window at 2^31 in two steps", STREAM_FLOW, update(OPEN, 2**30), update(OPEN, 2**30)),
    both("6.9.1", "the connection's window at 2^31-1", NO_FAULT, update(0, 2**31 - 1 - 65_535)),
    both("6.9.1", "the connection's window at 2^31", FLOW, update(0, 2**31 - 65_535)),
    both("6.9.1", "DATA up to the stream's window", NO_FAULT, *[data(OPEN, bytes(WINDOW_BYTES // 5))] * 5),
    both("6.9.1", "DATA beyond it", STREAM_FLOW, *[data(OPEN, bytes(WINDOW_BYTES // 5))] * 5, data(OPEN, b"a")),
    both("6.9.1", "padding beyond it", STREAM_FLOW, *[data(OPEN, bytes(14_000))] * 5, raw(DATA, 8, OPEN, b"\0")),
    both("6.9.1", "empty DATA at a window of 0", NO_FAULT, *[data(OPEN, bytes(14_000))] * 5, data(OPEN, b"")),
    Case(
        "6.9.1",
        "DATA beyond the connection's window",
        lambda p: [p.request(IDLE), p.request(17), *[data(one, bytes(15_000)) for one in (1, 15, 17)] * 4],
        FLOW,
        NOT_HERE,
    ),
    Case(
        "6.9.1",
        "DATA beyond the connection's window, in answers",
        lambda p: [
            *[p.headers(one, wire.RESPONSE) for one in (BYSTANDER, PROMISED)],
            *[data(one, bytes(15_000)) for one in (OPEN, BYSTANDER, PROMISED)] * 4,
        ],
        NOT_HERE,
        FLOW,
    ),
    both("6.9.2", "a window that SETTINGS raise above 2^31-1", FLOW, update(OPEN, 2**30), settings({4: 2**31 - 1})),
    both("6.9.2", "a window that SETTINGS lower below 0", ANSWERED, settings({4: 0})),
)

BLOCKS = (
    within("DATA", data(OPEN, b"a")),
    within("HEADERS of the same stream", raw(HEADERS, 4, OPEN)),
    within("HEADERS of another stream", raw(HEADERS, 4, BYSTANDER)),
    within("PRIORITY", wire.priority(OPEN)),
    within("RST_STREAM", rst(OPEN)),
    within("SETTINGS", settings()),
    within("PUSH_PROMISE", wire.push_promise(OPEN)),
    within("PING", ping()),
    within("GOAWAY", go_away(0)),
    within("WINDOW_UPDATE", update(0, 1)),
    within("an unknown frame (5.5)", raw(0xEE, 0, OPEN)),
    within("CONTINUATION of another stream", raw(CONTINUATION, 4, BYSTANDER)),
    within("CONTINUATION of stream 0", raw(CONTINUATION, 4, 0)),
    both("6.10", "CONTINUATION on stream 0", PROTOCOL, raw(CONTINUATION, 4, 0)),
    both("6.10", "CONTINUATION without HEADERS", PROTOCOL, raw(CONTINUATION, 4, OPEN)),
    both("6.10", "CONTINUATION after DATA", PROTOCOL, data(OPEN, b"a"), raw(CONTINUATION, 4, OPEN)),
    Case(
        "6.10",
        "CONTINUATION after END_HEADERS",
        lambda p: [p.headers(RESET_BY_US, TRAILERS), raw(CONTINUATION, 4, RESET_BY_US)],
        PROTOCOL,
        PROTOCOL,
    ),
    Case(
        "6.10",
        "CONTINUATION after a CONTINUATION with END_HEADERS",
        lambda p: [*p.in_parts(RESET_BY_US, TRAILERS, 5), raw(CONTINUATION, 4, RESET_BY_US)],
        PROTOCOL,
        PROTOCOL,
    ),
    Case(
        "6.10", "a list in parts of 2 bytes", lambda p: p.in_parts(OPEN, TRAILERS, 2, "END_STREAM"), ANSWERED, ANSWERED
    ),
    Case(
        "6.10",
        "empty HEADERS and CONTINUATIONs before the last one",
        lambda p: [raw(HEADERS, 1, OPEN), raw(CONTINUATION, 0, OPEN), raw(CONTINUATION, 4, OPEN, p.block_of(TRAILERS))],
        ANSWERED,
        ANSWERED,
    ),
    both(
        "10.5.1",
        f"{CONTINUATIONS_MAX + 1} CONTINUATIONs",
        CALM,
        raw(HEADERS, 1, OPEN),
        *[raw(CONTINUATION, 0, OPEN)] * (CONTINUATIONS_MAX + 1),
    ),
)

EXTENSIONS = (
    both("9218 7.1", "PRIORITY_UPDATE", NO_FAULT, raw(0x10, 0, 0, b"\0\0\0\1u=0, i")),
    both("9218 7.1", "PRIORITY_UPDATE on a stream", NO_FAULT, raw(0x10, 0, OPEN, b"\0\0\0\1u=0")),
    both("9218 7.1", "PRIORITY_UPDATE of 1 byte", NO_FAULT, raw(0x10, 0, 0, b"\0")),
    both("9218 2.1", "NO_RFC7540_PRIORITIES 1", ANSWERED, raw(SETTINGS, 0, 0, b"\0\x09\0\0\0\1")),
    both("7838 4", "ALTSVC", NO_FAULT, raw(0xA, 0, OPEN, b'\0\0h2=":1"')),
    both("8336 2", "ORIGIN", NO_FAULT, raw(0xC, 0, 0, b"\0\4http")),
)

CASES = (*STARTS, *LAYOUT, *STATES, *FRAMES, *WINDOWS, *BLOCKS, *EXTENSIONS)
