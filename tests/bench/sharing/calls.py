"""Calls of a real clientv3 while no etcd is reachable: failures, number of tries, and the cost of waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.sharing.front import Figures, Front
from tests.clients.clientv3 import Clientv3, Line
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, relay_to
from tests.proxy_process import ProxyProcess

AWAY_S = 4.0
CUT_S = 10.0
CLIENTS = 500
RACES = 300


def _figures(summary: Line, kinds: tuple[str, ...]) -> Figures:
    figures: Figures = {}
    made = {kind: summary[kind] for kind in kinds if kind in summary}
    for kind in kinds:
        figures[f"{kind} failed"] = f"{made[kind]['lost']} of {made[kind]['done']}" if kind in made else "none made"
    figures["most tries of a call"] = summary["tries_most"]
    figures["slowest call s"] = max(one["slowest_s"] for one in made.values())
    return figures


def restart(front: Front) -> Figures:
    """Seventeen clients create and update, as Kubernetes does, while etcd is down for some seconds."""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        flags = ("--mode=kubernetes", "--workers=17", "--clients=17", "--calls=1", "--timeout=30")
        etcd.stop()
        with Clientv3("load", address, *flags) as load:
            load.until(lambda line: line["kind"] == "started", "the load")
            time.sleep(AWAY_S)
            etcd.start()
            load.wait(60)
        return _figures(load.summary(), ("creates", "updates", "gets"))


def waiting(front: Front) -> Figures:
    """Many clients wait for an etcd that is down: CPU of the proxy."""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        etcd.stop()
        flags = (f"--workers={CLIENTS}", f"--clients={CLIENTS}", "--calls=1", "--timeout=30")
        with Clientv3("load", address, *flags) as load:
            load.until(lambda line: line["kind"] == "started", "the load", 60)
            time.sleep(1)
            before, began = front.proxy.cpu_s() if front.proxy else 0.0, time.monotonic()
            time.sleep(AWAY_S - 1)
            used = (front.proxy.cpu_s() if front.proxy else 0.0) - before
            took = time.monotonic() - began
            etcd.start()
            load.wait(60)
        return {"CPU of the proxy %": 100 * used / took, **_figures(load.summary(), ("puts", "gets"))}


def one_of_two(front: Front) -> Figures:
    """Clients have two endpoints, one of which loses its etcd for some seconds."""
    with EtcdServer() as etcd, _relay(etcd.client_port) as (loop, way), front.before(way.endpoint) as cut:
        with _second(front, etcd) as whole:
            flags = ("--workers=10", "--timeout=5", "--pause=0.05", "--seconds=60")
            with Clientv3("load", f"{cut},{whole}", *flags) as load:
                time.sleep(1)
                loop.call_soon_threadsafe(way.cut)
                time.sleep(CUT_S)
                loop.call_soon_threadsafe(way.mend)
                time.sleep(1)
                load.finish()
        return _figures(load.summary(), ("puts", "gets"))


def revocation(front: Front) -> Figures:
    """A lease is kept alive on a stream and revoked by a call at the same moment: which one reaches etcd first?"""
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return {f"revocation first of {RACES}": asyncio.run(_races(address))}


async def _races(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = rpc_pb2_grpc.LeaseStub(channel)
        return sum([await _revocation_is_first(stub) for _ in range(RACES)])


async def _revocation_is_first(stub: rpc_pb2_grpc.LeaseAsyncStub) -> bool:
    lease = (await stub.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=60))).ID
    stream = stub.LeaseKeepAlive()
    keep_alive = rpc_pb2.LeaseKeepAliveRequest(ID=lease)
    await stream.write(keep_alive)
    await stream.read()
    await asyncio.gather(stream.write(keep_alive), _revoke(stub, lease))
    answer = await stream.read()
    stream.cancel()
    assert isinstance(answer, rpc_pb2.LeaseKeepAliveResponse)
    return answer.TTL == 0


async def _revoke(stub: rpc_pb2_grpc.LeaseAsyncStub, lease: int) -> None:
    await stub.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=lease))


@contextlib.contextmanager
def _second(front: Front, etcd: EtcdServer) -> Iterator[str]:
    if front.root is None:
        yield etcd.endpoint
        return
    with ProxyProcess(etcd.endpoint, directory=front.root) as proxy:
        yield proxy.endpoint


@contextlib.contextmanager
def _relay(port: int) -> Iterator[tuple[asyncio.AbstractEventLoop, Relay]]:
    """Run a relay in a thread with its own event loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    stack = contextlib.AsyncExitStack()
    try:
        way = asyncio.run_coroutine_threadsafe(stack.enter_async_context(relay_to(port)), loop).result(10)
        yield loop, way
    finally:
        asyncio.run_coroutine_threadsafe(stack.aclose(), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


SCENARIOS = {
    "calls-restart": restart,
    "calls-waiting": waiting,
    "calls-one-of-two": one_of_two,
    "calls-revocation": revocation,
}
