"""The listener's limits and counters. Each limit is documented with its unit and its reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from proto.http2 import Http2Limits
from proto.http2.receiving import FLOOD_NAMES, TOO_MANY_FIELDS

CUT_OFF_REASONS = (
    *("PROTOCOL_ERROR", "FLOW_CONTROL_ERROR", "FRAME_SIZE_ERROR", "COMPRESSION_ERROR"),
    "too_many_pings",
    "flood: CONTINUATION",
    TOO_MANY_FIELDS,
    *(f"flood: {name}" for name in FLOOD_NAMES),
)
"""Reasons for cutting a connection off: HTTP/2 connection errors (RFC 9113 section 7), too many pings, floods."""

REFUSED_AT = {
    "max_streams": "max_concurrent_streams",
    "header_list_bytes_max": "header_list_bytes_max",
    "initial_window": "initial_window",
}
"""Limits of an HTTP/2 connection at which a stream is refused or reset, and their names in metrics."""

TIMEOUTS = ("first_bytes_timeout_s", "settings_timeout_s", "keepalive_timeout_s", "idle_timeout_s")
"""Settings whose timeout closes a connection."""


@dataclass(slots=True, frozen=True)
class ListenerSettings:
    """The limits of one listener, each with its unit and its reason."""

    http2: Http2Limits = field(
        default_factory=lambda: Http2Limits(connection_window=16 * 1024 * 1024, turn_work_max=1_000)
    )
    """Limits of each HTTP/2 connection: streams, windows, frames, headers, floods. The connection's window is large
    enough that streams the proxy currently does not read (their client sends requests but does not read responses) do
    not block the others."""

    connections_max: int = 20_000
    """Maximum concurrent connections; further ones get GOAWAY and are closed. Lowered at startup to what the limit of
    open files allows (proxy/process/descriptors.py)."""

    first_bytes_timeout_s: float = 10.0
    """How long a client may take to show whether it speaks HTTP/2 or HTTP/1, or to finish its TLS handshake; then the
    connection is closed. Without it half-open connections would pile up."""

    settings_timeout_s: float = 20.0
    """How long a client may take to acknowledge the proxy's SETTINGS (RFC 9113 6.5.3)."""

    keepalive_interval_s: float | None = 7200.0
    """Silence after which the proxy pings a connection; etcd's --grpc-keepalive-interval. None: never."""

    keepalive_timeout_s: float = 20.0
    """How long a client may take to answer a ping; then the connection is closed. etcd's --grpc-keepalive-timeout."""

    keepalive_min_s: float | None = 5.0
    """Minimum time between a client's pings; the connection of one that pings more often is closed with GOAWAY
    too_many_pings, as gRPC servers do (see `pings`). etcd's --grpc-keepalive-min-time. None: not checked."""

    idle_timeout_s: float | None = None
    """How long a connection may have no streams; then it gets GOAWAY. None: any time, since clients keep their
    connection for the next call."""

    write_buffer_bytes: int = 256 * 1024
    """Bytes the transport buffers beyond the kernel's buffer before the connection's streams stall. Also the size of
    one write when more is queued, so that bytes shared by many streams are not copied for each of them."""

    unread_bytes_max: int = 1024 * 1024
    """Bytes of control frames and trailers kept for a client that reads nothing; above this, the proxy stops reading
    from it too."""

    reason_s: float = 1.0
    """How long a client that is cut off has to read the GOAWAY with the reason. Closing while it still sends would
    reset the connection, and its kernel would discard the GOAWAY. The proxy reads nothing from it meanwhile."""

    drain_ping_s: float = 1.0
    """How long the second GOAWAY of a drain waits for the client to receive the first (RFC 9113 6.8)."""

    leaving_per_turn: int = 256
    """Streams of closed connections, of all connections together, that are cleaned up in one turn of the event loop:
    about five milliseconds. Twenty thousand at once would block all other clients for a fifth of a second."""


@dataclass(slots=True)
class ListenerStats:
    """Counters since the start; gauges are properties of the listener."""

    accepted: int = 0
    refused: int = 0
    """Connections refused at `connections_max` or while draining."""

    http1: int = 0
    """Connections handed to the HTTP/1 side."""

    failed: int = 0
    """Connections closed because of an error of the client."""

    handshakes_failed: int = 0
    """TLS handshakes that failed or timed out."""

    cut_off: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CUT_OFF_REASONS, 0)))
    """Failed connections by reason: the flood, or the name of the HTTP/2 error."""

    timed_out: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TIMEOUTS, 0)))
    """Connections closed by a timeout, by the name of its setting."""

    refused_at: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSED_AT.values(), 0)))
    """Streams refused or reset, by the limit reached."""

    not_read: int = 0
    """Times the proxy stopped reading from a client that had left `unread_bytes_max` unread."""

    in_turns: int = 0
    """Times the input of one client was spread over several turns of the event loop."""

    requests: int = 0
    writes: int = 0
    written_bytes: int = 0
