"""The CPU of an event that comes alone, for one client: in the proxy, in the floor, and in a process that only echoes.

Between two events, etcd and the client use the cores and their caches. What the echo costs is the price of a wake-up,
a read and a write in a process of this language and event loop; the floor (tests/bench/floor.py) receives the event
from etcd and is answered by the client as well. Run as a program with a port as its argument, this module is the echo.
"""

from __future__ import annotations

import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import uvloop

from proto.pb import rpc_pb2
from tests.bench.caller import PUT, Caller, connect, stamped
from tests.bench.cases import CASES
from tests.bench.load import WATCH
from tests.bench.profiles import DATA, HEADERS, GrpcGo, frame
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import PYTHON, Target, floor
from tests.bench.wire import MARKER, STAMP_DIGITS, RawClient, RequestBlocks, key_of, message_frame, range_of
from tests.etcd.binaries import current
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.waiting import until, until_async

FLOOR_RANGE, OUR_RANGE = 0, 1
VALUE_BYTES: Final = 64
ECHOED_BYTES: Final = 130
"""As large as an event."""
WARM_UP: Final = 40
find_stamps = re.compile(re.escape(MARKER)).finditer


class Pace(NamedTuple):
    """How events follow each other."""

    name: str
    events: int
    rate: float
    """Events a second; 0: each after the previous one has arrived."""


PACES: Final = (Pace("20 a second", 80, 20), Pace("200 a second", 400, 200), Pace("each after the last", 1000, 0))


class Receiver(RawClient):
    """A client that takes the time of what it receives: events of one watch, or echoes."""

    def __init__(self) -> None:
        super().__init__(GrpcGo())
        self.created = False
        self.delays_ms: list[float] = []
        self.came = asyncio.Event()

    def watch(self, number: int, authority: str) -> None:
        """Open the watch of a range."""
        key, end = range_of(number)
        create = rpc_pb2.WatchCreateRequest(key=key, range_end=end)
        message = rpc_pb2.WatchRequest(create_request=create).SerializeToString()
        self.transport.write(frame(HEADERS, 4, 1, RequestBlocks(WATCH, authority).take()) + message_frame(1, message))

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags, stream
        if kind == DATA:
            self.take(data[start:end])

    def take(self, data: bytes) -> None:
        """Record events."""
        self.created = True
        for at in (found.end() for found in find_stamps(data)):
            self.delays_ms.append((time.monotonic_ns() - int(data[at : at + STAMP_DIGITS])) / 1e6)
            self.came.set()


class EchoReceiver(Receiver):
    """A client of the echo."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.take(data)


class Echo(asyncio.Protocol):
    """A connection of the echo."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


async def serve_echo(port: int) -> None:
    """Serve until killed."""
    await asyncio.get_running_loop().create_server(Echo, HOST, port)
    await asyncio.Event().wait()


@contextmanager
def echo() -> Iterator[Target]:
    """Yield the running echo."""
    port = free_port()
    process = subprocess.Popen([PYTHON, "-m", "tests.bench.sharing.lone", str(port)])
    target = Target("echo", port, process.pid)
    try:
        # Without a connection, which would end in an error there.
        until(lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text(), "the echo to listen")
        yield target
    finally:
        process.kill()
        process.wait()


def wakes_of(target: Target) -> int:
    """Return how often a process has waited for something."""
    status = Path(f"/proc/{target.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("voluntary"))


async def send(receiver: Receiver, events: int, rate: float, write: Callable[[], None]) -> None:
    """Cause so many events and wait until they have arrived."""
    wanted, began = len(receiver.delays_ms) + events, time.monotonic()
    for number in range(events):
        receiver.came.clear()
        if rate:
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        write()
        if not rate:
            await receiver.came.wait()
    await until_async(lambda: len(receiver.delays_ms) >= wanted, "all events")


async def measure(targets: list[tuple[Target, int | None]], etcd: EtcdServer) -> Figures:
    """Return the figures of all targets in turn; each with the number of its range, None: it echoes."""
    figures: Figures = {}
    putter = await connect(HOST, etcd.client_port)
    clients = []
    for target, number in targets:
        kind = EchoReceiver if number is None else Receiver
        _, client = await asyncio.get_running_loop().create_connection(kind, HOST, target.port)
        write = _writer(putter, client, number)
        if number is not None:
            client.watch(number, f"{HOST}:{target.port}")
            await until_async(lambda: client.created, "the watch")  # noqa: B023  # called at once
        await send(client, WARM_UP, 0, write)
        clients.append((target, client, write))
    for pace in PACES:
        for target, client, write in clients:
            client.delays_ms.clear()
            before_s, before = target.cpu_s(), wakes_of(target)
            await send(client, pace.events, pace.rate, write)
            spent_us, wakes = 1e6 * (target.cpu_s() - before_s), wakes_of(target) - before
            name = f"{pace.name}, {target.name}"
            figures[f"{name}: us of CPU"] = round(spent_us / pace.events, 1)
            figures[f"{name}: wake-ups"] = round(wakes / pace.events, 2)
            quantiles = statistics.quantiles(client.delays_ms, n=100)
            figures[f"{name}: p50 / p99, ms"] = f"{quantiles[49]:.2f} / {quantiles[98]:.2f}"
    return figures


def _writer(putter: Caller, client: Receiver, number: int | None) -> Callable[[], None]:
    def put() -> None:
        assert number is not None, "the number of a range"
        request = rpc_pb2.PutRequest(key=key_of(number), value=stamped(VALUE_BYTES))
        putter.call(PUT, request.SerializeToString())

    return put if number is not None else lambda: client.transport.write(stamped(ECHOED_BYTES))


def lone(front: Front) -> Figures:
    """One client with one watch, and events that come alone."""
    if front.root is None:
        return {}
    with ExitStack() as stack:
        etcd = stack.enter_context(EtcdServer(current()))
        stack.enter_context(front.before(etcd.endpoint))
        ours = front.server(etcd)
        bare = stack.enter_context(floor(CASES["scale-10"], etcd, cast(Any, None)))
        targets = [
            (Target("proxy", ours.port, ours.pid), OUR_RANGE),
            (bare, FLOOR_RANGE),
            (stack.enter_context(echo()), None),
        ]
        return asyncio.run(measure(targets, etcd))


SCENARIOS: Final[dict[str, Scenario]] = {"lone-events": lone}

if __name__ == "__main__":
    uvloop.run(serve_echo(int(sys.argv[1])))
