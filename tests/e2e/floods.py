"""Floods: requests that cost much work for few bytes, sent within the windows, which other clients should not notice.

Attacks that break the rules of HTTP/2 are in `attacks`; these keep to the rules, and only request a lot.
"""

from __future__ import annotations

import asyncio
import gzip
import itertools
from collections.abc import Callable, Iterator

from hyperframe.frame import Frame, SettingsFrame, WindowUpdateFrame

from proto.framing import frame
from proto.pb import rpc_pb2
from tests.e2e.attacks import WATCHED, WINDOW_MAX, Attacker
from tests.http2.wire import data, raw, update
from tests.waiting import until_async

FRAME_BYTES = 16_384
GZIP = (b"grpc-encoding", b"gzip")
COMPACTED = b"required revision has been compacted"
"""What such a create is answered."""

FILTERS = 2_000_000
"""In one request: 2 MB of them, which is as much as a watch request may be; gzip makes 2 KB of it."""


class Sender(Attacker):
    """An attacker that keeps to its windows and reads all responses."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connection_window = 65_535
        self.initial_window = 65_535
        self.windows: dict[int, int] = {}
        """By stream: what was sent on it and what was added to its window."""
        self.moved = asyncio.Event()
        self.received = 0
        """Bytes that came."""
        self.greeted = False
        """The server's SETTINGS came."""
        self.gone: set[int] = set()
        """Streams that the server has ended."""
        self.last: set[int] = set()
        """Streams on which a create from a negative revision was answered."""
        super().__init__(reader, writer)

    @classmethod
    async def open(cls, port: int, greeted: bool = True) -> Sender:
        """Connect, with windows that are wide open; `greeted`: wait for the server's SETTINGS too."""
        sender = await cls.connect(port, WINDOW_MAX)
        assert isinstance(sender, Sender)
        await sender.say(update(0, WINDOW_MAX - 65_535))
        if greeted:
            await until_async(lambda: sender.greeted or sender.over.is_set(), "SETTINGS")
        return sender

    def room(self, stream_id: int) -> int:
        """Bytes that may be sent on a stream now."""
        return min(self.connection_window, self.initial_window + self.windows.get(stream_id, 0))

    async def send(self, stream_id: int, body: bytes, limit_s: float = 600.0) -> bool:
        """Send a body as fast as the windows let it; False: stream or connection ended. Raises TimeoutError."""
        start = 0
        async with asyncio.timeout(limit_s):
            while start < len(body):
                size = min(self.room(stream_id), FRAME_BYTES, len(body) - start)
                if size <= 0:
                    self.moved.clear()
                    if self.over.is_set() or stream_id in self.gone:
                        return False
                    await self.moved.wait()
                    continue
                self.connection_window -= size
                self.windows[stream_id] = self.windows.get(stream_id, 0) - size
                await self.say(data(stream_id, body[start : start + size]))
                start += size
        return not self.over.is_set() and stream_id not in self.gone

    async def _listen(self) -> None:
        await super()._listen()
        self.moved.set()

    def resume(self) -> None:
        """Read again."""
        self.writer.transport.resume_reading()  # type: ignore[attr-defined]  # sockets have it

    def _take(self, heard: bytes) -> bytes:
        at = 0
        while len(heard) - at >= 9 and len(heard) - at >= (size := 9 + int.from_bytes(heard[at : at + 3], "big")):
            kind = heard[at + 3]
            if kind == 8:
                self._granted(heard[at : at + size])
            elif kind == 4:
                self._settings(heard[at : at + size])
            elif kind != 0:
                # RST_STREAM, or HEADERS that end the stream.
                if kind == 3 or (kind == 1 and heard[at + 4] & 1):
                    self.gone.add(int.from_bytes(heard[at + 5 : at + 9], "big"))
                    self.moved.set()
                super()._take(heard[at : at + size])
            elif COMPACTED in heard[at : at + size]:
                self.last.add(int.from_bytes(heard[at + 5 : at + 9], "big"))
            self.received += size
            at += size
        return heard[at:]

    def _granted(self, text: bytes) -> None:
        parsed, _ = Frame.parse_frame_header(memoryview(text[:9]))
        parsed.parse_body(memoryview(text[9:]))
        assert isinstance(parsed, WindowUpdateFrame)
        if parsed.stream_id:
            self.windows[parsed.stream_id] = self.windows.get(parsed.stream_id, 0) + parsed.window_increment
        else:
            self.connection_window += parsed.window_increment
        self.moved.set()

    def _settings(self, text: bytes) -> None:
        parsed, _ = Frame.parse_frame_header(memoryview(text[:9]))
        parsed.parse_body(memoryview(text[9:]))
        assert isinstance(parsed, SettingsFrame)
        if "ACK" not in parsed.flags:
            self.greeted = True
            self.writer.write(raw(4, 1, 0, b""))
        self.initial_window = parsed.settings.get(SettingsFrame.INITIAL_WINDOW_SIZE, self.initial_window)
        self.moved.set()


def create(key: bytes = WATCHED, watch_id: int = 0, start_revision: int = 0) -> bytes:
    """Build a framed create."""
    request = rpc_pb2.WatchCreateRequest(key=key, watch_id=watch_id, start_revision=start_revision)
    return frame(rpc_pb2.WatchRequest(create_request=request).SerializeToString())


def cancel(watch_id: int) -> bytes:
    """Build a framed cancel."""
    request = rpc_pb2.WatchCancelRequest(watch_id=watch_id)
    return frame(rpc_pb2.WatchRequest(cancel_request=request).SerializeToString())


def progress() -> bytes:
    """Build a framed request for progress."""
    return frame(rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()).SerializeToString())


def filters(count: int = FILTERS, value: int = 2) -> bytes:
    """Build a framed, compressed create with this many filters, all the same."""
    packed = bytes((value,)) * count
    body = _field(0x2A, packed) + _field(0x0A, WATCHED)
    return frame(gzip.compress(_field(0x0A, body)), compressed=True)


def _field(tag: int, content: bytes) -> bytes:
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes((tag,)) + bytes(length) + bytes((size,)) + content


Flood = tuple[Callable[[int], Iterator[bytes]], tuple[tuple[bytes, bytes], ...]]
"""What is sent on one Watch stream: so many messages, and the metadata of the call."""

FLOODS: dict[str, Flood] = {
    "progress requests": (lambda count: itertools.repeat(progress(), count), ()),
    "cancels of unknown ids": (lambda count: (cancel(1_000 + number) for number in range(count)), ()),
    "creates of an id that is taken": (lambda count: itertools.repeat(create(watch_id=7), count), ()),
    "creates of one range": (lambda count: itertools.repeat(create(), count), ()),
    "creates of different ranges": (lambda count: (create(b"r/%d" % number) for number in range(count)), ()),
    "requests full of filters": (lambda count: itertools.repeat(filters(), count), (GZIP,)),
}


async def flood(port: int, name: str, count: int, streams: int = 1, limit_s: float = 60.0) -> str:
    """Send `count` messages of a kind on each of some Watch streams, wait until handled, and return how it ended."""
    sender = await Sender.open(port)
    try:
        async with asyncio.timeout(limit_s):
            await asyncio.gather(*(_flood_one(sender, 2 * number + 1, name, count) for number in range(streams)))
        return sender.goaway or ("closed" if sender.over.is_set() else "taken")
    except TimeoutError:
        return f"not taken in {limit_s:g} s"
    finally:
        sender.close()


async def _flood_one(sender: Sender, stream_id: int, name: str, count: int) -> None:
    messages, metadata = FLOODS[name]
    await sender.say(sender.request(stream_id, *metadata))
    # The watch that duplicates repeat, and that progress is requested for.
    await sender.send(stream_id, create(watch_id=7) + b"".join(messages(count)))
    # The last one is answered after all before it were handled, with a response that no other one gets.
    await sender.send(stream_id, create(start_revision=-1))
    await until_async(lambda: {stream_id} & (sender.last | sender.gone) or sender.over.is_set(), "the last answer", 600)
