"""Users, roles, permissions and tokens, and the checks on them.

Pure: time is passed in, and the caller makes tokens and password hashes (hashing takes milliseconds by design, so it
runs on a thread). While auth is off every check passes. Source: etcd server/auth/store.go and range_perm_cache.go.
Tokens are etcd's "simple" tokens, which stay valid as long as they are used.

One intended difference: a permission for [a, b) does not let its user watch or read from a on without end, which etcd
allowed before 3.5.33.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proto.pb import auth_pb2, rpc_pb2
from proto.spans import FROM_KEY
from upstream.store import errors
from upstream.store.errors import StoreError

ROOT = "root"
"""The user that must exist before auth can be turned on, and the role that may do everything."""

TOKEN_IDLE_S_MAX = 300.0
"""How long an unused token lives (etcd's --auth-token-ttl default)."""

FIRST_AUTH_REVISION = 1

_Permission = auth_pb2.Permission
Span = tuple[bytes, bytes]

LeaseKeys = Callable[[int], list[bytes]]
"""Returns the keys of a lease, none for an unknown lease."""


@dataclass(slots=True)
class Permissions:
    """The spans that a user may read and write, without overlaps, in order."""

    read: list[Span] = field(default_factory=list)
    write: list[Span] = field(default_factory=list)


class Auth:
    """The auth store. `user` arguments are names; None is a call without a token."""

    def __init__(self) -> None:
        self.enabled = False
        self.revision = FIRST_AUTH_REVISION
        self.users: dict[str, auth_pb2.User] = {}
        self.roles: dict[str, auth_pb2.Role] = {}
        # Token -> (user, time of last use).
        self._tokens: dict[str, tuple[str, float]] = {}
        # By user, computed on first use; any change of users or roles drops all of them.
        self._permissions: dict[str, Permissions] = {}

    # Tokens

    def add_token(self, token: str, user: str, now: float) -> None:
        """Add a token issued to a user."""
        self._drop_old_tokens(now)
        self._tokens[token] = (user, now)

    def user_of(self, token: str | None, now: float) -> str | None:
        """Return the token's user; None without a token or with auth off. Raises StoreError for an invalid token."""
        if not self.enabled or token is None:
            return None
        user, used = self._tokens.get(token, ("", 0.0))
        if not user or now - used > TOKEN_IDLE_S_MAX:
            raise StoreError(errors.INVALID_AUTH_TOKEN)
        self._tokens[token] = (user, now)
        return user

    def forget_tokens(self, user: str | None = None) -> None:
        """Invalidate a user's tokens, or all tokens."""
        self._tokens = {} if user is None else {t: entry for t, entry in self._tokens.items() if entry[0] != user}

    def _drop_old_tokens(self, now: float) -> None:
        self._tokens = {t: entry for t, entry in self._tokens.items() if now - entry[1] <= TOKEN_IDLE_S_MAX}

    # Checks

    def check(self, user: str | None, key: bytes, range_end: bytes = b"", *, write: bool = False) -> None:
        """Refuse access to [key, range_end) unless the user has permission. Raises StoreError."""
        if not self.enabled:
            return
        self.check_user(user)
        if user is None or user not in self.users:
            raise StoreError(errors.PERMISSION_DENIED)
        if ROOT in self.users[user].roles:
            return
        permissions = self._permissions_of(user)
        if not covers(permissions.write if write else permissions.read, key, range_end):
            raise StoreError(errors.PERMISSION_DENIED)

    def check_user(self, user: str | None) -> None:
        """Refuse calls without a user. Raises StoreError."""
        if self.enabled and user is None:
            raise StoreError(errors.USER_EMPTY)

    def check_admin(self, user: str | None) -> None:
        """Refuse users without the root role. Raises StoreError."""
        if not self.enabled:
            return
        if not user:
            raise StoreError(errors.USER_EMPTY)
        if user not in self.users:
            raise StoreError(errors.USER_NOT_FOUND)
        if ROOT not in self.users[user].roles:
            raise StoreError(errors.PERMISSION_DENIED)

    def check_put(self, user: str | None, request: rpc_pb2.PutRequest, lease_keys: LeaseKeys) -> None:
        """Refuse a put. Raises StoreError.

        The user must have write permission on all keys of the lease too, since revoking the lease deletes them.
        """
        if not self.enabled:
            return
        self.check(user, request.key, write=True)
        for key in lease_keys(request.lease):
            self.check(user, key, write=True)
        if request.prev_kv:
            self.check(user, request.key)

    def check_delete_range(self, user: str | None, request: rpc_pb2.DeleteRangeRequest) -> None:
        """Refuse a delete. Raises StoreError."""
        self.check(user, request.key, request.range_end, write=True)
        if request.prev_kv:
            self.check(user, request.key, request.range_end)

    def check_txn(self, user: str | None, request: rpc_pb2.TxnRequest, lease_keys: LeaseKeys) -> None:
        """Refuse a transaction if any part of it, taken or not, is not permitted. Raises StoreError."""
        if not self.enabled:
            return
        for compare in request.compare:
            self.check(user, compare.key, compare.range_end)
        for branch in (request.success, request.failure):
            for op in branch:
                kind = op.WhichOneof("request")
                if kind == "request_range":
                    self.check(user, op.request_range.key, op.request_range.range_end)
                elif kind == "request_put":
                    self.check_put(user, op.request_put, lease_keys)
                elif kind == "request_delete_range":
                    self.check_delete_range(user, op.request_delete_range)
                elif kind == "request_txn":
                    self.check_txn(user, op.request_txn, lease_keys)

    # Changes

    def changed(self) -> None:
        """Record a change of users or roles."""
        self.revision += 1
        self._permissions.clear()

    def _permissions_of(self, user: str) -> Permissions:
        known = self._permissions.get(user)
        if known is None:
            read: list[Span] = []
            write: list[Span] = []
            for name in self.users[user].roles:
                role = self.roles.get(name)
                for permission in role.keyPermission if role is not None else ():
                    span = (permission.key, permission.range_end)
                    if permission.permType != _Permission.WRITE:
                        read.append(span)
                    if permission.permType != _Permission.READ:
                        write.append(span)
            known = self._permissions[user] = Permissions(merge(read), merge(write))
        return known

    # Storing

    def rows(self) -> dict[str, bytes]:
        """Return the state to store, by name."""
        state = b"%d %d" % (self.enabled, self.revision)
        users = {f"user/{name}": user.SerializeToString() for name, user in self.users.items()}
        roles = {f"role/{name}": role.SerializeToString() for name, role in self.roles.items()}
        return {"state": state, **users, **roles}

    def load(self, rows: dict[str, bytes]) -> None:
        """Restore what `rows` returned. Tokens are not stored: clients authenticate again."""
        for name, data in rows.items():
            kind, _, rest = name.partition("/")
            if kind == "user":
                self.users[rest] = auth_pb2.User.FromString(data)
            elif kind == "role":
                self.roles[rest] = auth_pb2.Role.FromString(data)
            else:
                enabled, revision = data.split()
                self.enabled, self.revision = enabled == b"1", int(revision)


def _end(span: Span) -> bytes:
    """Return the end of a span, as a range_end that is never empty."""
    return span[1] or span[0] + b"\x00"


def merge(spans: list[Span]) -> list[Span]:
    """Merge spans that overlap or touch; the result has no empty range_end."""
    merged: list[Span] = []
    for start, end in sorted((span[0], _end(span)) for span in spans):
        if merged and (merged[-1][1] == FROM_KEY or start <= merged[-1][1]):
            before = merged[-1][1]
            merged[-1] = (merged[-1][0], FROM_KEY if FROM_KEY in (before, end) else max(before, end))
        else:
            merged.append((start, end))
    return merged


def covers(merged: list[Span], key: bytes, range_end: bytes) -> bool:
    """Return whether one of the merged spans contains all of [key, range_end)."""
    end = _end((key, range_end))
    return any(start <= key and (upto == FROM_KEY or (end != FROM_KEY and end <= upto)) for start, upto in merged)
