"""The longest turn of the event loop while a client with 100,000 watches on one stream leaves.

The client is a separate process: it is killed, resets its stream, or cancels each watch. The proxy runs in this
process, see `leaving`; no event of another client waits for longer than the longest turn.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from functools import partial
from typing import NamedTuple

import uvloop

from coalesce.limits import CoreLimits
from proto.framing import MessageReader
from proto.pb import rpc_pb2
from proxy.server import Proxy, ProxySettings, tune_gc
from tests.bench.profiles import DATA, HEADERS, RST_STREAM, frame
from tests.bench.sharing.bystander import load_command
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.sharing.leaving import PATH, Turns
from tests.bench.wire import RawClient, RequestBlocks, message_frame
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import until_async

WATCHES = 100_000
AT_ONCE = 1000
"""Requests that are sent without waiting for answers: they fit into the window of a server."""
FUTURE = 1 << 40
WAYS = ("is killed", "resets its stream", "cancels each watch")


class Place(NamedTuple):
    """Where the watches are when their client leaves."""

    own: bool = False
    """Each watch has a key of its own."""
    start: int = 0
    covers: tuple[bytes, ...] = ()
    stalled: bool = False
    """The client has stopped reading, and the watches lag since an event."""


PLACES = {
    "one range": Place(),
    "one range, ahead": Place(start=FUTURE),
    "one range, stalled": Place(stalled=True),
    "ranges of their own": Place(own=True),
    "below a cover": Place(own=True, covers=(b"k",)),
}


class Leaver(RawClient):
    """A client that creates its watches in parts, and leaves at SIGUSR1."""

    def __init__(self, port: int, place: Place, way: str) -> None:
        super().__init__()
        self._authority = f"{HOST}:{port}"
        self._place = place
        self._way = way
        self._answered = 0
        self._reader = MessageReader(1 << 20)
        self._leaves = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.transport.write(frame(HEADERS, 4, 1, RequestBlocks(PATH, self._authority).take()))
        self._send_part()

    def _send_part(self) -> None:
        part = range(self._answered, self._answered + AT_ONCE)
        self.transport.write(b"".join(message_frame(1, self._request(number)) for number in part))

    def _request(self, number: int) -> bytes:
        if self._leaves:
            cancel = rpc_pb2.WatchCancelRequest(watch_id=number)
            return rpc_pb2.WatchRequest(cancel_request=cancel).SerializeToString()
        key = b"k%06d" % number if self._place.own else b"k"
        create = rpc_pb2.WatchCreateRequest(key=key, start_revision=self._place.start)
        return rpc_pb2.WatchRequest(create_request=create).SerializeToString()

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream
        if kind != DATA:
            return
        for _ in self._reader.feed(data[start:end]):
            self._answered += 1
            if self._answered % AT_ONCE == 0:
                self._go_on()

    def _go_on(self) -> None:
        if self._answered < WATCHES:
            self._send_part()
        elif not self._leaves:
            if self._place.stalled:
                self.transport.pause_reading()
            sys.stdout.write("there\n")
            sys.stdout.flush()

    def leave(self) -> None:
        """Leave by resetting the stream or by cancelling each watch."""
        if self._way == WAYS[1]:
            self.transport.write(frame(RST_STREAM, 0, 1, bytes((0, 0, 0, 8))))
            return
        self.transport.resume_reading()
        self._leaves, self._answered = True, 0
        self._send_part()


async def stay(port: int, place: str, way: str) -> str:
    """Create the watches, and wait for the signal, or to be killed."""
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: Leaver(port, PLACES[place], way), HOST, port)
    loop.add_signal_handler(signal.SIGUSR1, client.leave)
    await asyncio.Event().wait()
    return ""


async def leaving(etcd: EtcdServer, place: str, way: str) -> Turns:
    """Return the durations of the turns until all of the client's state was removed."""
    proxy = Proxy(ProxySettings(endpoints=etcd.endpoint, tune_gc=False, limits=CoreLimits(covers=PLACES[place].covers)))
    await proxy.start()
    command = [sys.executable, "-m", "tests.bench.sharing.leaving_watches", "stay", place, way, str(proxy.port)]
    client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    try:
        assert client.stdout is not None
        assert await client.stdout.readline() == b"there\n"
        stats = proxy.engine.core.stats
        assert stats.watches == WATCHES
        if PLACES[place].stalled:
            # The first event waits for the client to read; the second one is missed.
            for _ in range(2):
                etcd.ctl("put", "k", "v" * 4000)
            await until_async(lambda: stats.lagging > WATCHES // 2, "the watches to lag", 60)
        tune_gc()
        turns = Turns()
        turns.start()
        if way == WAYS[0]:
            client.kill()
        else:
            client.send_signal(signal.SIGUSR1)
        await until_async(lambda: not stats.watches and not stats.trunks, "all to be removed", 120)
        turns.stop()
        return turns
    finally:
        if client.returncode is None:
            client.kill()
        await client.wait()
        await proxy.stop()


def left(place: str, front: Front) -> Figures:
    """Measure the proxy of this checkout only."""
    figures: Figures = {}
    for way in WAYS if front.name == "watchmux" else ():
        with EtcdServer() as etcd:
            turns = uvloop.run(leaving(etcd, place, way))
        figures |= {f"{way}: turns": turns.count, f"{way}: longest turn, ms of CPU": turns.longest_s * 1000}
    return figures


SCENARIOS: dict[str, Scenario] = {f"leaving: {WATCHES:,} watches, {place}": partial(left, place) for place in PLACES}

main = load_command({"stay": stay})


if __name__ == "__main__":
    main()
