"""The KV service: reads straight from the store, writes through the writer (which makes them durable)."""

from __future__ import annotations

import grpc

from proto.pb import rpc_pb2
from upstream.store.calls import Traffic, service, unary
from upstream.store.loops import Compactor
from upstream.store.state import StoreState
from upstream.store.writer import Writer


class KVService:
    """etcdserverpb.KV."""

    def __init__(self, state: StoreState, writer: Writer, compactor: Compactor) -> None:
        self._state = state
        self._writer = writer
        self._compactor = compactor

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service(
            "etcdserverpb.KV",
            {
                "Range": unary(rpc_pb2.RangeRequest, self.range, traffic),
                "Put": unary(rpc_pb2.PutRequest, self.put, traffic, write=True),
                "DeleteRange": unary(rpc_pb2.DeleteRangeRequest, self.delete_range, traffic, write=True),
                "Txn": unary(rpc_pb2.TxnRequest, self.txn, traffic, write=True),
                "Compact": unary(rpc_pb2.CompactionRequest, self.compact, traffic),
            },
        )

    async def range(self, request: rpc_pb2.RangeRequest) -> rpc_pb2.RangeResponse:
        """Answer Range: linearizable and serializable are the same here, where one task does everything."""
        return self._state.range(request)

    async def put(self, request: rpc_pb2.PutRequest) -> rpc_pb2.PutResponse:
        """Answer Put."""
        return await self._writer.write(lambda: self._state.put(request))

    async def delete_range(self, request: rpc_pb2.DeleteRangeRequest) -> rpc_pb2.DeleteRangeResponse:
        """Answer DeleteRange."""
        return await self._writer.write(lambda: self._state.delete_range(request))

    async def txn(self, request: rpc_pb2.TxnRequest) -> rpc_pb2.TxnResponse:
        """Answer Txn."""
        return await self._writer.write(lambda: self._state.txn(request))

    async def compact(self, request: rpc_pb2.CompactionRequest) -> rpc_pb2.CompactionResponse:
        """Answer Compact; a physical one once the space is free."""
        response = await self._writer.write(lambda: self._state.compact(request))
        self._compactor.start()
        if request.physical:
            await self._compactor.done()
        return response
