"""Every limit at its edge: exactly the limit is accepted, one more ends the connection with ENHANCE_YOUR_CALM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from proto.http2 import Connection, ErrorCode, Http2Limits, LimitReached, Role
from proto.http2.compression import FIELD_OVERHEAD_BYTES
from proto.http2.sending import CROSSING_FRAMES
from tests.http2 import wire
from tests.http2.test_fuzz import LIMITS, script
from tests.http2.wire import Peer, data, event_lines, ping, raw, rst, server, settings, update

LIMIT = 50
EDGE = Http2Limits(
    resets_max=LIMIT,
    pings_max=LIMIT,
    # The handshake's SETTINGS does not count: its counter decreases when the output is taken.
    settings_max=LIMIT,
    empty_data_max=LIMIT,
    tiny_updates_max=LIMIT,
    ignored_max=LIMIT,
    paused_requests_max=LIMIT,
    continuations_max=LIMIT,
    max_streams=1_000,
)

# The n-th piece of each flood. Stream 1 is open; n starts at 0.
FLOODS: dict[str, Callable[[Peer, int], bytes]] = {
    "PING": lambda _peer, _n: ping(),
    "PING acknowledgements": lambda _peer, _n: ping(b"12345678", "ACK"),
    "SETTINGS": lambda _peer, _n: settings(),
    "empty DATA": lambda _peer, _n: data(1, b""),
    "DATA of padding only": lambda _peer, _n: data(1, b"", padding=1),
    "PRIORITY": lambda _peer, _n: wire.priority(1),
    "unknown frames": lambda _peer, _n: raw(0x77, 0, 1, b"x"),
    "GOAWAY": lambda _peer, _n: wire.go_away(0),
    "tiny WINDOW_UPDATEs of the connection": lambda _peer, _n: update(0, 1),
    "tiny WINDOW_UPDATEs of a stream": lambda _peer, _n: update(1, 1_023),
    "WINDOW_UPDATEs of a closed stream": lambda _peer, _n: update(3, 1),
    "RST_STREAM of a closed stream": lambda _peer, _n: rst(3),
    "rapid reset": lambda peer, n: peer.request(2 * n + 5) + rst(2 * n + 5),
    "malformed requests": lambda peer, n: peer.headers(2 * n + 5, [(b":method", b"GET")]),
    "made you reset": lambda peer, n: peer.request(2 * n + 5) + raw(8, 0, 2 * n + 5, bytes(4)),
    # Skipped ids are closed (5.1.1).
    "DATA on closed streams": lambda peer, n: (b"" if n else peer.request(1_001)) + data(2 * n + 5, b"x"),
}


def start(limits: Http2Limits = EDGE) -> tuple[Connection, Peer]:
    """Return a server with stream 1 open, stream 3 closed, and all counters at zero."""
    connection, peer = server(limits)
    peer.receive(peer.request(1), peer.request(3))
    connection.send_headers(connection.streams[3], wire.RESPONSE)
    peer.receive(rst(3))
    peer.said()
    assert connection._flood == [0] * 7
    return connection, peer


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_ends_the_connection(name: str) -> None:
    """http2 point 16 (RFC 9113 10.5), and point 6 for PING: the limit bounds unread answers too."""
    connection, peer = start()
    for n in range(LIMIT):
        connection.receive(FLOODS[name](peer, n))
    assert not connection.closed
    assert peer.receive(FLOODS[name](peer, LIMIT))[-1] == "failed ENHANCE_YOUR_CALM"
    assert connection.closed
    assert peer.said()[-1].endswith("ENHANCE_YOUR_CALM")


@pytest.mark.parametrize("name", FLOODS)
def test_a_peer_that_keeps_pace_with_the_loop_is_not_a_flood(name: str) -> None:
    """One per turn, without end: keep-alive pings of a week must not add up."""
    connection, peer = start()
    for n in range(4 * LIMIT):
        connection.receive(FLOODS[name](peer, n))
        connection.output()
    assert not connection.closed


@pytest.mark.parametrize("name", FLOODS)
def test_counters_do_not_decrease_while_the_transport_is_paused(name: str) -> None:
    """http2 point 6 (10.5): a peer that does not read its answers cannot make them pile up."""
    connection, peer = start()
    connection.pause()
    for n in range(LIMIT + 1):
        connection.receive(FLOODS[name](peer, n))
        connection.output()
    assert connection.closed


def test_requests_of_a_peer_that_reads_nothing_are_bounded() -> None:
    """10.5: each would be answered by at least a header list."""
    connection, peer = start()
    connection.pause()
    for n in range(LIMIT):
        assert peer.receive(peer.request(2 * n + 5)) == [f"request {2 * n + 5}"]
        connection.output()
    assert peer.receive(peer.request(2 * LIMIT + 5)) == ["failed ENHANCE_YOUR_CALM"]


@pytest.mark.parametrize(("parts", "expected"), [(LIMIT, "request 5"), (LIMIT + 1, "failed ENHANCE_YOUR_CALM")])
def test_continuations_of_one_header_block_are_bounded(parts: int, expected: str) -> None:
    """http2 point 16 (10.5): empty ones too."""
    _, peer = start()
    block = peer.block_of(wire.REQUEST)
    flood = raw(1, 0, 5, block) + raw(9, 0, 5) * (parts - 1) + raw(9, 4, 5)
    assert peer.receive(flood) == [expected]


def test_continuations_are_counted_block_by_block() -> None:
    """Long header lists, one after the other, are not a flood."""
    _, peer = start()
    for stream_id in (5, 7, 9):
        parts = raw(1, 0, stream_id, peer.block_of(wire.REQUEST)) + raw(9, 0, stream_id) * (LIMIT - 1)
        assert peer.receive(parts, raw(9, 4, stream_id)) == [f"request {stream_id}"]


def test_resets_of_answered_streams_are_not_a_flood() -> None:
    """A client may cancel ten thousand watches at once."""
    connection, peer = start()
    for n in range(2 * LIMIT):
        peer.receive(peer.request(2 * n + 5))
        connection.send_headers(connection.streams[2 * n + 5], wire.RESPONSE)
    for n in range(2 * LIMIT):
        peer.receive(rst(2 * n + 5))
    assert not connection.closed


def test_window_updates_that_are_not_tiny_are_not_a_flood() -> None:
    connection, _ = start()
    connection.receive(update(1, 1_024) * (4 * LIMIT) + update(0, 1_024) * (4 * LIMIT))
    assert not connection.closed


def test_late_frames_after_our_resets_are_counted() -> None:
    """http2 point 8: they are not an error, but they cost work."""
    connection, peer = start()
    connection.reset(connection.streams[1], ErrorCode.CANCEL)
    connection.receive(data(1, b"x") * (LIMIT + CROSSING_FRAMES))
    assert not connection.closed
    assert peer.receive(data(1, b"x")) == ["failed ENHANCE_YOUR_CALM"]


def test_frames_that_cross_the_end_of_a_stream_are_not_a_flood() -> None:
    """Deadlines of a client and a server expire together: one reset and one window update per stream that we ended."""
    connection, peer = start()
    ids = range(5, 5 + 4 * LIMIT, 2)
    for stream_id in ids:
        peer.receive(peer.request(stream_id, "END_STREAM"))
        connection.send_headers(connection.streams[stream_id], wire.RESPONSE, True)
    for stream_id in ids:
        connection.receive(update(stream_id, 1) + rst(stream_id))
    assert (connection.closed, connection._flood[5]) == (False, 0)
    for _ in range(LIMIT):
        connection.receive(rst(5))
    assert not connection.closed
    assert peer.receive(rst(5)) == ["failed ENHANCE_YOUR_CALM"]


def test_resets_of_streams_that_waited_are_not_a_flood() -> None:
    """Calls with the same deadline while the answers are late, repeatedly; resets within `patience_s` are counted."""
    connection, peer = start()
    patience_s = EDGE.patience_s
    first = 5
    for waited_s, counted in ((patience_s, 0), (60.0, 0), (patience_s * 0.99, LIMIT)):
        ids = range(first, first + 2 * LIMIT, 2)
        first += 2 * LIMIT
        connection.receive(b"".join(map(peer.request, ids)))
        connection.now += waited_s
        connection.receive(b"".join(map(rst, ids)))
        assert (connection.closed, connection._flood[0]) == (False, counted)


def test_refused_streams_are_counted() -> None:
    """http2 point 14: a peer that keeps ignoring the limit loses its connection."""
    connection, peer = server(Http2Limits(max_streams=1, resets_max=LIMIT))
    peer.receive(peer.request(1))
    for n in range(LIMIT):
        assert peer.receive(peer.request(2 * n + 3)) == []
    assert peer.receive(peer.request(2 * LIMIT + 3)) == ["failed ENHANCE_YOUR_CALM"]
    assert connection.closed


def test_defaults_allow_ten_thousand_streams_at_once() -> None:
    """Opened in one read, answered, cancelled in one read; with a window update each."""
    connection, peer = server()
    connection.receive(b"".join(peer.request(2 * n + 1) for n in range(10_000)))
    for stream in connection.streams.values():
        connection.send_headers(stream, wire.RESPONSE)
        assert connection.send(stream, [b"x"], 1)
    connection.output()
    connection.receive(b"".join(update(2 * n + 1, 1) for n in range(10_000)))
    connection.output()
    connection.receive(b"".join(rst(2 * n + 1) for n in range(10_000)))
    assert (connection.closed, len(connection.streams)) == (False, 0)


def test_settings_that_move_many_windows_weigh_more() -> None:
    """A change of 20,000 streams counts as ten SETTINGS; the same window again changes nothing."""
    connection, peer = server(Http2Limits(settings_max=100))
    for number in range(20_000):
        connection.receive(peer.request(2 * number + 1))
    connection.output()
    for _ in range(20):
        assert peer.receive(settings({4: 1_000})) == ["settings"]
    for number in range(6):
        assert peer.receive(settings({4: 2_000 + number})) == ["settings"]
    assert peer.receive(settings({4: 5_000})) == ["failed ENHANCE_YOUR_CALM"]


def test_too_many_header_fields_end_the_connection() -> None:
    """Ten fields are accepted, in any number of frames; the eleventh ends the connection, even in an oversized list."""
    limits = Http2Limits(header_fields_max=10, header_list_bytes_max=200)
    for fields, cut_off in ((10, False), (11, True)):
        connection, peer = server(limits)
        block = b"\x88" * fields
        connection.receive(raw(1, 0, 1, block[:4]) + raw(9, 0, 1, block[4:9]) + raw(9, 4, 1, block[9:]))
        assert connection.closed is cut_off
        said = peer.said()[-1]
        assert said.endswith("ENHANCE_YOUR_CALM"), said
        assert said.startswith("GOAWAY" if cut_off else "RST_STREAM"), said
        if not cut_off:
            # The count starts at zero in each block.
            connection.receive(raw(1, 4, 3, block))
            assert not connection.closed


def test_the_fields_allowed_are_those_of_the_smallest_that_fit() -> None:
    assert Http2Limits().header_fields_max * FIELD_OVERHEAD_BYTES == Http2Limits().header_list_bytes_max


def test_frames_beyond_one_turns_work_wait_for_the_next() -> None:
    connection, peer = server(Http2Limits(turn_work_max=5))
    events = connection.receive(ping() * 12)
    counts = [len(events)]
    while connection.behind:
        counts.append(len(connection.receive(b"")))
    assert counts == [5, 5, 2]
    assert connection.receive(ping()[:9]) == []
    assert not connection.behind
    # Bytes that arrive meanwhile are handled after those that wait.
    assert len(connection.receive(ping()[9:] + ping() * 9 + ping()[:5])) == 5
    assert connection.behind
    assert len(connection.receive(ping()[5:])) == 5
    assert connection.behind
    assert len(connection.receive(b"")) == 1
    assert not connection.behind
    assert len(peer.said()) == 12 + 1 + 9 + 1


def test_counters_do_not_decrease_while_frames_wait() -> None:
    connection, _peer = server(Http2Limits(turn_work_max=5, pings_max=100))
    connection.output()
    connection.receive(ping() * 99)
    while connection.behind:
        connection.output()
        connection.receive(b"")
    assert connection._flood[1] == 99
    connection.output()
    assert connection._flood[1] == 98


def _joined(lines: list[str]) -> list[str]:
    """Join the lines of successive data of one stream."""
    joined: list[str] = []
    for line in lines:
        start, _, size = line.rpartition(" ")
        if line.startswith("data ") and joined and size.isdigit() and joined[-1].rpartition(" ")[0] == start:
            joined[-1] = f"{start} {int(joined[-1].rpartition(' ')[2]) + int(size)}"
        else:
            joined.append(line)
    return joined


@pytest.mark.parametrize("seed", range(100))
def test_small_turns_change_nothing(seed: int) -> None:
    """The same events and the same output in small turns, for any input; data may be joined only within a turn."""
    text = script(seed, 60)
    at_once, in_turns = Connection(Role.SERVER, LIMITS), Connection(Role.SERVER, replace(LIMITS, turn_work_max=3))
    results = []
    for connection in (at_once, in_turns):
        connection.start()
        events = connection.receive(text)
        while connection.behind:
            events += connection.receive(b"")
        results.append((_joined(event_lines(events)), b"".join(connection.output())))
    assert results[0] == results[1]


@pytest.mark.parametrize("limit", ["max_streams", "header_list_bytes_max", "initial_window"])
def test_a_stream_that_reaches_a_limit_is_reported(limit: str) -> None:
    """Once for each stream beyond the limit, and not at the limit."""
    connection, peer = server(Http2Limits(max_streams=2, header_list_bytes_max=1_000, initial_window=100))
    weight = sum(FIELD_OVERHEAD_BYTES + len(name) + len(value) for name, value in wire.REQUEST)
    room = 1_000 - weight - FIELD_OVERHEAD_BYTES - len(b"x")

    def headers(stream_id: int, size: int) -> bytes:
        return peer.headers(stream_id, [*wire.REQUEST, (b"x", b"y" * size)])

    if limit == "max_streams":
        good, bad = peer.request(1) + peer.request(3), peer.request(5)
    elif limit == "header_list_bytes_max":
        good, bad = headers(1, room), headers(3, room + 1)
    else:
        good, bad = peer.request(1) + data(1, bytes(100)), data(1, b"x")
    assert LimitReached(limit) not in connection.receive(good)
    assert connection.receive(bad).count(LimitReached(limit)) == 1
    assert not connection.closed
