"""Server limits per connection: concurrent streams, requests, late answers; and members that do not serve.

Every client has a separate connection, as separate programs do; its library reconnects by itself when a server closes
a connection gracefully.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio
import uvloop

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.bench.sharing.bystander import port_of, quantiles
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.clients.clientv3 import Clientv3
from tests.e2e.raw_client import RawClient
from tests.e2e.test_auth import token_of, with_users
from tests.etcd.cluster import Member, cluster
from tests.etcd.fronts import Front as Balancer
from tests.etcd.server import EtcdServer
from tests.faults.test_shared_limits import keep_leases
from tests.waiting import until_async

STREAMS_MAX = 50
LEASES = 50
USERS = 60
WAIT_S = 3.0
PUTS = 8_000
LATE_CALLS = 4_800
STALL_S = 2.5
DEADLINE = [("grpc-timeout", "1250m")]


class Client:
    """One client with a separate connection."""

    def __init__(self, address: str) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(address, options)
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.watches = rpc_pb2_grpc.WatchStub(self.channel)
        self.leases = rpc_pb2_grpc.LeaseStub(self.channel)

    async def watch(self, key: bytes, metadata: Sequence[tuple[str, str]] = ()) -> Any:
        """Open a watch and wait for its `created`."""
        call = self.watches.Watch(metadata=metadata)
        await call.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=key)))
        created: Any = await call.read()
        assert created.created
        return call

    async def keep_alive(self) -> Any:
        """Keep a new lease alive, on a stream that stays open."""
        lease = await self.leases.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=600))
        call = self.leases.LeaseKeepAlive()
        await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=lease.ID))
        kept: Any = await call.read()
        assert kept.TTL == 600
        return call


@asynccontextmanager
async def clients(address: str, count: int) -> AsyncIterator[list[Client]]:
    """Yield so many clients."""
    found = [Client(address) for _ in range(count)]
    try:
        yield found
    finally:
        await asyncio.gather(*(client.channel.close() for client in found))


async def outcomes(calls: Sequence[Callable[[], Awaitable[object]]], at_a_time: int) -> tuple[int, list[float]]:
    """Make calls, each with a timeout; return how many failed, and how long each took (seconds)."""
    failed, took = 0, []
    waiting = iter(calls)

    async def some() -> None:
        nonlocal failed
        for call in waiting:
            began = time.perf_counter()
            try:
                async with asyncio.timeout(WAIT_S):
                    await call()
            except (grpc.aio.AioRpcError, TimeoutError, AssertionError):
                failed += 1
            took.append(time.perf_counter() - began)

    await asyncio.gather(*(some() for _ in range(at_a_time)))
    return failed, took


def limited_streams(front: Front) -> Figures:
    """An etcd with 50 streams to a connection: 50 clients keep a lease alive, others put, get and watch."""

    async def run(address: str) -> Figures:
        async with clients(address, LEASES) as keepers, clients(address, 10) as others:
            kept, _ = await outcomes([keeper.keep_alive for keeper in keepers], LEASES)
            puts = [
                lambda client=client: client.kv.Put(rpc_pb2.PutRequest(key=b"k", value=b"v")) for client in others * 3
            ]
            failed, took = await outcomes(puts, 10)
            watches = [lambda client=client: client.watch(b"k") for client in others]
            unopened, _ = await outcomes(watches, 10)
            return {
                "leases not kept": kept,
                "puts failed of 30": failed,
                "watches not created of 10": unopened,
                **quantiles("put", took),
            }

    with (
        EtcdServer(extra=[f"--max-concurrent-streams={STREAMS_MAX}"]) as etcd,
        front.before(etcd.endpoint) as address,
    ):
        return uvloop.run(run(address))


def token_users(front: Front) -> Figures:
    """An etcd with auth and 50 streams to a connection: 60 tokens watch, each a different range."""

    async def run(etcd: EtcdServer, address: str) -> Figures:
        async with await RawClient.connect(etcd.client_port) as client:
            tokens = [await token_of(client, f"u{number % 2 + 1}") for number in range(USERS)]
        async with clients(address, USERS) as users:
            watches = [
                lambda user=user, token=token, place=place: user.watch(b"a/%d" % place, [("token", token)])
                for place, (user, token) in enumerate(zip(users, tokens, strict=True))
            ]
            began = time.perf_counter()
            failed, _ = await outcomes(watches, USERS)
            return {f"watches not created of {USERS}": failed, "all decided s": time.perf_counter() - began}

    with EtcdServer(extra=[f"--max-concurrent-streams={STREAMS_MAX}"]) as etcd:
        with_users(etcd)
        with front.before(etcd.endpoint) as address:
            return uvloop.run(run(etcd, address))


async def rotated(etcd: EtcdServer, address: str, count: int) -> Figures:
    """Put from 8 clients while one watches; return the failures, and the events of the watch with their delays."""
    async with clients(address, 9) as (watcher, *writers):
        watch = await watcher.watch(b"k")
        seen: list[int] = []
        ended: list[int] = []

        async def read() -> None:
            try:
                while response := await watch.read():
                    seen.extend(event.kv.mod_revision for event in response.events)
            except grpc.aio.AioRpcError:
                pass
            ended.append(1)

        reading = asyncio.create_task(read())
        puts = [
            lambda client=client: client.kv.Put(rpc_pb2.PutRequest(key=b"k", value=b"v"))
            for client in writers * (count // len(writers))
        ]
        began = time.perf_counter()
        failed, took = await outcomes(puts, 32)
        seconds = time.perf_counter() - began
        async with await RawClient.connect(etcd.client_port) as client:
            read_back = await client.unary("/etcdserverpb.KV/Range", rpc_pb2.RangeRequest(key=b"k").SerializeToString())
        written = rpc_pb2.RangeResponse.FromString(read_back.messages[0]).kvs[0].version
        with suppress(AssertionError):
            await until_async(lambda: len(seen) >= written or ended, "all events", WAIT_S)
        reading.cancel()
        return {
            f"puts failed of {len(puts)}": failed,
            "events lost": written - len(set(seen)),
            "events twice": len(seen) - len(set(seen)),
            "watches ended": len(ended),
            "puts per s": len(puts) / seconds,
            **quantiles("put", took),
        }


def nginx_defaults(front: Front) -> Figures:
    """nginx with its defaults before etcd: it gracefully closes each connection after 1,000 requests."""
    with (
        EtcdServer() as etcd,
        Balancer("nginx", etcd.endpoint) as before,
        front.before(before.endpoint) as address,
    ):
        return uvloop.run(rotated(etcd, address, PUTS))


def nginx_100_requests(front: Front) -> Figures:
    """The same with 100 requests to a connection."""
    with (
        EtcdServer() as etcd,
        Balancer("nginx", etcd.endpoint, "keepalive_requests 100;") as before,
        front.before(before.endpoint) as address,
    ):
        return uvloop.run(rotated(etcd, address, PUTS // 2))


def late_answers(front: Front) -> Figures:
    """etcd stalls for 2.5 s with 4,800 calls whose deadlines run out, then answers; others keep leases alive."""

    async def run(etcd: Member, address: str) -> Figures:
        request = rpc_pb2.RangeRequest(key=b"k").SerializeToString()
        async with await RawClient.connect(port_of(address)) as keeper:
            leases = await keep_leases(keeper, 5)
            loaders = [await RawClient.connect(port_of(address)) for _ in range(8)]
            try:
                etcd.hold_still()
                calls = [loaders[number % 8].call("/etcdserverpb.KV/Range", DEADLINE) for number in range(LATE_CALLS)]
                for call in calls:
                    call.send(request, end=True)
                began = asyncio.get_running_loop().time()
                await until_async(lambda: asyncio.get_running_loop().time() > began + STALL_S / 2, "the deadlines")
                for call in calls:
                    if not call.over:
                        call.cancel()
                await until_async(lambda: asyncio.get_running_loop().time() > began + STALL_S, "the stall")
                etcd.go_on()
                after = await keeper.unary("/etcdserverpb.KV/Range", request)
                await until_async(lambda: asyncio.get_running_loop().time() > began + STALL_S + 1, "the late answers")
                return {
                    "lease streams broken of 5": sum(lease.over for lease in leases),
                    "next call failed": int(after.status != 0),
                }
            finally:
                etcd.go_on()
                for loader in loaders:
                    await loader.close()

    with Member("m0") as etcd, front.before(etcd.endpoint) as address:
        return uvloop.run(run(etcd, address))


def learner(front: Front) -> Figures:
    """A learner is one of two endpoints; clientv3 puts and gets 200 times."""

    async def run() -> Figures:
        async with cluster(1) as members:
            (voter,) = members.members
            one = Member("learner")
            await one.relay.start()
            known = f"{voter.name}={voter.peer_url},learner={one.peer_url}"
            await asyncio.to_thread(voter.ctl, "member", "add", "learner", "--learner", f"--peer-urls={one.peer_url}")
            one.flags = voter.flags | {
                "--name": "learner",
                "--initial-advertise-peer-urls": one.peer_url,
                "--initial-cluster": known,
                "--initial-cluster-state": "existing",
            }
            members.members.append(one)
            await asyncio.to_thread(one.start)
            return await asyncio.to_thread(load, f"{one.endpoint},{voter.endpoint}")

    def load(endpoints: str) -> Figures:
        with front.before(endpoints) as address, Clientv3("load", address, "--calls=200") as client:
            client.wait(60)
            summary = client.summary()
            lost = sum(part["lost"] for part in summary.values() if isinstance(part, dict))
            return {"calls failed of 400": lost, "tries": summary["tries"]}

    return uvloop.run(run())


SCENARIOS: dict[str, Scenario] = {
    "limited-streams": limited_streams,
    "token-users": token_users,
    "nginx-defaults": nginx_defaults,
    "nginx-100-requests": nginx_100_requests,
    "late-answers": late_answers,
    "learner": learner,
}
