"""The load's writes: puts, deletes and transactions over the planned ranges, at a steady rate.

All keys belong to a lease of the run. Its end removes them in one step: `clean_up` revokes it, and if the run is killed
or loses its etcd, the lease expires. A write that is under way then is refused, so no key is left behind.

Each value contains the time at which its write began, so that a client's delay can be computed from the event: all
processes of a run are on one machine and so share one monotonic clock.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from proto.pb import rpc_pb2
from proxy.measuring.load.client import FinalRevisions, failure_of
from proxy.measuring.load.plan import ROOT, LoadRange
from proxy.measuring.load.target import LoadTarget

KEYS_PER_RANGE = 16
CLOSED_TOGETHER = 50
"""Ranges that get their last put in one transaction: fewer than etcd's --max-txn-ops."""

CALL_LIMIT_S = 10.0
STAMP_BYTES = 20
LEASE_TTL_S = 120
"""How long etcd keeps the keys of a run that was killed (seconds)."""

RENEW_S = 20.0
CLEAN_UP_LIMIT_S = 5.0
_LEASE = "/etcdserverpb.Lease/"
_KV = "/etcdserverpb.KV/"

OVERTIME = 4.0
"""On a slow store the writes may take this many times the planned duration."""


class WriteFailed(Exception):
    """The store did not accept a write; the text is one line."""


def stamp(size: int) -> bytes:
    """Return a value of at least `size` bytes that begins with the current time."""
    return (b"%020d " % time.monotonic_ns()).ljust(size, b"x")


def read_stamp(value: bytes) -> int:
    """Return the monotonic time in ns at which a value was written; 0 for a value without a stamp."""
    head = value[:STAMP_BYTES]
    return int(head) if len(head) == STAMP_BYTES and head.isdigit() else 0


class PutWriter:
    """Writes to the ranges, and records the last revisions of each."""

    def __init__(self, target: LoadTarget, ranges: Sequence[LoadRange], value_bytes: int) -> None:
        self._target = target
        self._channel = target.channel()
        self._value_bytes = value_bytes
        self._keys = [span.keys(KEYS_PER_RANGE) for span in ranges]
        self._alive: set[bytes] = set()
        self._turn = 0
        self._lease_id = 0
        self._renewing: asyncio.Task[None] | None = None
        self.commits = 0
        """Number of transactions: one revision each."""
        self.written = 0
        """Number of events: one for each key put or deleted."""
        self.revision = 0
        """The newest revision written."""
        self.final = FinalRevisions([0] * len(ranges), [0] * len(ranges))

    async def _call(self, path: str, request: Message, limit_s: float = CALL_LIMIT_S) -> bytes:
        method: Any = self._channel.unary_unary(path)
        where = self._target.address
        for attempt in range(2):
            try:
                answer: bytes = await method(
                    request.SerializeToString(), timeout=limit_s, metadata=self._target.metadata
                )
                return answer
            except grpc.aio.AioRpcError as error:
                if "invalid auth token" in (error.details() or "") and self._target.token and not attempt:
                    # The token has expired: etcd's --auth-token-ttl, or the ttl of a JWT.
                    self._target = await self._target.logged_in()
                    continue
                reason = failure_of(error, self._target.secure)
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    raise WriteFailed(f"cannot reach etcd at {where}: {reason}") from None
                raise WriteFailed(f"etcd at {where} refused the call: {reason}") from None
        raise AssertionError("the second attempt returns or raises")

    async def cluster_id(self) -> int:
        """Return the id of the cluster that answers."""
        request = rpc_pb2.RangeRequest(key=ROOT, count_only=True)
        return rpc_pb2.RangeResponse.FromString(await self._call(_KV + "Range", request)).header.cluster_id

    async def start(self, prefix: bytes) -> int:
        """Grant the lease of the keys and return the store's revision; all keys of the run are below `prefix`."""
        grant = rpc_pb2.LeaseGrantRequest(TTL=LEASE_TTL_S)
        answer = await self._call(_LEASE + "LeaseGrant", grant)
        self._lease_id = rpc_pb2.LeaseGrantResponse.FromString(answer).ID
        self._renewing = asyncio.create_task(self._renew())
        request = rpc_pb2.RangeRequest(key=prefix, count_only=True)
        return rpc_pb2.RangeResponse.FromString(await self._call(_KV + "Range", request)).header.revision

    async def _renew(self) -> None:
        """Keep the lease alive. A renewal that fails is made again later, within the lease's time."""
        request = rpc_pb2.LeaseKeepAliveRequest(ID=self._lease_id).SerializeToString()
        while True:
            await asyncio.sleep(RENEW_S)
            method: Any = self._channel.stream_stream(_LEASE + "LeaseKeepAlive")
            call = method(timeout=CALL_LIMIT_S, metadata=self._target.metadata)
            with contextlib.suppress(grpc.aio.AioRpcError):
                await call.write(request)
                await call.read()
            call.cancel()

    async def _commit(self, ranges: Iterable[int], puts: Sequence[bytes], deletes: Sequence[bytes]) -> None:
        """Put and delete keys in one transaction; each of `ranges` has one of them if there are any."""
        operations = [
            rpc_pb2.RequestOp(
                request_put=rpc_pb2.PutRequest(key=key, value=stamp(self._value_bytes), lease=self._lease_id)
            )
            for key in puts
        ]
        operations += [rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key)) for key in deletes]
        answer = await self._call(_KV + "Txn", rpc_pb2.TxnRequest(success=operations))
        self.commits += 1
        self.revision = rpc_pb2.TxnResponse.FromString(answer).header.revision
        self.written += len(operations)
        self._alive.update(puts)
        self._alive.difference_update(deletes)
        for which in ranges:
            if puts:
                self.final.puts[which] = self.revision
            if deletes:
                self.final.deletes[which] = self.revision

    async def write(self) -> None:
        """Make the next change: usually one put; every fifth turn a transaction of several; every seventh a delete."""
        turn, self._turn = self._turn, self._turn + 1
        which = turn % len(self._keys)
        keys = self._keys[which]
        start = turn // len(self._keys)
        chosen = [keys[(start + step) % len(keys)] for step in range(min(3, len(keys)))]
        doomed = [key for key in chosen[-1:] if key in self._alive]
        if turn % 7 == 6 and doomed:
            await self._commit([which], [], doomed)
        elif turn % 5 == 4 and len(chosen) > 1:
            await self._commit([which], chosen[:-1], doomed)
        else:
            await self._commit([which], chosen[:1], [])

    async def write_for(self, seconds: float, per_second: float) -> None:
        """Write at a steady rate for `seconds`, then close each range with a put and a delete.

        A store slower than this rate gets the same writes over a longer time, so that the two parts of a measurement
        stay comparable. After OVERTIME times `seconds` the rest of the writes is dropped.
        """
        loop = asyncio.get_running_loop()
        start = loop.time()
        for number in range(math.ceil(seconds * per_second)):
            now = loop.time()
            if (wait := start + number / per_second - now) > 0:
                await asyncio.sleep(wait)
            elif now > start + OVERTIME * seconds:
                break
            await self.write()
        await self.close_ranges()

    async def close_ranges(self) -> None:
        """Write a last put and a last delete to each range, so that watches with any filter have a last event."""
        for first in range(0, len(self._keys), CLOSED_TOGETHER):
            ranges = range(first, min(first + CLOSED_TOGETHER, len(self._keys)))
            keys = [self._keys[which][0] for which in ranges]
            await self._commit(ranges, keys, [])
            await self._commit(ranges, [], keys)

    async def clean_up(self) -> str:
        """Delete the keys that still exist; return "" or why they are left."""
        if not self._lease_id:
            return ""
        request = rpc_pb2.LeaseRevokeRequest(ID=self._lease_id)
        try:
            await self._call(_LEASE + "LeaseRevoke", request, CLEAN_UP_LIMIT_S)
        except WriteFailed as error:
            return f"{error}; etcd removes them itself within {LEASE_TTL_S} s"
        except asyncio.CancelledError:
            return f"interrupted again; etcd removes them itself within {LEASE_TTL_S} s"
        self._alive.clear()
        return ""

    async def close(self) -> None:
        """Stop renewing the lease and close the connection."""
        if self._renewing is not None:
            self._renewing.cancel()
        await self._channel.close()


async def cluster_id(target: LoadTarget) -> int:
    """Return the id of the cluster that answers at `target`. Raises WriteFailed, LoginFailed."""
    writer = PutWriter(await target.logged_in(), [], 0)
    try:
        return await writer.cluster_id()
    finally:
        await writer.close()
