"""Counts of the clients' calls by method and gRPC code, and their durations, as go-grpc-prometheus counts them.

The work is per call: a started call is counted by its path, and its HTTP/2 stream keeps the `MethodCalls` as observer,
which is notified once when the stream ends. Messages are not counted, so an event costs nothing here. All methods that
are not etcd's or gRPC health's share one entry, because their names come from clients.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Final

from proto.framing import Status
from proto.http2 import ErrorCode, Stream
from upstream.heads import STATUS_OF_RESET

BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of durations, in seconds: those of go-grpc-prometheus and three below."""

UNKNOWN: Final = b"/unknown/unknown"
"""Stands for all methods that are not in METHODS."""

_SERVICES: Final = {
    "etcdserverpb.KV": "Range Put DeleteRange Txn Compact",
    "etcdserverpb.Watch": "Watch",
    "etcdserverpb.Lease": "LeaseGrant LeaseRevoke LeaseKeepAlive LeaseTimeToLive LeaseLeases",
    "etcdserverpb.Cluster": "MemberAdd MemberRemove MemberUpdate MemberList MemberPromote",
    "etcdserverpb.Maintenance": "Alarm Status Defragment Hash HashKV Snapshot MoveLeader Downgrade",
    "etcdserverpb.Auth": "AuthEnable AuthDisable AuthStatus Authenticate UserAdd UserGet UserList UserDelete "
    "UserChangePassword UserGrantRole UserRevokeRole RoleAdd RoleGet RoleList RoleDelete RoleGrantPermission "
    "RoleRevokePermission",
    "v3lockpb.Lock": "Lock Unlock",
    "v3electionpb.Election": "Campaign Proclaim Leader Observe Resign",
    "grpc.health.v1.Health": "Check List Watch",
}
"""The methods of each service."""
_STREAMS: Final = {
    b"/etcdserverpb.Watch/Watch": "bidi_stream",
    b"/etcdserverpb.Lease/LeaseKeepAlive": "bidi_stream",
    b"/etcdserverpb.Maintenance/Snapshot": "server_stream",
    b"/v3electionpb.Election/Observe": "server_stream",
    b"/grpc.health.v1.Health/Watch": "server_stream",
}
"""The methods that are not unary."""

METHODS: Final = {
    **{f"/{name}/{method}".encode(): "unary" for name, methods in _SERVICES.items() for method in methods.split()},
    **_STREAMS,
    UNKNOWN: "unknown",
}
"""The methods that are counted by name, with their `grpc_type`."""

CODES: Final = (
    *("OK", "Canceled", "Unknown", "InvalidArgument", "DeadlineExceeded", "NotFound", "AlreadyExists"),
    *("PermissionDenied", "ResourceExhausted", "FailedPrecondition", "Aborted", "OutOfRange", "Unimplemented"),
    *("Internal", "Unavailable", "DataLoss", "Unauthenticated"),
)
"""The names of gRPC's codes in grpc-go (codes/code_string.go), by number."""


UNKNOWN_CODE: Final = int(Status.UNKNOWN)
STATUS_OF_TEXT: Final = {b"%d" % code: int(code) for code in Status}


class MethodCalls:
    """The calls of one method, and the observer of their streams."""

    __slots__ = ("_now", "buckets", "codes", "seconds", "started")

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self.started = 0
        self.codes = [0] * len(CODES)
        """Ended calls, by code."""
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        """Ended calls, by duration."""
        self.seconds = 0.0
        """The sum of the durations."""

    def ended(self, stream: Stream, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Count a call that ended with `headers` as its trailers; without a status in them it is Unknown."""
        for name, value in headers:
            if name == b"grpc-status":
                self._count(stream, STATUS_OF_TEXT.get(value, UNKNOWN_CODE))
                return
        self._count(stream, UNKNOWN_CODE)

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Count a call whose stream was reset by either side or lost with its connection."""
        self._count(stream, STATUS_OF_RESET.get(code, Status.INTERNAL))

    def _count(self, stream: Stream, code: int) -> None:
        seconds = self._now() - stream.opened_at
        self.codes[code] += 1
        self.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        self.seconds += seconds


class CallMetrics:
    """The calls of all clients, by method."""

    def __init__(self, now: Callable[[], float]) -> None:
        """`now`: the clock of `Stream.opened_at`."""
        self.methods: dict[bytes, MethodCalls] = {}
        """By path; a method is added by its first call."""
        self._now = now

    def begin(self, path: bytes, stream: Stream) -> None:
        """Count a new call, and observe its stream."""
        method = self.methods.get(path)
        if method is None:
            known = path if path in METHODS else UNKNOWN
            method = self.methods.get(known)
            if method is None:
                method = self.methods[known] = MethodCalls(self._now)
        method.started += 1
        stream.observer = method
