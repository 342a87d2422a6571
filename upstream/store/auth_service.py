"""The Auth service: users, roles, permissions, tokens."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
from collections.abc import Callable
from time import monotonic

import grpc

from proto.pb import rpc_pb2
from upstream.store import auth_admin as admin
from upstream.store import errors
from upstream.store.auth import Auth
from upstream.store.calls import service
from upstream.store.errors import StoreError
from upstream.store.service import StoreService

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
        unary = self._calls.unary
        return service(
            "etcdserverpb.Auth",
            {
                "AuthEnable": unary(rpc_pb2.AuthEnableRequest, self.enable),
                "AuthDisable": unary(rpc_pb2.AuthDisableRequest, self.disable),
                "AuthStatus": unary(rpc_pb2.AuthStatusRequest, self.status),
                "Authenticate": unary(rpc_pb2.AuthenticateRequest, self.authenticate),
                "UserAdd": unary(rpc_pb2.AuthUserAddRequest, self.user_add, check=check_password),
                "UserGet": unary(rpc_pb2.AuthUserGetRequest, self.user_get),
                "UserList": unary(rpc_pb2.AuthUserListRequest, self.user_list),
                "UserDelete": unary(rpc_pb2.AuthUserDeleteRequest, self.user_delete),
                "UserChangePassword": unary(
                    rpc_pb2.AuthUserChangePasswordRequest, self.user_change_password, check=check_password
                ),
                "UserGrantRole": unary(rpc_pb2.AuthUserGrantRoleRequest, self.user_grant_role),
                "UserRevokeRole": unary(rpc_pb2.AuthUserRevokeRoleRequest, self.user_revoke_role),
                "RoleAdd": unary(rpc_pb2.AuthRoleAddRequest, self.role_add),
                "RoleGet": unary(rpc_pb2.AuthRoleGetRequest, self.role_get),
                "RoleList": unary(rpc_pb2.AuthRoleListRequest, self.role_list),
                "RoleDelete": unary(rpc_pb2.AuthRoleDeleteRequest, self.role_delete),
                "RoleGrantPermission": unary(rpc_pb2.AuthRoleGrantPermissionRequest, self.role_grant_permission),
                "RoleRevokePermission": unary(rpc_pb2.AuthRoleRevokePermissionRequest, self.role_revoke_permission),
            },
        )

    async def _change(self, user: str | None, change: Callable[[], None]) -> None:
        """Run a change on behalf of an administrator, durably. Raises StoreError."""

        def apply() -> None:
            self._auth.check_admin(user)
            change()
            self._state.auth_changed()

        await self._writer.write(apply)

    async def enable(self, _request: rpc_pb2.AuthEnableRequest, user: str | None) -> rpc_pb2.AuthEnableResponse:
        """Answer AuthEnable."""
        await self._change(user, lambda: admin.enable(self._auth))
        response = rpc_pb2.AuthEnableResponse()
        self._state.fill(response.header)
        return response

    async def disable(self, _request: rpc_pb2.AuthDisableRequest, user: str | None) -> rpc_pb2.AuthDisableResponse:
        """Answer AuthDisable."""
        await self._change(user, lambda: admin.disable(self._auth))
        response = rpc_pb2.AuthDisableResponse()
        self._state.fill(response.header)
        return response

    async def status(self, _request: rpc_pb2.AuthStatusRequest, user: str | None) -> rpc_pb2.AuthStatusResponse:
        """Answer AuthStatus."""
        self._auth.check_admin(user)
        response = rpc_pb2.AuthStatusResponse(enabled=self._auth.enabled, authRevision=self._auth.revision)
        self._state.fill(response.header)
        return response

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
        response = rpc_pb2.AuthenticateResponse(token=token)
        self._state.fill(response.header)
        return response

    async def user_add(self, request: rpc_pb2.AuthUserAddRequest, user: str | None) -> rpc_pb2.AuthUserAddResponse:
        """Answer UserAdd."""
        check_password(request)
        hashed = b"" if request.options.no_password else await asyncio.to_thread(hash_password, request.password)
        await self._change(user, lambda: admin.user_add(self._auth, request, hashed))
        response = rpc_pb2.AuthUserAddResponse()
        self._state.fill(response.header)
        return response

    async def user_get(self, request: rpc_pb2.AuthUserGetRequest, user: str | None) -> rpc_pb2.AuthUserGetResponse:
        """Answer UserGet; every user may read its own entry."""
        if request.name != user:
            self._auth.check_admin(user)
        response = rpc_pb2.AuthUserGetResponse(roles=admin.user_roles(self._auth, request.name))
        self._state.fill(response.header)
        return response

    async def user_list(self, _request: rpc_pb2.AuthUserListRequest, user: str | None) -> rpc_pb2.AuthUserListResponse:
        """Answer UserList."""
        self._auth.check_admin(user)
        response = rpc_pb2.AuthUserListResponse(users=sorted(self._auth.users))
        self._state.fill(response.header)
        return response

    async def user_delete(
        self, request: rpc_pb2.AuthUserDeleteRequest, user: str | None
    ) -> rpc_pb2.AuthUserDeleteResponse:
        """Answer UserDelete."""
        await self._change(user, lambda: admin.user_delete(self._auth, request.name))
        response = rpc_pb2.AuthUserDeleteResponse()
        self._state.fill(response.header)
        return response

    async def user_change_password(
        self, request: rpc_pb2.AuthUserChangePasswordRequest, user: str | None
    ) -> rpc_pb2.AuthUserChangePasswordResponse:
        """Answer UserChangePassword."""
        check_password(request)
        hashed = await asyncio.to_thread(hash_password, request.password)
        await self._change(user, lambda: admin.user_change_password(self._auth, request.name, hashed))
        response = rpc_pb2.AuthUserChangePasswordResponse()
        self._state.fill(response.header)
        return response

    async def user_grant_role(
        self, request: rpc_pb2.AuthUserGrantRoleRequest, user: str | None
    ) -> rpc_pb2.AuthUserGrantRoleResponse:
        """Answer UserGrantRole."""
        await self._change(user, lambda: admin.user_grant_role(self._auth, request.user, request.role))
        response = rpc_pb2.AuthUserGrantRoleResponse()
        self._state.fill(response.header)
        return response

    async def user_revoke_role(
        self, request: rpc_pb2.AuthUserRevokeRoleRequest, user: str | None
    ) -> rpc_pb2.AuthUserRevokeRoleResponse:
        """Answer UserRevokeRole."""
        await self._change(user, lambda: admin.user_revoke_role(self._auth, request.name, request.role))
        response = rpc_pb2.AuthUserRevokeRoleResponse()
        self._state.fill(response.header)
        return response

    async def role_add(self, request: rpc_pb2.AuthRoleAddRequest, user: str | None) -> rpc_pb2.AuthRoleAddResponse:
        """Answer RoleAdd."""
        await self._change(user, lambda: admin.role_add(self._auth, request.name))
        response = rpc_pb2.AuthRoleAddResponse()
        self._state.fill(response.header)
        return response

    async def role_get(self, request: rpc_pb2.AuthRoleGetRequest, user: str | None) -> rpc_pb2.AuthRoleGetResponse:
        """Answer RoleGet; every user may read its own roles."""
        own = user is not None and user in self._auth.users and request.role in self._auth.users[user].roles
        if not own:
            self._auth.check_admin(user)
        response = rpc_pb2.AuthRoleGetResponse(perm=admin.role_permissions(self._auth, request.role))
        self._state.fill(response.header)
        return response

    async def role_list(self, _request: rpc_pb2.AuthRoleListRequest, user: str | None) -> rpc_pb2.AuthRoleListResponse:
        """Answer RoleList."""
        self._auth.check_admin(user)
        response = rpc_pb2.AuthRoleListResponse(roles=sorted(self._auth.roles))
        self._state.fill(response.header)
        return response

    async def role_delete(
        self, request: rpc_pb2.AuthRoleDeleteRequest, user: str | None
    ) -> rpc_pb2.AuthRoleDeleteResponse:
        """Answer RoleDelete."""
        await self._change(user, lambda: admin.role_delete(self._auth, request.role))
        response = rpc_pb2.AuthRoleDeleteResponse()
        self._state.fill(response.header)
        return response

    async def role_grant_permission(
        self, request: rpc_pb2.AuthRoleGrantPermissionRequest, user: str | None
    ) -> rpc_pb2.AuthRoleGrantPermissionResponse:
        """Answer RoleGrantPermission."""
        await self._change(user, lambda: admin.role_grant_permission(self._auth, request))
        response = rpc_pb2.AuthRoleGrantPermissionResponse()
        self._state.fill(response.header)
        return response

    async def role_revoke_permission(
        self, request: rpc_pb2.AuthRoleRevokePermissionRequest, user: str | None
    ) -> rpc_pb2.AuthRoleRevokePermissionResponse:
        """Answer RoleRevokePermission."""
        await self._change(
            user, lambda: admin.role_revoke_permission(self._auth, request.role, request.key, request.range_end)
        )
        response = rpc_pb2.AuthRoleRevokePermissionResponse()
        self._state.fill(response.header)
        return response
