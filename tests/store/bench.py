"""
What the bundled store costs: `python -m tests.store.bench [KEYS]`.

A store in a process of its own, clients in this one: rates of puts (in memory, durable, durable with batched commits)
and ranges, start-up time and memory with many keys, and the CPU of fanning events out to 1,000 watches.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import grpc

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.waiting import until_async
from upstream.store.server import Store, StoreSettings

CONNECTIONS = 20
CALLS = 4000
WATCHES, STREAMS, RANGES = 1000, 200, 10
VALUE = b"x" * 100


def serve(directory: str, commit_interval_s: float) -> None:
    """Run the store under uvloop, as the program does."""
    import uvloop

    async def run() -> None:
        started = time.monotonic()
        data_dir = Path(directory) if directory else None
        store = Store(StoreSettings(data_dir=data_dir, commit_interval_s=commit_interval_s))
        await store.start()
        print(store.endpoint, time.monotonic() - started, flush=True)  # noqa: T201  # the parent reads it
        await store.failure()

    uvloop.run(run())


class Process:
    """A store to measure."""

    def __init__(self, directory: str = "", commit_interval_s: float = 0.0) -> None:
        arguments = [sys.executable, "-m", "tests.store.bench", "--serve", directory, str(commit_interval_s)]
        self._process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.endpoint, start_s = self._process.stdout.readline().split()
        self.start_s = float(start_s)
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1)]
        self.channels = [grpc.aio.insecure_channel(self.endpoint, options=options) for _ in range(CONNECTIONS)]
        self.kv = [rpc_pb2_grpc.KVStub(channel) for channel in self.channels]

    def cpu_s(self) -> float:
        """Return the CPU time it has used."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Return its resident memory."""
        pages = int(Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    async def end(self) -> None:
        """Kill it."""
        for channel in self.channels:
            await channel.close()
        self._process.kill()
        self._process.communicate()


def show(text: str) -> None:
    """Print a line of results."""
    print(text, flush=True)  # noqa: T201  # this is a program


async def rate(process: Process, what: str, concurrency: int, call: Callable[[int], Awaitable[object]]) -> None:
    """Measure CALLS calls."""

    async def work(number: int) -> None:
        for at in range(number, CALLS, concurrency):
            await call(at)

    cpu_s, started = process.cpu_s(), time.monotonic()
    await asyncio.gather(*(work(number) for number in range(concurrency)))
    elapsed, cpu_s = time.monotonic() - started, process.cpu_s() - cpu_s
    show(f"{what:32} {concurrency:3} at a time: {CALLS / elapsed:7.0f}/s, CPU {1e6 * cpu_s / CALLS:4.0f} us each")


async def rates(name: str, directory: str = "", commit_interval_s: float = 0.0) -> None:
    """Measure puts and ranges."""
    process = Process(directory, commit_interval_s)

    async def put(at: int) -> object:
        request = rpc_pb2.PutRequest(key=b"rate/%d" % (at % 1000), value=VALUE)
        return await process.kv[at % CONNECTIONS].Put(request)

    async def read(at: int) -> object:
        return await process.kv[at % CONNECTIONS].Range(rpc_pb2.RangeRequest(key=b"rate/%d" % (at % 1000)))

    for concurrency in (1, 100):
        await rate(process, f"put, {name}", concurrency, put)
    if not directory:
        for concurrency in (1, 100):
            await rate(process, f"range, {name}", concurrency, read)
    await process.end()


async def many_keys(count: int) -> None:
    """Measure a durable store full of keys."""
    with tempfile.TemporaryDirectory() as directory:
        process = Process(directory)
        for first in range(0, count, 128):
            txn = rpc_pb2.TxnRequest()
            for at in range(first, min(first + 128, count)):
                put = txn.success.add().request_put
                put.key, put.value = b"many/%08d" % at, VALUE
            await process.kv[0].Txn(txn)
        await process.end()
        process = Process(directory)
        show(f"{count} keys: started in {process.start_s:.2f} s, {process.memory_mib():.0f} MiB")
        for what, request in (
            ("count", rpc_pb2.RangeRequest(key=b"many/", range_end=b"many0", count_only=True)),
            ("first page of 500", rpc_pb2.RangeRequest(key=b"many/", range_end=b"many0", limit=500)),
            ("all", rpc_pb2.RangeRequest(key=b"many/", range_end=b"many0")),
        ):
            started = time.monotonic()
            await process.kv[0].Range(request)
            show(f"  range, {what}: {1000 * (time.monotonic() - started):.1f} ms")
        await process.end()


async def fan_out() -> None:
    """Measure what a delivered event costs."""
    process = Process()
    created = got = want = 0

    async def watch(number: int) -> None:
        nonlocal created, got
        call = rpc_pb2_grpc.WatchStub(process.channels[number % CONNECTIONS]).Watch()
        for at in range(WATCHES // STREAMS):
            which = (number * (WATCHES // STREAMS) + at) % RANGES
            create = rpc_pb2.WatchCreateRequest(key=b"%d/" % which, range_end=b"%d0" % which)
            await call.write(rpc_pb2.WatchRequest(create_request=create))
        async for response in call:
            created += response.created
            got += len(response.events)

    def all_there() -> bool:
        return got == want

    tasks = [asyncio.create_task(watch(number)) for number in range(STREAMS)]
    await until_async(lambda: created == WATCHES, "all watches to be created")
    for per_s, puts in ((20, 100), (0, 300)):
        before = got
        cpu_s, started = process.cpu_s(), time.monotonic()
        for at in range(puts):
            await process.kv[0].Put(rpc_pb2.PutRequest(key=b"%d/x" % (at % RANGES), value=VALUE))
            await asyncio.sleep(1 / per_s if per_s else 0)
        want += puts * WATCHES // RANGES
        await until_async(all_there, "all events")
        cpu_s = process.cpu_s() - cpu_s
        how = f"{per_s} puts/s" if per_s else "as fast as it goes"
        events = got - before
        per_second, us = events / (time.monotonic() - started), 1e6 * cpu_s / events
        show(f"{WATCHES} watches, {how}: {per_second:.0f} events/s, CPU {us:.1f} us each")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await process.end()


async def main(count: int) -> None:
    """Measure everything."""
    await rates("in memory")
    with tempfile.TemporaryDirectory() as directory:
        await rates("durable", directory)
    with tempfile.TemporaryDirectory() as directory:
        await rates("durable, commits every 5 ms", directory, 0.005)
    await many_keys(count)
    await fan_out()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], float(sys.argv[3]))
    else:
        asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 100_000))
