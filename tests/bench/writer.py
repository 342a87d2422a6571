"""The writer: puts straight into etcd, paced or as fast as they go, each value marked with the time of its write."""

from __future__ import annotations

import asyncio
import sys
import time

import grpc.aio
import uvloop

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.cases import CASES, Case
from tests.bench.load import MARKER, STAMP_DIGITS, range_of

IN_FLIGHT = 32


async def run(case: Case, endpoint: str) -> None:
    """Make the writes of `case`."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        kv = rpc_pb2_grpc.KVStub(channel)
        free = asyncio.Semaphore(IN_FLIGHT)
        started = time.monotonic()

        async def put(number: int) -> None:
            stamp = b"%0*d" % (STAMP_DIGITS, time.monotonic_ns())
            value = (MARKER + stamp).ljust(case.value_bytes, b".")
            await kv.Put(rpc_pb2.PutRequest(key=range_of(number % case.ranges)[0] + b"k", value=value))
            free.release()

        async with asyncio.TaskGroup() as group:
            for number in range(case.writes):
                if case.rate:
                    await asyncio.sleep(max(0.0, started + number / case.rate - time.monotonic()))
                await free.acquire()
                group.create_task(put(number))


if __name__ == "__main__":
    uvloop.run(run(CASES[sys.argv[1]], sys.argv[2]))
