"""2,000 keep-alives of leases, on few and many streams.

Streams are open and every lease has been kept alive once before a round begins; a round is one keep-alive for each
lease, all written at once (or each after the answer to the previous one), and ends with the last answer. Every answer
is checked: the right lease on the right stream, in order, with its full time to live.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from typing import NamedTuple

import grpc
import uvloop

from proto.framing import MessageReader
from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import Target
from tests.bench.wire import RawClient, RequestBlocks, message_frame
from tests.etcd.server import HOST, EtcdServer

LEASES = 2_000
TTL_S = 600
PATH = "/etcdserverpb.Lease/LeaseKeepAlive"
ROUNDS = 9


class Shape(NamedTuple):
    """The distribution of the keep-alives."""

    name: str
    connections: int
    streams: int
    """Of each connection."""
    at_once: bool = True


SHAPES = (
    Shape("one stream, at once", 1, 1),
    Shape("one stream, each after the last one's answer", 1, 1, at_once=False),
    Shape("2,000 streams on one connection", 1, LEASES),
    Shape("2,000 streams on 200 connections", 200, LEASES // 200),
)


class Keeper(RawClient):
    """A connection whose streams keep leases alive."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.answers: defaultdict[int, list[bytes]] = defaultdict(list)
        """By stream."""
        self.count = 0
        self.wanted = 0
        self.turn = asyncio.Event()
        self._blocks = RequestBlocks(PATH, f"{HOST}:{port}")
        self._unframers: defaultdict[int, MessageReader] = defaultdict(lambda: MessageReader(1 << 20))

    def open(self, number: int) -> int:
        """Open one more stream, the `number`-th, and return its id."""
        stream = 2 * number + 1
        self.transport.write(frame(HEADERS, 4, stream, self._blocks.take()))
        return stream

    def on_frame(self, kind: int, flags: int, stream: int, data: bytes, start: int, end: int) -> None:
        del flags
        if kind == DATA:
            messages = self._unframers[stream].feed(data[start:end])
            self.answers[stream] += messages
            self.count += len(messages)
            if self.count >= self.wanted:
                self.turn.set()

    async def wait(self, count: int) -> None:
        """Wait until so many answers were received."""
        self.wanted = count
        self.turn.clear()
        while self.count < count:
            if self.broken:
                raise ConnectionError(self.broken)
            await self.turn.wait()


class Round(NamedTuple):
    """The figures of one round."""

    seconds: float
    cpu_s: float


async def measured(target: Target, shape: Shape) -> list[Round]:
    """Run the rounds of a shape at a target."""
    loop = asyncio.get_running_loop()
    keepers = []
    for _ in range(shape.connections):
        _, keeper = await loop.create_connection(lambda: Keeper(target.port), HOST, target.port)
        keepers.append(keeper)
    places = [(keeper, keeper.open(number)) for keeper in keepers for number in range(shape.streams)]
    leases: dict[tuple[Keeper, int], list[int]] = {place: [] for place in places}
    for lease in range(1, LEASES + 1):
        leases[places[lease % len(places)]].append(lease)
    found = []
    for _ in range(ROUNDS + 1):
        cpu_s, began = target.cpu_s(), time.perf_counter()
        await (_at_once if shape.at_once else _in_turn)(leases)
        found.append(Round(time.perf_counter() - began, target.cpu_s() - cpu_s))
        _check(leases)
    for keeper in keepers:
        keeper.transport.close()
    return found[1:]


def _request(stream: int, lease: int) -> bytes:
    return message_frame(stream, rpc_pb2.LeaseKeepAliveRequest(ID=lease).SerializeToString())


async def _at_once(leases: dict[tuple[Keeper, int], list[int]]) -> None:
    due: defaultdict[Keeper, list[bytes]] = defaultdict(list)
    for (keeper, stream), kept in leases.items():
        due[keeper] += [_request(stream, lease) for lease in kept]
    wanted = {keeper: keeper.count + len(requests) for keeper, requests in due.items()}
    for keeper, requests in due.items():
        keeper.transport.write(b"".join(requests))
    for keeper, count in wanted.items():
        await keeper.wait(count)


async def _in_turn(leases: dict[tuple[Keeper, int], list[int]]) -> None:
    for (keeper, stream), kept in leases.items():
        for lease in kept:
            keeper.transport.write(_request(stream, lease))
            await keeper.wait(keeper.count + 1)


def _check(leases: dict[tuple[Keeper, int], list[int]]) -> None:
    """Check that each lease was answered on its stream, in order, with its time to live; drop the answers."""
    for (keeper, stream), kept in leases.items():
        answers = [rpc_pb2.LeaseKeepAliveResponse.FromString(answer) for answer in keeper.answers.pop(stream)]
        if [(answer.ID, answer.TTL) for answer in answers] != [(lease, TTL_S) for lease in kept]:
            raise AssertionError(f"stream {stream}: other answers than {len(kept)} leases kept alive, in order")


def kept_alive(shape: Shape) -> Scenario:
    """Make the scenario of a shape."""

    def scenario(front: Front) -> Figures:
        with EtcdServer() as etcd:
            with grpc.insecure_channel(etcd.endpoint) as channel:
                stub = rpc_pb2_grpc.LeaseStub(channel)
                for lease in range(1, LEASES + 1):
                    stub.LeaseGrant(rpc_pb2.LeaseGrantRequest(ID=lease, TTL=TTL_S))
            with front.before(etcd.endpoint):
                found = uvloop.run(measured(front.server(etcd), shape))
        took = statistics.median(each.seconds for each in found)
        return {
            "all answered, median ms": took * 1000,
            "slowest round, ms": max(each.seconds for each in found) * 1000,
            "keep-alives a second": LEASES / took,
            "CPU us each": statistics.median(each.cpu_s for each in found) / LEASES * 1e6,
        }

    return scenario


SCENARIOS: dict[str, Scenario] = {f"leases: {shape.name}": kept_alive(shape) for shape in SHAPES}
