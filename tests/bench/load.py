"""The load generator: raw HTTP/2 connections that open Watch streams and count what arrives.

A bench client must cost less than what it measures, so nothing is decoded: frame headers are walked, events are
counted by a marker in every value, and the marker is followed by the time of the write, which gives the delay.
Runs as a process of its own: the case and the target come as arguments, the result goes to standard output as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import sys
import time
from typing import Any, cast

import hpack
import uvloop

from proto.pb import rpc_pb2
from tests.bench.cases import CASES, Case

MARKER = b"@wm@"
STAMP_DIGITS = 20
TAIL = len(MARKER) + STAMP_DIGITS - 1
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW = 2**31 - 1
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Make one HTTP/2 frame."""
    return struct.pack(">I", len(payload) << 8 | kind) + struct.pack(">BI", flags, stream) + payload


def range_of(index: int) -> tuple[bytes, bytes]:
    """Return (key, range_end) of a range."""
    return b"bench/%06d/" % index, b"bench/%06d0" % index


class Client(asyncio.Protocol):
    """One connection with its streams."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.rest = b""
        self.tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        settings = struct.pack(">HIHI", 4, WINDOW, 5, 2**24 - 1)
        raise_window = frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - 65535))
        self.transport.write(PREFACE + frame(SETTINGS, 0, 0, settings) + raise_window)

    def open(self, streams: list[list[int]], authority: str) -> None:
        """Open one stream for each list of ranges, with a watch on each of them."""
        encoder = hpack.Encoder()
        encoder.header_table_size = 0
        block = encoder.encode(
            [
                (":method", "POST"),
                (":scheme", "http"),
                (":path", "/etcdserverpb.Watch/Watch"),
                (":authority", authority),
                ("content-type", "application/grpc"),
                ("te", "trailers"),
            ]
        )
        out = []
        for number, ranges in enumerate(streams):
            out.append(frame(HEADERS, 4, 2 * number + 1, block))
            for index in ranges:
                key, end = range_of(index)
                create = rpc_pb2.WatchCreateRequest(key=key, range_end=end)
                message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
                out.append(frame(DATA, 0, 2 * number + 1, b"\0" + struct.pack(">I", len(message)) + message))
        self.transport.write(b"".join(out))

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        events = self.tail + data
        self.tail = events[-TAIL:] if len(events) > TAIL else events
        count = events.count(MARKER, 0, len(events) - STAMP_DIGITS)
        if count:
            self.tally.count(count, events, now)
        if self.rest:
            data = self.rest + data
        self.rest = data[self._walk(data) :]

    def _walk(self, data: bytes) -> int:
        """Answer what must be answered; return the offset of the first incomplete frame."""
        offset, end, answers = 0, len(data), 0
        while end - offset >= 9:
            length = data[offset] << 16 | data[offset + 1] << 8 | data[offset + 2]
            after = offset + 9 + length
            kind = data[offset + 3]
            if after > end:
                break
            if kind == DATA:
                answers += 1
            elif kind == PING and not data[offset + 4] & 1:
                self.transport.write(frame(PING, 1, 0, data[offset + 9 : after]))
            elif kind == SETTINGS and not data[offset + 4] & 1:
                self.transport.write(frame(SETTINGS, 1, 0, b""))
            elif kind in (RST_STREAM, GOAWAY):
                self.tally.broken += 1
            offset = after
        self.tally.frames += answers
        if self.tally.frames >= self.tally.creates:
            self.tally.created.set()
        return offset

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002 - asyncio's signature
        self.tally.broken += 1


class Tally:
    """What all connections together have received."""

    def __init__(self, creates: int, expected: int) -> None:
        self.creates = creates
        self.created = asyncio.Event()
        self.expected = expected
        self.events = 0
        self.frames = 0
        self.broken = 0
        self.delays: list[tuple[int, int]] = []
        self.complete = asyncio.Event()

    def count(self, count: int, events: bytes, now: int) -> None:
        """Count events; the first one of a chunk gives the delay of all."""
        self.events += count
        at = events.index(MARKER) + len(MARKER)
        self.delays.append((now - int(events[at : at + STAMP_DIGITS]), count))
        if self.events >= self.expected:
            self.complete.set()

    def delay_ms(self, share: float) -> float:
        """Return the delay in ms that `share` of the events stayed below."""
        self.delays.sort()
        wanted = share * sum(count for _, count in self.delays)
        for delay, count in self.delays:
            wanted -= count
            if wanted <= 0:
                return delay / 1e6
        return 0.0


async def run(case: Case, host: str, port: int) -> None:
    """Open everything, say so, wait for all events, say what came."""
    loop = asyncio.get_running_loop()
    tally = Tally(case.streams * case.watches, case.expected)
    started = time.monotonic()
    clients = []
    for _ in range(case.connections):
        _, client = await loop.create_connection(lambda: Client(tally), host, port)
        clients.append(client)
    number = 0
    share, rest = divmod(case.streams, case.connections)
    for index, client in enumerate(clients):
        streams = []
        for _ in range(share + (index < rest)):
            streams.append([(number + watch) % case.ranges for watch in range(case.watches)])
            number += case.watches
        client.open(streams, f"{host}:{port}")
    await asyncio.wait_for(tally.created.wait(), 60)
    say({"ready": True, "created": tally.frames, "create_s": time.monotonic() - started})
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if case.writes:
        limit_s = 30 + (case.writes / case.rate if case.rate else 30)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(tally.complete.wait(), limit_s)
        percentiles = {f"p{share:g}_ms": tally.delay_ms(share / 100) for share in (50, 99, 100)}
        say({"events": tally.events, "expected": case.expected, "broken": tally.broken, **percentiles})
    await reader.readline()


def say(what: dict[str, Any]) -> None:
    """Report one line to the parent."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(run(CASES[sys.argv[1]], sys.argv[2], int(sys.argv[3])))
