"""--workers and two levels: CPU of all processes per delivered event, the share of each worker, and the delay.

Each scenario runs with one process, with two workers, and as a leaf in front of a hub, in turn. `workers-throughput`
leaves the cores to the proxy: the clients do not read, since the kernel keeps what they receive.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import statistics
import struct
import subprocess
import termios
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
            figures[f"{how}: us of CPU per write, by process"] = " + ".join(f"{s / load.puts * 1e6:.0f}" for s in used)
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


UNREAD_BYTES_MAX: Final = 4 * 1024 * 1024
CONNECTIONS: Final = 400
PUTS: Final = 4000
AT_A_TIME: Final = 16
LOOK_S: Final = 0.05
EVENT_BYTES_MIN: Final = 40
"""Each event has a key of 10 bytes, a value of 16, and the frames and fields around them."""


def throughput(front: Front) -> Figures:
    """400 connections with one stream each, and writes as fast as etcd takes them; no client reads meanwhile."""
    figures: Figures = {}
    if front.root is None:
        return figures
    rates: list[float] = []
    for how in ("1 process", "2 workers"):
        with EtcdServer(current()) as etcd, arranged(front, etcd, how) as (port, pids):
            time.sleep(SETTLE_S)
            used, took_s, own_s = asyncio.run(unread(etcd, port, pids))
        events = CONNECTIONS * PUTS
        rates.append(events / took_s)
        figures[f"{how}: events per second"] = round(rates[-1])
        figures[f"{how}: us of CPU per event"] = round(sum(used) / events * 1e6, 2)
        figures[f"{how}: cores used by the proxy"] = round(sum(used) / took_s, 2)
        figures[f"{how}: cores used by its busiest process"] = round(max(used) / took_s, 2)
        figures[f"{how}: cores used by the load generator"] = round(own_s / took_s, 2)
    figures["2 workers: times the events per second of 1 process"] = round(rates[1] / rates[0], 2)
    return figures


async def unread(etcd: EtcdServer, port: int, pids: Callable[[], list[int]]) -> tuple[list[float], float, float]:
    """Return the CPU seconds of each process, the seconds until the last event, and the CPU seconds of the clients."""
    clients = [await RawClient.connect(port) for _ in range(CONNECTIONS)]
    streams = [client.watch() for client in clients]
    for stream in streams:
        stream.create(KEY)
    for stream in streams:
        await stream.created(30)
    sockets: list[socket.socket] = []
    for client in clients:
        assert client.transport is not None
        client.transport.pause_reading()
        sockets.append(client.transport.get_extra_info("socket"))
        sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, UNREAD_BYTES_MAX)

    def received() -> list[int]:
        return [struct.unpack("i", fcntl.ioctl(each, termios.FIONREAD, bytes(4)))[0] for each in sockets]

    before, began, own = cpu_s(pids()), time.perf_counter(), time.process_time()
    async with direct(etcd) as calls:

        async def write() -> None:
            for _ in range(PUTS // AT_A_TIME):
                await calls.put(KEY, bytes(16))

        await asyncio.gather(*(write() for _ in range(AT_A_TIME)))
    sizes: list[int] = []
    last, used, own_s = time.perf_counter(), before, own
    while time.perf_counter() - last < 1.0:
        now = received()
        if now != sizes:
            sizes, last = now, time.perf_counter()
            used, own_s = cpu_s(pids()), time.process_time()
        await asyncio.sleep(LOOK_S)
    assert min(sizes) > PUTS * EVENT_BYTES_MIN, "a client did not get all events"
    for client in clients:
        await client.close()
    return [after - was for after, was in zip(used, before, strict=True)], last - began, own_s - own


SCENARIOS: Final = {
    **{f"workers-{name}": scenario(load) for name, load in LOADS.items()},
    "workers-throughput": throughput,
}
