"""The writer: puts (and deletes) directly to etcd, paced or at full speed, each value marked with its time.

Arguments: the case, etcd's endpoint, the number of writes, and the index of the first one.
"""

from __future__ import annotations

import asyncio
import sys
import time

import grpc.aio
import uvloop

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.caller import DELETE, PUT, connect, stamped
from tests.bench.cases import CASES, Case
from tests.bench.wire import key_of, range_of

IN_FLIGHT = 64
FRAME_BYTES_MAX = 16_000


async def run_large(case: Case, endpoint: str, count: int, rate: float) -> None:
    """Make writes that do not fit into a frame or a window, with a client that handles those."""
    async with grpc.aio.insecure_channel(endpoint) as channel:
        stub = rpc_pb2_grpc.KVStub(channel)
        started = time.monotonic()
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
            key = key_of(number % case.ranges)
            await stub.Put(rpc_pb2.PutRequest(key=key, value=stamped(case.value_bytes)))


async def run(case: Case, endpoint: str, first: int, count: int, rate: float) -> None:
    """Make `count` writes of `case`, the first one of number `first`."""
    if case.value_bytes > FRAME_BYTES_MAX:
        await run_large(case, endpoint, count, rate)
        return
    host, _, port = endpoint.rpartition(":")
    putter = await connect(host, int(port))
    deleter = await connect(host, int(port))
    # Writes to one key keep their order only if made one by one.
    in_flight = 1 if case.mixed else IN_FLIGHT
    started = time.monotonic()
    for number in range(first, first + count):
        if rate:
            await asyncio.sleep(max(0.0, started + (number - first) / rate - time.monotonic()))
        await putter.room(in_flight)
        prefix = range_of(number % case.ranges)[0]
        if not case.mixed:
            key = prefix + b"k"
        else:
            key = prefix + b"%06d" % (number // 3)
            if number % 3 == 2:
                deleter.call(DELETE, rpc_pb2.DeleteRangeRequest(key=key).SerializeToString())
                await deleter.room(1)
                continue
        value = stamped(case.value_bytes)
        putter.call(PUT, rpc_pb2.PutRequest(key=key, value=value).SerializeToString())
    await putter.room(1)
    if putter.failed or deleter.failed:
        raise SystemExit(f"{putter.failed + deleter.failed} writes failed")


if __name__ == "__main__":
    name, endpoint, first, count, rate = sys.argv[1:]
    uvloop.run(run(CASES[name], endpoint, int(first), int(count), float(rate)))
