"""Attacks on a listener, each a coroutine that takes a port and returns how the attack ended.

They write HTTP/2 frames as bytes, since a client library would prevent most of them. Each goes on until the server cuts
it off or it is finished; `Attack.wants` is the outcome that the proxy must reach. Some attack by holding connections
open until they are asked to close them.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass

from hpack import Encoder
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, RstStreamFrame

from proto.framing import frame
from proto.http2 import ErrorCode
from proto.pb import rpc_pb2
from tests.http2.wire import PREFACE, REQUEST, data, ping, priority, raw, rst, settings, update
from tests.waiting import until_async

HOST = "127.0.0.1"
CHUNK_BYTES = 64 * 1024
PIECES = 500
"""What is sent at a time: more than is forgiven for a turn of the loop, else it would be no flood. Not many times more,
since making them takes time as well, and in a test the attacker has its turns in the same loop."""

WINDOW_MAX = 2**31 - 1
WATCHED = b"abuse"


class Attacker:
    """One connection that sends arbitrary bytes and records how the server ends it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.encoder = Encoder()
        self.goaway = ""
        """The last GOAWAY, as text."""
        self.resets: list[str] = []
        """The RST_STREAMs that came."""
        self.heads = b""
        """All header blocks that came, undecoded: enough to look for a text in trailers that are not compressed."""
        self.over = asyncio.Event()
        self._listening = asyncio.get_running_loop().create_task(self._listen())

    @classmethod
    async def connect(cls, port: int, window: int | None = None) -> Attacker:
        """
        Connect and send the HTTP/2 client preface; `window`: the receive window of each stream.

        The server's SETTINGS are acknowledged: on a busy machine an attack may take longer than their timeout.
        """
        attacker = cls(*await asyncio.open_connection(HOST, port))
        await attacker.say(PREFACE + settings({4: window} if window is not None else {}) + settings(None, "ACK"))
        return attacker

    async def say(self, text: bytes) -> None:
        """Send, as fast as the server reads. Does nothing once the connection is closed."""
        if self.over.is_set():
            return
        self.writer.write(text)
        with contextlib.suppress(ConnectionError):
            await self.writer.drain()

    async def flood(self, pieces: Iterator[bytes]) -> None:
        """Send pieces until there are no more or the connection ends."""
        while not self.over.is_set():
            chunk = b"".join(itertools.islice(pieces, PIECES))
            if not chunk:
                return
            await self.say(chunk)
            # Writing without ever waiting would block the event loop.
            await asyncio.sleep(0)

    def request(self, stream_id: int, *extra: tuple[bytes, bytes]) -> bytes:
        """Build the head of a Watch call."""
        return HeadersFrame(stream_id, self.encoder.encode([*REQUEST, *extra]), flags=["END_HEADERS"]).serialize()

    def watch(self, stream_id: int) -> bytes:
        """Build a Watch call for WATCHED."""
        create = rpc_pb2.WatchCreateRequest(key=WATCHED)
        message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
        return self.request(stream_id) + data(stream_id, frame(message))

    def pause(self) -> None:
        """Stop reading."""
        self.writer.transport.pause_reading()  # type: ignore[attr-defined]  # sockets have it

    async def fate(self, limit_s: float = 30.0) -> str:
        """Wait for the end and return what it was."""
        async with asyncio.timeout(limit_s):
            await self.over.wait()
        self.close()
        return self.goaway or "closed"

    def close(self) -> None:
        """Close the connection."""
        self.writer.transport.abort()
        self._listening.cancel()

    async def _listen(self) -> None:
        heard = b""
        with contextlib.suppress(ConnectionError):
            while part := await self.reader.read(CHUNK_BYTES):
                heard = self._take(heard + part)
        self.over.set()

    def _take(self, heard: bytes) -> bytes:
        while len(heard) >= 9 and len(heard) >= (size := 9 + int.from_bytes(heard[:3], "big")):
            parsed, _ = Frame.parse_frame_header(memoryview(heard[:9]))
            parsed.parse_body(memoryview(heard[9:size]))
            heard = heard[size:]
            if isinstance(parsed, GoAwayFrame):
                reason = parsed.additional_data.decode("ascii", "replace")
                self.goaway = f"GOAWAY {ErrorCode(parsed.error_code).name}: {reason}"
            elif isinstance(parsed, RstStreamFrame):
                self.resets.append(ErrorCode(parsed.error_code).name)
            elif isinstance(parsed, HeadersFrame):
                self.heads += parsed.data
        return heard


@contextlib.asynccontextmanager
async def attacking(port: int, window: int | None = None) -> AsyncIterator[Attacker]:
    """Yield a connected attacker, closed at the end."""
    attacker = await Attacker.connect(port, window)
    try:
        yield attacker
    finally:
        attacker.close()


def flooding(piece: Callable[[Attacker, int], bytes], begin: bool = True) -> Callable[[int], Awaitable[str]]:
    """Make an attack that repeats the same bytes; `begin`: on a connection that has stream 1 open."""

    async def attack(port: int) -> str:
        async with attacking(port) as attacker:
            if begin:
                await attacker.say(attacker.watch(1))
            await attacker.flood(piece(attacker, number) for number in range(300_000))
            return await attacker.fate()

    return attack


def continuation(attacker: Attacker, number: int) -> bytes:
    """HEADERS that never end."""
    if number == 0:
        return HeadersFrame(3, attacker.encoder.encode(REQUEST)).serialize()
    return raw(9, 0, 3, b"")


async def metadata_bomb(port: int) -> str:
    """Refer to one large field of the compression table two thousand times a call: 2 KB of frames, 7 MB decoded."""
    async with attacking(port) as attacker:
        first = attacker.encoder.encode([*REQUEST, (b"x-bomb", b"x" * 3500)])
        indexed = attacker.encoder.encode([(b"x-bomb", b"x" * 3500)])
        await attacker.say(raw(1, 4, 1, first))
        for stream_id in range(3, 203, 2):
            block = attacker.encoder.encode(REQUEST) + indexed * 2_000
            await attacker.say(raw(1, 4, stream_id, block))
        await until_async(
            lambda: attacker.resets.count("ENHANCE_YOUR_CALM") >= 100 or attacker.over.is_set(), "the resets"
        )
        return f"{attacker.resets.count('ENHANCE_YOUR_CALM')} calls reset ENHANCE_YOUR_CALM"


async def header_fields(port: int) -> str:
    """Put thousands of the smallest fields into each call, each of which changes the compression table."""
    async with attacking(port) as attacker:
        blocks = (attacker.encoder.encode(REQUEST) + b"\x41\x00" * 8_000 for _ in itertools.count())
        await attacker.flood(raw(1, 4, 2 * number + 1, next(blocks)) for number in range(10_000))
        return await attacker.fate()


async def compression_bomb(port: int) -> str:
    """Send gzip that inflates to 64 MiB, as one WatchRequest."""
    bomb = frame(gzip.compress(bytes(64 << 20), 6), compressed=True)
    return await refused_calls(port, 20, bomb, (b"grpc-encoding", b"gzip"))


async def huge_message(port: int) -> str:
    """Announce a message of 4 GiB."""
    return await refused_calls(port, 20, b"\0\xff\xff\xff\xff" + bytes(100))


async def refused_calls(port: int, count: int, body: bytes, *extra: tuple[bytes, bytes]) -> str:
    """Make calls with a body that must be refused; count the RESOURCE_EXHAUSTED answers."""
    async with attacking(port) as attacker:
        for stream_id in range(1, 2 * count, 2):
            await attacker.say(attacker.request(stream_id, *extra))
            for start in range(0, len(body), 16_384):
                await attacker.say(data(stream_id, body[start : start + 16_384]))
            # The connection's window is given back only when the server has consumed the body.
            await until_async(lambda: len(attacker.resets) >= (stream_id + 1) // 2 or attacker.over.is_set(), "a reset")  # noqa: B023  # called at once
        return f"{len(attacker.resets)} calls refused"


async def slow_loris(port: int) -> str:
    """Open 500 connections that send the preface a byte at a time, or nothing."""
    pairs = [await asyncio.open_connection(HOST, port) for _ in range(500)]
    for reader, writer in pairs:
        writer.write(PREFACE[:5] if id(reader) % 2 else b"")
    closed = 0
    for reader, writer in pairs:
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 30) == b""
        closed += 1
        writer.close()
    return f"{closed} connections closed"


async def never_opening_windows(port: int) -> str:
    """Hold 2,000 watches whose windows stay closed."""
    return await hold_watches(port, 2000, window=0)


async def never_reading(port: int) -> str:
    """Hold 2,000 watches with wide windows and read nothing."""
    return await hold_watches(port, 2000, window=WINDOW_MAX, deaf=True)


async def hold_watches(port: int, count: int, window: int, deaf: bool = False) -> str:
    """Open watches, consume none of their data, and hold them for some seconds."""
    async with attacking(port, window) as attacker:
        await attacker.say(update(0, WINDOW_MAX - 65_535))
        await attacker.flood(attacker.watch(2 * number + 1) for number in range(count))
        if deaf:
            attacker.pause()
        with contextlib.suppress(TimeoutError):
            return await attacker.fate(HOLD_S)
        return f"held {count} watches"


async def settings_over_streams(port: int) -> str:
    """Change the windows of 20,000 streams repeatedly."""
    async with attacking(port) as attacker:
        await attacker.flood(attacker.request(2 * number + 1) for number in range(20_000))
        await attacker.flood(settings({4: 1000 + number % 2}) for number in range(2_000))
        return await attacker.fate()


HOLD_S = 3.0
"""How long attacks hold on that attack by being there."""

CALM = "GOAWAY ENHANCE_YOUR_CALM: "


@dataclass(frozen=True)
class Attack:
    """One attack and its required outcome."""

    run: Callable[[int], Awaitable[str]]
    wants: str
    """A regular expression."""

    waits: bool = False
    """It is there for longer than a quick test takes."""


ATTACKS: dict[str, Attack] = {
    "ping flood": Attack(flooding(lambda _, __: ping()), f"{CALM}(too_many_pings|flood: PING)"),
    "SETTINGS flood": Attack(flooding(lambda _, __: settings()), f"{CALM}flood: SETTINGS"),
    "SETTINGS over 20,000 streams": Attack(settings_over_streams, f"{CALM}flood: SETTINGS"),
    "rapid reset": Attack(
        flooding(lambda attacker, number: attacker.request(2 * number + 1) + rst(2 * number + 1), begin=False),
        f"{CALM}flood: streams ended badly",
    ),
    "made you reset": Attack(
        flooding(lambda attacker, n: attacker.request(2 * n + 1) + raw(8, 0, 2 * n + 1, bytes(4)), begin=False),
        f"{CALM}flood: streams ended badly",
    ),
    "CONTINUATION flood": Attack(flooding(continuation), f"{CALM}flood: CONTINUATION"),
    "empty DATA": Attack(flooding(lambda _, __: data(1, b"")), f"{CALM}flood: empty DATA"),
    "PRIORITY flood": Attack(flooding(lambda _, __: priority(1)), f"{CALM}flood: frames without effect"),
    "tiny WINDOW_UPDATEs": Attack(flooding(lambda _, __: update(1, 1)), f"{CALM}flood: tiny WINDOW_UPDATE"),
    "metadata bomb": Attack(metadata_bomb, "100 calls reset ENHANCE_YOUR_CALM"),
    "header field flood": Attack(header_fields, f"{CALM}flood: header fields"),
    "compressed-message bomb": Attack(compression_bomb, "20 calls refused"),
    "message of 4 GiB": Attack(huge_message, "20 calls refused"),
    "windows that never open": Attack(never_opening_windows, "held 2000 watches", waits=True),
    "never reading": Attack(never_reading, "held 2000 watches", waits=True),
    "500 connections that say nothing": Attack(slow_loris, "500 connections closed", waits=True),
}
