"""What one event costs without the noise of a machine: `python -m tests.bench.footprint` (needs valgrind).

A process that an event wakes finds the CPU's caches filled by others, so it pays for each cache line of code and data
that it touches, more than for its instructions. callgrind counts both. The cache of its model (1 MB) is emptied before
each event, and what that costs is subtracted. The kernel's part is not counted.
"""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, Final

import uvloop

import upstream.watching.call
from proto.http2.frames import FRAME_HEADER_BYTES, PING_HEADER, UPDATE_AND_PING, UPDATE_HEADER
from proto.pb import rpc_pb2
from proxy.admin.delays import DeliveryDelays
from tests.bench.wire import message_frame, unpack_head
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from upstream.connection import ClientConnection

KEY: Final = b"/bench/key"
EVENTS: Final = 8
WARM_UP: Final = 100
LOADS: Final = {
    "1 client": (1, 1, False),
    "10 clients": (10, 1, False),
    "10 Go clients, which answer": (10, 1, True),
    "500 streams on 20 connections": (20, 25, False),
}
"""Connections, streams on each, and whether each event is answered by a WINDOW_UPDATE and a PING."""
WORDS: Final = bytearray(2 << 20)
"""Reading it empties the cache."""


async def child(connections: int, streams: int, answers: bool, deliver: bool) -> None:
    """Deliver EVENTS events while callgrind counts; without `deliver`, do only what is subtracted."""
    received: list[tuple[ClientConnection, bytes]] = []
    receive = ClientConnection.data_received

    def record(self: ClientConnection, data: bytes) -> None:
        received.append((self, data))
        receive(self, data)

    ClientConnection.data_received = record  # type: ignore[method-assign]  # the loop keeps it for each connection
    # Events must not wait for the next turn because callgrind is slow.
    upstream.watching.call.TURN_S = 1e9  # type: ignore[misc]  # a constant of the product
    with EtcdServer(current()) as etcd:
        async with proxy_for(etcd) as proxy, direct(etcd) as store:
            DeliveryDelays(proxy.listener.output)
            peers = [await RawClient.connect(proxy.port) for _ in range(connections)]
            opened = [peer.watch() for peer in peers for _ in range(streams)]
            for watch in opened:
                watch.create(KEY)
            for watch in opened:
                await watch.created(30)
            # Above 127, as revisions are in practice.
            for _ in range(200):
                await store.put(KEY, b"T=%016.6f" % time.perf_counter())
            etcds, data = next(each for each in reversed(received) if KEY in each[1])
            response = rpc_pb2.WatchResponse.FromString(data[FRAME_HEADER_BYTES + 5 :])
            clients = list(proxy.listener.connections)
            for client in clients:
                client.h2.send_window = 1 << 30
                for stream in client.h2.streams.values():
                    stream.send_window = 1 << 30
            answer = UPDATE_AND_PING.pack(UPDATE_HEADER, 1, PING_HEADER, b"watchmux")
            revisions = count(response.header.revision + 20_000)

            def event() -> Callable[[], None]:
                response.header.revision = response.events[0].kv.mod_revision = next(revisions)
                frame = message_frame(unpack_head(data)[2], response.SerializeToString())

                def run() -> None:
                    receive(etcds, frame)
                    for client in clients if answers else ():
                        client.data_received(answer)

                return run

            for _ in range(WARM_UP):
                event()()
                await asyncio.sleep(0.002)
            deliveries = [event() for _ in range(EVENTS)]
            control("-i", "on")
            for run in deliveries:
                WORDS.find(b"\1")
                if deliver:
                    run()
            control("-d")
            control("-i", "off")


def control(*arguments: str) -> None:
    """Start to count, or write what was counted."""
    subprocess.run(["callgrind_control", *arguments, str(os.getpid())], check=True, stdout=subprocess.DEVNULL)


def counted(load: str, deliver: bool) -> dict[str, int]:
    """Return callgrind's counts of a child."""
    cache = ("--cache-sim=yes", "--LL=1048576,16,64", "--instr-atstart=no")
    with tempfile.TemporaryDirectory(prefix="watchmux-footprint-") as directory:
        program = (sys.executable, "-m", "tests.bench.footprint", load, *("deliver" for _ in range(deliver)))
        command = ["valgrind", "--tool=callgrind", *cache, f"--callgrind-out-file={directory}/out", *program]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": "0"})
        text = Path(directory, "out.1").read_text()
    found: Any = [re.search(rf"^{name}: (.*)$", text, re.MULTILINE) for name in ("events", "(?:summary|totals)")]
    return dict(zip(found[0][1].split(), map(int, found[1][1].split()), strict=False))


def main() -> None:
    """Print the table."""
    sys.stdout.write("| one event to | instructions | cache lines of code | of data |\n|---|---:|---:|---:|\n")
    for load in LOADS:
        alone, both = counted(load, False), counted(load, True)
        each = {name: (both[name] - alone[name]) / EVENTS for name in both}
        data = each["DLmr"] + each["DLmw"]
        sys.stdout.write(f"| {load} | {each['Ir']:,.0f} | {each['ILmr']:,.0f} | {data:,.0f} |\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        uvloop.run(child(*LOADS[sys.argv[1]], deliver="deliver" in sys.argv[2:]))
    else:
        main()
