"""The errors etcd answers with: exact gRPC code and text.

Clients depend on both (clientv3 maps texts back to its own errors, other clients look at the code only), so both must
match exactly. Source: etcd api/v3rpc/rpctypes/error.go. The pure parts raise these errors; the services turn them into
a gRPC status.
"""

from __future__ import annotations

from typing import NamedTuple

from proto.framing import Status


class Refusal(NamedTuple):
    """The status of a refused call."""

    code: Status
    text: str


class StoreError(Exception):
    """A call is refused."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.refusal = refusal


EMPTY_KEY = Refusal(Status.INVALID_ARGUMENT, "etcdserver: key is not provided")
KEY_NOT_FOUND = Refusal(Status.INVALID_ARGUMENT, "etcdserver: key not found")
VALUE_PROVIDED = Refusal(Status.INVALID_ARGUMENT, "etcdserver: value is provided")
LEASE_PROVIDED = Refusal(Status.INVALID_ARGUMENT, "etcdserver: lease is provided")
TOO_MANY_OPS = Refusal(Status.INVALID_ARGUMENT, "etcdserver: too many operations in txn request")
DUPLICATE_KEY = Refusal(Status.INVALID_ARGUMENT, "etcdserver: duplicate key given in txn request")
INVALID_SORT_OPTION = Refusal(Status.INVALID_ARGUMENT, "etcdserver: invalid sort option")
COMPACTED = Refusal(Status.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")
FUTURE_REVISION = Refusal(Status.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision")
NO_SPACE = Refusal(Status.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
CORRUPT = Refusal(Status.DATA_LOSS, "etcdserver: corrupt cluster")
REQUEST_TOO_LARGE = Refusal(Status.INVALID_ARGUMENT, "etcdserver: request is too large")

LEASE_NOT_FOUND = Refusal(Status.NOT_FOUND, "etcdserver: requested lease not found")
LEASE_EXISTS = Refusal(Status.FAILED_PRECONDITION, "etcdserver: lease already exists")
LEASE_TTL_TOO_LARGE = Refusal(Status.OUT_OF_RANGE, "etcdserver: too large lease TTL")

MEMBER_NOT_FOUND = Refusal(Status.NOT_FOUND, "etcdserver: member not found")
ROOT_USER_NOT_EXIST = Refusal(Status.FAILED_PRECONDITION, "etcdserver: root user does not exist")
ROOT_ROLE_NOT_EXIST = Refusal(Status.FAILED_PRECONDITION, "etcdserver: root user does not have root role")
USER_ALREADY_EXISTS = Refusal(Status.FAILED_PRECONDITION, "etcdserver: user name already exists")
USER_EMPTY = Refusal(Status.INVALID_ARGUMENT, "etcdserver: user name is empty")
USER_NOT_FOUND = Refusal(Status.FAILED_PRECONDITION, "etcdserver: user name not found")
ROLE_ALREADY_EXISTS = Refusal(Status.FAILED_PRECONDITION, "etcdserver: role name already exists")
ROLE_NOT_FOUND = Refusal(Status.FAILED_PRECONDITION, "etcdserver: role name not found")
ROLE_EMPTY = Refusal(Status.INVALID_ARGUMENT, "etcdserver: role name is empty")
AUTH_FAILED = Refusal(Status.INVALID_ARGUMENT, "etcdserver: authentication failed, invalid user ID or password")
NO_PASSWORD_USER = Refusal(Status.UNKNOWN, "auth: authentication failed, password was given for no password user")
PASSWORD_TOO_LONG = Refusal(Status.UNKNOWN, "bcrypt: password length exceeds 72 bytes")
PERMISSION_NOT_GIVEN = Refusal(Status.INVALID_ARGUMENT, "etcdserver: permission not given")
PERMISSION_DENIED = Refusal(Status.PERMISSION_DENIED, "etcdserver: permission denied")
ROLE_NOT_GRANTED = Refusal(Status.FAILED_PRECONDITION, "etcdserver: role is not granted to the user")
PERMISSION_NOT_GRANTED = Refusal(Status.FAILED_PRECONDITION, "etcdserver: permission is not granted to the role")
AUTH_NOT_ENABLED = Refusal(Status.FAILED_PRECONDITION, "etcdserver: authentication is not enabled")
INVALID_AUTH_TOKEN = Refusal(Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
INVALID_AUTH_MANAGEMENT = Refusal(Status.INVALID_ARGUMENT, "etcdserver: invalid auth management")
WATCH_CANCELED = Refusal(Status.CANCELLED, "etcdserver: watch canceled")
STOPPED = Refusal(Status.UNAVAILABLE, "etcdserver: server stopped")

# Refusals of a watch's create request; sent as cancel_reason, so the code is only for completeness.
WATCH_RANGE_EMPTY = Refusal(Status.INVALID_ARGUMENT, "mvcc: watcher range is empty")
WATCH_DUPLICATE_ID = Refusal(Status.INVALID_ARGUMENT, "mvcc: duplicate watch ID provided on the WatchStream")
