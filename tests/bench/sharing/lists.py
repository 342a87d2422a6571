"""Range calls: different ones, which share nothing, and identical ones."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import uvloop

from proto.pb import rpc_pb2
from tests.bench.caller import RANGE, connect, drive
from tests.bench.sharing.bystander import port_of
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import Target
from tests.etcd.server import HOST, EtcdServer

CALLS = 12_000
CONNECTIONS = 8
RANGES = "etcd_mvcc_range_total"


def cpu_s(server: Front | EtcdServer) -> float:
    """Return the CPU seconds of a server; 0 without a proxy."""
    process = server.process if isinstance(server, EtcdServer) else server.proxy and server.proxy.process
    return Target("", 0, process.pid).cpu_s() if process else 0.0


def _request(number: int) -> bytes:
    return rpc_pb2.RangeRequest(key=b"key-%08d" % number).SerializeToString()


def calls(in_flight: int, *, same: bool) -> Scenario:
    """Make the scenario of Range calls of one key each."""

    async def measured(front: Front, etcd: EtcdServer, address: str) -> Figures:
        callers = [await connect(HOST, port_of(address)) for _ in range(min(CONNECTIONS, in_flight))]
        count = CALLS // len(callers)
        each = in_flight // len(callers)

        def requests(first: int) -> Iterator[bytes]:
            return (_request(0 if same else first + number) for number in range(count))

        await asyncio.gather(*(drive(one, RANGE, iter([_request(0)] * 200), each) for one in callers))
        for one in callers:
            one.delays.clear()
        ranges = etcd.metrics()[RANGES]
        cpu, etcd_cpu, began = cpu_s(front), cpu_s(etcd), time.perf_counter()
        await asyncio.gather(*(drive(one, RANGE, requests(number * count), each) for number, one in enumerate(callers)))
        took = time.perf_counter() - began
        total = count * len(callers)
        delays = [delay for one in callers for delay in one.delays]
        assert not sum(one.failed for one in callers)
        return {
            "proxy CPU us a call": (cpu_s(front) - cpu) / total * 1e6,
            "etcd CPU us a call": (cpu_s(etcd) - etcd_cpu) / total * 1e6,
            "p50 ms": statistics.median(delays) * 1e3,
            "calls a second": total / took,
            "ranges at etcd": etcd.metrics()[RANGES] - ranges,
        }

    def scenario(front: Front) -> Figures:
        with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
            return uvloop.run(measured(front, etcd, address))

    return scenario


SCENARIOS: dict[str, Scenario] = {
    "lists: 1 call in flight": calls(1, same=False),
    "lists: 64 different calls in flight": calls(64, same=False),
    "lists: 64 identical calls in flight": calls(64, same=True),
}
