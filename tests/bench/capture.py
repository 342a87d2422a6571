"""What real clients send while they receive events: `python -m tests.bench.capture` writes docs/evidence/clients.md.

Each client watches through a relay in front of watchmux that records the frames of the client and when it wrote them.
The load's profiles (tests/bench/profiles.py) follow this record.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import grpc
import grpc.aio
import uvloop

from proto.pb import rpc_pb2
from tests.bench.caller import PUT, Caller, connect, stamped
from tests.bench.cases import CASES, Case
from tests.bench.load import WATCH, Crowd, Tally
from tests.bench.profiles import ACK, HEADERS, PING, PROFILES, SETTINGS, WINDOW_UPDATE
from tests.bench.targets import PYTHON, Target, ours
from tests.bench.wire import PREFACE, frames, range_of
from tests.clients import golang
from tests.clients.libraries import LIBRARIES
from tests.etcd.server import HOST, EtcdServer
from tests.upstream.certificates import Certificates

PAGE = Path("docs/evidence/clients.md")
NAMES = {0: "DATA", 1: "HEADERS", 3: "RST_STREAM", 4: "SETTINGS", 6: "PING", 7: "GOAWAY", 8: "WINDOW_UPDATE"}
SETTING_NAMES = {
    1: "HEADER_TABLE_SIZE",
    2: "ENABLE_PUSH",
    3: "MAX_CONCURRENT_STREAMS",
    4: "INITIAL_WINDOW_SIZE",
    5: "MAX_FRAME_SIZE",
    6: "MAX_HEADER_LIST_SIZE",
    0xFE03: "GRPC_ALLOW_TRUE_BINARY_METADATA",
    0xFE04: "GRPC_PREFERRED_RECEIVE_CRYPTO_FRAME_SIZE",
    0xFE05: "GRPC_ALLOW_SECURITY_FRAME",
}


class Scene(NamedTuple):
    """Events that a client receives on one connection."""

    what: str
    streams: int
    writes: int
    rate: float
    """Writes per second; 0: as fast as they go."""
    value_bytes: int


SCENES = (
    Scene("1 stream, 20 events/s", 1, 60, 20, 64),
    Scene("25 streams, 20 writes/s", 25, 60, 20, 64),
    Scene("50 streams, 300 writes as fast as they go", 50, 300, 0, 64),
    Scene("1 stream, 100 KB, 20 events/s", 1, 60, 20, 100_000),
)


def go_client(port: int, streams: int) -> list[str]:
    """Return the command of clientv3 (grpc-go)."""
    return [
        str(golang.program()),
        "crowd",
        f"--endpoints={HOST}:{port}",
        f"--streams={streams}",
        "--expected=1000000000",
    ]


def python_client(port: int, streams: int) -> list[str]:
    """Return the command of grpcio (C-core)."""
    return [PYTHON, "-m", "tests.bench.capture", "grpcio", str(port), str(streams)]


def node_client(port: int, streams: int) -> list[str]:
    """Return the command of grpc-js."""
    node = next(library for library in LIBRARIES if library.is_node)
    node.install()
    command = node.command(HOST, port, program="node_streams.mjs")
    return [*command, str(streams), request().hex()]


def load_client(profile: str) -> Callable[[int, int], list[str]]:
    """Return the command of the benchmark's load with a profile."""
    return lambda port, streams: [PYTHON, "-m", "tests.bench.capture", profile, str(port), str(streams)]


CLIENTS: dict[str, Callable[[int, int], list[str]]] = {
    "clientv3 (grpc-go)": go_client,
    "load, grpc-go": load_client("grpc-go"),
    "grpcio (C-core)": python_client,
    "load, C-core": load_client("C-core"),
    "grpc-js": node_client,
    "load, grpc-js": load_client("grpc-js"),
}


def request() -> bytes:
    """Return the request of every stream."""
    key, end = range_of(0)
    return rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=key, range_end=end)).SerializeToString()


@dataclass
class Record:
    """What a client wrote on one connection."""

    opening: list[str] = field(default_factory=list)
    """The frames before its first request."""
    opened: bool = False
    counting: bool = False
    at: list[tuple[float, list[tuple[str, int]]]] = field(default_factory=list)
    """By write, since counting: its time, and (kind, size of the increment or 0) of each frame."""
    settings: list[str] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)
    """Bytes of either side came since this was cleared."""
    rest: bytes = b""

    def client(self, data: bytes, now: float) -> None:
        """Record bytes of the client."""
        data = self.rest + data
        if data.startswith(PREFACE):
            data = data[len(PREFACE) :]
        done = 0
        found: list[tuple[str, int]] = []
        for kind, flags, stream, start, end in frames(data):
            done = end
            name = NAMES.get(kind, str(kind))
            size = 0
            if kind in (PING, SETTINGS) and flags & ACK:
                name += " ACK"
            elif kind == WINDOW_UPDATE:
                size = int.from_bytes(data[start:end], "big")
                name += " of the connection" if stream == 0 else " of a stream"
            elif kind == SETTINGS:
                pairs = [(data[at : at + 2], data[at + 2 : at + 6]) for at in range(start, end, 6)]
                values = [(int.from_bytes(name, "big"), int.from_bytes(value, "big")) for name, value in pairs]
                text = ", ".join(f"{SETTING_NAMES.get(key, hex(key))} {value}" for key, value in values) or "empty"
                (self.settings if self.opened else self.opening).append(f"SETTINGS ({text})")
            if kind == HEADERS:
                self.opened = True
            elif not self.opened and kind == WINDOW_UPDATE:
                self.opening.append(f"WINDOW_UPDATE of the connection by {size}")
            elif not self.opened and kind != SETTINGS:
                self.opening.append(name)
            found.append((name, size))
        self.rest = data[done:]
        if self.counting and found:
            self.at.append((now, found))

    async def quiet(self) -> None:
        """Wait until the client has opened its streams and nothing passes for a second."""
        while True:
            self.heard.clear()
            try:
                await asyncio.wait_for(self.heard.wait(), 1)
            except TimeoutError:
                if self.opened:
                    return


class Half(asyncio.Protocol):
    """One side of the relay."""

    def __init__(self, record: Record, is_client: bool) -> None:
        self.record = record
        self.is_client = is_client
        self.other: asyncio.Transport | None = None
        self.waiting: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def join(self, other: asyncio.Transport) -> None:
        """Pass everything on to the other side from now on."""
        self.other = other
        other.write(b"".join(self.waiting))

    def data_received(self, data: bytes) -> None:
        self.record.heard.set()
        if self.is_client:
            self.record.client(data, asyncio.get_running_loop().time())
        if self.other is None:
            self.waiting.append(data)
        else:
            self.other.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        del exc
        if self.other is not None:
            self.other.close()


async def relay(target: Target, record: Record) -> tuple[asyncio.Server, int]:
    """Start the relay; return it and its port."""
    loop = asyncio.get_running_loop()

    async def meet(client: Half) -> None:
        transport, server = await loop.create_connection(lambda: Half(record, False), HOST, target.port)
        server.join(client.transport)
        client.join(transport)

    tasks = []

    class Front(Half):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            tasks.append(loop.create_task(meet(self)))

    server = await loop.create_server(lambda: Front(record, True), HOST, 0)
    return server, server.sockets[0].getsockname()[1]


async def put(scene: Scene, putter: Caller, writes: int) -> None:
    """Make writes."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    key = range_of(0)[0] + b"k"
    for number in range(writes):
        if scene.rate:
            await asyncio.sleep(max(0.0, started + number / scene.rate - loop.time()))
        await putter.room(64)
        putter.call(PUT, rpc_pb2.PutRequest(key=key, value=stamped(min(scene.value_bytes, 16_000))).SerializeToString())
    await putter.room(1)


async def big_puts(scene: Scene, endpoint: str, writes: int) -> None:
    """Make writes that do not fit into a window."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call: Any = channel.unary_unary(PUT)
        for _ in range(writes):
            message = rpc_pb2.PutRequest(key=range_of(0)[0] + b"k", value=stamped(scene.value_bytes))
            await call(message.SerializeToString())
            await asyncio.sleep(1 / scene.rate)


async def capture(command: Callable[[int, int], list[str]], scene: Scene) -> Record:
    """Run a client through a scene and return what it wrote."""
    record = Record()
    with EtcdServer() as etcd, ours(CASES["paced"], etcd, cast(Certificates, None)) as target:
        server, port = await relay(target, record)
        host, _, etcd_port = etcd.endpoint.rpartition(":")
        putter = await connect(host, int(etcd_port))
        null = asyncio.subprocess.DEVNULL
        client = await asyncio.create_subprocess_exec(
            *command(port, scene.streams), stdin=asyncio.subprocess.PIPE, stdout=null, stderr=null
        )
        try:
            await record.quiet()
            record.counting = True
            if scene.value_bytes > 16_000:
                await big_puts(scene, etcd.endpoint, scene.writes)
            else:
                await put(scene, putter, scene.writes)
            await asyncio.sleep(0.5)
            record.counting = False
        finally:
            client.kill()
            await client.wait()
            server.close()
            putter.transport.close()
    return record


async def grpcio(port: int, streams: int) -> None:
    """Open the streams with grpcio, until killed."""
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:

        async def one() -> None:
            call: Any = channel.stream_stream(WATCH)()
            await call.write(request())
            async for _ in call:
                pass

        await asyncio.gather(*(one() for _ in range(streams)))


async def load(profile: str, port: int, streams: int) -> None:
    """Open the streams with the benchmark's load, until killed."""
    case = Case("captured", "", 1, streams, profile=profile)
    crowd = Crowd(case, HOST, (port,), ("", ""))
    await crowd.come(Tally(streams, 0, 1 << 62))
    await asyncio.Event().wait()


def row(name: str, scene: Scene, record: Record) -> str:
    """Return a row of the table."""
    events = scene.writes * scene.streams
    kinds = Counter(kind for _, found in record.at for kind, _ in found)
    pings = [at for at, found in record.at if any(kind == "PING" for kind, _ in found)]
    gaps = [1e3 * (later - earlier) for earlier, later in pairwise(pings)]
    gap = f"{statistics.median(gaps):.1f}" if gaps else "-"

    def updates(whose: str) -> str:
        sizes = [size for _, found in record.at for kind, size in found if kind == f"WINDOW_UPDATE of {whose}"]
        return f"{len(sizes)} ({statistics.median(sizes):.0f})" if sizes else "0"

    together = sum(len(found) > 1 for _, found in record.at)
    cells = [
        *(name, scene.what, f"{events}", f"{len(record.at)}", f"{together}", str(kinds["PING"]), gap),
        *(updates("the connection"), updates("a stream"), str(kinds["SETTINGS"])),
    ]
    return "| " + " | ".join(cells) + " |"


def page(records: dict[str, list[tuple[Scene, Record]]]) -> str:
    """Return the tables."""
    lines = [
        "| client | load | events | writes of the client | of several frames | PINGs | ms between PINGs "
        "| WINDOW_UPDATEs of the connection (median bytes) | of streams (median bytes) | SETTINGS |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, scenes in records.items():
        lines += [row(name, scene, record) for scene, record in scenes]
    lines += ["", "| client | before its first request | SETTINGS later, in the last load |", "|---|---|---|"]
    for name, scenes in records.items():
        record = scenes[-1][1]
        later = "; ".join(record.settings[:4]) + ("; ..." if len(record.settings) > 4 else "")
        lines.append(f"| {name} | {'; '.join(record.opening)} | {later or 'none'} |")
    return "\n".join(lines) + "\n"


def main(names: Sequence[str]) -> None:
    """Capture all clients, or the named ones, and print the page; all: write it."""
    from tests.bench.__main__ import write_between_marks

    records: dict[str, list[tuple[Scene, Record]]] = {}
    for name, command in CLIENTS.items():
        if not names or name in names:
            records[name] = [(scene, uvloop.run(capture(command, scene))) for scene in SCENES]
    text = page(records)
    sys.stdout.write(text)
    if not names:
        write_between_marks(PAGE, text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["grpcio"]:
        uvloop.run(grpcio(int(sys.argv[2]), int(sys.argv[3])))
    elif sys.argv[1:] and sys.argv[1] in PROFILES:
        uvloop.run(load(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
    else:
        main(sys.argv[1:])
