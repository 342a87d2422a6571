"""`python -m tests.bench.leases`: 2,000 keep-alives, directly at etcd and through the proxy.

Streams are open and every lease has been kept alive once before a round begins; a round is one keep-alive for each
lease, all written at once (or each after the answer to the previous one), and ends with the last answer. Every answer
is checked: the right lease on the right stream, in order, with its full time to live. Rows are Markdown, for
docs/performance.md.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import click
import grpc
import uvloop

from proto.framing import MessageReader
from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.profiles import DATA, HEADERS, frame
from tests.bench.targets import Target
from tests.bench.wire import RawClient, RequestBlocks, message_frame
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess

LEASES = 2_000
TTL_S = 600
PATH = "/etcdserverpb.Lease/LeaseKeepAlive"
HEADINGS = ("keep-alives", "target", "all answered, median ms", "slowest round, ms", "a second", "CPU us each")


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


async def measured(target: Target, shape: Shape, rounds: int) -> list[Round]:
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
    for _ in range(rounds + 1):
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


@contextmanager
def targets(etcd: EtcdServer) -> Iterator[list[Target]]:
    """Yield etcd itself and watchmux in front of it."""
    with ProxyProcess(etcd.endpoint) as proxy:
        assert etcd.process is not None
        assert proxy.process is not None
        yield [
            Target("etcd", etcd.client_port, etcd.process.pid),
            Target("watchmux", proxy.port, proxy.process.pid),
        ]


def row(shape: Shape, target: Target, found: Sequence[Round]) -> str:
    """Format the figures of a shape at a target."""
    took = statistics.median(each.seconds for each in found)
    slowest = max(each.seconds for each in found)
    cpu_us = statistics.median(each.cpu_s for each in found) / LEASES * 1e6
    cells = (f"{took * 1000:.0f}", f"{slowest * 1000:.0f}", f"{LEASES / took:,.0f}", f"{cpu_us:.0f}")
    return f"| {shape.name} | {target.name} | {' | '.join(cells)} |"


@click.command()
@click.option("--rounds", default=9, show_default=True, help="Rounds of each shape at each target.")
def main(rounds: int) -> None:
    """Measure keep-alives, directly and through the proxy."""
    click.echo(f"| {' | '.join(HEADINGS)} |\n|---|---|{'---:|' * (len(HEADINGS) - 2)}")
    with EtcdServer() as etcd:
        with grpc.insecure_channel(etcd.endpoint) as channel:
            stub = rpc_pb2_grpc.LeaseStub(channel)
            for lease in range(1, LEASES + 1):
                stub.LeaseGrant(rpc_pb2.LeaseGrantRequest(ID=lease, TTL=TTL_S))
        with targets(etcd) as both:
            for shape in SHAPES:
                for target in both:
                    click.echo(row(shape, target, uvloop.run(measured(target, shape, rounds))))


if __name__ == "__main__":
    main()
