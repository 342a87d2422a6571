"""How often a client may ping: gRPC's keep-alive enforcement, as grpc-go's servers and so etcd have it.

A client that pings more often than it should costs every server it talks to, for ever, and thousands of such clients
are a load. gRPC servers count strikes and send a client away with `too_many_pings`; client libraries know that text and
double their interval (gRFC A8). Clients set up for etcd's --grpc-keepalive-min-time behave at the proxy as at etcd.
"""

from __future__ import annotations

TOO_MANY_PINGS = b"too_many_pings"
"""What client libraries look for in a GOAWAY."""

STRIKES_MAX = 2
"""Pings that came too early and are overlooked; grpc-go's maxPingStrikes."""

IDLE_MIN_S = 7200.0
"""The least time between pings of a connection without streams; grpc-go's defaultPingTimeout. Exceeding it needs
PermitWithoutStream, which etcd's servers do not give."""


class PingPolicy:
    """One connection's pings. Answers that bring something forgive the pings before them."""

    __slots__ = ("_last", "_min_s", "_progress", "_strikes")

    def __init__(self, min_s: float) -> None:
        self._min_s = min_s
        # When the last ping came; None before the first.
        self._last: float | None = None
        # What the connection had sent by then.
        self._progress = -1
        self._strikes = 0

    def too_many(self, now: float, progress: int, has_streams: bool) -> bool:
        """Count a ping at `now`, in seconds; tell whether it was one too many.

        `progress` grows with each DATA and HEADERS frame sent: what answers a client gives it new credit.
        """
        last, self._last = self._last, now
        if progress != self._progress:
            self._progress = progress
            self._strikes = 0
            return False
        least_s = self._min_s if has_streams else max(self._min_s, IDLE_MIN_S)
        if last is not None and now - last < least_s:
            self._strikes += 1
        return self._strikes > STRIKES_MAX
