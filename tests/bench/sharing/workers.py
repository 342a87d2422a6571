"""The events a second of one process and of --workers=2, with the cores left to the proxy.

The clients do not read, since the kernel keeps what they receive. `make bench` has the CPU per event and the delay.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
import time
from dataclasses import replace
from typing import Final

from tests.bench.sharing.front import Figures, Front, Scenario
from tests.bench.targets import Target, children
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer

KEY: Final = b"/bench/key"
SETTLE_S: Final = 2.0
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
    for how, flags in (("1 process", ()), ("2 workers", ("--workers=2",))):
        with EtcdServer(current()) as etcd, front.before(etcd.endpoint, *flags):
            time.sleep(SETTLE_S)
            target = front.server(etcd)
            target = replace(target, others=children(target.pid))
            used, took_s, own_s = asyncio.run(unread(etcd, target))
        events = CONNECTIONS * PUTS
        rates.append(events / took_s)
        figures[f"{how}: events per second"] = round(rates[-1])
        figures[f"{how}: us of CPU per event"] = round(sum(used) / events * 1e6, 2)
        figures[f"{how}: cores used by the proxy"] = round(sum(used) / took_s, 2)
        figures[f"{how}: cores used by its busiest process"] = round(max(used) / took_s, 2)
        figures[f"{how}: cores used by the load generator"] = round(own_s / took_s, 2)
    figures["2 workers: times the events per second of 1 process"] = round(rates[1] / rates[0], 2)
    return figures


async def unread(etcd: EtcdServer, target: Target) -> tuple[list[float], float, float]:
    """Return the CPU seconds of each process, the seconds until the last event, and the CPU seconds of the clients."""
    clients = [await RawClient.connect(target.port) for _ in range(CONNECTIONS)]
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

    before, began, own = target.cpu_each_s(), time.perf_counter(), time.process_time()
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
            used, own_s = target.cpu_each_s(), time.process_time()
        await asyncio.sleep(LOOK_S)
    assert min(sizes) > PUTS * EVENT_BYTES_MIN, "a client did not get all events"
    for client in clients:
        await client.close()
    return [after - was for after, was in zip(used, before, strict=True)], last - began, own_s - own


SCENARIOS: Final[dict[str, Scenario]] = {"workers-throughput": throughput}
