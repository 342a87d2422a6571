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
        state = self._state
        return service(
            "etcdserverpb.Lease",
            {
                "LeaseGrant": self._write(
                    rpc_pb2.LeaseGrantRequest, lambda request, user: state.lease_grant(request, monotonic(), user)
                ),
                "LeaseRevoke": self._write(
                    rpc_pb2.LeaseRevokeRequest, lambda request, user: state.lease_revoke(request.ID, user)
                ),
                "LeaseKeepAlive": stream(self._keep_alive),
                "LeaseTimeToLive": self._read(
                    rpc_pb2.LeaseTimeToLiveRequest,
                    lambda request, user: state.lease_time_to_live(request, monotonic(), user),
                ),
                "LeaseLeases": self._read(rpc_pb2.LeaseLeasesRequest, lambda _, user: state.lease_leases(user)),
            },
        )

    async def _keep_alive(self, context: Context) -> None:
        while (data := await self._calls.read(context)) is not None:
            request = parse(rpc_pb2.LeaseKeepAliveRequest, data)
            answer = self._state.lease_keep_alive(request.ID, monotonic(), self._calls.user(context))
            await self._calls.write(context, answer.SerializeToString())
