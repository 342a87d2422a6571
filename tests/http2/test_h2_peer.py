"""Whole conversations with `h2` as the peer, in memory: our server with its client, our client with its server.

Each seed is a random conversation: opened streams, data of all sizes both ways with and without padding, ends, resets,
changes of settings, pings, late window updates. At the end every byte must have arrived, in order.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import pytest

from proto.http2 import (
    Connection,
    ConnectionFailed,
    DataReceived,
    ErrorCode,
    HeadersKind,
    HeadersReceived,
    Http2Limits,
    Role,
    Stream,
    StreamReset,
)
from tests.http2.wire import REQUEST, RESPONSE, TRAILERS

LIMITS = Http2Limits(initial_window=70_000, connection_window=150_000, max_frame_bytes=20_000, header_table_bytes=300)
SETTINGS = h2.settings.SettingCodes


@dataclass
class Conversation:
    """Our connection, h2's, and the bytes that each side has sent and received on every stream."""

    seed: int
    role: Role
    rng: random.Random = field(init=False)
    ours: Connection = field(init=False)
    theirs: h2.connection.H2Connection = field(init=False)
    # Stream id -> bytes.
    we_sent: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    we_received: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    they_sent: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    they_received: dict[int, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    # Streams on which we, or h2, can still send, and streams that either side has reset.
    our_open: dict[int, Stream] = field(default_factory=dict)
    their_open: set[int] = field(default_factory=set)
    reset: set[int] = field(default_factory=set)
    # Bytes received but not yet returned by a window update: (stream id, bytes).
    our_debts: list[tuple[Stream, int]] = field(default_factory=list)
    their_debts: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.ours = Connection(self.role, LIMITS)
        config = h2.config.H2Configuration(client_side=self.role is Role.SERVER, header_encoding=None)
        self.theirs = h2.connection.H2Connection(config)
        self.ours.start()
        self.theirs.initiate_connection()
        self.exchange()

    def exchange(self) -> None:
        """Exchange bytes, in random pieces, until neither side has output."""
        while True:
            out = b"".join(self.ours.output())
            back = self.theirs.data_to_send()
            if not out and not back:
                return
            if out:
                self.receive_h2(self.theirs.receive_data(out))
            while back:
                size = self.rng.choice([len(back), self.rng.randrange(len(back)) + 1])
                self.receive(back[:size])
                back = back[size:]

    def receive(self, data: bytes) -> None:
        for event in self.ours.receive(data):
            match event:
                case HeadersReceived(stream, _, _, HeadersKind.REQUEST):
                    self.our_open[stream.id] = stream
                    self.ours.send_headers(stream, RESPONSE)
                case DataReceived(stream, chunk, flow_size):
                    self.we_received[stream.id] += chunk
                    self.our_debts.append((stream, flow_size))
                case StreamReset(stream, code):
                    assert code in (ErrorCode.CANCEL, ErrorCode.NO_ERROR)
                    self.our_open.pop(stream.id, None)
                    if code is ErrorCode.CANCEL:
                        self.reset.add(stream.id)
                case ConnectionFailed():
                    raise AssertionError(event)

    def receive_h2(self, events: list[h2.events.Event]) -> None:
        # h2 has already applied a reset that is later in the list.
        over = {event.stream_id for event in events if isinstance(event, h2.events.StreamReset)}
        for event in events:
            if isinstance(event, h2.events.RequestReceived):
                if event.stream_id in over:
                    continue
                assert event.stream_id is not None
                self.their_open.add(event.stream_id)
                self.theirs.send_headers(event.stream_id, RESPONSE)
            elif isinstance(event, h2.events.DataReceived):
                assert event.stream_id is not None
                self.they_received[event.stream_id] += event.data or b""
                self.their_debts.append((event.stream_id, event.flow_controlled_length or 0))
            elif isinstance(event, h2.events.StreamReset):
                assert event.stream_id is not None
                self.their_open.discard(event.stream_id)
                if event.error_code == ErrorCode.CANCEL:
                    self.reset.add(event.stream_id)
            else:
                assert not isinstance(event, h2.events.ConnectionTerminated)

    def step(self) -> None:
        rng = self.rng
        often = [self.open, *[self.send] * 4, *[self.send_h2] * 4, self.pay]
        rare = [self.end, self.end_h2, self.reset_one, self.reset_one_h2, self.settings, self.ping, self.pause]
        rng.choice(often if rng.random() < 0.85 else rare)()
        if rng.random() < 0.5:
            self.exchange()

    def open(self) -> None:
        if self.role is Role.CLIENT:
            stream = self.ours.open(REQUEST)
            self.our_open[stream.id] = stream
        else:
            stream_id = self.theirs.get_next_available_stream_id()
            self.theirs.send_headers(stream_id, [*REQUEST, (b"n", b"%d" % self.rng.randrange(99))])
            self.their_open.add(stream_id)

    def send(self) -> None:
        if self.our_open:
            stream = self.rng.choice(list(self.our_open.values()))
            pieces = [
                self.rng.randbytes(self.rng.choice([1, 5, 100, 30_000])) for _ in range(self.rng.randrange(3) + 1)
            ]
            whole = self.ours.send(stream, pieces, sum(map(len, pieces)))
            assert whole == (not stream.blocked)
            self.we_sent[stream.id] += b"".join(pieces)

    def send_h2(self) -> None:
        if self.their_open:
            stream_id = self.rng.choice(sorted(self.their_open))
            room = min(self.theirs.local_flow_control_window(stream_id), self.theirs.max_outbound_frame_size)
            padding = self.rng.choice([None, None, 0, 9])
            size = min(self.rng.choice([0, 5, 1_000, 30_000]), room - 10)
            if size >= 0:
                chunk = self.rng.randbytes(size)
                self.theirs.send_data(stream_id, chunk, pad_length=padding)
                self.they_sent[stream_id] += chunk

    def pay(self) -> None:
        for stream, size in self.our_debts:
            self.ours.consumed(stream, size)
        for stream_id, size in self.their_debts:
            self.theirs.acknowledge_received_data(size, stream_id)
        self.our_debts.clear()
        self.their_debts.clear()

    def end(self) -> None:
        if self.our_open:
            stream = self.our_open.pop(self.rng.choice(sorted(self.our_open)))
            # h2 refuses an empty frame while its window is negative, although it needs no window (6.9).
            if self.rng.random() < 0.4 and stream.send_window >= 0:
                self.ours.send(stream, [], 0, end_stream=True)
            else:
                self.ours.send_headers(stream, TRAILERS, end_stream=True)

    def end_h2(self) -> None:
        if self.their_open:
            stream_id = self.rng.choice(sorted(self.their_open))
            self.their_open.discard(stream_id)
            self.theirs.end_stream(stream_id)

    def reset_one(self) -> None:
        if self.our_open:
            stream = self.our_open.pop(self.rng.choice(sorted(self.our_open)))
            self.reset.add(stream.id)
            self.ours.reset(stream, ErrorCode.CANCEL)

    def reset_one_h2(self) -> None:
        if self.their_open:
            stream_id = self.rng.choice(sorted(self.their_open))
            self.their_open.discard(stream_id)
            self.reset.add(stream_id)
            self.theirs.reset_stream(stream_id, ErrorCode.CANCEL)

    def settings(self) -> None:
        name, values = self.rng.choice(
            [
                (SETTINGS.INITIAL_WINDOW_SIZE, [0, 100, 65_535, 200_000]),
                (SETTINGS.MAX_FRAME_SIZE, [16_384, 50_000]),
                (SETTINGS.HEADER_TABLE_SIZE, [0, 1_500, 4_096, 9_000]),
            ]
        )
        self.theirs.update_settings({name: self.rng.choice(values)})
        # One at a time: h2 applies an acknowledgement to one pending change of every setting.
        self.exchange()

    def ping(self) -> None:
        self.ours.ping(b"12345678")
        self.theirs.ping(b"abcdefgh")

    def pause(self) -> None:
        if self.ours.paused:
            self.ours.resume()
        else:
            self.ours.pause()

    def finish(self) -> None:
        """Let all data be sent, then compare the sent bytes with the received ones."""
        self.ours.resume()
        self.theirs.update_settings({SETTINGS.INITIAL_WINDOW_SIZE: 2**20})
        for _ in range(200):
            self.exchange()
            if not self.our_debts and not self.their_debts:
                break
            self.pay()
        for sent, received in ((self.we_sent, self.they_received), (self.they_sent, self.we_received)):
            for stream_id, data in sent.items():
                if stream_id in self.reset or (stream_id not in received and not data):
                    continue
                if sent is self.they_sent and bytes(data) != bytes(received[stream_id]):
                    # A server whose response is complete does not wait for the rest of the request.
                    assert self.role is Role.SERVER
                    assert stream_id not in self.ours.streams
                    assert data.startswith(received[stream_id])
                    continue
                assert bytes(received[stream_id]) == bytes(data), stream_id
        assert not any(stream.blocked for stream in self.ours.streams.values())


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("seed", range(25))
def test_a_random_conversation_loses_no_byte(seed: int, role: Role) -> None:
    talk = Conversation(seed, role)
    for _ in range(150):
        talk.step()
    talk.finish()
    # Enough data was exchanged.
    received = [*talk.they_received.values(), *talk.we_received.values()]
    assert sum(map(len, received)) > 20_000
