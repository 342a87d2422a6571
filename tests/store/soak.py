"""Mixed load on a durable store that is killed every few seconds: `python -m tests.store.soak --seconds 60`.

Workers put, delete, transact, grant and revoke, each on its own keys and leases, and record the acknowledged writes.
After every kill -9 and restart each worker finds exactly these, with or without the one request that was not answered
yet. One watch is resumed over all restarts from its next revision; the keys built from its events must equal the
store's. Compactions run all the time. Sometimes the store is killed while it starts.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import grpc

from proto.pb import kv_pb2, rpc_pb2, rpc_pb2_grpc
from tests.store.process import StoreProcess
from tests.waiting import until_async

WORKERS = 16
KEYS = 12
LIFE_S = (0.3, 3.0)
START_S_MAX = 0.6
KILLED_STARTING = 0.2
TTL_S = 5000
COMPACT_BEHIND = 300
EVERYTHING = rpc_pb2.RangeRequest(key=b"\x00", range_end=b"\x00")

Keys = dict[bytes, tuple[bytes, int]]
"""Key -> (value, lease id)."""


@dataclass(frozen=True)
class Holding:
    """A worker's keys and leases in the store."""

    keys: Keys = field(default_factory=dict)
    leases: frozenset[int] = frozenset()

    def with_keys(self, keys: Keys) -> Holding:
        """Set some keys."""
        return Holding({**self.keys, **keys}, self.leases)

    def without_keys(self, *keys: bytes) -> Holding:
        """Drop some keys."""
        return Holding({key: kept for key, kept in self.keys.items() if key not in keys}, self.leases)


class Clients:
    """The stubs for one life of the store."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.aio.insecure_channel(endpoint, options=[("grpc.use_local_subchannel_pool", 1)])
        self.kv = rpc_pb2_grpc.KVStub(self.channel)
        self.lease = rpc_pb2_grpc.LeaseStub(self.channel)
        self.watch = rpc_pb2_grpc.WatchStub(self.channel)


class Worker:
    """One client that writes one thing at a time."""

    def __init__(self, number: int, rng: Random) -> None:
        self._rng = rng
        self._prefix = b"w%02d/" % number
        self._first_lease = number * 1_000_000 + 1
        self._count = 0
        # The acknowledged state, the state after the request not answered yet, and the newest revision received.
        self.holding = Holding()
        self.perhaps: Holding | None = None
        self.revision = 0
        self.acknowledged = 0

    async def work(self, clients: Clients) -> None:
        """Write until the store is killed."""
        try:
            while True:
                call, self.perhaps = self._choose(clients)
                response = await call()
                self.holding, self.perhaps = self.perhaps, None
                self.revision = max(self.revision, response.header.revision)
                self.acknowledged += 1
        except grpc.RpcError as error:
            if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
                raise

    def _choose(self, clients: Clients) -> tuple[Callable[[], Awaitable[Any]], Holding]:
        """Pick the next call; return it and the state after it."""
        rng, held = self._rng, self.holding
        self._count += 1
        kind = rng.random()
        if kind < 0.05 and len(held.leases) < 5:
            lease = self._first_lease + self._count
            grant = rpc_pb2.LeaseGrantRequest(ID=lease, TTL=TTL_S)
            return lambda: clients.lease.LeaseGrant(grant), Holding(held.keys, held.leases | {lease})
        if kind < 0.08 and held.leases:
            lease = rng.choice(sorted(held.leases))
            kept = {key: what for key, what in held.keys.items() if what[1] != lease}
            revoke = rpc_pb2.LeaseRevokeRequest(ID=lease)
            return lambda: clients.lease.LeaseRevoke(revoke), Holding(kept, held.leases - {lease})
        if kind < 0.2:
            key = self._key()
            return lambda: clients.kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=key)), held.without_keys(key)
        if kind < 0.4:
            return self._transaction(clients)
        put = self._put()
        return lambda: clients.kv.Put(put), held.with_keys({put.key: (put.value, put.lease)})

    def _transaction(self, clients: Clients) -> tuple[Callable[[], Awaitable[Any]], Holding]:
        puts = {put.key: put for put in (self._put() for _ in range(4))}
        gone = next(key for key in map(self._numbered, range(KEYS)) if key not in puts)
        request = rpc_pb2.TxnRequest()
        for put in puts.values():
            request.success.add().request_put.CopyFrom(put)
        request.success.add().request_delete_range.CopyFrom(rpc_pb2.DeleteRangeRequest(key=gone))
        left = self.holding.with_keys({key: (put.value, put.lease) for key, put in puts.items()}).without_keys(gone)
        return lambda: clients.kv.Txn(request), left

    def _put(self) -> rpc_pb2.PutRequest:
        lease = self._rng.choice((0, 0, *sorted(self.holding.leases)))
        value = b"%d " % self._count + bytes(self._rng.randrange(300))
        return rpc_pb2.PutRequest(key=self._key(), value=value, lease=lease)

    def _key(self) -> bytes:
        return self._numbered(self._rng.randrange(KEYS))

    def _numbered(self, at: int) -> bytes:
        return self._prefix + b"%d" % at

    def check(self, keys: Keys, leases: set[int], revision: int) -> None:
        """Compare with the contents of a restarted store, and continue from them."""
        mine = {key: what for key, what in keys.items() if key.startswith(self._prefix)}
        ids = range(self._first_lease, self._first_lease + 1_000_000)
        found = Holding(mine, frozenset(lease for lease in leases if lease in ids))
        assert found in (self.holding, self.perhaps), (
            f"{self._prefix!r}: {self.holding} and {self.perhaps}, not {found}"
        )
        assert revision >= self.revision, f"the store went back from revision {self.revision} to {revision}"
        self.holding, self.perhaps = found, None


class Follower:
    """A watch of all keys that is resumed over restarts, and the keys built from its events."""

    def __init__(self) -> None:
        self.keys: Keys = {}
        self.next_revision = 1
        self.events = 0

    async def follow(self, clients: Clients) -> None:
        """Take events until the store is killed."""
        call = clients.watch.Watch()
        create = rpc_pb2.WatchCreateRequest(
            key=b"\x00", range_end=b"\x00", start_revision=self.next_revision, fragment=True
        )
        try:
            await call.write(rpc_pb2.WatchRequest(create_request=create))
            async for response in call:
                assert not response.canceled, response
                self._take(response)
        except grpc.RpcError:
            return

    def _take(self, response: rpc_pb2.WatchResponse) -> None:
        for event in response.events:
            kv = event.kv
            assert kv.mod_revision >= self.next_revision, "an event came twice"
            self.events += 1
            if event.type == kv_pb2.Event.DELETE:
                del self.keys[kv.key]
            else:
                self.keys[kv.key] = (kv.value, kv.lease)
        if response.events and not response.fragment:
            self.next_revision = response.events[-1].kv.mod_revision + 1


class Soak:
    """The whole test run: workers, follower, and lives of the store."""

    def __init__(self, directory: Path, seed: int) -> None:
        self._directory = directory
        self._rng = Random(seed)
        self.workers = [Worker(number, Random(seed + number)) for number in range(WORKERS)]
        self.follower = Follower()
        self.kills = 0
        self.compactions = 0

    async def run(self, seconds: float) -> None:
        """Run for `seconds`. Raises AssertionError when something is lost."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            await self._live()
        await self._live(working=False)

    async def _live(self, working: bool = True) -> None:
        """Start the store, check its contents, load it, kill it."""
        process = StoreProcess(self._directory, self._rng.choice((0.0, 0.0, 0.005)))
        process.begin()
        try:
            if working and self._rng.random() < KILLED_STARTING:
                await asyncio.sleep(self._rng.uniform(0, START_S_MAX))
                return
            await asyncio.to_thread(process.wait_started)
            clients = Clients(process.endpoint)
            await self._check(clients)
            if working:
                await self._load(clients, process)
            await clients.channel.close()
        finally:
            self.kills += 1
            await asyncio.to_thread(process.kill)

    async def _check(self, clients: Clients) -> None:
        response = await clients.kv.Range(EVERYTHING, timeout=20)
        leases = await clients.lease.LeaseLeases(rpc_pb2.LeaseLeasesRequest(), timeout=20)
        keys = {kv.key: (kv.value, kv.lease) for kv in response.kvs}
        for worker in self.workers:
            worker.check(keys, {lease.ID for lease in leases.leases}, response.header.revision)
        following = asyncio.create_task(self.follower.follow(clients))
        await until_async(lambda: self.follower.keys == keys, "the watch to catch up with the store")
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    async def _load(self, clients: Clients, process: StoreProcess) -> None:
        tasks = [asyncio.create_task(worker.work(clients)) for worker in self.workers]
        tasks.append(asyncio.create_task(self.follower.follow(clients)))
        await asyncio.sleep(self._rng.uniform(*LIFE_S) / 2)
        if (revision := self.follower.next_revision - COMPACT_BEHIND) > 0:
            compact = rpc_pb2.CompactionRequest(revision=revision, physical=self._rng.random() < 0.5)
            try:
                await clients.kv.Compact(compact)
                self.compactions += 1
            except grpc.aio.AioRpcError as error:
                # The watch has not advanced since the last compaction.
                if error.code() is not grpc.StatusCode.OUT_OF_RANGE:
                    raise
        await asyncio.sleep(self._rng.uniform(*LIFE_S) / 2)
        await asyncio.to_thread(process.kill)
        await asyncio.gather(*tasks)

    def report(self, seconds: float) -> str:
        """Return the figures of the run."""
        writes = sum(worker.acknowledged for worker in self.workers)
        return (
            f"{writes} acknowledged writes in {seconds:.0f} s, {self.kills} kills, {self.compactions} compactions, "
            f"{self.follower.events} events watched: nothing lost"
        )


def soak(directory: Path, seconds: float, seed: int) -> str:
    """Run the test in a directory and return the report. Raises AssertionError when something is lost."""
    run = Soak(directory, seed)
    started = time.monotonic()
    asyncio.run(run.run(seconds))
    return run.report(time.monotonic() - started)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2)))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        print(f"seed {arguments.seed}", flush=True)  # noqa: T201  # this is a program
        print(soak(Path(made), arguments.seconds, arguments.seed))  # noqa: T201  # this is a program
