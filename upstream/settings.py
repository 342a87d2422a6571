"""The limits and intervals of the upstream side, each with its unit and its reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MIB: Final = 1 << 20

BACKOFF_FIRST_S: Final = 0.02
BACKOFF_MAX_S: Final = 2.0
NEXT_ADDRESS_S: Final = 0.25
HUB_BATCH_INTERVAL_S: Final = 0.001
"""The same for the hub of `--workers`: a burst to 1,000 streams then costs two thirds of the CPU time; longer batches
save little more."""

CONNECTION_LIMITS: Final = ("connect_timeout_s", "settings_timeout_s", "keepalive_timeout_s", "useless_frames_max")
"""Limits at which the proxy gives up a connection to an endpoint: the values of `Unreachable.limit`."""

WATCH_LIMITS: Final = (*CONNECTION_LIMITS, "status_timeout_s", "create_timeout_s")
"""The same for the watch client, and the limits of its own requests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSettings:
    """Settings of one connection to one endpoint."""

    # Maximum time for name resolution, TCP, TLS and the server's first SETTINGS together.
    connect_timeout_s: float = 5.0
    # How long to wait for one address of a name before the next one is tried in parallel (RFC 8305 section 8).
    next_address_s: float = NEXT_ADDRESS_S
    # How long the server may take to acknowledge our SETTINGS (RFC 9113 6.5.3).
    settings_timeout_s: float = 10.0
    # Silence after which a PING is sent while calls are open. etcd accepts one PING every 5 s
    # (--grpc-keepalive-min-time) and closes connections that send more.
    keepalive_s: float = 10.0
    # How long the answer to a PING may take before the connection counts as dead.
    keepalive_timeout_s: float = 5.0
    # Inbound window of one call. Received data is passed on at once, so the window only has to cover one round trip; it
    # is also the most that a paused backfill can hold in memory.
    stream_window_bytes: int = 1 * MIB
    # Inbound window of the connection: so large that paused calls never block the others.
    connection_window_bytes: int = 1024 * MIB
    # Useless frames of each kind at which the connection is closed: late frames of calls that the proxy has ended, tiny
    # WINDOW_UPDATEs, empty DATA, PINGs, SETTINGS, answers that violate HTTP/2. Each read reduces the count by one
    # percent. etcd sends such frames only in response to ours, so only a faulty server that fills many reads with them
    # reaches this.
    useless_frames_max: int = 1_000_000
    # How long a connection waits before it reads more events when they follow each other within twice this time: it
    # then reads them at once (`batching.py`). 0: it does not wait.
    batch_interval_s: float = 0.0
    # Bytes not yet accepted by the kernel at which the proxy stops writing, and at which it continues.
    write_high_bytes: int = 256 * 1024
    write_low_bytes: int = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """Settings of the watch client and the pool."""

    connection: ConnectionSettings = ConnectionSettings()
    # Delay between two attempts at one endpoint: the first retry is immediate, then the delay doubles from the first
    # value to the maximum, with jitter.
    backoff_first_s: float = BACKOFF_FIRST_S
    backoff_max_s: float = BACKOFF_MAX_S
    # When several endpoints can be tried, the attempts start this long after one another.
    stagger_s: float = 0.05
    # Maximum connections to one endpoint, of the pool and of the watch client each. Another one is opened only when the
    # server limits the streams of a connection and these are used up: 100 connections carry 5,000 streams if the server
    # allows 50 on each.
    connections_per_endpoint_max: int = 100
    # How long an unused surplus connection is kept: longer than the pause between two bursts.
    surplus_idle_s: float = 60.0
    # How long calls or watches may wait for a free stream before the log, the metrics and readiness report it.
    place_wait_s: float = 5.0
    # Timeout of the first request on a new connection (Status: version, revision, leader).
    status_timeout_s: float = 5.0
    # How long a watch create may stay unanswered before it is reported; a create with a token is then given up. etcd
    # answers at once, except that a create waits without end if its token is from before the store was restored
    # (auth/simple_token.go waits for the token's raft index).
    create_timeout_s: float = 10.0
    # Maximum size of one revision (the events of one transaction in one range), which is held until it is complete. A
    # response of any size is read in pieces, but a revision is passed on as a whole; a larger one ends its watch.
    watch_message_bytes_max: int = 512 * MIB
    # The largest answer to one of the proxy's own calls.
    unary_message_bytes_max: int = 64 * MIB
