"""The KV service: reads go straight to the store, writes go through the writer (which makes them durable)."""

from __future__ import annotations

import grpc

from proto.pb import rpc_pb2
from upstream.store import txn as requests
from upstream.store.calls import Calls, service
from upstream.store.loops import Compactor
from upstream.store.service import StoreService
from upstream.store.state import StoreState
from upstream.store.writer import StoreWriter


class KVService(StoreService):
    """etcdserverpb.KV."""

    def __init__(self, state: StoreState, writer: StoreWriter, compactor: Compactor, calls: Calls) -> None:
        super().__init__(state, writer, calls)
        self._compactor = compactor

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        unary = self._calls.unary
        return service(
            "etcdserverpb.KV",
            {
                "Range": unary(rpc_pb2.RangeRequest, self.range, check=requests.check_range),
                "Put": unary(rpc_pb2.PutRequest, self.put, write=True, check=requests.check_put),
                "DeleteRange": unary(
                    rpc_pb2.DeleteRangeRequest, self.delete_range, write=True, check=requests.check_delete_range
                ),
                "Txn": unary(rpc_pb2.TxnRequest, self.txn, write=True, check=requests.check_txn),
                "Compact": unary(rpc_pb2.CompactionRequest, self.compact),
            },
        )

    async def range(self, request: rpc_pb2.RangeRequest, user: str | None) -> rpc_pb2.RangeResponse:
        """Answer Range: a single member has no stale reads, so linearizable and serializable are the same."""
        return self._state.range(request, user)

    async def put(self, request: rpc_pb2.PutRequest, user: str | None) -> rpc_pb2.PutResponse:
        """Answer Put."""
        return await self._writer.write(lambda: self._state.put(request, user))

    async def delete_range(self, request: rpc_pb2.DeleteRangeRequest, user: str | None) -> rpc_pb2.DeleteRangeResponse:
        """Answer DeleteRange."""
        return await self._writer.write(lambda: self._state.delete_range(request, user))

    async def txn(self, request: rpc_pb2.TxnRequest, user: str | None) -> rpc_pb2.TxnResponse:
        """Answer Txn."""
        return await self._writer.write(lambda: self._state.txn(request, user))

    async def compact(self, request: rpc_pb2.CompactionRequest, user: str | None) -> rpc_pb2.CompactionResponse:
        """Answer Compact; with `physical` once the space is freed."""
        response = await self._writer.write(lambda: self._state.compact(request, user))
        self._compactor.start()
        if request.physical:
            await self._compactor.done()
        return response
