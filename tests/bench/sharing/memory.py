"""Loads that cost a proxy memory or work out of proportion to their bytes, each with a bystander."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import urllib.request
from collections.abc import Awaitable, Callable

import uvloop

from proto.framing import frame
from proto.pb import rpc_pb2
from tests.bench.sharing.bystander import load_command, port_of, with_bystander
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until_async

MODULE = "tests.bench.sharing.memory"
HISTORY_EVENTS = 19_500
REPLAYS = 300
NAMESPACE = b"/n/"
UNREAD = 300
IDLE = 300
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0"
BOMBS = 10
BOMB_BYTES = 64 * 2**20
RANGE = rpc_pb2.WatchCreateRequest.FilterType


async def fill(etcd: EtcdServer, key: bytes, count: int, value: bytes = b"v") -> int:
    """Put a key `count` times, some concurrently; return the last revision."""
    async with direct(etcd) as store:
        for _ in range(0, count, 50):
            await asyncio.gather(*[store.put(key, value) for _ in range(50)])
        return await store.revision()


def filtered_replays(front: Front) -> Figures:
    """300 NOPUT watches, each from a different start, over a history of 19,500 puts: none of them is sent."""

    async def run(address: str) -> Figures:
        async with await RawClient.connect(port_of(address)) as keeper:
            stream = keeper.watch()
            stream.create(b"history")
            first = (await stream.created()).header.revision
            last = await fill(etcd, b"history", HISTORY_EVENTS)
            await until_async(lambda: stream.responses[-1].header.revision >= last, "all events", 30)
            return await with_bystander(front, etcd, address, MODULE, "filtered_replays", str(first + 1))

    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return uvloop.run(run(address))


async def load_filtered_replays(port: int, first: str) -> str:
    """Open them, and wait until each is caught up: a progress request is answered."""
    async with await RawClient.connect(port) as client:
        stream = client.watch()
        requests = [
            rpc_pb2.WatchRequest(
                create_request=rpc_pb2.WatchCreateRequest(
                    key=b"history", start_revision=int(first) + place, filters=[RANGE.NOPUT]
                )
            )
            for place in range(REPLAYS)
        ]
        stream.raw.send_raw(b"".join(frame(request.SerializeToString()) for request in requests))
        await until_async(lambda: len(stream.raw.messages) >= REPLAYS, "all to be created", 60)
        # Repeated, because etcd drops a request that it cannot answer yet.
        for _ in range(600):
            stream.progress()
            try:
                await until_async(lambda: len(stream.raw.messages) > REPLAYS, "progress", 0.1)
                return ""
            except AssertionError:
                continue
        raise AssertionError("no progress")


def gzip_bomb(front: Front) -> Figures:
    """10 puts under --namespace of 64 KiB each, which inflate to 64 MiB, far beyond etcd's limit."""
    with EtcdServer() as etcd, front.before(etcd.endpoint, f"--namespace={NAMESPACE.decode()}") as address:
        return uvloop.run(with_bystander(front, etcd, address, MODULE, "gzip_bomb", namespace=NAMESPACE))


def unread_answers(front: Front) -> Figures:
    """300 answers of a megabyte under --namespace, which etcd sends in gzip and the client does not read."""

    async def run(address: str) -> Figures:
        async with direct(etcd) as store:
            await store.put((NAMESPACE if front.proxy else b"") + b"k", bytes(2**20))
        figures = await with_bystander(front, etcd, address, MODULE, "unread_answers", namespace=NAMESPACE)
        if front.proxy is not None:
            figures["unread at the end MiB"] = front.proxy.metric("watchmux_unread_bytes") / 2**20
        return figures

    with EtcdServer() as etcd, front.before(etcd.endpoint, f"--namespace={NAMESPACE.decode()}") as address:
        return uvloop.run(run(address))


def ignore(data: bytes) -> None:
    """Take no received message."""
    del data


async def load_unread_answers(port: int) -> str:
    """Make requests, read nothing for some seconds, and report how many calls are left."""
    message = gzip.compress(rpc_pb2.RangeRequest(key=b"k").SerializeToString())
    framed = b"\1" + len(message).to_bytes(4, "big") + message
    async with await RawClient.connect(port, window=1000) as client:
        calls = []
        for _ in range(UNREAD):
            call = client.call("/etcdserverpb.KV/Range", [("grpc-encoding", "gzip"), ("grpc-accept-encoding", "gzip")])
            call.taking = False
            # It is in gzip, and never complete.
            setattr(call, "take_data", ignore)  # noqa: B010  # a method of this one stream
            call.send_raw(framed, end=True)
            calls.append(call)
            await asyncio.sleep(0.01)
        await asyncio.sleep(2)
        return f"{sum(not call.over for call in calls)} of {UNREAD} calls left"


async def load_gzip_bomb(port: int) -> str:
    """Send them and report their outcome."""
    put = rpc_pb2.PutRequest(key=b"k", value=bytes(BOMB_BYTES)).SerializeToString()
    message = gzip.compress(put)
    framed = b"\1" + len(message).to_bytes(4, "big") + message
    async with await RawClient.connect(port) as client:
        calls = []
        for _ in range(BOMBS):
            call = client.call("/etcdserverpb.KV/Put", [("grpc-encoding", "gzip")])
            await _send(client, call.id, framed)
            calls.append(call)
        for call in calls:
            await call.end(120)
        return ", ".join(sorted({f"status {call.status}" for call in calls}))


async def _send(client: RawClient, stream_id: int, data: bytes) -> None:
    """Send more than the window allows at once; the server may end the call meanwhile."""
    while data and not client.streams[stream_id].over:
        room = min(client.h2.local_flow_control_window(stream_id), client.h2.max_outbound_frame_size)
        if room > 0:
            client.h2.send_data(stream_id, data[:room])
            data = data[room:]
            client.flush()
        await asyncio.sleep(0)
    if not client.streams[stream_id].over:
        client.h2.end_stream(stream_id)
        client.flush()


def few_descriptors(front: Front) -> Figures:
    """256 descriptors, 300 clients that connect and do nothing, and a restart of etcd: which clients are served?"""

    async def watch_goes_on(address: str) -> bool:
        async with await RawClient.connect(port_of(address)) as client:
            stream = await client.open_watch(b"k")
            with contextlib.ExitStack() as stack:
                open_idle(stack, port_of(address), IDLE)
                await asyncio.to_thread(etcd.kill)
                if front.proxy is not None:
                    # As returning clients do, when the connections to etcd are gone.
                    await asyncio.sleep(1)
                    open_idle(stack, port_of(address), IDLE // 10)
                await asyncio.to_thread(etcd.start)
                if front.proxy is not None:
                    figures["livez answers"] = await asyncio.to_thread(answers, front.proxy, "livez")
                    figures["metrics answer"] = await asyncio.to_thread(answers, front.proxy, "metrics")
                async with direct(etcd) as store:
                    await store.put(b"k", b"v")
                try:
                    await until_async(lambda: bool(stream.values) or stream.raw.over, "the event", 20)
                except AssertionError:
                    return False
                return bool(stream.values)

    figures: Figures = {}
    with EtcdServer() as etcd, front.before(etcd.endpoint, prefix=("prlimit", "--nofile=256:256")) as address:
        figures["watch resumed"] = "yes" if uvloop.run(watch_goes_on(address)) else "no"
    return figures


def open_idle(stack: contextlib.ExitStack, port: int, count: int) -> None:
    """Open connections that send the preface and nothing more."""
    for _ in range(count):
        sock = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        with contextlib.suppress(OSError):
            sock.sendall(PREFACE)


def answers(proxy: ProxyProcess, page: str) -> str:
    """Return whether a page of the proxy's admin port is answered in time."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{proxy.metrics_port}/{page}", timeout=5):
            return "yes"
    except OSError:
        return "no"


LOADS: dict[str, Callable[..., Awaitable[str]]] = {
    "filtered_replays": load_filtered_replays,
    "gzip_bomb": load_gzip_bomb,
    "unread_answers": load_unread_answers,
}
SCENARIOS: dict[str, Scenario] = {
    "filtered replays": filtered_replays,
    "gzip bomb": gzip_bomb,
    "unread translated answers": unread_answers,
    "few descriptors": few_descriptors,
}


main = load_command(LOADS)


if __name__ == "__main__":
    main()
