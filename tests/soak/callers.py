"""Callers that write and read through the proxy, which passes every call but Watch through unchanged.

Acknowledged writes are recorded and looked up in etcd's history at the end; a linearizable read must not be older than
its caller's earlier answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.soak.watcher import WRITE_FAILED, Seen

ANSWER_BROKEN = "Received RST_STREAM with error code 2"
"""Of a call whose answer had begun when the connection to etcd broke: gRPC ends a partial message only so."""

CALL_S = 3.0
SMALL, LARGE, HUGE = (0, 20, 200), 20_000, 60_000
HUGE_KEYS = 20
"""With prev_kv, twice 20 * 60 kB: over the 2 MiB from which etcd makes fragments."""

EXPECTED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.NOT_FOUND,
}
"""Statuses allowed while etcd and the routes to it fail and recover; NOT_FOUND: a lease that has expired."""


def any_key() -> bytes:
    """Return a key from one of the four groups that clients watch."""
    return b"/s/%c/%02d" % (random.choice(b"abcd"), random.randrange(20))


class Caller:
    """One caller that makes one call after the other."""

    def __init__(self, channel: grpc.aio.Channel, seen: Seen, calls: Counter[str]) -> None:
        self.kv = rpc_pb2_grpc.KVStub(channel)
        self.lease = rpc_pb2_grpc.LeaseStub(channel)
        self.maintenance = rpc_pb2_grpc.MaintenanceStub(channel)
        self.cluster = rpc_pb2_grpc.ClusterStub(channel)
        self._seen = seen
        self._calls = calls
        self.acknowledged: list[tuple[int, bytes]] = []
        """(revision, key) of puts that were acknowledged."""
        self._revision = 0
        self.stopping = False

    async def run(self, step: Callable[[Caller], Awaitable[None]], pace_s: float) -> None:
        """Make calls at a fixed rate until stopped."""
        while not self.stopping:
            try:
                await step(self)
            except grpc.aio.AioRpcError as error:
                self._calls[error.code().name] += 1
                text = error.details() or ""
                if error.code() not in EXPECTED and text != WRITE_FAILED and ANSWER_BROKEN not in text:
                    self._seen.faults.append(f"a call ended {error.code().name}: {text[:100]}")
            except Exception as error:
                # Reported at the end as a fault; the run goes on.
                self._seen.faults.append(f"{step.__name__} failed: {error!r}")
            await asyncio.sleep(random.uniform(0.2, 1.8) * pace_s)

    def done(self, answer: Any) -> Any:
        """Record a successful answer; the revisions of one caller never decrease."""
        self._calls["OK"] += 1
        revision = answer.header.revision
        if revision < self._revision:
            self._seen.faults.append(f"an answer of revision {revision} after one of {self._revision}")
        self._revision = revision
        self._seen.revision = max(self._seen.revision, revision)
        return answer

    async def put(self, key: bytes, value: bytes, lease: int = 0) -> None:
        """Put, and record the acknowledgement."""
        request = rpc_pb2.PutRequest(key=key, value=value, lease=lease)
        answer = self.done(await self.kv.Put(request, timeout=CALL_S))
        self.acknowledged.append((answer.header.revision, key))


async def write(caller: Caller) -> None:
    """Make a change: mostly a put, else a delete, a range of deletes, or several keys in one revision."""
    chance = random.random()
    value = random.randbytes(4).hex().encode() + b"x" * random.choice(SMALL)
    if chance < 0.7:
        await caller.put(any_key(), value)
    elif chance < 0.73:
        await caller.put(any_key(), value + b"x" * LARGE)
    elif chance < 0.88:
        caller.done(await caller.kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=any_key()), timeout=CALL_S))
    elif chance < 0.9:
        group = random.choice((b"/s/a/", b"/s/b/"))
        request = rpc_pb2.DeleteRangeRequest(key=group, range_end=group[:-1] + b"0", prev_kv=True)
        caller.done(await caller.kv.DeleteRange(request, timeout=CALL_S))
    else:
        await _put_many([b"/s/c/%02d" % number for number in range(random.randrange(2, 12))], value, caller)


async def write_huge(caller: Caller) -> None:
    """Put so much in one revision that etcd sends it in fragments."""
    value = random.randbytes(1) * HUGE
    await _put_many([b"/s/huge/%02d" % number for number in range(HUGE_KEYS)], value, caller)


async def _put_many(keys: list[bytes], value: bytes, caller: Caller) -> None:
    puts = [rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value)) for key in keys]
    answer = caller.done(await caller.kv.Txn(rpc_pb2.TxnRequest(success=puts), timeout=CALL_S))
    caller.acknowledged += [(answer.header.revision, key) for key in keys]


async def use_lease(caller: Caller) -> None:
    """Take a lease, put with it, keep it alive for a while, then revoke it or let it expire."""
    grant = await caller.lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=2), timeout=CALL_S)
    for _ in range(random.randrange(1, 4)):
        await caller.put(any_key(), b"leased", grant.ID)
    call: Any = caller.lease.LeaseKeepAlive(timeout=CALL_S)
    try:
        for _ in range(random.randrange(3)):
            # grpc.aio raises this for a call that has ended; the read gives the status.
            with contextlib.suppress(asyncio.InvalidStateError):
                await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=grant.ID))
            if await call.read() is grpc.aio.EOF:
                break
            await asyncio.sleep(0.2)
    finally:
        call.cancel()
    if random.random() < 0.5:
        await caller.lease.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=grant.ID), timeout=CALL_S)


async def read(caller: Caller) -> None:
    """Read keys, or request a status."""
    chance = random.random()
    if chance < 0.6:
        caller.done(await caller.kv.Range(rpc_pb2.RangeRequest(key=any_key()), timeout=CALL_S))
    elif chance < 0.8:
        request = rpc_pb2.RangeRequest(key=b"/s/", range_end=b"/s/e", limit=20)
        caller.done(await caller.kv.Range(request, timeout=CALL_S))
    elif chance < 0.9:
        await caller.maintenance.Status(rpc_pb2.StatusRequest(), timeout=CALL_S)
    else:
        await caller.cluster.MemberList(rpc_pb2.MemberListRequest(), timeout=CALL_S)
