"""The Cluster service: the store is always a cluster of one member."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from proto.pb import rpc_pb2
from upstream.store.calls import Calls, Handler, service, unimplemented
from upstream.store.state import StoreState

NO_CLUSTER = "the bundled store is a single member and cannot add others (run an etcd cluster for that)"


class ClusterService:
    """etcdserverpb.Cluster."""

    def __init__(self, state: StoreState, calls: Calls) -> None:
        self._state = state
        self._calls = calls
        # The URLs that clients are given; known once the server listens.
        self.client_urls: Sequence[str] = ()

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        methods: dict[str, Handler] = {
            name: unimplemented(NO_CLUSTER) for name in ("MemberAdd", "MemberRemove", "MemberUpdate", "MemberPromote")
        }
        methods["MemberList"] = self._calls.unary(rpc_pb2.MemberListRequest, self.member_list)
        return service("etcdserverpb.Cluster", methods)

    async def member_list(self, _request: rpc_pb2.MemberListRequest, user: str | None) -> rpc_pb2.MemberListResponse:
        """Answer MemberList. The store has no peer URL; the client URL is reported in its place."""
        self._state.auth.check_user(user)
        response = self._state.filled(rpc_pb2.MemberListResponse())
        # etcd's Cluster responses have no revision.
        response.header.revision = 0
        identity = self._state.identity
        response.members.add(
            ID=identity.member_id, name=identity.name, peerURLs=self.client_urls, clientURLs=self.client_urls
        )
        return response
