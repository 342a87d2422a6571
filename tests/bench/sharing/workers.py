"""--workers and two levels: CPU of all processes per delivered event, the share of each worker, and the delay.

Each scenario runs with one process, with two workers, and as a leaf in front of a hub, in turn.
"""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final, NamedTuple

from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import Target
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import direct
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until_async

KEY: Final = b"/bench/key"
SETTLE_S: Final = 2.0


class Load(NamedTuple):
    """The clients and the writes."""

    connections: int
    streams: int
    """On each connection."""
    puts: int
    pause_s: float
    """Between two puts; 0: one after the other."""


LOADS: Final = {
    "burst": Load(20, 25, 400, 0.0),
    "paced": Load(20, 25, 100, 0.05),
    "single": Load(400, 1, 100, 0.02),
}


def cpu_s(pids: list[int]) -> list[float]:
    """Return the CPU seconds that each process has used."""
    return [Target("", 0, pid).cpu_s() for pid in pids]


def family(proxy: ProxyProcess) -> list[int]:
    """Return the ids of a proxy's processes: the parent, the hub, the workers; or the only one."""
    assert proxy.process is not None
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(proxy.process.pid)], capture_output=True, text=True, check=False
    )
    return [proxy.process.pid, *sorted(int(pid) for pid in listed.stdout.split())]


@contextmanager
def arranged(front: Front, etcd: EtcdServer, how: str) -> Iterator[tuple[int, Callable[[], list[int]]]]:
    """Yield the clients' port, and what returns the ids of all processes."""
    if how != "two levels":
        flags = ("--workers=2",) if how == "2 workers" else ()
        with front.before(etcd.endpoint, *flags):
            assert front.proxy is not None
            yield front.proxy.port, partial(family, front.proxy)
        return
    with (
        ProxyProcess(etcd.endpoint, directory=front.root) as hub,
        front.before(etcd.endpoint, f"--watch-endpoints={hub.endpoint}"),
    ):
        leaf = front.proxy
        assert leaf is not None
        yield leaf.port, lambda: [*family(leaf), *family(hub)]


def scenario(load: Load) -> Scenario:
    """Return the scenario of a load."""

    def run(front: Front) -> Figures:
        figures: Figures = {}
        if front.root is None:
            return figures
        for how in ("1 process", "2 workers", "two levels"):
            with EtcdServer(current()) as etcd, arranged(front, etcd, how) as (port, pids):
                time.sleep(SETTLE_S)
                used, delay_s, last = asyncio.run(measured(etcd, port, pids, load))
            events = load.connections * load.streams * load.puts
            figures[f"{how}: us of CPU per event"] = round(sum(used) / events * 1e6, 2)
            figures[f"{how}: delay p50, ms"] = round(delay_s * 1e3, 2)
            figures[f"{how}: time of all events, s"] = round(last, 2)
            if how == "2 workers":
                figures["smaller worker's share of CPU, %"] = round(100 * min(used[2:]) / sum(used[2:]), 1)
        return figures

    return run


async def measured(
    etcd: EtcdServer, port: int, pids: Callable[[], list[int]], load: Load
) -> tuple[list[float], float, float]:
    """Return the CPU seconds of each process, the median delay, and the seconds until the last event."""
    clients = [await RawClient.connect(port) for _ in range(load.connections)]
    streams: list[WatchStream] = []
    for client in clients:
        for _ in range(load.streams):
            stream = client.watch()
            stream.create(KEY)
            streams.append(stream)
    for stream in streams:
        await stream.created(30)
    delays: list[float] = []
    probe = streams[0].raw
    take = probe.take_data

    def stamped(data: bytes) -> None:
        take(data)
        at = data.rfind(b"T=")
        if at >= 0:
            delays.append(time.perf_counter() - float(data[at + 2 : at + 18]))

    probe.take_data = stamped  # type: ignore[method-assign]  # also measures
    counts = [len(stream.responses) for stream in streams]
    before, began = cpu_s(pids()), time.perf_counter()
    async with direct(etcd) as calls:
        for _ in range(load.puts):
            await calls.put(KEY, b"T=%016.6f" % time.perf_counter())
            await asyncio.sleep(load.pause_s)

    def events(stream: WatchStream, count: int) -> int:
        return sum(len(response.events) for response in stream.responses[count:])

    for stream, count in zip(streams, counts, strict=True):
        await until_async(lambda s=stream, c=count: events(s, c) >= load.puts, "all events", 60)  # type: ignore[misc]
    last = time.perf_counter() - began
    used = [after - was for after, was in zip(cpu_s(pids()), before, strict=True)]
    for client in clients:
        await client.close()
    return used, statistics.median(delays), last


SCENARIOS: Final = {f"workers-{name}": scenario(load) for name, load in LOADS.items()}
