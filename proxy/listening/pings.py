"""gRPC's keep-alive enforcement: how often a client may ping, as in grpc-go's servers and therefore in etcd.

Thousands of clients that ping too often are a permanent load on a server. gRPC servers count strikes and close the
connection with GOAWAY `too_many_pings`; client libraries recognize that text and double their interval (gRFC A8).
Clients configured for etcd's --grpc-keepalive-min-time thus see the same behaviour from the proxy as from etcd.
"""

from __future__ import annotations

TOO_MANY_PINGS = b"too_many_pings"
"""The debug data that client libraries look for in a GOAWAY."""

STRIKES_MAX = 2
"""Number of early pings that are tolerated; grpc-go's maxPingStrikes."""

IDLE_MIN_S = 7200.0
"""Minimum time between pings on a connection without streams; grpc-go's defaultPingTimeout. A shorter one needs
PermitWithoutStream, which etcd's servers do not set."""


class PingPolicy:
    """The pings of one connection. DATA or HEADERS sent to the client reset its strikes."""

    __slots__ = ("_last", "_min_s", "_progress", "_strikes")

    def __init__(self, min_s: float) -> None:
        self._min_s = min_s
        # When the last ping came; None before the first.
        self._last: float | None = None
        # The connection's `progress` at that time.
        self._progress = -1
        self._strikes = 0

    def too_many(self, now: float, progress: int, streams: int) -> bool:
        """Count a ping at `now`, in seconds; return whether it exceeds the limit.

        `progress` grows with each DATA and HEADERS frame sent; growth since the last ping resets the strikes.
        `streams` is the number of open ones.
        """
        last, self._last = self._last, now
        if progress != self._progress:
            self._progress = progress
            self._strikes = 0
            return False
        least_s = self._min_s if streams else max(self._min_s, IDLE_MIN_S)
        if last is not None and now - last < least_s:
            self._strikes += 1
        return self._strikes > STRIKES_MAX
