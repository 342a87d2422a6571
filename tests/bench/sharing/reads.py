"""Reads of "now" and permission checks: a member cut off or suspended, many creates with a token, bad tokens."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import Callable, Sequence

import uvloop

from proto.framing import MessageReader, frame
from proto.http2 import Headers
from proto.pb import rpc_pb2
from tests.bench.sharing.bystander import MemoryPeak, load, load_command, port_of, quantiles
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.e2e.test_auth import token_of, with_users
from tests.etcd.cluster import Cluster, cluster
from tests.etcd.server import HOST, EtcdServer
from tests.faults.test_reads import logged_in
from tests.waiting import until_async
from upstream.connection import ClientConnection, UpstreamCall, connect
from upstream.endpoints import parse_endpoint
from upstream.heads import request_headers

NOWS = 2_000
RIGHTS = 1_000
USERS = 10
CALLERS = 8
HELD_S = 8.0
CREATES = 100_000
MODULE = "tests.bench.sharing.reads"
LIMIT_S = 30.0
RANGE = "/etcdserverpb.KV/Range"
AT_ONCE = 500
"""Creates in one write."""


class Creating:
    """The handler of a Watch call that only counts the answers."""

    def __init__(self, wanted: int) -> None:
        self.wanted = wanted
        self.answered = 0
        self.refused = 0
        self.first_s = 0.0
        self.ended = ""
        self.over = asyncio.Event()
        self.call: UpstreamCall | None = None
        self._unframer = MessageReader(1 << 24)
        self._room = asyncio.Event()
        self._began = time.perf_counter()

    async def send(self, creates: Sequence[bytes]) -> None:
        """Send creates as fast as the windows allow."""
        assert self.call is not None
        for place in range(0, len(creates), AT_ONCE):
            body = b"".join(creates[place : place + AT_ONCE])
            if not self.call.write((body,), len(body)):
                self._room.clear()
                await self._room.wait()
            await asyncio.sleep(0)

    def on_headers(self, headers: Headers) -> None:
        pass

    def on_data(self, data: bytes, flow_size: int) -> None:
        assert self.call is not None
        self.call.consumed(flow_size)
        for message in self._unframer.feed(data):
            answer = rpc_pb2.WatchResponse.FromString(message)
            if answer.created:
                self.first_s = self.first_s or time.perf_counter() - self._began
                self.answered += 1
                self.refused += answer.canceled
        if self.answered >= self.wanted:
            self.over.set()

    def on_drained(self) -> None:
        self._room.set()

    def on_end(self, status: int, message: str, trailers: Headers) -> None:  # noqa: ARG002 - CallHandler's signature
        self.ended = f"{status}: {message}"
        self._room.set()
        self.over.set()


def creates_of(count: int, prefix: bytes) -> list[bytes]:
    """Return framed creates of as many keys, from now."""
    return [
        frame(
            rpc_pb2.WatchRequest(
                create_request=rpc_pb2.WatchCreateRequest(key=prefix + b"%d" % number)
            ).SerializeToString()
        )
        for number in range(count)
    ]


def open_stream(connection: ClientConnection, token: str, wanted: int) -> Creating:
    """Open a Watch call."""
    handler = Creating(wanted)
    metadata = [(b"token", token.encode())] if token else []
    handler.call = connection.request(request_headers(connection, b"/etcdserverpb.Watch/Watch", metadata), handler)
    return handler


async def crowd(port: int, token: str) -> str:
    """Create CREATES watches on one stream; report their outcome."""
    creates = creates_of(CREATES, b"a/")
    connection = await connect(parse_endpoint(f"{HOST}:{port}"), None)
    handler = open_stream(connection, token, CREATES)
    began = time.perf_counter()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LIMIT_S):
            await handler.send(creates)
            await handler.over.wait()
    took = time.perf_counter() - began
    connection.close()
    return f"{handler.answered} answered, {handler.refused} refused, {took:.2f} s {handler.ended}"


def many_creates(front: Front) -> Figures:
    """A restarted client creates all of its watches on one stream, with a valid token."""

    async def measured(etcd: EtcdServer, address: str) -> Figures:
        async with await RawClient.connect(port_of(address)) as client:
            token = await token_of(client, "u1")
        with MemoryPeak(front.server(etcd)) as peak:
            async with load(MODULE, "creates", token, str(port_of(address))) as said:
                outcome = await said
        proxy = front.proxy
        reads, cpu_s = (0.0, 0.0) if proxy is None else (proxy.metric("watchmux_upstream_reads_total"), proxy.cpu_s())
        seconds = float(outcome.split(" s")[0].rpartition(" ")[2])
        figures: Figures = {
            "answered": float(outcome.split()[0]),
            "s": seconds,
            "proxy CPU s": cpu_s,
            "calls to etcd": reads,
        }
        return {**figures, "memory peak MiB": peak.mib, "outcome": outcome}

    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        with_users(etcd)
        return uvloop.run(measured(etcd, address))


async def _create_delays(client: RawClient, token: str, done: Callable[[], bool]) -> list[float]:
    """Create a watch from now every 20 ms; return how long each took."""
    found: list[float] = []
    while not done() or not found:
        began = time.perf_counter()
        stream = client.watch([("token", token)] if token else [])
        stream.create(b"a/k")
        while not stream.raw.messages:
            await asyncio.sleep(0.001)
            if stream.raw.over or time.perf_counter() - began > LIMIT_S:
                break
        found.append(time.perf_counter() - began)
        stream.raw.cancel()
        await asyncio.sleep(0.02)
    return found


def made_up_token(front: Front) -> Figures:
    """A client with a made-up token creates many watches; others create watches meanwhile."""

    async def measured(etcd: EtcdServer, address: str) -> Figures:
        del etcd
        async with await RawClient.connect(port_of(address)) as client:
            token = await token_of(client, "u1")
            quiet = time.perf_counter() + 1
            before = await _create_delays(client, token, lambda: time.perf_counter() > quiet)
            async with load(MODULE, "creates", "made.up", str(port_of(address))) as said:
                during = await _create_delays(client, token, said.done)
                outcome = await said
        return {**quantiles("before", before), **quantiles("during", during), "outcome": outcome}

    with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
        with_users(etcd)
        return uvloop.run(measured(etcd, address))


def poisoned_reader(front: Front) -> Figures:
    """A client repeatedly creates a watch whose key etcd does not accept; others create watches meanwhile."""

    async def measured(address: str) -> Figures:
        async with await RawClient.connect(port_of(address)) as client:
            quiet = time.perf_counter() + 1
            before = await _create_delays(client, "", lambda: time.perf_counter() > quiet)
            async with load(MODULE, "poison", "3", str(port_of(address))) as said:
                during = await _create_delays(client, "", said.done)
                outcome = await said
        return {**quantiles("before", before), **quantiles("during", during), "outcome": outcome}

    with EtcdServer(extra=["--max-request-bytes=262144"]) as etcd, front.before(etcd.endpoint) as address:
        return uvloop.run(measured(address))


async def poison(port: int, seconds: str) -> str:
    """Create a watch of a key of 1 MiB for so long, on a new stream each time one ends, or after 0.2 s."""
    large = frame(
        rpc_pb2.WatchRequest(
            create_request=rpc_pb2.WatchCreateRequest(key=b"a/" + b"k" * (1 << 20))
        ).SerializeToString()
    )
    end, ends = time.perf_counter() + float(seconds), set()
    while time.perf_counter() < end:
        connection = await connect(parse_endpoint(f"{HOST}:{port}"), None)
        handler = open_stream(connection, "", 1)
        await handler.send([large])
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.2):
                await handler.over.wait()
        ends.add(handler.ended or ("refused" if handler.refused else "answered" if handler.answered else "nothing"))
        connection.close()
    return "; ".join(sorted(ends))


async def _with_one_cut_off(front: Front, members: Cluster, auth: bool) -> Figures:
    leader = await members.leader()
    cut = next(member for member in members.members if member is not leader)
    if auth:
        await asyncio.to_thread(with_users, leader)
    endpoints = members.endpoints if front.root is not None else leader.endpoint
    with front.before(endpoints) as address:
        async with await RawClient.connect(port_of(address)) as client, direct(leader) as store:
            token = await logged_in(client, "u1") if auth else ""
            root = [("token", await logged_in(client, "root", "r"))] if auth else []
            members.cut_off(cut)
            await until_async(lambda: not cut.has_leader, "the one cut off to notice", 20)
            if auth:
                await asyncio.to_thread(leader.ctl, "--user=root:r", "user", "revoke-role", "u1", "reader")
            wrong = done = 0
            numbers = iter(range(RIGHTS if auth else NOWS))

            async def user(name: int) -> None:
                nonlocal wrong, done
                for _ in numbers:
                    revision = 0 if auth else await store.put(b"a/%d" % name, b"")
                    stream = client.watch([("token", token)] if auth else [])
                    stream.create(b"a/%d" % name)
                    answer = await stream.next(LIMIT_S)
                    wrong += not answer.canceled if auth else answer.header.revision < revision
                    done += 1
                    stream.raw.cancel()

            async def call() -> None:
                message = rpc_pb2.RangeRequest(key=b"a/x", serializable=True).SerializeToString()
                while True:
                    await client.unary(RANGE, message, root)
                    await asyncio.sleep(0.001)

            calling = [asyncio.create_task(call()) for _ in range(CALLERS)]
            began = time.perf_counter()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LIMIT_S):
                    await asyncio.gather(*map(user, range(USERS)))
            for each in calling:
                each.cancel()
            await asyncio.gather(*calling, return_exceptions=True)
            took = time.perf_counter() - began
    name = "let in though revoked" if auth else "now below an acknowledged put"
    return {name: wrong, "of": done, "s": took}


def cut_off(auth: bool) -> Scenario:
    """Make the scenario of a member that is cut off while calls use all members in turn."""

    def scenario(front: Front) -> Figures:
        async def measured() -> Figures:
            async with cluster() as members:
                return await _with_one_cut_off(front, members, auth)

        return asyncio.run(measured())

    return scenario


def held_still(front: Front) -> Figures:
    """One member of three hangs: how long does a create from now take, and a call that is passed through?"""

    async def measured() -> Figures:
        async with cluster() as members:
            leader = await members.leader()
            held = next(member for member in members.members if member is not leader)
            endpoints = members.endpoints if front.root is not None else leader.endpoint
            with front.before(endpoints) as address:
                async with await RawClient.connect(port_of(address)) as client, direct(leader) as store:
                    await store.put(b"a/k", b"")
                    end = time.perf_counter() + 1
                    await _create_delays(client, "", lambda: time.perf_counter() > end)
                    held.hold_still()
                    end = time.perf_counter() + HELD_S
                    calls: list[float] = []
                    calling = asyncio.create_task(_calls(client, calls))
                    creates = await _create_delays(client, "", lambda: time.perf_counter() > end)
                    calling.cancel()
                    await asyncio.gather(calling, return_exceptions=True)
                    held.go_on()
        slow = sum(each > 1 for each in calls)
        figures: Figures = {"call p50 ms": statistics.median(calls) * 1e3, "calls": len(calls), "calls above 1 s": slow}
        return {**quantiles("create", creates), **figures}

    return asyncio.run(measured())


async def _calls(client: RawClient, took: list[float]) -> None:
    """Make a call every 10 ms, each in a separate task, so that one that hangs does not stop the others."""
    message = rpc_pb2.RangeRequest(key=b"a/k").SerializeToString()

    async def call() -> None:
        began = time.perf_counter()
        place = len(took)
        took.append(LIMIT_S)
        await client.unary(RANGE, message)
        took[place] = time.perf_counter() - began

    async with asyncio.TaskGroup() as group:
        while True:
            group.create_task(call())
            await asyncio.sleep(0.01)


SCENARIOS: dict[str, Scenario] = {
    "reads: now with a member cut off": cut_off(auth=False),
    "reads: a revoked right with a member cut off": cut_off(auth=True),
    "reads: a member hangs": held_still,
    "reads: 100,000 creates with a token": many_creates,
    "reads: creates with a made-up token": made_up_token,
    "reads: a key that etcd does not take": poisoned_reader,
}


main = load_command({"creates": crowd, "poison": poison})


if __name__ == "__main__":
    main()
