"""The Auth service: users, roles, permissions, tokens."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable
from time import monotonic

import grpc
from google.protobuf.message import Message

from proto.pb import rpc_pb2
from upstream.store import auth_admin as admin
from upstream.store import errors
from upstream.store.auth import Auth
from upstream.store.calls import Handler, Request, service
from upstream.store.errors import StoreError
from upstream.store.service import StoreService
from upstream.store.state import Answer

# scrypt's cost: about 10 ms and 4 MiB a password; etcd's bcrypt takes as long at its default cost.
_SCRYPT_N, _SCRYPT_R, _SCRYPT_P = 2**12, 8, 1
_SALT_BYTES = 16
_PASSWORD_BYTES_MAX = 72
_TOKEN_BYTES = 12


def hash_password(password: str, salt: bytes | None = None) -> bytes:
    """Hash a password, with its salt in front."""
    salt = secrets.token_bytes(_SALT_BYTES) if salt is None else salt
    return salt + hashlib.scrypt(password.encode(), salt=salt, n=_SCRYPT_N, r=_SCRYPT_R, p=_SCRYPT_P)


def check_password(request: rpc_pb2.AuthUserAddRequest | rpc_pb2.AuthUserChangePasswordRequest) -> None:
    """Refuse a password longer than etcd accepts. Raises StoreError."""
    if isinstance(request, rpc_pb2.AuthUserAddRequest) and request.options.no_password:
        return
    if len(request.password.encode()) > _PASSWORD_BYTES_MAX:
        raise StoreError(errors.PASSWORD_TOO_LONG)


def is_password(password: str, hashed: bytes) -> bool:
    """Return whether a password matches its hash."""
    return hmac.compare_digest(hash_password(password, hashed[:_SALT_BYTES]), hashed)


class AuthService(StoreService):
    """etcdserverpb.Auth."""

    @property
    def _auth(self) -> Auth:
        return self._state.auth

    def handlers(self) -> grpc.GenericRpcHandler:
        """Return the service to register."""
        unary, read, change = self._calls.unary, self._read, self._change
        pb = rpc_pb2
        return service(
            "etcdserverpb.Auth",
            {
                "AuthEnable": change(pb.AuthEnableRequest, pb.AuthEnableResponse, admin.enable),
                "AuthDisable": change(pb.AuthDisableRequest, pb.AuthDisableResponse, admin.disable),
                "AuthStatus": read(pb.AuthStatusRequest, self.status),
                "Authenticate": unary(pb.AuthenticateRequest, self.authenticate),
                "UserAdd": unary(pb.AuthUserAddRequest, self.user_add, check=check_password),
                "UserGet": read(pb.AuthUserGetRequest, self.user_get),
                "UserList": read(pb.AuthUserListRequest, self.user_list),
                "UserDelete": change(pb.AuthUserDeleteRequest, pb.AuthUserDeleteResponse, admin.user_delete),
                "UserChangePassword": unary(
                    pb.AuthUserChangePasswordRequest, self.user_change_password, check=check_password
                ),
                "UserGrantRole": change(
                    pb.AuthUserGrantRoleRequest, pb.AuthUserGrantRoleResponse, admin.user_grant_role
                ),
                "UserRevokeRole": change(
                    pb.AuthUserRevokeRoleRequest, pb.AuthUserRevokeRoleResponse, admin.user_revoke_role
                ),
                "RoleAdd": change(pb.AuthRoleAddRequest, pb.AuthRoleAddResponse, admin.role_add),
                "RoleGet": read(pb.AuthRoleGetRequest, self.role_get),
                "RoleList": read(pb.AuthRoleListRequest, self.role_list),
                "RoleDelete": change(pb.AuthRoleDeleteRequest, pb.AuthRoleDeleteResponse, admin.role_delete),
                "RoleGrantPermission": change(
                    pb.AuthRoleGrantPermissionRequest,
                    pb.AuthRoleGrantPermissionResponse,
                    admin.role_grant_permission,
                ),
                "RoleRevokePermission": change(
                    pb.AuthRoleRevokePermissionRequest,
                    pb.AuthRoleRevokePermissionResponse,
                    admin.role_revoke_permission,
                ),
            },
        )

    def _change(
        self, kind: type[Request], response: Callable[[], Message], change: Callable[[Auth, Request], None]
    ) -> Handler:
        """Make the handler of a change; its response has only a header."""

        def apply(request: Request, user: str | None) -> Message:
            return self._changed(user, lambda: change(self._auth, request), response())

        return self._write(kind, apply)

    def _changed(self, user: str | None, change: Callable[[], None], response: Answer) -> Answer:
        """Run a change on behalf of an administrator. Raises StoreError."""
        self._auth.check_admin(user)
        change()
        self._state.auth_changed()
        return self._state.filled(response)

    def status(self, _request: rpc_pb2.AuthStatusRequest, user: str | None) -> rpc_pb2.AuthStatusResponse:
        """Answer AuthStatus."""
        self._auth.check_admin(user)
        response = rpc_pb2.AuthStatusResponse(enabled=self._auth.enabled, authRevision=self._auth.revision)
        return self._state.filled(response)

    async def authenticate(
        self, request: rpc_pb2.AuthenticateRequest, _user: str | None
    ) -> rpc_pb2.AuthenticateResponse:
        """Answer Authenticate with a token."""
        hashed = admin.password_of(self._auth, request.name)
        if not await asyncio.to_thread(is_password, request.password, hashed):
            raise StoreError(errors.AUTH_FAILED)
        # The user may have changed while the password was hashed.
        if admin.password_of(self._auth, request.name) != hashed:
            raise StoreError(errors.AUTH_FAILED)
        token = f"{secrets.token_hex(_TOKEN_BYTES)}.{self._state.raft_index}"
        self._auth.add_token(token, request.name, monotonic())
        return self._state.filled(rpc_pb2.AuthenticateResponse(token=token))

    async def user_add(self, request: rpc_pb2.AuthUserAddRequest, user: str | None) -> rpc_pb2.AuthUserAddResponse:
        """Answer UserAdd."""
        check_password(request)
        hashed = b"" if request.options.no_password else await asyncio.to_thread(hash_password, request.password)
        response = rpc_pb2.AuthUserAddResponse()
        return await self._writer.write(
            lambda: self._changed(user, lambda: admin.user_add(self._auth, request, hashed), response)
        )

    def user_get(self, request: rpc_pb2.AuthUserGetRequest, user: str | None) -> rpc_pb2.AuthUserGetResponse:
        """Answer UserGet; every user may read its own entry."""
        if request.name != user:
            self._auth.check_admin(user)
        return self._state.filled(rpc_pb2.AuthUserGetResponse(roles=admin.user_roles(self._auth, request.name)))

    def user_list(self, _request: rpc_pb2.AuthUserListRequest, user: str | None) -> rpc_pb2.AuthUserListResponse:
        """Answer UserList."""
        self._auth.check_admin(user)
        return self._state.filled(rpc_pb2.AuthUserListResponse(users=sorted(self._auth.users)))

    async def user_change_password(
        self, request: rpc_pb2.AuthUserChangePasswordRequest, user: str | None
    ) -> rpc_pb2.AuthUserChangePasswordResponse:
        """Answer UserChangePassword."""
        check_password(request)
        hashed = await asyncio.to_thread(hash_password, request.password)
        response = rpc_pb2.AuthUserChangePasswordResponse()
        return await self._writer.write(
            lambda: self._changed(user, lambda: admin.user_change_password(self._auth, request.name, hashed), response)
        )

    def role_get(self, request: rpc_pb2.AuthRoleGetRequest, user: str | None) -> rpc_pb2.AuthRoleGetResponse:
        """Answer RoleGet; every user may read its own roles."""
        own = user is not None and user in self._auth.users and request.role in self._auth.users[user].roles
        if not own:
            self._auth.check_admin(user)
        return self._state.filled(rpc_pb2.AuthRoleGetResponse(perm=admin.role_permissions(self._auth, request.role)))

    def role_list(self, _request: rpc_pb2.AuthRoleListRequest, user: str | None) -> rpc_pb2.AuthRoleListResponse:
        """Answer RoleList."""
        self._auth.check_admin(user)
        return self._state.filled(rpc_pb2.AuthRoleListResponse(roles=sorted(self._auth.roles)))
