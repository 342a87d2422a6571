"""Many clients that connect, disconnect, stall and request progress while etcd is written to, compacted and killed.

The workload is drawn from a seed; the order of messages on the wire is not, so a seed that fails once need not fail
again, but the violations say what it found. The guarantee checkers compare every watch with a history that a direct
client of etcd has recorded without gaps.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import grpc

from coalesce.guarantees.checkers import Change, Truth, check
from proto.pb import rpc_pb2
from proxy.measuring.load.judge import change_of
from proxy.server import Proxy
from tests.e2e.judging import log_of
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

RANGES = [(b"/p/", b"/p0"), (b"/p/1", b""), (b"/p/2", b"/p/6"), (b"/q/", b"/q0"), (b"\0", b"\0")]
WINDOWS = (65_535, 200_000, 2**31 - 1)
CLIENTS = 6
STREAMS_MAX = 120


class History:
    """All events of etcd from revision 1 on, recorded by a direct watch that resumes by itself."""

    def __init__(self, port: int) -> None:
        self.changes: list[Change] = []
        self.next_revision = 1
        self._port = port
        self._stopping = False
        self._client: RawClient | None = None
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while not self._stopping:
            try:
                async with await RawClient.connect(self._port) as self._client:
                    stream = self._client.watch()
                    stream.create(b"\0", b"\0", self.next_revision, prev_kv=True)
                    while True:
                        response = await stream.next(3600)
                        assert not response.canceled, "the recorder was compacted"
                        self.changes += [change_of(event) for event in response.events]
                        if response.events:
                            self.next_revision = response.events[-1].kv.mod_revision + 1
            except (OSError, AssertionError):
                # etcd is down, or the run is over.
                await asyncio.sleep(0.05)

    async def reach(self, revision: int) -> None:
        """Wait until everything through `revision` is recorded."""
        await until_async(lambda: self.next_revision > revision, f"the history through {revision}")

    async def stop(self) -> None:
        """Stop recording."""
        self._stopping = True
        if self._client is not None:
            await self._client.close()
        await self._task


@dataclass
class Subject:
    """One watch, on a separate stream."""

    stream: WatchStream
    key: bytes
    range_end: bytes
    start_revision: int
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False
    cancelled: bool = False

    @property
    def ended(self) -> bool:
        """Whether it gets no more events, whichever side ended it."""
        return self.cancelled or self.stream.raw.over or any(r.canceled for r in self.stream.responses[-1:])


@dataclass
class Churn:
    """The state of one run."""

    proxy: Proxy
    etcd: EtcdServer
    store: Etcd
    history: History
    chance: random.Random
    clients: list[RawClient] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    compactions: list[int] = field(default_factory=list)
    revision: int = 1

    async def write(self) -> None:
        """Make a change: a put, a delete, a range of deletes, or several keys in one revision."""
        chance = self.chance
        key = chance.choice((b"/p/", b"/q/")) + b"%d" % chance.randrange(8)
        value = b"%d" % chance.randrange(10**6) + b"x" * chance.choice((0, 10, 1000, 30_000))
        kind = chance.random()
        if kind < 0.75:
            self.revision = await self.store.put(key, value)
        elif kind < 0.9:
            self.revision = await self.store.delete(key)
        elif kind < 0.95:
            self.revision = await self.store.delete(b"/q/", b"/q0")
        else:
            puts = [rpc_pb2.PutRequest(key=b"/p/%d" % number, value=value) for number in range(6)]
            operations = [rpc_pb2.RequestOp(request_put=put) for put in puts]
            self.revision = (await self.store.kv.Txn(rpc_pb2.TxnRequest(success=operations))).header.revision

    async def connect(self) -> None:
        """Add a client, or replace one; the watches of the old one end."""
        client = await RawClient.connect(self.proxy.port, self.chance.choice(WINDOWS))
        if len(self.clients) < CLIENTS:
            self.clients.append(client)
            return
        index = self.chance.randrange(CLIENTS)
        old, self.clients[index] = self.clients[index], client
        await old.close()

    def open(self) -> None:
        """Add a watch, from now, from a past revision, or from a future one."""
        chance = self.chance
        live = [subject for subject in self.subjects if not subject.ended]
        if len(live) >= STREAMS_MAX:
            return
        key, range_end = chance.choice(RANGES)
        low = max(1, self.revision - 300)
        start = chance.choice((0, 0, chance.randint(low, self.revision + 1), self.revision + chance.randint(1, 20)))
        subject = Subject(chance.choice(self.clients).watch(), key, range_end, start)
        subject.no_put, subject.no_delete = chance.random() < 0.1, chance.random() < 0.1
        subject.prev_kv = chance.random() < 0.3
        wanted = rpc_pb2.WatchCreateRequest
        filters = [wanted.NOPUT] * subject.no_put + [wanted.NODELETE] * subject.no_delete
        subject.stream.create(
            key, range_end, start, filters=filters, prev_kv=subject.prev_kv, fragment=chance.random() < 0.3
        )
        self.subjects.append(subject)

    def bother(self) -> None:
        """Do something to one of the watches."""
        live = [subject for subject in self.subjects if not subject.ended]
        if not live:
            return
        subject = self.chance.choice(live)
        raw = subject.stream.raw
        kind = self.chance.random()
        if kind < 0.4:
            raw.taking = False
        elif kind < 0.7:
            raw.take()
        elif kind < 0.85 and raw.messages:
            subject.stream.progress()
        elif kind < 0.95:
            subject.cancelled = True
            raw.cancel()

    async def compact(self) -> None:
        """Compact some way behind the newest revision."""
        revision = max(1, self.revision - self.chance.randrange(200))
        if revision > max(self.compactions, default=1):
            await self.history.reach(revision)
            await self.store.compact(revision)
            self.compactions.append(revision)

    async def kill(self) -> None:
        """Kill etcd and start it again."""
        await asyncio.to_thread(self.etcd.kill)
        await asyncio.to_thread(self.etcd.start)
        while True:
            try:
                self.revision = await self.store.revision()
                return
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)

    async def step(self) -> None:
        """Do one thing."""
        kind = self.chance.random()
        try:
            if kind < 0.6:
                await self.write()
            elif kind < 0.75:
                self.open()
            elif kind < 0.95:
                self.bother()
            elif kind < 0.98:
                await self.connect()
            else:
                await self.compact()
        except grpc.aio.AioRpcError:
            await asyncio.sleep(0.01)

    async def settle(self) -> int:
        """Wait until every watch has read everything and has progress that confirms it; return the last revision."""
        self.revision = await self.store.revision()
        while self.revision < max(subject.start_revision for subject in self.subjects):
            self.revision = await self.store.put(b"/p/1", b"late")
        await self.history.reach(self.revision)
        for subject in self.subjects:
            if not subject.ended:
                subject.stream.raw.take()
                subject.stream.progress()
        for subject in self.subjects:
            await until_async(lambda s=subject: self.has_all(s), f"{subject} to have everything")  # type: ignore[misc]  # bound
        return self.revision

    def has_all(self, subject: Subject) -> bool:
        """Whether progress confirms that it has everything, or it is over."""
        if subject.ended:
            return True
        newest = subject.stream.responses[-1:]
        return bool(newest) and newest[0].watch_id == -1 and newest[0].header.revision >= self.revision

    def judge(self, last: int) -> list[str]:
        """Return the violations of all watches."""
        truth = Truth(self.history.changes, self.compactions)
        found = []
        for number, subject in enumerate(self.subjects):
            log = log_of(subject.stream, subject.key, subject.range_end, subject.start_revision)
            log.no_put, log.no_delete, log.prev_kv = subject.no_put, subject.no_delete, subject.prev_kv
            through = None if subject.ended else last
            found += [f"watch {number}: {violation}" for violation in check(log, truth, through, safe_headers=True)]
        return found
