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
    """etcdserverpb.KV. A single member has no stale reads: linearizable and serializable ranges are the same."""

    def __init__(self, state: StoreState, writer: StoreWriter, compactor: Compactor, calls: Calls) -> None:
        super().__init__(state, writer, calls)
        self._compactor = compactor

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        state, write = self._state, self._write
        delete = write(rpc_pb2.DeleteRangeRequest, state.delete_range, limited=True, check=requests.check_delete_range)
        return service(
            "etcdserverpb.KV",
            {
                "Range": self._read(rpc_pb2.RangeRequest, state.range, check=requests.check_range),
                "Put": write(rpc_pb2.PutRequest, state.put, limited=True, check=requests.check_put),
                "DeleteRange": delete,
                "Txn": write(rpc_pb2.TxnRequest, state.txn, limited=True, check=requests.check_txn),
                "Compact": self._calls.unary(rpc_pb2.CompactionRequest, self.compact),
            },
        )

    async def compact(self, request: rpc_pb2.CompactionRequest, user: str | None) -> rpc_pb2.CompactionResponse:
        """Answer Compact; with `physical` once the space is freed."""
        response = await self._writer.write(lambda: self._state.compact(request, user))
        self._compactor.start()
        if request.physical:
            await self._compactor.done()
        return response
