"""Creates, progress requests and restores: decisions of the core for many clients at once."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from typing import Any

import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.sharing.bystander import quantiles
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.clients.restarting import PROGRAMS, starts_again
from tests.etcd.server import EtcdServer, free_port
from tests.waiting import until

WATCH = "/etcdserverpb.Watch/Watch"
COLD_CREATES = 4_000
PUTS = 100
TOKENS = 2_000
PROGRESS_S = 8.0


def create(key: bytes, start_revision: int = 0) -> bytes:
    """Return an encoded create of a watch of one key."""
    wanted = rpc_pb2.WatchCreateRequest(key=key, start_revision=start_revision)
    return rpc_pb2.WatchRequest(create_request=wanted).SerializeToString()


@asynccontextmanager
async def watch_stream(channel: grpc.aio.Channel, token: str = "") -> AsyncIterator[Any]:
    """Yield a Watch call with raw bytes as messages."""
    call: Any = channel.stream_stream(WATCH)(metadata=(("token", token),) if token else None)
    try:
        yield call
    finally:
        call.cancel()


async def _one_by_one(call: Any, creates: Iterable[bytes]) -> None:
    """Create watches as clientv3 does: each after the `created` of the previous one."""
    for message in creates:
        await call.write(message)
        answer = rpc_pb2.WatchResponse.FromString(await call.read())
        assert answer.created, answer
        assert not answer.canceled, answer


async def _at_once(call: Any, creates: Iterable[bytes]) -> None:
    """Create watches without waiting for answers."""

    async def write() -> None:
        for message in creates:
            await call.write(message)

    writing = asyncio.create_task(write())
    for place in range(COLD_CREATES):
        answer = rpc_pb2.WatchResponse.FromString(await call.read())
        assert answer.created, answer
        assert answer.watch_id == place, answer
    await writing


@contextmanager
def _floor(endpoint: str) -> Iterator[str]:
    """Yield the address of a loop that only makes the system calls of a create from now."""
    host, _, port = endpoint.rpartition(":")
    listen = free_port()
    with subprocess.Popen([sys.executable, "-m", "tests.bench.create_floor", host, port, str(listen)]) as process:
        try:
            until(lambda: _listens(listen), "the floor to listen")
            yield f"127.0.0.1:{listen}"
        finally:
            process.kill()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cold_creates(front: Front) -> Figures:
    """One stream watches thousands of keys that no other client watches; directly also through the floor."""

    async def measured(address: str, how: Callable[[Any, Iterable[bytes]], Any], messages: list[bytes]) -> float:
        async with grpc.aio.insecure_channel(address) as channel, watch_stream(channel) as call:
            began_at = time.perf_counter()
            await asyncio.wait_for(how(call, messages), 60)
            return time.perf_counter() - began_at

    figures: Figures = {}
    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        etcd.ctl("put", "k", "v")
        for name, how, start in (
            ("one by one, now", _one_by_one, 0),
            ("one by one, next revision", _one_by_one, 3),
            ("at once, now", _at_once, 0),
            ("at once, next revision", _at_once, 3),
        ):
            messages = [create(b"%s %d" % (name.encode(), number), start) for number in range(COLD_CREATES)]
            before_s = front.proxy.cpu_s() if front.proxy else 0.0
            figures[f"{name}: s"] = asyncio.run(measured(address, how, messages))
            if front.proxy:
                figures[f"{name}: CPU, us each"] = 1e6 * (front.proxy.cpu_s() - before_s) / COLD_CREATES
        if not front.proxy:
            messages = [create(b"floor %d" % number) for number in range(COLD_CREATES)]
            with _floor(etcd.endpoint) as floor:
                figures["one by one, now, the system calls alone: s"] = asyncio.run(
                    measured(floor, _one_by_one, messages)
                )
    return figures


async def _tokens(channel: grpc.aio.Channel, count: int) -> list[str]:
    """Log the user root in so many times."""
    auth = rpc_pb2_grpc.AuthStub(channel)
    request = rpc_pb2.AuthenticateRequest(name="root", password="r")
    found: list[str] = []
    while len(found) < count:
        answers = await asyncio.gather(*(auth.Authenticate(request) for _ in range(min(50, count - len(found)))))
        found += [answer.token for answer in answers]
    return found


async def _ask_for_progress(call: Any, until: float) -> tuple[int, int]:
    """Request every 50 ms, wait a second at most for each answer; return the numbers of requests and answers."""
    asked = answered = 0
    message = rpc_pb2.WatchRequest(progress_request=rpc_pb2.WatchProgressRequest()).SerializeToString()
    reading: asyncio.Future[Any] | None = None
    while time.perf_counter() < until:
        asked += 1
        await call.write(message)
        reading = reading or asyncio.ensure_future(call.read())
        if (await asyncio.wait((reading,), timeout=1))[0]:
            answered += 1
            reading = None
        await asyncio.sleep(0.05)
    if reading is not None:
        reading.cancel()
    return asked, answered


async def _bystander(call: Any, store: grpc.aio.Channel, token: str, until: float) -> list[float]:
    """Return the delays, in seconds, from puts made directly at etcd to their events."""
    kv = rpc_pb2_grpc.KVStub(store)
    delays: list[float] = []
    while time.perf_counter() < until:
        began_at = time.perf_counter()
        _, message = await asyncio.gather(
            kv.Put(rpc_pb2.PutRequest(key=b"bystander"), metadata=(("token", token),)), call.read()
        )
        assert rpc_pb2.WatchResponse.FromString(message).events
        delays.append(time.perf_counter() - began_at)
        await asyncio.sleep(0.01)
    return delays


def progress(front: Front) -> Figures:
    """Thousands of tokens have a watch each, and a stream at etcd; three of them request progress repeatedly."""

    async def measured(address: str, endpoint: str) -> Figures:
        async with (
            grpc.aio.insecure_channel(address) as channel,
            grpc.aio.insecure_channel(endpoint) as store,
            AsyncExitStack() as stack,
        ):
            calls = []
            tokens = await _tokens(store, TOKENS)
            for number, token in enumerate(tokens):
                call = await stack.enter_async_context(watch_stream(channel, token))
                await call.write(create(b"bystander" if number == 0 else b"%d" % number))
                calls.append(call)
            for call in calls:
                assert rpc_pb2.WatchResponse.FromString(await call.read()).created
            until = time.perf_counter() + PROGRESS_S
            others = asyncio.gather(*(_ask_for_progress(call, until) for call in calls[1:4]))
            delays = await _bystander(calls[0], store, tokens[0], until)
            asked = await others
        return {
            "asked": sum(number for number, _ in asked),
            "answered": sum(number for _, number in asked),
            **quantiles("bystander", delays),
        }

    with EtcdServer() as etcd:
        for line in ("user add root:r", "user grant-role root root", "auth enable"):
            etcd.ctl(*line.split())
        with front.before(etcd.endpoint) as address:
            return asyncio.run(measured(address, etcd.endpoint))


def put_behind_create(front: Front) -> Figures:
    """A client sends a put of a key right after a create of its watch, without waiting for `created`."""

    async def is_seen(channel: grpc.aio.Channel, key: bytes) -> bool:
        kv = rpc_pb2_grpc.KVStub(channel)
        async with watch_stream(channel) as call:
            await call.wait_for_connection()
            await call.write(create(key))
            put = await kv.Put(rpc_pb2.PutRequest(key=key))
            created = rpc_pb2.WatchResponse.FromString(await call.read())
            if put.header.revision <= created.header.revision:
                return False
            events = rpc_pb2.WatchResponse.FromString(await asyncio.wait_for(call.read(), 5)).events
            assert events[0].kv.mod_revision == put.header.revision
            return True

    async def measured(address: str) -> Figures:
        async with grpc.aio.insecure_channel(address) as channel, watch_stream(channel) as keeps:
            await keeps.write(create(b"shared"))
            await keeps.read()
            cold = [await is_seen(channel, b"%d" % number) for number in range(PUTS)]
            shared = [await is_seen(channel, b"shared") for _ in range(PUTS)]
        return {f"seen of {PUTS}, own range": sum(cold), f"seen of {PUTS}, shared range": sum(shared)}

    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        return asyncio.run(measured(address))


def restore(front: Front) -> Figures:
    """The store is restored from a snapshot under the watch of a real client."""
    figures: Figures = {}
    for library in PROGRAMS:
        again, _ = starts_again(library, partial(front.before), limit_s=6)
        figures[f"{library} started again"] = "yes" if again else "no"
    return figures


SCENARIOS: dict[str, Scenario] = {
    "cold-creates": cold_creates,
    "progress": progress,
    "put-behind-create": put_behind_create,
    "restore": restore,
}
