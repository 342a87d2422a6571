"""The Auth service: not there yet, so it is off; that much clients can ask."""

from __future__ import annotations

import grpc

from proto.pb import rpc_pb2
from upstream.store import errors
from upstream.store.calls import Handler, Traffic, service, unary, unimplemented
from upstream.store.errors import StoreError
from upstream.store.state import StoreState

NO_AUTH = "the bundled store has no users and roles yet: everyone may do everything"

_METHODS = rpc_pb2.DESCRIPTOR.services_by_name["Auth"].methods_by_name


class AuthService:
    """etcdserverpb.Auth."""

    def __init__(self, state: StoreState) -> None:
        self._state = state

    def handlers(self, traffic: Traffic) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        methods: dict[str, Handler] = {name: unimplemented(NO_AUTH) for name in _METHODS}
        methods["AuthStatus"] = unary(rpc_pb2.AuthStatusRequest, self.status, traffic)
        methods["Authenticate"] = unary(rpc_pb2.AuthenticateRequest, self.authenticate, traffic)
        return service("etcdserverpb.Auth", methods)

    async def status(self, _request: rpc_pb2.AuthStatusRequest) -> rpc_pb2.AuthStatusResponse:
        """Answer AuthStatus: off, at the first revision of the auth store."""
        response = rpc_pb2.AuthStatusResponse(enabled=False, authRevision=1)
        self._state.fill(response.header)
        return response

    async def authenticate(self, _request: rpc_pb2.AuthenticateRequest) -> rpc_pb2.AuthenticateResponse:
        """Answer Authenticate: refused while auth is off (clientv3 goes on without a token then)."""
        raise StoreError(errors.AUTH_NOT_ENABLED)
