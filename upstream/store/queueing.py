"""Lines of waiting callers, on which Lock and Election are built.

A caller that wants the lock, or to lead, puts its own key under a common prefix, attached to its lease. The caller
with the oldest key is the holder; each other waits until every older key is deleted. Keys and order are those of
etcd's client/v3/concurrency, so that clients with their own implementation (etcdctl lock and elect) join the same line.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

from proto.pb import kv_pb2, rpc_pb2
from proto.spans import prefix_end
from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.state import StoreState
from upstream.store.txn import key_value
from upstream.store.watch_batch import WatchMessage
from upstream.store.watchable import ServedStream
from upstream.store.writer import StoreWriter

SESSION_TTL_S = 60
"""TTL of the lease that is granted for a call without a lease (etcd's concurrency.Session)."""

_Range = rpc_pb2.RangeRequest


class LockQueue:
    """One line, on behalf of one caller."""

    __slots__ = ("_state", "_user", "_writer", "prefix")

    def __init__(self, state: StoreState, writer: StoreWriter, name: bytes, user: str | None) -> None:
        """The keys of the line `name` have the prefix name/."""
        self._state = state
        self._writer = writer
        self._user = user
        self.prefix = name + b"/"

    async def lease(self, lease_id: int) -> int:
        """Return the lease to use: the given one, or a new one for 0."""
        if lease_id:
            return lease_id
        request = rpc_pb2.LeaseGrantRequest(TTL=SESSION_TTL_S)
        granted = await self._writer.write(lambda: self._state.lease_grant(request, monotonic(), self._user))
        return granted.ID

    async def enter(self, lease_id: int, value: bytes) -> tuple[bytes, rpc_pb2.TxnResponse]:
        """Join the line with a lease's key, unless the key exists already.

        Return the key and the transaction's answer: its only response has the key-value if the key existed. Raises
        StoreError when the lease does not exist.
        """
        key = self.prefix + b"%x" % lease_id
        request = rpc_pb2.TxnRequest(compare=[created_at(key, 0)])
        request.success.add().request_put.CopyFrom(rpc_pb2.PutRequest(key=key, value=value, lease=lease_id))
        request.failure.add().request_range.CopyFrom(_Range(key=key))
        return key, await self.commit(request)

    async def commit(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """Run a transaction. Raises StoreError."""
        return await self._writer.write(lambda: self._state.txn(request, self._user))

    async def wait_for_turn(self, revision: int) -> None:
        """Wait until no key of the line is older than the one created at `revision`."""
        older = _Range(
            key=self.prefix,
            range_end=prefix_end(self.prefix),
            max_create_revision=revision - 1,
            sort_order=_Range.DESCEND,
            sort_target=_Range.CREATE,
            limit=1,
            keys_only=True,
        )
        while found := (self._state.range(older, self._user).kvs if revision > 1 else ()):
            async with self.watching(found[0].key) as messages:
                async for message in messages:
                    if message.batch is not None and any(record.deleted for record in message.batch.records):
                        break

    def first(self) -> tuple[rpc_pb2.ResponseHeader, kv_pb2.KeyValue | None]:
        """Return a header and the holder's key-value, which is the oldest; None in an empty line."""
        oldest = _Range(
            key=self.prefix,
            range_end=prefix_end(self.prefix),
            sort_order=_Range.ASCEND,
            sort_target=_Range.CREATE,
            limit=1,
        )
        response = self._state.range(oldest, self._user)
        return response.header, response.kvs[0] if response.kvs else None

    async def turns(self) -> AsyncIterator[tuple[int, kv_pb2.KeyValue]]:
        """Yield (header revision, key-value) of the holder, whenever the holder or its value changes."""
        while True:
            header, leader = self.first()
            revision = header.revision
            if leader is None:
                async with self.watching(self.prefix, prefix_end(self.prefix)) as messages:
                    async for message in messages:
                        records = message.batch.records if message.batch is not None else ()
                        put = next((record for record in records if not record.deleted), None)
                        if put is not None:
                            leader, revision = key_value(put), put.mod_revision
                            break
            assert leader is not None
            yield revision, leader
            async for update in self._updates(leader.key, revision + 1):
                yield update

    async def _updates(self, key: bytes, start_revision: int) -> AsyncIterator[tuple[int, kv_pb2.KeyValue]]:
        """Yield a key's new values until it is deleted."""
        async with self.watching(key, start_revision=start_revision) as messages:
            async for message in messages:
                for record in message.batch.records if message.batch is not None else ():
                    if record.deleted:
                        return
                    yield message.revision, key_value(record)

    @asynccontextmanager
    async def watching(
        self, key: bytes, range_end: bytes = b"", start_revision: int = 0
    ) -> AsyncIterator[AsyncIterator[WatchMessage]]:
        """Watch a range of the store from within. Raises StoreError."""
        self._state.auth.check(self._user, key, range_end)
        ready = asyncio.Event()
        stream = self._state.watchable.open_stream(ready.set)
        stream.create(key, range_end, start_revision)
        try:
            yield _messages(stream, ready)
        finally:
            stream.close()


async def _messages(stream: ServedStream, ready: asyncio.Event) -> AsyncIterator[WatchMessage]:
    while True:
        while (message := stream.take()) is not None:
            if message.compact_revision:
                raise StoreError(errors.COMPACTED)
            yield message
        ready.clear()
        await ready.wait()


def created_at(key: bytes, revision: int) -> rpc_pb2.Compare:
    """Make the compare that a key was created at a revision; 0 = does not exist."""
    return rpc_pb2.Compare(key=key, target=rpc_pb2.Compare.CREATE, create_revision=revision)


_leaving: set[asyncio.Task[Any]] = set()


def leave(work: Callable[[], Coroutine[Any, Any, object]]) -> None:
    """Leave a line in the background: the caller is being cancelled and cannot wait."""
    task = asyncio.ensure_future(work())
    # The event loop keeps only weak references to tasks.
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)
