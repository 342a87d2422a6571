"""The Lock service of etcd (server/etcdserver/api/v3lock): Lock returns once the caller holds the lock."""

from __future__ import annotations

import grpc

from proto.framing import Status
from proto.pb import rpc_pb2, v3lock_pb2
from upstream.store.calls import service
from upstream.store.errors import StoreError, StoreRefusal
from upstream.store.queueing import leave
from upstream.store.service import LineService

SESSION_EXPIRED = StoreRefusal(Status.UNKNOWN, "mutex: session is expired")


class LockService(LineService):
    """v3lockpb.Lock."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service(
            "v3lockpb.Lock",
            {
                "Lock": self._unary(v3lock_pb2.LockRequest, self.lock),
                "Unlock": self._unary(v3lock_pb2.UnlockRequest, self.unlock),
            },
        )

    async def lock(self, request: v3lock_pb2.LockRequest, user: str | None) -> v3lock_pb2.LockResponse:
        """Answer Lock once the lock is held; a cancelled call leaves the line."""
        line = self._line(request.name, user)
        key, entered = await line.enter(await line.lease(request.lease), b"")
        header = entered.header
        revision = header.revision if entered.succeeded else entered.responses[0].response_range.kvs[0].create_revision
        _, first = line.first()
        if first is not None and first.create_revision != revision:
            try:
                await line.wait_for_turn(revision)
                found = self._state.range(rpc_pb2.RangeRequest(key=key), user)
            except BaseException:
                leave(lambda: self._delete(key, user))
                raise
            if not found.kvs:
                raise StoreError(SESSION_EXPIRED)
            header = found.header
        return v3lock_pb2.LockResponse(header=header, key=key)

    async def unlock(self, request: v3lock_pb2.UnlockRequest, user: str | None) -> v3lock_pb2.UnlockResponse:
        """Answer Unlock; unlocking a lock that is not held succeeds."""
        deleted = await self._delete(request.key, user)
        return v3lock_pb2.UnlockResponse(header=deleted.header)

    async def _delete(self, key: bytes, user: str | None) -> rpc_pb2.DeleteRangeResponse:
        request = rpc_pb2.DeleteRangeRequest(key=key)
        return await self._writer.write(lambda: self._state.delete_range(request, user))
