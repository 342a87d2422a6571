"""Flow control in both directions, and the order in which streams are served when a window opens again."""

from __future__ import annotations

import pytest

from proto.http2 import Connection, ErrorCode, Http2Limits, Role, Stream, StreamBatch
from tests.http2 import wire
from tests.http2.wire import INITIAL_WINDOW, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, Peer, data, server, settings, update

KIB = 1024


def serve(count: int, peer_settings: dict[int, int] | None = None) -> tuple[Connection, Peer, list[Stream]]:
    """Return a server with `count` streams open, response headers sent."""
    connection, peer = server(peer_settings=peer_settings)
    peer.receive(*[peer.request(2 * n + 1, "END_STREAM") for n in range(count)])
    streams = list(connection.streams.values())
    for stream in streams:
        connection.send_headers(stream, wire.RESPONSE)
    peer.said()
    return connection, peer, streams


def sent_bytes(peer: Peer) -> dict[int, int]:
    """Take the output and return the bytes of DATA per stream."""
    sizes: dict[int, int] = {}
    for line in peer.said():
        word, stream_id, size, *_ = line.split()
        assert word == "DATA"
        sizes[int(stream_id)] = sizes.get(int(stream_id), 0) + int(size)
    return sizes


def test_data_debits_both_windows_and_stalls_at_zero() -> None:
    """http2 point 2 (RFC 9113 5.2, 6.9)."""
    connection, peer, (one, two) = serve(2)
    assert connection.send(one, [bytes(1000)], 1000)
    assert (one.send_window, connection.send_window) == (INITIAL_WINDOW - 1000, INITIAL_WINDOW - 1000)
    assert (connection.room(one), connection.room(two)) == (INITIAL_WINDOW - 1000, INITIAL_WINDOW - 1000)
    assert connection.send(one, [bytes(INITIAL_WINDOW - 1000)], INITIAL_WINDOW - 1000)
    assert (one.send_window, connection.send_window) == (0, 0)
    assert not connection.send(one, [b"x"], 1)
    # The other stream has a window of its own, but the connection has none.
    assert not connection.send(two, [b"y"], 1)
    assert sent_bytes(peer) == {1: INITIAL_WINDOW}
    assert peer.receive(update(0, 10)) == ["drained 3"]
    assert peer.receive(update(1, 10)) == ["drained 1"]
    assert (one.send_window, two.send_window, connection.send_window) == (9, INITIAL_WINDOW - 1, 8)
    assert (connection.room(one), connection.room(two)) == (8, 8)


def test_output_taken_while_there_is_none_stays_empty() -> None:
    """The shell may keep the list: later output is not added to it."""
    connection, _peer, (stream,) = serve(1)
    taken = connection.output()
    connection.send(stream, [b"x"], 1)
    assert taken == []


def test_a_raised_initial_window_wakes_all_stalled_streams() -> None:
    """http2 point 3 (6.9.2): without any WINDOW_UPDATE; the connection's window does not change."""
    connection, peer, streams = serve(3, {INITIAL_WINDOW_SIZE: 10})
    for stream in streams:
        assert not connection.send(stream, [bytes(25)], 25)
    assert sent_bytes(peer) == {1: 10, 3: 10, 5: 10}
    before = connection.send_window
    assert peer.receive(settings({INITIAL_WINDOW_SIZE: 30})) == ["settings", "drained 1", "drained 3", "drained 5"]
    assert peer.said() == ["SETTINGS ack", "DATA 1 15", "DATA 3 15", "DATA 5 15"]
    assert connection.send_window == before - 45
    assert [stream.send_window for stream in streams] == [5, 5, 5]


def test_a_lowered_initial_window_may_leave_windows_negative() -> None:
    """http2 point 3 (6.9.2): nothing is sent until they are positive again."""
    connection, peer, (stream,) = serve(1)
    assert connection.send(stream, [bytes(100)], 100)
    assert peer.receive(settings({INITIAL_WINDOW_SIZE: 40})) == ["settings"]
    assert stream.send_window == -60
    assert connection.room(stream) == 0
    assert not connection.send(stream, [b"abc"], 3)
    assert peer.receive(update(1, 60)) == []
    peer.said()
    assert peer.receive(update(1, 1)) == []
    assert peer.receive(update(1, 2)) == ["drained 1"]
    assert peer.said() == ["DATA 1 1", "DATA 1 2"]


def test_a_new_stream_begins_with_the_new_initial_window() -> None:
    """http2 point 3 (6.9.2)."""
    connection, peer = server(peer_settings={INITIAL_WINDOW_SIZE: 77})
    peer.receive(peer.request(1), settings({INITIAL_WINDOW_SIZE: 88}), peer.request(3))
    assert [stream.send_window for stream in connection.streams.values()] == [88, 88]


@pytest.mark.parametrize(("grown", "expected"), [(1, "settings"), (2, "failed FLOW_CONTROL_ERROR")])
def test_an_initial_window_that_overflows_a_stream_fails(grown: int, expected: str) -> None:
    """http2 point 3 (6.9.2): 2^31-1 is allowed, one more is not."""
    connection, peer, (stream,) = serve(1, {INITIAL_WINDOW_SIZE: 10})
    peer.receive(update(1, 2**31 - 1 - 11))
    assert stream.send_window == 2**31 - 2
    assert peer.receive(settings({INITIAL_WINDOW_SIZE: 10 + grown})) == [expected]
    assert connection.closed == (grown == 2)


@pytest.mark.parametrize("size", [16_384, 20_000, 2**24 - 1])
def test_the_peers_frame_size_is_honoured(size: int) -> None:
    """http2 point 4 (4.2): for each write, as soon as the setting is received."""
    connection, peer, (stream,) = serve(1, {INITIAL_WINDOW_SIZE: 2**31 - 1})
    peer.receive(update(0, 2**30))
    for _ in range(2):
        assert connection.send(stream, [bytes(40_000)], 40_000)
    assert [line.split()[2] for line in peer.said()] == ["16384", "16384", "7232"] * 2
    peer.receive(settings({MAX_FRAME_SIZE: size}))
    assert connection.send(stream, [bytes(40_000)], 40_000)
    sizes = [int(line.split()[2]) for line in peer.said()[1:]]
    assert sum(sizes) == 40_000
    assert sizes[0] == min(size, 40_000)
    connection.send_headers(stream, [(b"long", b"x" * 20_001)], end_stream=True)
    assert peer.frames()[0].body_len == min(size, 20_001 + 10)


def test_our_frames_stay_small_even_if_the_peer_allows_more() -> None:
    """http2 point 18: a turn of the round robin is 64 KiB at most."""
    connection, peer, streams = serve(2, {INITIAL_WINDOW_SIZE: 2**30, MAX_FRAME_SIZE: 2**24 - 1})
    assert connection.send(streams[0], [bytes(INITIAL_WINDOW)], INITIAL_WINDOW)
    for stream in streams:
        assert not connection.send(stream, [bytes(100_000)], 100_000)
    peer.said()
    assert peer.receive(update(0, 2**20)) == ["drained 1", "drained 3"]
    assert peer.said() == ["DATA 1 65536", "DATA 3 65536", "DATA 1 34464", "DATA 3 34464"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_frame_bytes": 16_383},
        {"max_frame_bytes": 2**24},
        {"initial_window": 2**31},
        {"connection_window": 2**31},
        {"max_streams": 2**31},
        {"initial_window": -1},
    ],
)
def test_limits_that_the_protocol_cannot_express(wrong: dict[str, int]) -> None:
    """6.5.2, 6.9.1."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Http2Limits(**wrong)
    Http2Limits(max_frame_bytes=2**24 - 1, initial_window=2**31 - 1, connection_window=2**31 - 1, max_streams=0)


@pytest.mark.parametrize(("length", "fails"), [(16_384, False), (16_385, True), (2**24 - 1, True)])
def test_our_frame_size_is_checked_before_buffering(length: int, fails: bool) -> None:
    """http2 point 4 (4.2): the 9 bytes are enough to refuse."""
    connection, peer = server()
    peer.receive(peer.request(1))
    events = peer.receive(wire.raw(0, 0, 1, length=length))
    assert events == (["failed FRAME_SIZE_ERROR"] if fails else [])
    assert connection.closed == fails


def test_a_larger_frame_size_of_ours_is_announced_and_kept() -> None:
    """http2 point 4 (6.5.2)."""
    connection = Connection(Role.SERVER, Http2Limits(max_frame_bytes=20_000))
    connection.start()
    peer = Peer(connection)
    assert "5: 20000" in peer.said()[0]
    peer.receive(wire.PREFACE, settings(), peer.request(1))
    assert peer.receive(data(1, bytes(20_000))) == ["data 1 20000"]
    assert peer.receive(data(1, bytes(20_001))) == ["failed FRAME_SIZE_ERROR"]


def test_the_connection_window_is_raised_at_the_start() -> None:
    """http2 point 9 (6.9.2): by a WINDOW_UPDATE, because SETTINGS do not change it."""
    connection = Connection(Role.SERVER, Http2Limits(connection_window=100_000, initial_window=1))
    connection.start()
    assert Peer(connection).said()[1] == f"WINDOW_UPDATE 0 {100_000 - INITIAL_WINDOW}"
    assert connection.receive_window == 100_000


@pytest.mark.parametrize(("more", "expected"), [(0, ["data 1 100"]), (1, ["reset 1 FLOW_CONTROL_ERROR"])])
def test_a_stream_window_overrun_costs_the_stream(more: int, expected: list[str]) -> None:
    """http2 point 9 (6.9.1); its bytes are credited to the connection."""
    connection, peer = server(Http2Limits(initial_window=10 * KIB + 100, connection_window=64 * KIB))
    peer.receive(peer.request(1), peer.request(3), data(1, bytes(10 * KIB)))
    assert peer.receive(data(1, bytes(100 + more))) == expected
    assert connection.receive_window + connection._unreturned == 64 * KIB - 10 * KIB - (100 if not more else 0)
    assert peer.receive(data(3, b"lives")) == ["data 3 5"]


@pytest.mark.parametrize(("more", "expected"), [(0, "data 65 16"), (1, "failed FLOW_CONTROL_ERROR")])
def test_a_connection_window_overrun_costs_the_connection(more: int, expected: str) -> None:
    """http2 point 9 (6.9.1)."""
    connection, peer = server(Http2Limits(initial_window=64 * KIB, connection_window=64 * KIB + 16))
    requests = [peer.request(2 * n + 1) for n in range(33)]
    peer.receive(*requests, *[data(2 * n + 1, bytes(2 * KIB)) for n in range(32)])
    assert connection.receive_window == 16
    assert peer.receive(data(65, bytes(16 + more))) == [expected]


def test_padding_counts_and_is_given_back_by_the_connection() -> None:
    """http2 point 8 (6.1): the application returns the bytes of the data only."""
    connection, peer = server(Http2Limits(initial_window=1000, connection_window=INITIAL_WINDOW))
    peer.receive(peer.request(1))
    stream = connection.streams[1]
    assert peer.receive(data(1, bytes(100), padding=200)) == ["data 1 100"]
    assert (stream.receive_window, stream.unreturned) == (1000 - 301, 201)
    assert (connection.receive_window, connection._unreturned) == (INITIAL_WINDOW - 301, 201)


def test_consumed_bytes_are_returned_half_a_window_at_a_time() -> None:
    connection, peer = server(Http2Limits(initial_window=40_000, connection_window=100_000))
    peer.receive(peer.request(1), data(1, bytes(16_000)), data(1, bytes(16_000)))
    stream = connection.streams[1]
    connection.consumed(stream, 19_999)
    assert peer.said() == []
    connection.consumed(stream, 1)
    assert peer.said() == ["WINDOW_UPDATE 1 20000"]
    assert stream.receive_window == 40_000 - 32_000 + 20_000
    connection.consumed(None, 30_000)
    assert peer.said() == ["WINDOW_UPDATE 0 50000"]


def test_a_stream_whose_peer_has_ended_needs_no_window() -> None:
    """The connection is credited all the same."""
    connection, peer = server(Http2Limits(initial_window=10, connection_window=INITIAL_WINDOW))
    peer.receive(peer.request(1), data(1, bytes(10), "END_STREAM"))
    connection.consumed(connection.streams[1], 10)
    assert peer.said() == []
    assert connection._unreturned == 10


def test_a_small_initial_window_applies_once_acknowledged() -> None:
    """http2 point 15 (6.5.3): until then the peer may use the default window."""
    connection = Connection(Role.SERVER, Http2Limits(initial_window=100))
    connection.start()
    peer = Peer(connection)
    peer.receive(wire.PREFACE, settings(), peer.request(1), peer.request(3))
    assert peer.receive(data(1, bytes(101))) == ["data 1 101"]
    peer.receive(settings(None, "ACK"))
    assert connection.streams[1].receive_window == -1
    # An empty frame needs no window (6.9).
    assert peer.receive(peer.request(5), data(5, bytes(100)), data(1, b"")) == ["request 5", "data 5 100"]
    assert peer.receive(data(3, bytes(101))) == ["reset 3 FLOW_CONTROL_ERROR"]
    # More than half of the small window is consumed, so an update is sent; it also makes up for the negative window.
    connection.consumed(connection.streams[1], 101)
    assert connection.streams[1].receive_window == 100


def test_an_open_connection_window_serves_streams_round_robin() -> None:
    """http2 point 18 (5.2.1): a stream with megabytes of data does not delay the others."""
    connection, peer, streams = serve(4, {INITIAL_WINDOW_SIZE: 2**20})
    assert connection.send(streams[0], [bytes(INITIAL_WINDOW)], INITIAL_WINDOW)
    for size, stream in zip([50_000, 300, 40_000, 20], streams, strict=True):
        assert not connection.send(stream, [bytes(size)], size)
    sent_bytes(peer)
    assert peer.receive(update(0, 16_384 + 300 + 16_384 + 20 + 16_384 + 5)) == ["drained 3", "drained 7"]
    assert peer.said() == ["DATA 1 16384", "DATA 3 300", "DATA 5 16384", "DATA 7 20", "DATA 1 16384", "DATA 5 5"]
    assert peer.receive(update(0, 2**20)) == ["drained 1", "drained 5"]
    assert sent_bytes(peer) == {1: 50_000 - 2 * 16_384, 5: 40_000 - 16_384 - 5}


def test_a_resumed_transport_serves_streams_round_robin() -> None:
    """http2 point 18."""
    connection, peer, streams = serve(3, {INITIAL_WINDOW_SIZE: 2**20})
    peer.receive(update(0, 2**20))
    connection.pause()
    assert connection.paused
    for stream in streams:
        assert not connection.send(stream, [bytes(20_000)], 20_000)
        assert stream.blocked
    # Windows that open and settings that change meanwhile do not resume the data.
    assert peer.receive(update(0, 10), update(1, 10), settings({MAX_FRAME_SIZE: 16_384})) == ["settings"]
    assert peer.said() == ["SETTINGS ack"]
    # Trailers wait for the data before them.
    connection.send_headers(streams[0], wire.TRAILERS, end_stream=True)
    assert peer.said() == []
    assert wire.event_lines(connection.resume()) == ["drained 1", "drained 3", "drained 5"]
    assert peer.said() == [
        "DATA 1 16384",
        "DATA 3 16384",
        "DATA 5 16384",
        "DATA 1 3616",
        "HEADERS 1 grpc-status=0 END",
        "DATA 3 3616",
        "DATA 5 3616",
    ]
    assert connection.send(streams[1], [b"flows"], 5)


def test_a_stream_reset_in_the_round_robin_leaves_no_trace() -> None:
    """http2 points 11 and 18: by us or by the peer, while others wait after it."""
    connection, peer, streams = serve(4, {INITIAL_WINDOW_SIZE: 2**20})
    connection.pause()
    for stream in streams:
        connection.send(stream, [bytes(20_000)], 20_000)
    assert peer.receive(wire.rst(1)) == ["reset 1 CANCEL by peer"]
    connection.reset(streams[2], ErrorCode.CANCEL)
    assert peer.receive(settings({INITIAL_WINDOW_SIZE: 5})) == ["settings"]
    assert wire.event_lines(connection.resume()) == []
    assert peer.said() == ["RST_STREAM 5 CANCEL", "SETTINGS ack", "DATA 3 5", "DATA 7 5"]
    assert connection.send_window == INITIAL_WINDOW - 10


def test_a_stalled_stream_does_not_delay_others() -> None:
    """A stream whose own window is used up does not delay others, even if the connection's window opens repeatedly."""
    connection, peer, (slow, quick) = serve(2, {INITIAL_WINDOW_SIZE: 10})
    assert not connection.send(slow, [bytes(100)], 100)
    assert connection.send(quick, [bytes(10)], 10)
    assert peer.receive(update(3, 1000), update(0, 1000)) == []
    assert connection.send(quick, [bytes(1000)], 1000)
    assert sent_bytes(peer) == {1: 10, 3: 1010}


def test_send_each_skips_streams_that_must_wait() -> None:
    """`send_each` returns the skipped ones, and debits the windows of the others only."""
    connection, peer, (short, blocked, over, gone, open_one) = serve(5)
    short.send_window = 2
    blocked.send_window = 1
    assert not connection.send(blocked, [b"ab"], 2)
    connection.send(over, [], 0, end_stream=True)
    connection.reset(gone, ErrorCode.CANCEL)
    peer.said()
    before = connection.send_window
    together = StreamBatch([short, blocked, over, gone, open_one])
    assert list(connection.send_each(together, [[b"xy"] * 5, [b"z"] * 5], 3)) == [0, 1, 2, 3]
    assert peer.said() == ["DATA 9 3"]
    assert connection.send_window == before - 3
    assert open_one.send_window == INITIAL_WINDOW - 3
    assert (short.send_window, blocked.send_window) == (2, 0)


@pytest.mark.parametrize("why", ["window", "paused", "large"])
def test_send_each_sends_nothing_if_the_connection_is_too_full(why: str) -> None:
    connection, peer, streams = serve(2)
    size = 100
    if why == "window":
        connection.send_window = 199
    elif why == "paused":
        connection.pause()
    else:
        size = 20 * KIB
    assert list(connection.send_each(StreamBatch(streams), [[bytes(size)] * 2], size)) == [0, 1]
    assert peer.said() == []
    assert [stream.send_window for stream in streams] == [INITIAL_WINDOW] * 2


def test_send_each_sends_all_or_none_of_a_streams_messages() -> None:
    """So that later messages of the stream, by `send`, stay in order; sizes may differ between calls."""
    connection, _, (one, two) = serve(2)
    together = StreamBatch([one, two, one])
    one.send_window = 5
    assert list(connection.send_each(together, [[b"abc", b"def", b"ghi"]], 3)) == [0, 2]
    assert (one.send_window, two.send_window) == (5, INITIAL_WINDOW - 3)
    one.send_window = INITIAL_WINDOW
    for column in [b"a1", b"b1", b"c1"], [b"a2", b"b2", b"c2"], [b"a", b"b", b"c"]:
        assert list(connection.send_each(together, [column], len(column[0]))) == []
    assert b"".join(connection.output()) == b"".join(
        [data(two.id, b"def")]
        + [
            data(stream.id, b"%c%d" % (text, turn))
            for turn in (1, 2)
            for stream, text in zip((one, two, one), b"abc", strict=True)
        ]
        + [data(one.id, b"a"), data(two.id, b"b"), data(one.id, b"c")]
    )
    assert one.send_window == INITIAL_WINDOW - 2 * 5
