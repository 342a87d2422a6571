"""Management of users and roles: the calls of the Auth service on the auth store.

Each function makes etcd's checks in etcd's order (server/auth/store.go), and records a change once it has made one.
The caller checks that the user may manage auth at all.
"""

from __future__ import annotations

from proto.pb import auth_pb2, rpc_pb2
from proto.spans import FROM_KEY
from upstream.store import errors
from upstream.store.auth import ROOT, Auth
from upstream.store.errors import StoreError


def enable(auth: Auth, _request: rpc_pb2.AuthEnableRequest) -> None:
    """Turn auth on; a root user with the root role must exist. Raises StoreError."""
    if auth.enabled:
        return
    if ROOT not in auth.users:
        raise StoreError(errors.ROOT_USER_NOT_EXIST)
    if ROOT not in auth.users[ROOT].roles:
        raise StoreError(errors.ROOT_ROLE_NOT_EXIST)
    auth.enabled = True


def disable(auth: Auth, _request: rpc_pb2.AuthDisableRequest) -> None:
    """Turn auth off and invalidate all tokens."""
    if not auth.enabled:
        return
    auth.enabled = False
    auth.forget_tokens()
    auth.changed()


def password_of(auth: Auth, name: str) -> bytes:
    """Return a user's password hash. Raises StoreError when auth is off or the user has none."""
    if not auth.enabled:
        raise StoreError(errors.AUTH_NOT_ENABLED)
    if name not in auth.users:
        raise StoreError(errors.AUTH_FAILED)
    if auth.users[name].options.no_password:
        raise StoreError(errors.NO_PASSWORD_USER)
    return auth.users[name].password


def user_add(auth: Auth, request: rpc_pb2.AuthUserAddRequest, password: bytes) -> None:
    """Add a user with a password hash. Raises StoreError."""
    if not request.name:
        raise StoreError(errors.USER_EMPTY)
    if request.name in auth.users:
        raise StoreError(errors.USER_ALREADY_EXISTS)
    user = auth_pb2.User(name=request.name.encode(), options=request.options)
    if not request.options.no_password:
        user.password = password
    auth.users[request.name] = user
    auth.changed()


def user_delete(auth: Auth, request: rpc_pb2.AuthUserDeleteRequest) -> None:
    """Delete a user and invalidate its tokens. Raises StoreError."""
    name = request.name
    if auth.enabled and name == ROOT:
        raise StoreError(errors.INVALID_AUTH_MANAGEMENT)
    if name not in auth.users:
        raise StoreError(errors.USER_NOT_FOUND)
    del auth.users[name]
    auth.forget_tokens(name)
    auth.changed()


def user_change_password(auth: Auth, name: str, password: bytes) -> None:
    """Set a user's password hash and invalidate its tokens. Raises StoreError."""
    user = _user(auth, name)
    if not user.options.no_password:
        user.password = password
    auth.forget_tokens(name)
    auth.changed()


def user_grant_role(auth: Auth, request: rpc_pb2.AuthUserGrantRoleRequest) -> None:
    """Grant a user a role; granting it again changes nothing. Raises StoreError."""
    user, role = _user(auth, request.user), request.role
    if role != ROOT and role not in auth.roles:
        raise StoreError(errors.ROLE_NOT_FOUND)
    if role in user.roles:
        return
    roles = sorted([*user.roles, role])
    del user.roles[:]
    user.roles.extend(roles)
    auth.changed()


def user_revoke_role(auth: Auth, request: rpc_pb2.AuthUserRevokeRoleRequest) -> None:
    """Revoke a role from a user. Raises StoreError."""
    name, role = request.name, request.role
    if auth.enabled and name == ROOT and role == ROOT:
        raise StoreError(errors.INVALID_AUTH_MANAGEMENT)
    user = _user(auth, name)
    if role not in user.roles:
        raise StoreError(errors.ROLE_NOT_GRANTED)
    user.roles.remove(role)
    auth.changed()


def user_roles(auth: Auth, name: str) -> list[str]:
    """Return a user's roles. Raises StoreError."""
    return list(_user(auth, name).roles)


def role_add(auth: Auth, request: rpc_pb2.AuthRoleAddRequest) -> None:
    """Add a role without permissions. Raises StoreError."""
    name = request.name
    if not name:
        raise StoreError(errors.ROLE_EMPTY)
    if name in auth.roles:
        raise StoreError(errors.ROLE_ALREADY_EXISTS)
    auth.roles[name] = auth_pb2.Role(name=name.encode())
    auth.changed()


def role_delete(auth: Auth, request: rpc_pb2.AuthRoleDeleteRequest) -> None:
    """Delete a role and revoke it from all users. Raises StoreError."""
    name = request.role
    if auth.enabled and name == ROOT:
        raise StoreError(errors.INVALID_AUTH_MANAGEMENT)
    _role(auth, name)
    del auth.roles[name]
    for user in auth.users.values():
        if name in user.roles:
            user.roles.remove(name)
    auth.changed()


def role_permissions(auth: Auth, name: str) -> list[auth_pb2.Permission]:
    """Return a role's permissions. Raises StoreError."""
    role = _role(auth, name)
    if name == ROOT:
        return [auth_pb2.Permission(permType=auth_pb2.Permission.READWRITE, range_end=FROM_KEY)]
    return list(role.keyPermission)


def role_grant_permission(auth: Auth, request: rpc_pb2.AuthRoleGrantPermissionRequest) -> None:
    """Grant a role a permission, or change the type of an existing one. Raises StoreError."""
    if not request.HasField("perm"):
        raise StoreError(errors.PERMISSION_NOT_GIVEN)
    given = request.perm
    if not given.key or (given.range_end not in (b"", FROM_KEY) and given.key >= given.range_end):
        raise StoreError(errors.INVALID_AUTH_MANAGEMENT)
    role = _role(auth, request.name)
    # As in etcd, only the first permission with the key is compared.
    same = next((known for known in role.keyPermission if known.key >= given.key), None)
    if same is not None and (same.key, same.range_end) == (given.key, given.range_end):
        same.permType = given.permType
    else:
        permissions = sorted([*role.keyPermission, given], key=lambda permission: permission.key)
        role.ClearField("keyPermission")
        role.keyPermission.extend(permissions)
    auth.changed()


def role_revoke_permission(auth: Auth, request: rpc_pb2.AuthRoleRevokePermissionRequest) -> None:
    """Revoke a permission from a role. Raises StoreError."""
    role, revoked = _role(auth, request.role), (request.key, request.range_end)
    left = [known for known in role.keyPermission if (known.key, known.range_end) != revoked]
    if len(left) == len(role.keyPermission):
        raise StoreError(errors.PERMISSION_NOT_GRANTED)
    role.ClearField("keyPermission")
    role.keyPermission.extend(left)
    auth.changed()


def _user(auth: Auth, name: str) -> auth_pb2.User:
    if name not in auth.users:
        raise StoreError(errors.USER_NOT_FOUND)
    return auth.users[name]


def _role(auth: Auth, name: str) -> auth_pb2.Role:
    if name not in auth.roles:
        raise StoreError(errors.ROLE_NOT_FOUND)
    return auth.roles[name]
