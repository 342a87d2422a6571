"""The errors etcd answers with: exact gRPC code and text.

Clients depend on both (clientv3 maps texts back to its own errors, other clients look at the code only), so both must
match exactly. Source: etcd api/v3rpc/rpctypes/error.go. The pure parts raise these errors; the services turn them into
a gRPC status.
"""

from __future__ import annotations

from typing import NamedTuple

from proto import etcd_errors
from proto.framing import Status


class StoreRefusal(NamedTuple):
    """The status of a refused call."""

    code: Status
    text: str


class StoreError(Exception):
    """A call is refused."""

    def __init__(self, refusal: StoreRefusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


EMPTY_KEY = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: key is not provided")
KEY_NOT_FOUND = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: key not found")
VALUE_PROVIDED = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: value is provided")
LEASE_PROVIDED = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: lease is provided")
TOO_MANY_OPS = StoreRefusal(Status.INVALID_ARGUMENT, etcd_errors.TOO_MANY_OPS)
DUPLICATE_KEY = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request")
INVALID_SORT_OPTION = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: invalid sort option")
COMPACTED = StoreRefusal(Status.OUT_OF_RANGE, etcd_errors.COMPACTED)
FUTURE_REVISION = StoreRefusal(Status.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
NO_SPACE = StoreRefusal(Status.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
CORRUPT = StoreRefusal(Status.DATA_LOSS, "etcdserver: corrupt cluster")
REQUEST_TOO_LARGE = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: request is too large")

LEASE_NOT_FOUND = StoreRefusal(Status.NOT_FOUND, "etcdserver: requested lease not found")
LEASE_EXISTS = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: lease already exists")
LEASE_TTL_TOO_LARGE = StoreRefusal(Status.OUT_OF_RANGE, "etcdserver: too large lease TTL")

ROOT_USER_NOT_EXIST = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: root user does not exist")
ROOT_ROLE_NOT_EXIST = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: root user does not have root role")
USER_ALREADY_EXISTS = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: user name already exists")
USER_EMPTY = StoreRefusal(Status.INVALID_ARGUMENT, etcd_errors.USER_EMPTY)
USER_NOT_FOUND = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: user name not found")
ROLE_ALREADY_EXISTS = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: role name already exists")
ROLE_NOT_FOUND = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: role name not found")
ROLE_EMPTY = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: role name is empty")
AUTH_FAILED = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password")
NO_PASSWORD_USER = StoreRefusal(Status.UNKNOWN, "auth: authentication failed, password was given for no password user")
PASSWORD_TOO_LONG = StoreRefusal(Status.UNKNOWN, "bcrypt: password length exceeds 72 bytes")
PERMISSION_NOT_GIVEN = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: permission not given")
PERMISSION_DENIED = StoreRefusal(Status.PERMISSION_DENIED, "etcdserver: permission denied")
ROLE_NOT_GRANTED = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: role is not granted to the user")
PERMISSION_NOT_GRANTED = StoreRefusal(Status.FAILED_PRECONDITION, "etcdserver: permission is not granted to the role")
AUTH_NOT_ENABLED = StoreRefusal(Status.FAILED_PRECONDITION, etcd_errors.AUTH_NOT_ENABLED)
INVALID_AUTH_TOKEN = StoreRefusal(Status.UNAUTHENTICATED, etcd_errors.INVALID_TOKEN)
INVALID_AUTH_MANAGEMENT = StoreRefusal(Status.INVALID_ARGUMENT, "etcdserver: invalid auth management")
WATCH_CANCELED = StoreRefusal(Status.CANCELLED, etcd_errors.WATCH_CANCELED)
STOPPED = StoreRefusal(Status.UNAVAILABLE, "etcdserver: server stopped")

# Refusals of a watch's create request; sent as cancel_reason, so the code is only for completeness.
WATCH_RANGE_EMPTY = StoreRefusal(Status.INVALID_ARGUMENT, "mvcc: watcher range is empty")
WATCH_DUPLICATE_ID = StoreRefusal(Status.INVALID_ARGUMENT, "mvcc: duplicate watch ID provided on the WatchStream")
