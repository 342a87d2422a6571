"""The load's writes: puts, deletes and transactions over the planned ranges, at a steady rate.

Each value contains the time at which its write began, so that a client's delay can be computed from the event: all
processes of a run are on one machine and so share one monotonic clock.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from proto.pb import rpc_pb2
from proxy.measuring.load.client import Final, failure_of
from proxy.measuring.load.plan import Range

KEYS_PER_RANGE = 16
CALL_LIMIT_S = 10.0
STAMP_BYTES = 20
_OPERATIONS_MAX = 100
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

    def __init__(self, target: str, ranges: Sequence[Range], value_bytes: int) -> None:
        self._target = target
        self._channel = grpc.aio.insecure_channel(target)
        self._value_bytes = value_bytes
        self._keys = [span.keys(KEYS_PER_RANGE) for span in ranges]
        self._alive: set[bytes] = set()
        self._turn = 0
        self.written = 0
        """Number of events: one for each key put or deleted."""
        self.revision = 0
        """The newest revision written."""
        self.final = Final([0] * len(ranges), [0] * len(ranges))

    async def _call(self, name: str, request: Message) -> bytes:
        method: Any = self._channel.unary_unary(_KV + name)
        try:
            answer: bytes = await method(request.SerializeToString(), timeout=CALL_LIMIT_S)
            return answer
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise WriteFailed(f"cannot reach the store at {self._target}: {failure_of(error)}") from None
            raise WriteFailed(f"the store at {self._target} refused: {error.code().name}: {error.details()}") from None

    async def current_revision(self) -> int:
        """Return the store's revision."""
        request = rpc_pb2.RangeRequest(key=b"\0", count_only=True)
        return rpc_pb2.RangeResponse.FromString(await self._call("Range", request)).header.revision

    async def _commit(self, which: int, puts: Sequence[bytes], deletes: Sequence[bytes]) -> None:
        operations = [
            rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=stamp(self._value_bytes))) for key in puts
        ]
        operations += [rpc_pb2.RequestOp(request_delete_range=rpc_pb2.DeleteRangeRequest(key=key)) for key in deletes]
        answer = await self._call("Txn", rpc_pb2.TxnRequest(success=operations))
        self.revision = rpc_pb2.TxnResponse.FromString(answer).header.revision
        self.written += len(operations)
        self._alive.update(puts)
        self._alive.difference_update(deletes)
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
            await self._commit(which, [], doomed)
        elif turn % 5 == 4 and len(chosen) > 1:
            await self._commit(which, chosen[:-1], doomed)
        else:
            await self._commit(which, chosen[:1], [])

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
        for which, keys in enumerate(self._keys):
            await self._commit(which, keys[:1], [])
            await self._commit(which, [], keys[:1])

    async def clean_up(self) -> None:
        """Delete the keys that were written and still exist."""
        left = sorted(self._alive)
        for begin in range(0, len(left), _OPERATIONS_MAX):
            await self._commit(0, [], left[begin : begin + _OPERATIONS_MAX])

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()
