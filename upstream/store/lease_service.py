"""The Lease service."""

from __future__ import annotations

from time import monotonic

import grpc

from proto.pb import rpc_pb2
from upstream.store.calls import Context, Traffic, parse, read, service, stream, unary
from upstream.store.state import StoreState
from upstream.store.writer import Writer


class LeaseService:
    """etcdserverpb.Lease."""

    def __init__(self, state: StoreState, writer: Writer) -> None:
        self._state = state
        self._writer = writer
        self._traffic = Traffic()

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        self._traffic = traffic
        return service(
            "etcdserverpb.Lease",
            {
                "LeaseGrant": unary(rpc_pb2.LeaseGrantRequest, self.grant, traffic),
                "LeaseRevoke": unary(rpc_pb2.LeaseRevokeRequest, self.revoke, traffic),
                "LeaseKeepAlive": stream(self._keep_alive),
                "LeaseTimeToLive": unary(rpc_pb2.LeaseTimeToLiveRequest, self.time_to_live, traffic),
                "LeaseLeases": unary(rpc_pb2.LeaseLeasesRequest, self.leases, traffic),
            },
        )

    async def grant(self, request: rpc_pb2.LeaseGrantRequest) -> rpc_pb2.LeaseGrantResponse:
        """Answer LeaseGrant."""
        return await self._writer.write(lambda: self._state.lease_grant(request, monotonic()))

    async def revoke(self, request: rpc_pb2.LeaseRevokeRequest) -> rpc_pb2.LeaseRevokeResponse:
        """Answer LeaseRevoke."""
        return await self._writer.write(lambda: self._state.lease_revoke(request.ID))

    async def time_to_live(self, request: rpc_pb2.LeaseTimeToLiveRequest) -> rpc_pb2.LeaseTimeToLiveResponse:
        """Answer LeaseTimeToLive."""
        return self._state.lease_time_to_live(request, monotonic())

    async def leases(self, _request: rpc_pb2.LeaseLeasesRequest) -> rpc_pb2.LeaseLeasesResponse:
        """Answer LeaseLeases."""
        return self._state.lease_leases()

    async def _keep_alive(self, context: Context) -> None:
        while (data := await read(context, self._traffic)) is not None:
            request = parse(rpc_pb2.LeaseKeepAliveRequest, data)
            answer = self._state.lease_keep_alive(request.ID, monotonic()).SerializeToString()
            self._traffic.sent += len(answer)
            await context.write(answer)
