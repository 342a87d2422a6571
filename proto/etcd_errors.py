"""etcd's error texts and the form in which it reports them: clients, and etcd's own client, compare whole texts.

The texts are those of api/v3rpc/rpctypes/error.go. In a cancel_reason and in a watch's refusal etcd writes a status as
grpc-go formats it, `rpc error: code = PermissionDenied desc = TEXT`, with its names of codes (codes/code_string.go).
"""

from __future__ import annotations

import re
from typing import Final

from proto.framing import Status

NO_LEADER: Final = "etcdserver: no leader"
"""With UNAVAILABLE: a call that requires a leader, when there is none."""

LEARNER: Final = "etcdserver: rpc not supported for learner"
"""A learner refuses a call, as it does most: UNAVAILABLE up to 3.5, FAILED_PRECONDITION from 3.6."""

TIMED_OUT: Final = "etcdserver: request timed out"
"""The beginning of several texts, with UNAVAILABLE."""

AUTH_NOT_ENABLED: Final = "etcdserver: authentication is not enabled"
"""With FAILED_PRECONDITION: a request for a token while auth is off."""

INVALID_TOKEN: Final = "etcdserver: invalid auth token"
"""With UNAUTHENTICATED: a token that the server does not know."""

USER_EMPTY: Final = "etcdserver: user name is empty"
"""With INVALID_ARGUMENT: a call without a user while auth is on."""

OLD_AUTH_REVISION: Final = "etcdserver: revision of auth store is old"
"""With INVALID_ARGUMENT: a token from before a change of users or roles."""

TOO_MANY_OPS: Final = "etcdserver: too many operations in txn request"
"""With INVALID_ARGUMENT."""

COMPACTED: Final = "etcdserver: mvcc: required revision has been compacted"
"""With OUT_OF_RANGE."""

WATCH_CANCELED: Final = "etcdserver: watch canceled"
"""The reason of a watch that the server cancelled without another one."""

_GO_NAMES: Final = {
    status: "OK" if status is Status.OK else status.name.title().replace("_", "").replace("Cancelled", "Canceled")
    for status in Status
}
_STATUSES: Final = {name.lower(): status for status, name in _GO_NAMES.items()}
_REASON: Final = re.compile(r"rpc error: code = (\w+) desc = (.*)", re.DOTALL)


def is_auth_refusal(status: int, text: str) -> bool:
    """Return whether etcd refused a call because of its user, or because it had none.

    The two texts share their code with many other errors.
    """
    return status in (Status.PERMISSION_DENIED, Status.UNAUTHENTICATED) or text in (USER_EMPTY, OLD_AUTH_REVISION)


def reason_of(status: int, text: str) -> str:
    """Return a status as grpc-go formats it. An undefined code is `Unknown`."""
    return f"rpc error: code = {_GO_NAMES.get(Status(status) if status in _GO_NAMES else Status.UNKNOWN)} desc = {text}"


def read_reason(cancel_reason: str) -> tuple[int, str]:
    """Return the status and text of a cancel_reason: a status as grpc-go formats it, or the text of another error."""
    match = _REASON.fullmatch(cancel_reason)
    if match is not None:
        return _STATUSES.get(match[1].lower(), Status.UNKNOWN), match[2]
    if "compacted" in cancel_reason:
        return Status.OUT_OF_RANGE, cancel_reason
    if cancel_reason:
        return Status.INVALID_ARGUMENT, cancel_reason
    return Status.UNAVAILABLE, ""
