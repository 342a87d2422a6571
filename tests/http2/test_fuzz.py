"""Hostile input: `receive` never raises, flow control stays consistent, and splitting the input changes nothing.

Seeded; a failure names its seed. Inputs are runs of frames that a peer could send (most of them valid), then the same
with mutated bytes, then single frames of every kind, for which the result is compared with `h2`.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import pytest
from hyperframe.frame import Frame, RstStreamFrame

from proto.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    Event,
    GoingAway,
    HeadersKind,
    HeadersReceived,
    Http2Limits,
    Role,
    StreamBatch,
    StreamReset,
    StreamState,
    TooManyStreams,
)
from tests.http2 import lists, wire
from tests.http2.wire import PREFACE, REQUEST, RESPONSE, TRAILERS, Peer, data, event_lines, raw, settings

LIMITS = Http2Limits(
    initial_window=1_000,
    connection_window=70_000,
    header_list_bytes_max=600,
    max_streams=6,
    resets_remembered=3,
    resets_max=30,
    settings_max=10,
)


def check(connection: Connection) -> None:
    """Check the invariants that hold between any two calls."""
    waiting = [stream for stream in connection._round_robin if stream.blocked]
    if waiting and not connection.closed:
        assert connection.send_window <= 0 or connection.paused or all(stream.send_window <= 0 for stream in waiting)
    for stream_id, stream in connection.streams.items():
        assert stream_id == stream.id
        assert stream_id & 1
        assert stream_id <= connection._last_id
        assert stream.state is not StreamState.CLOSED
        queued = sum(map(len, stream.queue or ())) - stream.queue_offset
        assert stream.unsent == queued
        assert stream.blocked == bool(queued)
        if stream.blocked and stream.send_window > 0:
            assert stream.waiting
        assert stream.receive_window <= max(connection.limits.initial_window, wire.INITIAL_WINDOW)
    assert len(connection._reset_ids) <= connection.limits.resets_remembered
    assert len(connection._round_robin) == len(set(connection._round_robin))
    assert not (connection.ending and not connection.streams and not connection.closed)


def frames(rng: random.Random, peer: Peer, count: int) -> list[bytes]:
    """Return frames that a peer might send, most of them valid."""
    made: list[bytes] = []
    next_id = last_id = 1
    for _ in range(count):
        # Open, closed or skipped; rarely one that was never used.
        some_id = max(1, last_id - 2 * rng.randrange(6) + 2 * (rng.random() < 0.005))
        kind = rng.randrange(14) if made else 0
        end = ["END_STREAM"] if rng.random() < 0.2 else []
        if kind <= 2:
            roll = rng.random()
            if roll < 0.3:
                made += peer.in_parts(next_id, [*REQUEST, (b"n", b"%d" % rng.randrange(9))], 5, *end)
            elif roll < 0.4:
                made += peer.in_parts(next_id, lists.odd_request(rng), rng.choice([50, 16_000]), *end)
            elif roll < 0.43:
                made.append(raw(1, 4 | bool(end), next_id, lists.block(rng)))
            else:
                size = rng.choice([0, 10, 10, 250])
                made.append(peer.request(next_id, *end, extra=[(b"x", rng.randbytes(size).hex().encode())]))
            last_id = next_id
            next_id += 2 * rng.randrange(1, 3)
        elif kind <= 5:
            made.append(data(some_id, bytes(rng.choice([0, 1, 9, 9, 9, 300])), *end, padding=rng.choice([0, 0, 5])))
        elif kind == 6:
            fields = TRAILERS if rng.random() < 0.8 else lists.odd_request(rng)[len(REQUEST) :]
            made += peer.in_parts(some_id, fields or TRAILERS, rng.choice([9, 16_000]), "END_STREAM")
        elif kind == 7:
            made.append(wire.rst(some_id, rng.randrange(16)))
        elif kind <= 9:
            made.append(wire.update(rng.choice([0, some_id]), rng.choice([1, 7, 5_000])))
        elif kind == 10:
            values = {4: rng.choice([0, 10, 70_000]), 5: rng.choice([16_384, 30_000]), 1: rng.choice([0, 4_096])}
            made.append(settings(dict(rng.sample(sorted(values.items()), rng.randrange(4)))))
        elif kind == 11:
            made.append(rng.choice([wire.ping(), wire.ping(b"abcdefgh", "ACK"), wire.priority(some_id)]))
        elif kind == 12:
            made.append(raw(rng.randrange(10, 256), rng.randrange(256), some_id, rng.randbytes(rng.randrange(9))))
        elif rng.random() < 0.05:
            made.append(raw(rng.randrange(10), rng.randrange(256), some_id, rng.randbytes(rng.randrange(20))))
    return made


def mutate(rng: random.Random, text: bytes) -> bytes:
    mutated = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
        if not mutated:
            break
        at = rng.randrange(len(mutated))
        match rng.randrange(3):
            case 0:
                mutated[at] = rng.randrange(256)
            case 1:
                del mutated[at : at + rng.randrange(1, 12)]
            case _:
                mutated[at:at] = rng.randbytes(rng.randrange(1, 12))
    return bytes(mutated)


def script(seed: int, count: int) -> bytes:
    """Return a client's output, starting with the preface; two seeds in three are mutated."""
    rng = random.Random(seed)
    connection = Connection(Role.SERVER, LIMITS)
    said = b"".join([settings(), settings(None, "ACK"), *frames(rng, Peer(connection), count)])
    return PREFACE + (mutate(rng, said) if seed % 3 else said)


def answers(rng: random.Random, peer: Peer, ids: list[int], count: int) -> list[bytes]:
    """Return frames that a server might send to the calls with these ids, most of them valid."""
    made = [settings(), settings(None, "ACK")]
    begun: set[int] = set()
    for _ in range(count):
        stream_id = rng.choice(ids)
        end = ["END_STREAM"] if rng.random() < 0.15 else []
        kind = rng.randrange(12)
        if stream_id not in begun or kind == 0:
            made += peer.in_parts(stream_id, lists.response(rng), rng.choice([5, 16_000]), *end)
            begun.add(stream_id)
        elif kind <= 5:
            made.append(data(stream_id, bytes(rng.choice([0, 9, 9, 300])), *end, padding=rng.choice([0, 0, 5])))
        elif kind == 6:
            made.append(peer.headers(stream_id, TRAILERS, "END_STREAM"))
        elif kind == 7:
            made.append(wire.rst(stream_id, rng.randrange(16)))
        elif kind == 8:
            made.append(wire.update(rng.choice([0, stream_id]), rng.choice([1, 9_000])))
        elif kind == 9:
            values = {4: rng.choice([0, 10, 70_000]), 3: rng.choice([0, 6, 100]), 1: rng.choice([0, 100, 4_096])}
            made.append(settings(dict(rng.sample(sorted(values.items()), rng.randrange(4)))))
        elif kind == 10:
            made.append(rng.choice([wire.ping(), wire.ping(b"watchmux", "ACK"), raw(12, 0, 0, b"\0\4http")]))
        elif rng.random() < 0.1:
            made.append(wire.go_away(rng.choice([0, *ids, 2**31 - 1]), rng.choice([0, 11, 99]), b"too_many_pings"))
        elif rng.random() < 0.1:
            made.append(raw(1, 4, stream_id, lists.block(rng)))
    return made


def answer(connection: Connection, rng: random.Random, events: list[Event]) -> None:
    """Act as an application might."""
    for event in events:
        match event:
            case HeadersReceived(stream, _, _, HeadersKind.REQUEST):
                connection.send_headers(stream, RESPONSE)
                size = rng.choice([0, 10, 30_000])
                connection.send(stream, [bytes(size)], size, end_stream=rng.random() < 0.3)
                others = [other for other in connection.streams.values() if other.started]
                columns = [[piece] * len(others) for piece in (b"to", b"all")]
                for place in connection.send_each(StreamBatch(others), columns, 5):
                    connection.reset(others[place], ErrorCode.CANCEL)
            case DataReceived(stream, _, flow_size):
                connection.consumed(stream, flow_size)
    if rng.random() < 0.1:
        for stream in list(connection.streams.values()):
            match rng.randrange(4):
                case 0:
                    connection.reset(stream, ErrorCode.CANCEL)
                case 1 if not stream.ending:
                    size = rng.choice([0, 0, 20_000])
                    connection.send_headers(stream, [*TRAILERS, (b"grpc-message", b"m" * size)], end_stream=True)
    if rng.random() < 0.1:
        connection.pause()
    elif rng.random() < 0.3:
        connection.resume()
    if rng.random() < 0.02:
        connection.go_away(last=rng.random() < 0.5)


def serve(seed: int) -> None:
    """Run one script against a server."""
    rng = random.Random(seed)
    connection = Connection(Role.SERVER, LIMITS)
    connection.start()
    text = script(seed, 60)
    while text and not connection.closed:
        size = rng.choice([9, 40, 400])
        events = connection.receive(text[:size])
        assert connection.closed or not any(isinstance(event, ConnectionFailed) for event in events)
        answer(connection, rng, events)
        check(connection)
        # Consumed bytes are returned, even if the stream has ended.
        assert connection.closed or connection.receive_window + connection._unreturned == LIMITS.connection_window
        text = text[size:]
    connection.output()


def ask(seed: int) -> None:
    """Run one script against a client.

    Most of the frames are invalid for a server to send; only exceptions and flow control are checked.
    """
    rng = random.Random(seed)
    connection, peer = wire.client(LIMITS)
    streams = [connection.open(REQUEST) for _ in range(5)]
    for stream in streams:
        connection.send(stream, [bytes(20_000)], 20_000)
    text = b"".join(peer.headers(stream.id, RESPONSE) for stream in streams)
    text += b"".join(frames(rng, peer, 20)).replace(PREFACE, b"")
    for piece in (text[:200], mutate(rng, text[200:])):
        answer(connection, rng, connection.receive(piece))
        check(connection)


def ask_well(seed: int) -> None:
    """Run a mostly correct server's frames, one by one as from etcd, against a client that opens calls meanwhile."""
    rng = random.Random(seed)
    connection = Connection(Role.CLIENT, LIMITS)
    connection.start()
    for number in range(4):
        stream = connection.open([(b":method", b"HEAD"), *REQUEST[1:]] if number == 3 else REQUEST, number == 2)
    pieces = answers(rng, Peer(Connection(Role.SERVER)), [1, 3, 5, 7, 9], 60)
    if seed % 3 == 0:
        place = rng.randrange(2, len(pieces))
        pieces[place] = mutate(rng, pieces[place])
    for piece in pieces:
        fast = connection.receive_data(piece)
        if fast is None:
            answer(connection, rng, connection.receive(piece))
        else:
            connection.consumed(fast, len(piece) - 9)
        if rng.random() < 0.1:
            with contextlib.suppress(TooManyStreams, GoingAway):
                stream = connection.open(REQUEST)
                size = rng.choice([0, 10, 30_000])
                connection.send(stream, [bytes(size)], size, end_stream=rng.random() < 0.3)
        check(connection)
        assert connection.closed or connection.receive_window + connection._unreturned <= LIMITS.connection_window
    connection.output()


@pytest.mark.parametrize("group", range(10))
@pytest.mark.parametrize("role", [serve, ask, ask_well])
def test_no_input_raises_in_either_role(role: Callable[[int], None], group: int) -> None:
    for seed in range(group * 35, group * 35 + 35):
        role(seed)


def outcome(pieces: list[bytes]) -> tuple[list[str], bytes]:
    """Feed pieces to a new server; return its events as text and its output."""
    connection = Connection(Role.SERVER, LIMITS)
    connection.start()
    lines: list[str] = []
    for piece in pieces:
        lines += event_lines(connection.receive(piece))
    return lines, b"".join(connection.output())


@pytest.mark.parametrize("seed", range(12))
def test_splitting_the_input_anywhere_changes_nothing(seed: int) -> None:
    """The same events and the same output: split at each position, and into single bytes."""
    text = script(seed, 20)[:700]
    expected = outcome([text])
    assert outcome([text[at : at + 1] for at in range(len(text))]) == expected
    for at in range(1, len(text)):
        assert outcome([text[:at], text[at:]]) == expected, at


@pytest.mark.parametrize("seed", range(40))
def test_splitting_input_of_blocked_streams_changes_nothing(seed: int) -> None:
    """The same with data that waits on five streams until windows and settings release it."""
    rng = random.Random(seed)
    scribe = Peer(Connection(Role.SERVER))
    opening = b"".join([PREFACE, settings(), *[scribe.request(2 * n + 1) for n in range(5)]])
    choices = [lambda: wire.update(rng.choice([0, 1, 3, 5, 7, 9]), rng.choice([1, 500, 20_000])) for _ in range(6)]
    choices += [lambda: settings({4: rng.choice([0, 100, 70_000])}), lambda: wire.rst(rng.choice([1, 3]))]
    text = b"".join(rng.choice(choices)() for _ in range(30))

    def run(sizes: list[int]) -> tuple[list[str], bytes]:
        connection = Connection(Role.SERVER, LIMITS)
        connection.start()
        connection.receive(opening)
        for stream in connection.streams.values():
            connection.send(stream, [bytes(30_000), bytes(20_000)], 50_000)
        lines: list[str] = []
        at = 0
        while at < len(text):
            size = sizes.pop()
            lines += event_lines(connection.receive(text[at : at + size]))
            check(connection)
            at += size
        return lines, b"".join(connection.output())

    expected = run([len(text)])
    for _ in range(4):
        assert run([rng.randrange(1, 40) for _ in range(len(text))]) == expected
    assert run([1] * len(text)) == expected


def h2_event_lines(events: list[h2.events.Event]) -> list[str]:
    """Return h2's events as text, in the form of `event_lines`, as far as both have the event."""
    lines = []
    for event in events:
        match event:
            case h2.events.RequestReceived():
                lines.append(f"request {event.stream_id} {event.headers}" + (" END" if event.stream_ended else ""))
            case h2.events.TrailersReceived():
                lines.append(f"trailers {event.stream_id} {event.headers}")
            case h2.events.DataReceived() if event.data or event.stream_ended:
                lines.append(f"data {event.stream_id} {event.data!r}" + (" END" if event.stream_ended else ""))
            case h2.events.StreamReset() if event.remote_reset:
                lines.append(f"reset {event.stream_id}")
    return lines


def our_event_lines(events: list[Event]) -> list[str]:
    """Return our events in the same form."""
    lines = []
    for event in events:
        match event:
            case HeadersReceived(stream, headers, end_stream, HeadersKind.REQUEST):
                lines.append(f"request {stream.id} {headers}" + (" END" if end_stream else ""))
            case HeadersReceived(stream, headers):
                lines.append(f"trailers {stream.id} {headers}")
            case DataReceived(stream, chunk, _, end_stream):
                lines.append(f"data {stream.id} {chunk!r}" + (" END" if end_stream else ""))
            case StreamReset(stream, _, True):
                lines.append(f"reset {stream.id}")
    return lines


def judge_script(seed: int, count: int) -> int:
    """Run a whole script against both: the same events frame by frame, until one of them finds an error.

    The other one must then find the same error, or it must be one of DIFFERENCES. Returns how many frames both took.
    """
    rng = random.Random(seed)
    connection, peer = wire.server(Http2Limits(initial_window=65_535, connection_window=65_535, max_streams=100))
    judge = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
    judge.initiate_connection()
    judge.receive_data(b"".join([PREFACE, settings(), settings(None, "ACK")]))
    judge.data_to_send()
    pieces = frames(rng, peer, count)
    for place, piece in enumerate(pieces):
        theirs, their_events = h2_receives(judge, piece)
        events = connection.receive(piece)
        ours = ours_says(peer, events)
        kind = piece[3]
        if theirs != ours:
            assert (kind, theirs, ours) in DIFFERENCES | SCRIPT_DIFFERENCES, (kind, theirs, ours, piece)
            return place
        if ours != "fine":
            return place
        assert our_event_lines(events) == h2_event_lines(their_events), piece
    return len(pieces)


def ours_judges(connection: Connection, peer: Peer, frame: bytes) -> str:
    return ours_says(peer, connection.receive(frame))


def ours_says(peer: Peer, events: list[Event]) -> str:
    for event in events:
        if isinstance(event, ConnectionFailed):
            return f"connection {event.code.name}"
    resets = [line.split()[2] for line in peer.said() if line.startswith("RST_STREAM")]
    return f"stream {resets[0]}" if resets else "fine"


def h2_judges(connection: h2.connection.H2Connection, frame: bytes) -> str:
    return h2_receives(connection, frame)[0]


def h2_receives(connection: h2.connection.H2Connection, frame: bytes) -> tuple[str, list[h2.events.Event]]:
    try:
        events = connection.receive_data(frame)
    except h2.exceptions.ProtocolError as error:
        return f"connection {ErrorCode(error.error_code).name}", []
    out = connection.data_to_send()
    while out:
        said, length = Frame.parse_frame_header(memoryview(out[:9]))
        said.parse_body(memoryview(out[9 : 9 + length]))
        if isinstance(said, RstStreamFrame):
            return f"stream {ErrorCode(said.error_code).name}", events
        out = out[9 + length :]
    return "fine", events


HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, UPDATE, CONTINUATION, ALTSVC = 1, 2, 3, 4, 5, 6, 8, 9, 10
P, C, F = "connection PROTOCOL_ERROR", "connection COMPRESSION_ERROR", "connection FRAME_SIZE_ERROR"
# Intended differences from h2, and frames with two errors of which each reports another: (type, h2, ours) -> reason.
DIFFERENCES: dict[tuple[int, str, str], str] = {
    (0, P, F): "two faults: stream 0, and PADDED without a length",
    (HEADERS, P, F): "two faults: stream 0, and PADDED without a length",
    (HEADERS, P, "fine"): "6.2: padding may fill the frame, and the block may follow in CONTINUATION",
    (HEADERS, F, P): "6.2: padding longer than the frame is a PROTOCOL_ERROR",
    (HEADERS, P, C): "4.3: a header block that cannot be decoded is a COMPRESSION_ERROR",
    (HEADERS, P, "stream PROTOCOL_ERROR"): "8.1.1: a malformed header list is a stream error",
    (HEADERS, "fine", C): "we decode before END_HEADERS, and find the error earlier",
    (HEADERS, "fine", P): "we check the stream id before END_HEADERS",
    (HEADERS, "stream STREAM_CLOSED", P): "5.1.1: a request on a used id is a connection error",
    (PRIORITY, F, "fine"): "6.3: a stream error, and there is no stream",
    (PRIORITY, F, "stream FRAME_SIZE_ERROR"): "6.3: a stream error",
    (PRIORITY, F, P): "two faults: stream 0, and its length",
    (RST, P, F): "two faults: stream 0, and its length",
    (RST, "fine", P): "6.4: RST_STREAM on an idle stream is a PROTOCOL_ERROR",
    (SETTINGS, P, F): "two faults: not stream 0, and its length",
    (PUSH, F, P): "two faults: a push, and its length",
    (PUSH, "fine", P): "8.4: a client must not push, finished or not",
    (PUSH, "stream STREAM_CLOSED", P): "8.4: a client must not push, finished or not",
    (PING, P, F): "two faults: not stream 0, and its length",
    (UPDATE, P, "fine"): "6.9: the reserved bit is not part of the increment; on a closed stream nothing is an error",
    (UPDATE, P, "stream PROTOCOL_ERROR"): "6.9: an increment of 0 on a stream is a stream error",
    (UPDATE, P, "connection FLOW_CONTROL_ERROR"): "6.9: the reserved bit is not part of the increment",
    (UPDATE, P, "stream FLOW_CONTROL_ERROR"): "6.9: the reserved bit is not part of the increment",
    (CONTINUATION, "stream STREAM_CLOSED", P): "6.10: CONTINUATION without HEADERS is a connection error",
    (ALTSVC, F, "fine"): "5.5: h2 supports ALTSVC, we do not",
}


# The same for frames of a script.
_SKIPPED = "5.1.1: skipped ids are not remembered; without pseudo-header fields they are late trailers"
_LENGTH = "8.1.1: h2 checks content-length when DATA arrives, not when HEADERS end the stream"
SCRIPT_DIFFERENCES: dict[tuple[int, str, str], str] = {
    (0, P, "stream PROTOCOL_ERROR"): "8.1.1: content that differs from content-length is a stream error",
    (HEADERS, P, "stream STREAM_CLOSED"): _SKIPPED,
    (CONTINUATION, P, "stream STREAM_CLOSED"): _SKIPPED,
    (HEADERS, "fine", "stream PROTOCOL_ERROR"): _LENGTH,
    (CONTINUATION, "fine", "stream PROTOCOL_ERROR"): _LENGTH,
    (CONTINUATION, P, "stream PROTOCOL_ERROR"): "8.1.1: a malformed header list is a stream error",
    (CONTINUATION, "connection STREAM_CLOSED", P): "6.10: CONTINUATION without HEADERS is a connection error",
    (CONTINUATION, P, "fine"): "10.5.1: h2 counts HEADERS among its 64 frames of a block, we do not",
}


@pytest.mark.parametrize("group", range(10))
def test_single_frames_give_the_same_result_as_in_h2(group: int) -> None:
    judge_alike(group, 250)


@pytest.mark.parametrize("group", range(4))
def test_scripts_give_the_same_events_as_in_h2(group: int) -> None:
    taken = sum(judge_script(seed, 40) for seed in range(group * 8, group * 8 + 8))
    # The scripts were not refused at once.
    assert taken > 30


def judge_alike(seed: int, count: int) -> None:
    """Compare results for random frames of every type: accepted, or the same stream or connection error; else above."""
    rng = random.Random(seed)
    for _ in range(count):
        connection, peer = wire.server(Http2Limits(initial_window=65_535, connection_window=65_535, max_streams=100))
        judge = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding=None))
        judge.initiate_connection()
        before = [peer.request(1), peer.request(3, "END_STREAM"), wire.rst(3), peer.request(5, "END_STREAM")]
        connection.receive(b"".join(before))
        judge.receive_data(b"".join([PREFACE, settings(), settings(None, "ACK"), *before]))
        peer.said()
        judge.data_to_send()

        kind = rng.choice([0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 8, 9, 10, 11, 99])
        flags = rng.choice([0, 0, 1, 4, 5, 8, 9, 0x20, rng.randrange(256)])
        stream_id = rng.choice([0, 1, 1, 3, 5, 7, 2, 9, 2**31 + 1])
        payload = rng.randbytes(rng.choice([0, 1, 3, 4, 4, 5, 6, 8, 8, 12, rng.randrange(40)]))
        if rng.random() < 0.4:
            payload = bytes(len(payload))
        if kind == HEADERS and rng.random() < 0.8:
            fields = [*REQUEST, (b"a", b"b")]
            payload = peer.block_of(fields[rng.choice([0, 0, 4, 6]) :])
        frame = raw(kind, flags, stream_id, payload)
        theirs, ours = h2_judges(judge, frame), ours_judges(connection, peer, frame)
        assert theirs == ours or (kind, theirs, ours) in DIFFERENCES, (kind, theirs, ours, flags, stream_id, payload)
