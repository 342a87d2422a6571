"""The longest turn of the event loop when a client with very many streams disconnects.

The client is a separate process with a watch on each of its streams, and is killed. The proxy runs in this process,
where a callback in every turn of the loop measures the CPU time of each turn, independent of other load on the machine.
Measured with the default limit of streams removed per turn, and without a limit.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import uvloop

from proto.pb import rpc_pb2
from proxy.listening.settings import ListenerSettings
from proxy.server import Proxy, ProxySettings, tune_gc
from proxy.watch.settings import WatchSettings
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.sharing.bystander import load_command
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.wire import RawClient, RequestBlocks, message_frame
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import until_async

PATH = "/etcdserverpb.Watch/Watch"
NO_LIMIT = 1 << 30


class Turns:
    """Measures the duration of each turn of the loop by the CPU clock of its thread."""

    def __init__(self) -> None:
        self.longest_s = 0.0
        self.count = 0
        self._last = 0.0
        self._looking = False

    def start(self) -> None:
        """Start measuring."""
        self._looking = True
        self._last = time.thread_time()
        asyncio.get_running_loop().call_soon(self._look)

    def stop(self) -> None:
        """Stop measuring."""
        self._looking = False

    def _look(self) -> None:
        now = time.thread_time()
        self.longest_s = max(self.longest_s, now - self._last)
        self.count += 1
        self._last = now
        if self._looking:
            asyncio.get_running_loop().call_soon(self._look)


class Leaver(RawClient):
    """A client with a watch on each of many streams."""

    def __init__(self, port: int, streams: int) -> None:
        super().__init__()
        self._port = port
        self._streams = streams
        self._answered = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        blocks = RequestBlocks(PATH, f"{HOST}:{self._port}")
        create = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"k")).SerializeToString()
        for number in range(self._streams):
            stream = 2 * number + 1
            self.transport.write(frame(HEADERS, 4, stream, blocks.take()) + message_frame(stream, create))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream, data
        self._answered += kind == DATA and end > start
        if self._answered == self._streams:
            sys.stdout.write("there\n")
            sys.stdout.flush()
            self._answered = 0


async def stay(port: int, streams: str) -> str:
    """Open the streams and wait to be killed."""
    await asyncio.get_running_loop().create_connection(lambda: Leaver(port, int(streams)), HOST, port)
    await asyncio.Event().wait()
    return ""


async def leaving(etcd: EtcdServer, streams: int, per_turn: int) -> Turns:
    """Kill a client, and return the durations of the turns until all of its state was removed."""
    settings: dict[str, Any] = {
        "listener": ListenerSettings(leaving_per_turn=per_turn),
        "watch": WatchSettings(sessions_per_connection_max=streams),
    }
    proxy = Proxy(ProxySettings(endpoints=etcd.endpoint, tune_gc=False, **settings))
    await proxy.start()
    command = [sys.executable, "-m", "tests.bench.sharing.leaving", "stay", str(streams), str(proxy.port)]
    client = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert await client.stdout.readline() == b"there\n"
    tune_gc()
    turns = Turns()
    turns.start()
    client.kill()
    await until_async(lambda: not proxy.listener.connections and not proxy.watches.calls, "all to be forgotten", 60)
    turns.stop()
    await client.wait()
    await proxy.stop()
    return turns


def left(streams: int) -> Scenario:
    """Make the scenario of a client with so many streams; it measures the proxy of this checkout only."""

    def scenario(front: Front) -> Figures:
        figures: Figures = {}
        for limit, per_turn in (("", ListenerSettings().leaving_per_turn), (", no limit", NO_LIMIT)):
            if front.name == "watchmux":
                with EtcdServer() as etcd:
                    turns = uvloop.run(leaving(etcd, streams, per_turn))
                figures |= {f"turns{limit}": turns.count, f"longest turn, ms of CPU{limit}": turns.longest_s * 1000}
        return figures

    return scenario


SCENARIOS: dict[str, Scenario] = {f"leaving: {streams:,} streams": left(streams) for streams in (5_000, 20_000)}

main = load_command({"stay": stay})


if __name__ == "__main__":
    main()
