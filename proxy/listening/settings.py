"""What a listener allows its clients, and what it counts. Every bound has its unit and its reason here."""

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
"""Why a connection may be cut off: the errors of HTTP/2 that end one (RFC 9113 section 7), pings, floods."""

REFUSED_AT = {
    "max_streams": "max_concurrent_streams",
    "header_list_bytes_max": "header_list_bytes_max",
    "initial_window": "initial_window",
}
"""Limits of an HTTP/2 connection at which a stream is refused or reset, and the names by which operators know them."""

TIMEOUTS = ("first_bytes_timeout_s", "settings_timeout_s", "keepalive_timeout_s", "idle_timeout_s")
"""Times after which a connection is closed."""


@dataclass(slots=True, frozen=True)
class ListenerSettings:
    """What one listener allows, each with its unit and its reason."""

    http2: Http2Limits = field(
        default_factory=lambda: Http2Limits(connection_window=16 * 1024 * 1024, turn_work_max=1_000)
    )
    """Bounds of each HTTP/2 connection: streams, windows, frames, headers, floods. The connection's window is so wide
    that streams which are not read at present (a client that asks without taking answers) do not hold up the others."""

    connections_max: int = 20_000
    """Connections at a time; one more is told so and closed. Lowered at the start to what the limit of open files
    leaves (proxy/process/descriptors.py)."""

    first_bytes_timeout_s: float = 10.0
    """A connection that has not said what it speaks by then is closed; half-open ones would pile up."""

    settings_timeout_s: float = 20.0
    """A client must acknowledge our SETTINGS by then (RFC 9113 6.5.3)."""

    keepalive_interval_s: float | None = 7200.0
    """A connection that was silent for so long is pinged; etcd's --grpc-keepalive-interval. None: never."""

    keepalive_timeout_s: float = 20.0
    """A ping unanswered for so long ends the connection; etcd's --grpc-keepalive-timeout."""

    keepalive_min_s: float | None = 5.0
    """A client that pings more often is sent away with too_many_pings, as gRPC servers do (see `pings`); etcd's
    --grpc-keepalive-min-time. None: never."""

    idle_timeout_s: float | None = None
    """A connection without streams is sent away after so long. None: never; clients keep theirs for the next call."""

    write_buffer_bytes: int = 256 * 1024
    """Bytes the transport holds beyond the kernel's buffer before its streams stall; also the size of one write where
    there is more to write, so that bytes which many streams share are not copied for each."""

    unread_bytes_max: int = 1024 * 1024
    """Bytes of control frames and trailers kept for a client that reads nothing; beyond it is not read from either."""

    reason_s: float = 1.0
    """How long a client that is cut off has to read why. Closing while it still sends would reset the connection, and
    its system would throw our last words away; meanwhile nothing is read from it."""

    drain_ping_s: float = 1.0
    """How long the second GOAWAY waits for the client to have seen the first (RFC 9113 6.8)."""

    leaving_per_turn: int = 256
    """Streams of connections that have ended, of all together, that are forgotten in one turn of the event loop: some
    five milliseconds. Twenty thousand at once would hold everybody up for a fifth of a second."""


@dataclass(slots=True)
class ListenerStats:
    """Counts since the start; gauges are properties of the listener."""

    accepted: int = 0
    refused: int = 0
    """Turned away at `connections_max`."""

    http1: int = 0
    """Handed to the HTTP/1 side."""

    failed: int = 0
    """Ended by an error of the peer's making."""

    handshakes_failed: int = 0
    """TLS handshakes that came to nothing, or took too long."""

    cut_off: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(CUT_OFF_REASONS, 0)))
    """Why they failed: the flood, or the name of the HTTP/2 error."""

    timed_out: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(TIMEOUTS, 0)))
    """Said nothing, did not acknowledge SETTINGS, did not answer a ping or had no streams, by the limit."""

    refused_at: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(REFUSED_AT.values(), 0)))
    """Streams refused or reset, by the limit."""

    not_read: int = 0
    """Times a client was not read from because it had left `unread_bytes_max` unread."""

    in_turns: int = 0
    """Times what one client sent at once was handled in several turns."""

    requests: int = 0
    writes: int = 0
    written_bytes: int = 0
