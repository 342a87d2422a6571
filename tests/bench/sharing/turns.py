"""The effect of one client's many requests on others: the delays of their events, and the memory of the proxy."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
import uvloop

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.sharing.bystander import MemoryPeak, load_command, port_of, with_bystander
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.floods import Sender, create, flood
from tests.e2e.held import held
from tests.etcd.server import EtcdServer

HELD_S = 8.0
LEAVING_S = 1.0
"""How long the bystander runs after the load's connection ended, while its watches are removed."""

LOADS = {
    "progress requests": (20, 35_000),
    "cancels of unknown ids": (20, 25_000),
    "creates of an id that is taken": (20, 2_500),
    "creates of one range": (1, 20_000),
    "creates of different ranges": (1, 20_000),
    "requests full of filters": (1, 100),
}
"""Streams, and messages of each kind on each of them."""


def flooded(name: str) -> Scenario:
    """Make the scenario of one kind of messages."""

    def scenario(front: Front) -> Figures:
        with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
            return uvloop.run(with_bystander(front, etcd, address, "tests.bench.sharing.turns", "flood", name))

    return scenario


def waiting_requests(front: Front) -> Figures:
    """Twenty streams create watches while etcd does not answer: how much does the proxy keep?"""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        with held(etcd), MemoryPeak(front.server(etcd)) as peak:
            outcome = uvloop.run(hold(port_of(address)))
        return {"memory peak MiB": peak.mib, "outcome": outcome}


async def hold(port: int) -> str:
    """Create watches on twenty streams, with keys of 1 KiB, as fast as the windows allow."""
    sender = await Sender.open(port, greeted=False)
    body = create(b"k" * 1_024) * 50_000
    streams = range(1, 40, 2)
    await sender.say(b"".join(sender.request(stream_id) for stream_id in streams))

    async def one(stream_id: int) -> None:
        with contextlib.suppress(TimeoutError):
            await sender.send(stream_id, body, HELD_S)

    await asyncio.gather(*map(one, streams))
    sender.close()
    return sender.goaway or f"{len(sender.resets)} streams refused"


def shared_deadline(front: Front) -> Figures:
    """Three thousand calls of one channel have a common deadline, and etcd is slow: does its watch survive?"""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return uvloop.run(share_deadline(etcd, address))


async def share_deadline(etcd: EtcdServer, address: str, count: int = 3_000) -> Figures:
    """Make the calls while etcd is suspended, and report their outcome and that of the channel's watch."""
    async with grpc.aio.insecure_channel(address) as channel:
        kv = rpc_pb2_grpc.KVStub(channel)
        watch: Any = rpc_pb2_grpc.WatchStub(channel).Watch()
        await watch.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"mine")))
        await watch.read()
        with held(etcd):
            calls = [kv.Range(rpc_pb2.RangeRequest(key=b"mine"), timeout=1.5) for _ in range(count)]
            codes = await asyncio.gather(*map(_code, calls))
        await kv.Put(rpc_pb2.PutRequest(key=b"mine", value=b"1"), timeout=10)
        kept = False
        with contextlib.suppress(grpc.aio.AioRpcError, TimeoutError):
            event = await asyncio.wait_for(watch.read(), 5)
            kept = event is not grpc.aio.EOF and len(event.events) == 1
        in_time = codes.count(grpc.StatusCode.DEADLINE_EXCEEDED)
        return {"ended by their deadline": in_time, "ended otherwise": count - in_time, "watch kept": str(kept)}


async def _code(call: Awaitable[Any]) -> grpc.StatusCode:
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


SCENARIOS: dict[str, Callable[[Front], Figures]] = {
    **{f"turns: {streams * count:,} {name}": flooded(name) for name, (streams, count) in LOADS.items()},
    "turns: 20 streams while etcd is held": waiting_requests,
    "turns: 3,000 calls with one deadline": shared_deadline,
}


async def _flood(port: int, name: str) -> str:
    streams, count = LOADS[name]
    outcome = await flood(port, name, count, streams)
    await asyncio.sleep(LEAVING_S)
    return outcome


main = load_command({"flood": _flood})


if __name__ == "__main__":
    main()
