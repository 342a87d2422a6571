"""The Lease service."""

from __future__ import annotations

from time import monotonic

import grpc

from proto.pb import rpc_pb2
from upstream.store.calls import Context, parse, service, stream
from upstream.store.service import StoreService


class LeaseService(StoreService):
    """etcdserverpb.Lease."""

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        return service(
            "etcdserverpb.Lease",
            {
                "LeaseGrant": self._calls.unary(rpc_pb2.LeaseGrantRequest, self.grant),
                "LeaseRevoke": self._calls.unary(rpc_pb2.LeaseRevokeRequest, self.revoke),
                "LeaseKeepAlive": stream(self._keep_alive),
                "LeaseTimeToLive": self._calls.unary(rpc_pb2.LeaseTimeToLiveRequest, self.time_to_live),
                "LeaseLeases": self._calls.unary(rpc_pb2.LeaseLeasesRequest, self.leases),
            },
        )

    async def grant(self, request: rpc_pb2.LeaseGrantRequest, user: str | None) -> rpc_pb2.LeaseGrantResponse:
        """Answer LeaseGrant."""
        return await self._writer.write(lambda: self._state.lease_grant(request, monotonic(), user))

    async def revoke(self, request: rpc_pb2.LeaseRevokeRequest, user: str | None) -> rpc_pb2.LeaseRevokeResponse:
        """Answer LeaseRevoke."""
        return await self._writer.write(lambda: self._state.lease_revoke(request.ID, user))

    async def time_to_live(
        self, request: rpc_pb2.LeaseTimeToLiveRequest, user: str | None
    ) -> rpc_pb2.LeaseTimeToLiveResponse:
        """Answer LeaseTimeToLive."""
        return self._state.lease_time_to_live(request, monotonic(), user)

    async def leases(self, _request: rpc_pb2.LeaseLeasesRequest, user: str | None) -> rpc_pb2.LeaseLeasesResponse:
        """Answer LeaseLeases."""
        return self._state.lease_leases(user)

    async def _keep_alive(self, context: Context) -> None:
        while (data := await self._calls.read(context)) is not None:
            request = parse(rpc_pb2.LeaseKeepAliveRequest, data)
            answer = self._state.lease_keep_alive(request.ID, monotonic(), self._calls.user(context))
            await self._calls.write(context, answer.SerializeToString())
