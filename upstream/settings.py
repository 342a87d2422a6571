"""
The limits and intervals of the upstream side, each with its unit and its reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from upstream.endpoints import BACKOFF_FIRST_S, BACKOFF_MAX_S
from upstream.transport import NEXT_ADDRESS_S

MIB: Final = 1 << 20

CONNECTION_LIMITS: Final = ("connect_timeout_s", "settings_timeout_s", "keepalive_timeout_s", "useless_frames_max")
"""Limits at which a connection to an endpoint is given up: `Unreachable.limit`."""

WATCH_LIMITS: Final = (*CONNECTION_LIMITS, "status_timeout_s", "create_timeout_s")
"""The same of the watch client's, and those of what it asks there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """One connection to one endpoint."""

    # Resolving, TCP, TLS and the server's first SETTINGS together.
    connect_timeout_s: float = 5.0
    # How long one address of a name may keep us waiting before the next one is tried beside it (RFC 8305 section 8).
    next_address_s: float = NEXT_ADDRESS_S
    # How long the server may take to acknowledge our SETTINGS (RFC 9113 6.5.3).
    settings_timeout_s: float = 10.0
    # Silence after which a PING is sent while calls are open. etcd takes a ping every 5 s
    # (--grpc-keepalive-min-time) and ends connections that send more.
    keepalive_s: float = 10.0
    # How long the answer to it may take before the connection counts as dead.
    keepalive_timeout_s: float = 5.0
    # Inbound window of one call. What is received is handed on at once, so this only has to cover the way to the
    # server and back; it is also what a paused backfill can hold in memory.
    stream_window_bytes: int = 1 * MIB
    # Inbound window of the connection: so large that paused calls never hold up the others.
    connection_window_bytes: int = 1024 * MIB
    # Frames that bring nothing, of each kind: late ones of calls that we have ended, tiny WINDOW_UPDATEs, empty DATA,
    # PINGs, SETTINGS, calls answered against HTTP/2. One percent is forgiven at each read. What etcd sends of these we
    # have caused, so only what no server has a reason for (the whole of many reads) reaches this.
    useless_frames_max: int = 1_000_000
    # Bytes the kernel has not taken yet at which we stop writing, and at which we go on.
    write_high_bytes: int = 256 * 1024
    write_low_bytes: int = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """The watch client and the pool."""

    connection: ConnectionSettings = ConnectionSettings()
    # Between two tries of one endpoint: the first at once, then doubling from the one to the other, with jitter.
    backoff_first_s: float = BACKOFF_FIRST_S
    backoff_max_s: float = BACKOFF_MAX_S
    # When several endpoints can be tried, the next one starts this long after the one before, unless that failed.
    stagger_s: float = 0.05
    # Connections to one endpoint, of the pool and of the watch client each. Another one is opened only when the server
    # limits the streams of a connection and these are used up: 100 serve 5,000 streams of a server that allows 50.
    connections_per_endpoint_max: int = 100
    # How long a connection that is not needed any more is kept: longer than the pause between two bursts.
    surplus_idle_s: float = 60.0
    # How long calls or watches may wait for a place for their stream before the log, the metrics and readiness say so.
    place_wait_s: float = 5.0
    # What a new connection is asked first (version, revision, leader) has to be answered in this time.
    status_timeout_s: float = 5.0
    # How long a create may stay unanswered before it is reported; with a token it is given up then. etcd answers at
    # once, but lets one wait for ever whose token it cannot know yet: from before a store was restored
    # (auth/simple_token.go waits for the token's raft index).
    create_timeout_s: float = 10.0
    # How much of one revision (the events that one transaction has in one range) is held until all of it has come. A
    # response of any size is read in pieces, but a revision is passed on as a whole; a larger one ends its watch.
    watch_message_bytes_max: int = 512 * MIB
    # The largest answer to a call of our own.
    unary_message_bytes_max: int = 64 * MIB
