"""A server's reaction to each kind of frame: bytes in, events and bytes out. Each row is sent whole and bytewise."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proto.http2 import Connection, ErrorCode, Role
from tests.http2 import wire
from tests.http2.wire import PREFACE, Peer, data, ping, raw, rst, server, settings, update

Row = tuple[Callable[[Peer], list[bytes]], list[str], list[str]]

HANDSHAKE: dict[str, tuple[bytes, list[str]]] = {
    "settings": (PREFACE + settings(), ["settings"]),
    "settings with values and more": (PREFACE + settings({3: 1}) + ping(), ["settings"]),
    "HTTP/1": (b"GET / HTTP/1.1\r\n", ["failed PROTOCOL_ERROR"]),
    "preface with one wrong byte": (PREFACE[:-1] + b"x" + settings(), ["failed PROTOCOL_ERROR"]),
    "something before SETTINGS": (PREFACE + ping() + settings(), ["failed PROTOCOL_ERROR"]),
    "an acknowledgement first": (PREFACE + settings(None, "ACK"), ["failed PROTOCOL_ERROR"]),
    "window update first": (PREFACE + update(0, 1), ["failed PROTOCOL_ERROR"]),
}


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("name", HANDSHAKE)
def test_a_client_must_begin_with_preface_and_settings(name: str, bytewise: bool) -> None:
    """http2 point 7 (RFC 9113 3.4)."""
    sent, expected = HANDSHAKE[name]
    connection = Connection(Role.SERVER)
    connection.start()
    assert Peer(connection).receive(sent, bytewise=bytewise) == expected
    assert connection.closed == (expected[0] != "settings")


CLIENT_HANDSHAKE = {
    "settings": (settings(), ["settings"]),
    "HTTP/1": (b"HTTP/1.1 400 Bad Request\r\n", ["failed PROTOCOL_ERROR"]),
    "goaway first": (wire.go_away(0), ["failed PROTOCOL_ERROR"]),
}


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("name", CLIENT_HANDSHAKE)
def test_a_server_must_begin_with_settings(name: str, bytewise: bool) -> None:
    """http2 point 7 (RFC 9113 3.4)."""
    sent, expected = CLIENT_HANDSHAKE[name]
    connection = Connection(Role.CLIENT)
    connection.start()
    assert Peer(connection).receive(sent, bytewise=bytewise) == expected


def fails(code: str) -> tuple[list[str], list[str]]:
    """Return the outcome of a connection error."""
    return [f"failed {code}"], [f"GOAWAY 1 {code}"]


def breaks(code: str) -> tuple[list[str], list[str]]:
    """Return the outcome of a stream error on stream 1."""
    return [f"reset 1 {code}"], [f"RST_STREAM 1 {code}"]


OPENED: dict[str, Row] = {
    # http2 point 6: PING (6.7)
    "ping": (lambda _: [ping(b"abcdefgh")], [], ["PING abcdefgh ack"]),
    "ping ack is not answered": (lambda _: [ping(b"abcdefgh", "ACK")], ["pong abcdefgh"], []),
    "ping too long": (lambda _: [raw(6, 0, 0, bytes(9))], *fails("FRAME_SIZE_ERROR")),
    "ping too short": (lambda _: [raw(6, 0, 0, bytes(7))], *fails("FRAME_SIZE_ERROR")),
    "ping on a stream": (lambda _: [raw(6, 0, 1, bytes(8))], *fails("PROTOCOL_ERROR")),
    # http2 point 5: WINDOW_UPDATE (6.9, 6.9.1, 5.1)
    "update of the connection": (lambda _: [update(0, 5000)], [], []),
    "update of the stream": (lambda _: [update(1, 5000)], [], []),
    "update with the reserved bit": (lambda _: [raw(8, 0, 1, b"\x80\0\0\x05")], [], []),
    "update of a wrong size": (lambda _: [raw(8, 0, 1, bytes(5))], *fails("FRAME_SIZE_ERROR")),
    "update of nothing, connection": (lambda _: [raw(8, 0, 0, bytes(4))], *fails("PROTOCOL_ERROR")),
    "update of nothing, stream": (lambda _: [raw(8, 0, 1, bytes(4))], *breaks("PROTOCOL_ERROR")),
    "update of nothing but the reserved bit": (lambda _: [raw(8, 0, 1, b"\x80\0\0\0")], *breaks("PROTOCOL_ERROR")),
    "connection window at its maximum": (lambda _: [update(0, 2**31 - 1 - 65_535)], [], []),
    "connection window overflows": (lambda _: [update(0, 2**31 - 65_535)], *fails("FLOW_CONTROL_ERROR")),
    "stream window at its maximum": (lambda _: [update(1, 2**31 - 1 - 65_535)], [], []),
    "stream window overflows": (lambda _: [update(1, 2**31 - 65_535)], *breaks("FLOW_CONTROL_ERROR")),
    "update on an idle stream": (lambda _: [update(3, 1)], *fails("PROTOCOL_ERROR")),
    "update on an even stream": (lambda _: [update(2, 1)], *fails("PROTOCOL_ERROR")),
    "update on a closed stream": (lambda _: [rst(1), update(1, 1)], ["reset 1 CANCEL by peer"], []),
    "update of nothing on a closed stream": (
        lambda _: [rst(1), raw(8, 0, 1, bytes(4))],
        ["reset 1 CANCEL by peer"],
        [],
    ),
    # http2 point 8: DATA (5.1, 6.1)
    "data": (lambda _: [data(1, b"abc")], ["data 1 3"], []),
    "data and end": (lambda _: [data(1, b"abc"), data(1, b"", "END_STREAM")], ["data 1 3", "data 1 0 END"], []),
    "padded data": (lambda _: [data(1, b"abc", "END_STREAM", padding=7)], ["data 1 3 END"], []),
    "padding only": (lambda _: [data(1, b"", padding=7)], [], []),
    "padding that fills the frame": (lambda _: [raw(0, 0x8, 1, b"\x04abcd")], [], []),
    "padding longer than the frame": (lambda _: [raw(0, 0x8, 1, b"\x05abcd")], *fails("PROTOCOL_ERROR")),
    "padded frame without the padding's length": (lambda _: [raw(0, 0x8, 1)], *fails("FRAME_SIZE_ERROR")),
    "data on stream 0": (
        lambda _: [data(1, b"a"), raw(0, 0, 0, b"a")],
        ["data 1 1", "failed PROTOCOL_ERROR"],
        ["GOAWAY 1 PROTOCOL_ERROR"],
    ),
    "data on an idle stream": (lambda _: [data(3, b"a")], *fails("PROTOCOL_ERROR")),
    "data after the end": (
        lambda _: [data(1, b"", "END_STREAM"), data(1, b"a")],
        ["data 1 0 END", "reset 1 STREAM_CLOSED"],
        ["RST_STREAM 1 STREAM_CLOSED"],
    ),
    "data after the peer's reset": (
        lambda _: [rst(1), data(1, b"a")],
        ["reset 1 CANCEL by peer"],
        ["RST_STREAM 1 STREAM_CLOSED"],
    ),
    "empty data is counted, not reported": (lambda _: [data(1, b"")], [], []),
    # HEADERS (6.2, 5.1.1)
    "another request": (lambda peer: [peer.request(3, "END_STREAM")], ["request 3 END"], []),
    "ids may be skipped": (lambda peer: [peer.request(9)], ["request 9"], []),
    "padded request": (lambda peer: [peer.headers(3, wire.REQUEST, padding=3)], ["request 3"], []),
    "request with priority": (
        lambda peer: [raw(1, 0x24, 3, bytes(5) + peer.block_of(wire.REQUEST))],
        ["request 3"],
        [],
    ),
    "no room for the priority": (lambda _: [raw(1, 0x24, 3, bytes(4))], *fails("FRAME_SIZE_ERROR")),
    "even id": (lambda peer: [peer.request(2)], *fails("PROTOCOL_ERROR")),
    "request on stream 0": (lambda peer: [raw(1, 4, 0, peer.block_of(wire.REQUEST))], *fails("PROTOCOL_ERROR")),
    "id decreases": (
        lambda peer: [peer.request(9), peer.request(7)],
        ["request 9", "failed PROTOCOL_ERROR"],
        ["GOAWAY 9 PROTOCOL_ERROR"],
    ),
    "id used again": (
        lambda peer: [rst(1), peer.request(1)],
        ["reset 1 CANCEL by peer", "failed PROTOCOL_ERROR"],
        ["GOAWAY 1 PROTOCOL_ERROR"],
    ),
    "trailers": (lambda peer: [peer.headers(1, [(b"x", b"y")], "END_STREAM")], ["trailers 1 END"], []),
    "trailers that do not end": (lambda peer: [peer.headers(1, [(b"x", b"y")])], *breaks("PROTOCOL_ERROR")),
    "headers after the end": (
        lambda peer: [data(1, b"", "END_STREAM"), peer.headers(1, [(b"x", b"y")], "END_STREAM")],
        ["data 1 0 END", "reset 1 STREAM_CLOSED"],
        ["RST_STREAM 1 STREAM_CLOSED"],
    ),
    "trailers after the peer's reset": (
        lambda peer: [rst(1), peer.headers(1, [(b"x", b"y")], "END_STREAM"), peer.request(3)],
        ["reset 1 CANCEL by peer", "request 3"],
        ["RST_STREAM 1 STREAM_CLOSED"],
    ),
    "invalid header block": (
        lambda _: [raw(1, 4, 3, b"\xff\xff\xff\xff\xff\xff\xff")],
        *fails("COMPRESSION_ERROR"),
    ),
    "header block cut off": (lambda _: [raw(1, 4, 3, b"\x40\x05ab")], *fails("COMPRESSION_ERROR")),
    # CONTINUATION (6.10)
    "request in parts": (lambda peer: peer.in_parts(3, wire.REQUEST, 2, "END_STREAM"), ["request 3 END"], []),
    "ping between the parts": (lambda peer: [peer.in_parts(3, wire.REQUEST, 2)[0], ping()], *fails("PROTOCOL_ERROR")),
    "part of another stream": (
        lambda peer: [peer.in_parts(3, wire.REQUEST, 2)[0], raw(9, 4, 5, b"")],
        *fails("PROTOCOL_ERROR"),
    ),
    "continuation without headers": (lambda _: [raw(9, 4, 1, b"")], *fails("PROTOCOL_ERROR")),
    # RST_STREAM (6.4)
    "reset": (lambda _: [rst(1)], ["reset 1 CANCEL by peer"], []),
    "reset with an unknown code": (lambda _: [rst(1, 0x4711)], ["reset 1 INTERNAL_ERROR by peer"], []),
    "reset twice": (lambda _: [rst(1), rst(1)], ["reset 1 CANCEL by peer"], []),
    "reset of an idle stream": (lambda _: [rst(3)], *fails("PROTOCOL_ERROR")),
    "reset of stream 0": (lambda _: [raw(3, 0, 0, bytes(4))], *fails("PROTOCOL_ERROR")),
    "reset of a wrong size": (lambda _: [raw(3, 0, 1, bytes(3))], *fails("FRAME_SIZE_ERROR")),
    # PRIORITY (6.3)
    "priority": (lambda _: [wire.priority(1), wire.priority(99)], [], []),
    "priority of stream 0": (lambda _: [raw(2, 0, 0, bytes(5))], *fails("PROTOCOL_ERROR")),
    "priority of a wrong size": (lambda _: [raw(2, 0, 1, bytes(4))], *breaks("FRAME_SIZE_ERROR")),
    "priority of a wrong size on an idle stream": (lambda _: [raw(2, 0, 77, bytes(4))], [], []),
    # GOAWAY (6.8)
    "goaway": (lambda _: [wire.go_away(0, debug=b"bye"), data(1, b"a")], ["goaway 0 NO_ERROR bye", "data 1 1"], []),
    "goaway on a stream": (lambda _: [raw(7, 0, 1, bytes(8))], *fails("PROTOCOL_ERROR")),
    "goaway of a wrong size": (lambda _: [raw(7, 0, 0, bytes(7))], *fails("FRAME_SIZE_ERROR")),
    # http2 point 15 (5.5, 8.4)
    "unknown frame": (lambda _: [raw(0xEE, 0xFF, 1, b"anything"), raw(0xEE, 0, 0), ping()], [], ["PING 12345678 ack"]),
    "push": (lambda _: [wire.push_promise(1)], *fails("PROTOCOL_ERROR")),
}


@pytest.mark.parametrize("bytewise", [False, True])
@pytest.mark.parametrize("name", OPENED)
def test_frames_to_a_server_with_stream_1_open(name: str, bytewise: bool) -> None:
    """Points 5, 6, 8, 15, 17 of the connection's list, and the layout of every frame."""
    sent, events, answers = OPENED[name]
    connection, peer = server()
    assert peer.receive(peer.request(1)) == ["request 1"]
    assert peer.receive(*sent(peer), bytewise=bytewise) == events
    assert peer.said() == answers
    assert connection.closed == any(line.startswith("failed") for line in events)


@pytest.mark.parametrize("name", [name for name, row in OPENED.items() if any("failed" in line for line in row[1])])
def test_input_after_a_connection_error_is_ignored(name: str) -> None:
    """A closed connection ignores bytes, calls and a drained transport."""
    sent, _, _ = OPENED[name]
    connection, peer = server()
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    peer.receive(*sent(peer))
    peer.said()
    assert connection.receive(ping() + b"garbage") == []
    connection.pause()
    assert connection.resume() == []
    connection.consumed(stream, 2**30)
    connection.ping(b"12345678")
    connection.send_headers(stream, wire.RESPONSE)
    assert connection.send(stream, [b"abc"], 3)
    connection.reset(stream, ErrorCode.CANCEL)
    connection.go_away(last=True)
    assert connection.output() == []
