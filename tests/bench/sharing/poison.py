"""Requests or ranges of one client that harm the stream to etcd that all clients share, each with a bystander."""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Awaitable, Callable

import click
import uvloop

from proto.pb import rpc_pb2
from tests.bench.sharing.bystander import load_command, port_of, with_bystander
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.raw_client import RawClient
from tests.e2e.running import Etcd, direct
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, relay_to
from tests.waiting import until_async

MODULE = "tests.bench.sharing.poison"
LOAD_S = 6.0
TOO_LARGE = b"k" * 600_000
SMALL_REQUESTS = "--max-request-bytes=65536"
"""etcd accepts 512 KiB more than that."""
KEYS = 100_000
TXN_PUTS = 100
BREAK_S = 3.0
BIG, BIG_END = b"big/", b"big0"


def streams_started(etcd: EtcdServer) -> float:
    """Return the number of Watch streams at etcd so far, from its metrics."""
    name = re.compile(r"grpc_server_started_total\{.*grpc_method=\"Watch\"")
    return sum(value for sample, value in etcd.metrics().items() if name.match(sample))


def repeated(load: str, *flags: str) -> Scenario:
    """Return the scenario of a client that repeats the same bad watch as soon as it is refused."""

    def scenario(front: Front) -> Figures:
        with EtcdServer(extra=list(flags)) as etcd, front.before(etcd.endpoint) as address:
            before = streams_started(etcd)
            figures = uvloop.run(with_bystander(front, etcd, address, MODULE, load))
            figures["watch streams at etcd per minute"] = (streams_started(etcd) - before) * 60 / LOAD_S
            return figures

    return scenario


async def load_size(port: int) -> str:
    """Create a watch that is larger than etcd accepts, repeatedly."""
    return await _again(port, TOO_LARGE, [])


async def load_token(port: int) -> str:
    """Create a watch with a token that Go's HTTP/2 does not accept, repeatedly."""
    return await _again(port, b"k", [("token", "a\x01b")])


async def _again(port: int, key: bytes, metadata: list[tuple[str, str]]) -> str:
    tried = refused = 0
    until = time.perf_counter() + LOAD_S
    async with await RawClient.connect(port) as client:
        while time.perf_counter() < until:
            stream = client.watch(metadata)
            await stream.create_large(key, 1)
            tried += 1
            try:
                await stream.raw.end(0.5)
                refused += 1
            except AssertionError:
                stream.raw.cancel()
            await asyncio.sleep(0.05)
    return f"{refused} of {tried} refused"


async def fill(store: Etcd, count: int) -> None:
    """Put many keys below big/, some in each transaction."""
    for first in range(0, count, TXN_PUTS):
        puts = [
            rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=BIG + b"%08d" % number, value=b"v"))
            for number in range(first, first + TXN_PUTS)
        ]
        await store.kv.Txn(rpc_pb2.TxnRequest(success=puts))


def large_delete(front: Front) -> Figures:
    """100,000 keys are deleted at once under a watch; the bystander watches another range."""

    async def run(address: str) -> Figures:
        async with direct(etcd) as store:
            await fill(store, KEYS)
        return await with_bystander(front, etcd, address, MODULE, "delete", etcd.endpoint)

    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return uvloop.run(run(address))


async def load_delete(port: int, endpoint: str) -> str:
    """Watch them, delete them, and wait for all events."""
    async with await RawClient.connect(port) as client, direct(endpoint) as store:
        stream = await client.open_watch(BIG, BIG_END)
        began = time.perf_counter()
        await store.delete(BIG, BIG_END)
        response = await stream.next(60)
        assert len(response.events) == KEYS
        return f"{KEYS:,} events after {time.perf_counter() - began:.1f} s"


class Resuming:
    """A watch that resumes from its last event when its connection breaks."""

    def __init__(self, port: int, key: bytes, range_end: bytes, start_revision: int) -> None:
        self._port = port
        self._range = key, range_end
        self._next = start_revision
        self.events = 0
        self.opened = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        while True:
            try:
                async with await RawClient.connect(self._port) as client:
                    stream = await client.open_watch(*self._range, start_revision=self._next)
                    self.opened.set()
                    while True:
                        response = await stream.next(60)
                        self.events += len(response.events)
                        if response.events:
                            self._next = response.events[-1].kv.mod_revision + 1
            except (AssertionError, OSError):
                await asyncio.sleep(0.05)


def catch_up(front: Front) -> Figures:
    """The connection to etcd is cut for 3 s, while 1,000 transactions of 100 puts are made in one range."""

    async def run(way: Relay, address: str) -> Figures:
        async with direct(etcd) as store:
            first = await store.put(b"bystander", b"")
            bystander = Resuming(port_of(address), b"bystander", b"", first + 1)
            command = (sys.executable, "-m", MODULE, "resume", str(first + 1), str(port_of(address)))
            load = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
            assert load.stdout is not None
            await bystander.opened.wait()
            await load.stdout.readline()
            way.cut()
            cut = time.perf_counter()
            await fill(store, KEYS)
            await asyncio.sleep(max(0.0, cut + BREAK_S - time.perf_counter()))
            # One event from before the connection is back, and more as soon as that has arrived.
            await store.put(b"bystander", b"")
            way.mend()
            mended = time.perf_counter()
            await until_async(lambda: bystander.events >= 1, "the bystander's event", 90)
            first_s = time.perf_counter() - mended
            delays: list[float] = []
            while load.returncode is None and len(delays) < 500:
                began = time.perf_counter()
                seen = bystander.events
                await store.put(b"bystander", b"")
                await until_async(lambda seen=seen: bystander.events > seen, "its next event", 60)  # type: ignore[misc]
                delays.append(time.perf_counter() - began)
            said, _ = await load.communicate()
            bystander.task.cancel()
            return {
                "bystander's first event ms": first_s * 1e3,
                "bystander's slowest event after ms": max(delays, default=0.0) * 1e3,
                "caught up after ms": (float(said) - mended) * 1e3,
            }

    async def whole() -> Figures:
        async with relay_to(etcd.client_port) as way:
            manager = front.before(way.endpoint)
            address = await asyncio.to_thread(manager.__enter__)
            try:
                return await run(way, address)
            finally:
                await asyncio.to_thread(manager.__exit__, None, None, None)

    with EtcdServer() as etcd:
        return uvloop.run(whole())


async def load_resume(port: int, start: str) -> str:
    """Watch big/ through the break, and report when all events had arrived (time.perf_counter)."""
    watch = Resuming(port, BIG, BIG_END, int(start))
    await watch.opened.wait()
    click.echo("opened")
    await until_async(lambda: watch.events >= KEYS, "all events", 90)
    watch.task.cancel()
    return str(time.perf_counter())


LOADS: dict[str, Callable[..., Awaitable[str]]] = {
    "size": load_size,
    "token": load_token,
    "delete": load_delete,
    "resume": load_resume,
}
SCENARIOS: dict[str, Scenario] = {
    "poisoned by size": repeated("size", SMALL_REQUESTS),
    "poisoned by token": repeated("token"),
    "large delete": large_delete,
    "catch-up after a break": catch_up,
}


main = load_command(LOADS)


if __name__ == "__main__":
    main()
