"""The fast paths: `receive_data` has the same effect as `receive` for one whole DATA frame, `frame` the same as `send`;
anything else they leave alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proto.http2 import UPDATE_AND_PING_BYTES, Connection, ErrorCode, Http2Limits, Stream
from proto.http2.frames import BANDWIDTH_PING
from proto.http2.limits import LATE_ACK_BYTES_MAX, LATE_ACK_GAP_S, LATE_ACK_WINDOW_MIN
from tests.http2 import wire
from tests.http2.wire import Peer, client, data, event_lines, raw, server, update

WINDOW = 70_000


def answered(*more: tuple[bytes, bytes]) -> tuple[Connection, Peer]:
    """Return a client with a call on stream 1 that has its response's headers."""
    connection, peer = client(limits=Http2Limits(initial_window=WINDOW))
    connection.open(wire.REQUEST)
    peer.receive(wire.settings(None, "ACK"), peer.headers(1, [*wire.RESPONSE, *more]))
    peer.said()
    return connection, peer


def state(connection: Connection) -> tuple[object, ...]:
    stream = connection.streams.get(1)
    return connection.receive_window, connection.closed, stream and (stream.receive_window, stream.state)


@pytest.mark.parametrize("size", [1, 100, 16_384])
def test_receive_data_equals_receive_for_one_frame(size: int) -> None:
    quick, _ = answered()
    ever, _ = answered()
    assert quick.receive_data(data(1, bytes(size))) is quick.streams[1]
    assert event_lines(ever.receive(data(1, bytes(size)))) == [f"data 1 {size}"]
    assert state(quick) == state(ever)


NOT_TAKEN: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "half a frame header": lambda: data(1, b"x")[:5],
    "a frame header": lambda: data(1, b"xy")[:9],
    "half a frame": lambda: data(1, b"xy")[:-1],
    "a frame and a byte": lambda: data(1, b"xy") + b"\0",
    "two frames": lambda: data(1, b"xy") + data(1, b"z"),
    "an empty frame": lambda: data(1, b""),
    "the last frame": lambda: data(1, b"x", "END_STREAM"),
    "padding": lambda: data(1, b"x", padding=3),
    "an undefined flag": lambda: raw(0, 0x40, 1, b"x"),
    "another stream": lambda: data(3, b"x"),
    "stream 0": lambda: raw(0, 0, 0, b"x"),
    "another type": lambda: wire.ping(),
    "too large a frame": lambda: data(1, bytes(16_385)),
}


@pytest.mark.parametrize("name", NOT_TAKEN)
def test_receive_data_ignores_anything_else(name: str) -> None:
    connection, _ = answered()
    before = state(connection)
    assert connection.receive_data(NOT_TAKEN[name]()) is None
    assert state(connection) == before
    assert connection.output() == []


def test_receive_data_ignores_a_frame_inside_another() -> None:
    connection, peer = answered()
    whole = data(1, data(1, b"x"))
    peer.receive(whole[:9])
    assert connection.receive_data(whole[9:]) is None
    assert peer.receive(whole[9:]) == [f"data 1 {len(whole) - 9}"]


def test_receive_data_ignores_frames_inside_a_header_block() -> None:
    connection, peer = answered()
    peer.receive(peer.in_parts(1, wire.TRAILERS, 5, "END_STREAM")[0])
    assert connection.receive_data(data(1, b"x")) is None
    assert peer.receive(data(1, b"x")) == ["failed PROTOCOL_ERROR"]


def test_receive_data_ignores_overruns_and_content_length() -> None:
    connection, peer = answered()
    for _ in range(WINDOW // 10_000):
        assert connection.receive_data(data(1, bytes(10_000))) is not None
    assert connection.receive_data(data(1, b"x")) is None
    assert peer.receive(data(1, b"x")) == ["reset 1 FLOW_CONTROL_ERROR"]
    promised, _ = answered((b"content-length", b"2"))
    assert promised.receive_data(data(1, b"x")) is None


def test_receive_data_ignores_frames_before_headers_or_after_end() -> None:
    connection, peer = client()
    connection.open(wire.REQUEST)
    assert connection.receive_data(data(1, b"x")) is None
    peer.receive(peer.headers(1, wire.RESPONSE), data(1, b"x", "END_STREAM"))
    assert connection.receive_data(data(1, b"x")) is None
    assert event_lines(connection.receive(data(1, b"x"))) == ["reset 1 STREAM_CLOSED"]


def asked(window: int = WINDOW) -> tuple[Connection, Stream]:
    """Return a server with a request on stream 1 to which it has sent response headers."""
    connection, peer = wire.server(peer_settings={4: window})
    peer.receive(peer.headers(1, wire.REQUEST))
    stream = connection.streams[1]
    connection.send_headers(stream, wire.RESPONSE)
    connection.output()
    return connection, stream


@pytest.mark.parametrize("size", [1, 100, 16_384])
def test_frame_returns_the_bytes_that_send_queues(size: int) -> None:
    quick, at_once = asked()
    ever, queued = asked()
    assert ever.send(queued, (bytes(size),), size)
    assert quick.frame(at_once, bytes(size), size) == b"".join(ever.output())
    assert (quick.send_window, at_once.send_window) == (ever.send_window, queued.send_window)
    assert quick.output() == []
    assert quick.progress() == ever.progress()


WAITING: dict[str, Callable[[Connection, Stream], object]] = {
    "the output is not empty": lambda connection, _: connection.ping(b"12345678"),
    "the transport is full": lambda connection, _: connection.pause(),
    "the stream has no window": lambda connection, stream: connection.send(stream, (bytes(99),), 99),
    "the stream has ended": lambda connection, stream: connection.send(stream, (), 0, True),
    "a flood counter is above zero": lambda connection, _: connection.receive(update(0, 1) * 500),
    "the stream was reset": lambda connection, stream: connection.reset(stream, ErrorCode.CANCEL),
}


@pytest.mark.parametrize("name", WAITING)
def test_frame_returns_none_if_send_would_wait_or_drop(name: str) -> None:
    connection, stream = asked(window=100)
    WAITING[name](connection, stream)
    if name != "the output is not empty":
        connection.output()
    before = connection.send_window, stream.send_window
    assert connection.frame(stream, b"xy", 2) is None
    assert (connection.send_window, stream.send_window) == before


def test_frame_returns_none_above_the_peers_frame_size() -> None:
    connection, stream = asked()
    assert connection.frame(stream, bytes(16_385), 16_385) is None


def served() -> tuple[Connection, Peer, Stream]:
    """Return a server with an open stream, after everything before it is written."""
    connection, peer = server()
    peer.receive(peer.request(1))
    connection.output()
    connection.output()
    return connection, peer, connection.streams[1]


def test_update_and_ping_equal_receive() -> None:
    both = update(0, 123) + wire.ping(b"12345678")
    assert len(both) == UPDATE_AND_PING_BYTES
    quick, _, _ = served()
    ever, _, _ = served()
    assert quick.receive_update_and_ping(both) == wire.ping(b"12345678", "ACK")
    ever.receive(both)
    assert b"".join(ever.output()) == wire.ping(b"12345678", "ACK")
    assert (quick.send_window, quick.progress(), quick._flood) == (ever.send_window, ever.progress(), ever._flood)


BOTH_ELSE: dict[str, bytes] = {
    "an update of a stream": update(1, 123) + wire.ping(b"12345678"),
    "an acknowledged ping": update(0, 123) + wire.ping(b"12345678", "ACK"),
    "an update of nothing": update(0, 0) + wire.ping(b"12345678"),
    "an update above 2^31-1": update(0, 2**31 - 1) + wire.ping(b"12345678"),
    "the other order": wire.ping(b"12345678") + update(0, 123),
    "two updates": update(0, 1) + update(0, 2) + bytes(4),
}


@pytest.mark.parametrize("name", BOTH_ELSE)
def test_update_and_ping_ignore_anything_else(name: str) -> None:
    connection, _, _ = served()
    before = connection.send_window
    assert connection.receive_update_and_ping(BOTH_ELSE[name]) is None
    assert connection.send_window == before


def test_update_and_ping_leave_waiting_data_to_receive() -> None:
    """With data that waits for the window, or a flood counter above zero, `receive` has more to do."""
    connection, _, stream = served()
    both = update(0, 123) + wire.ping(b"12345678")
    connection.receive(update(1, 1_000_000))
    connection.output()
    connection.output()
    assert not connection.send(stream, [bytes(70_000)], 70_000)
    assert connection.receive_update_and_ping(both) is None
    flooded, _, _ = served()
    flooded.receive(wire.ping(b"12345678"))
    assert flooded.receive_update_and_ping(both) is None


ASK = update(0, 123) + wire.ping(BANDWIDTH_PING)
ACKNOWLEDGED = wire.ping(BANDWIDTH_PING, "ACK")


def asked_at(now: float) -> Connection:
    """Return a server whose client's BANDWIDTH_PING was acknowledged at `now`."""
    connection, _, _ = served()
    connection.now = now
    assert connection.receive_update_and_ping(ASK) == ACKNOWLEDGED
    return connection


def test_bandwidth_ping_soon_after_another_waits() -> None:
    connection = asked_at(10.0)
    connection.now = 10.2
    assert connection.receive_update_and_ping(ASK) == b""
    assert connection.output() == []
    connection.acknowledge_late(11.2)
    connection.acknowledge_late(11.2)
    assert connection.output() == [ACKNOWLEDGED]
    connection.now = 11.4
    assert connection.receive_update_and_ping(ASK) == b""


AT_ONCE: dict[str, tuple[float, bytes, int]] = {
    "another payload": (10.2, b"12345678", 123),
    "late enough": (10.0 + LATE_ACK_GAP_S, BANDWIDTH_PING, 123),
    "much was read": (10.2, BANDWIDTH_PING, LATE_ACK_BYTES_MAX + 1),
}


@pytest.mark.parametrize("name", AT_ONCE)
def test_a_ping_is_acknowledged_at_once(name: str) -> None:
    now, payload, increment = AT_ONCE[name]
    connection = asked_at(10.0)
    connection.now = now
    assert connection.receive_update_and_ping(update(0, increment) + wire.ping(payload)) == wire.ping(payload, "ACK")


def test_each_bandwidth_ping_is_acknowledged() -> None:
    """A client may send further ones, or return more of a window, while one waits; grpc-go does the latter only."""
    connection = asked_at(10.0)
    connection.now = 10.1
    assert connection.receive_update_and_ping(ASK) == b""
    assert connection.receive_update_and_ping(ASK) == ACKNOWLEDGED
    connection.receive(update(0, 20_000) + update(1, 20_000))
    assert connection.output() == []
    connection.send_window = LATE_ACK_WINDOW_MIN - 1
    connection.receive(update(0, 20_000))
    assert b"".join(connection.output()) == ACKNOWLEDGED
    connection.acknowledge_late(10.3)
    assert connection.output() == []
