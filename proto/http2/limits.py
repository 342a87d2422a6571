"""Every limit of an HTTP/2 connection, with its unit and its reason.

The peer decides how many streams it opens, what it sends and how fast; these limits bound the cost. Those of the first
group are announced in SETTINGS and part of the protocol, those of the second are our own (RFC 9113 section 10.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FRAME_BYTES_MIN = 16_384
FRAME_BYTES_MAX = 2**24 - 1
WINDOW_BYTES_DEFAULT = 65_535
WINDOW_BYTES_MAX = 2**31 - 1
STREAM_ID_MAX = 2**31 - 1
HEADER_TABLE_BYTES_DEFAULT = 4_096
# Maximum bytes of DATA in a frame that we send, even if the peer allows more: a turn of the round robin, and the most
# that a reset, a PING or another stream's event may have to wait for.
FRAME_BYTES_SENT_MAX = 65_536
# Data that successive frames bring for one stream is joined to this size at most: that of a frame by default.
JOINED_DATA_BYTES_MAX = FRAME_BYTES_MIN
# How late grpc-go's BANDWIDTH_PING is acknowledged at most. grpc-go sends none until then, so until then an event costs
# one write, without a read and another write for a PING; so does a call on the side of etcd, a grpc-go server.
LATE_ACK_S_MAX = 1.0
# It is acknowledged at once if the last acknowledgement is older than this: the timer would cost more than it saves.
LATE_ACK_GAP_S = 0.25
# It is acknowledged at once if the client returns more of its window than this with it, or later while less than
# LATE_ACK_WINDOW_MIN was left: the windows may limit the transfer, and the acknowledgement lets them grow.
LATE_ACK_BYTES_MAX = 8_192
LATE_ACK_WINDOW_MIN = WINDOW_BYTES_DEFAULT // 2


@dataclass(frozen=True, slots=True)
class Http2Limits:
    """The limits of one connection's peer.

    Flood limits use no clock: each counts frames that cost work and have no use, and the count decreases by one percent
    of the limit (resets: a fifth of that) whenever the shell takes the output of a connection that is not paused. A
    peer that sends no more than a turn of the event loop can handle never reaches a limit; one that is faster than the
    loop does. While a peer does not read its answers (the transport is paused), the count does not decrease.
    """

    max_streams: int = 100_000
    """Maximum open streams of the peer; further ones are refused one by one. Bounds memory: about 400 bytes each."""

    initial_window: int = 262_144
    """Bytes that a stream may receive before we have consumed any. Bounds the memory of one call."""

    connection_window: int = 1_048_576
    """Bytes that all streams together may receive before we have consumed any (at least 65,535, the default)."""

    max_frame_bytes: int = FRAME_BYTES_MIN
    """Maximum bytes of a received frame's payload, checked before it is buffered. Bounds the receive buffer."""

    header_list_bytes_max: int = 65_536
    """Maximum bytes of one header list, decoded, plus 32 per field (RFC 9113 6.5.2). A longer list is not kept, and its
    stream is refused with ENHANCE_YOUR_CALM (gRPC's RESOURCE_EXHAUSTED)."""

    header_table_bytes: int = HEADER_TABLE_BYTES_DEFAULT
    """Maximum bytes of the table that the peer's header compression may build on our side (RFC 7541 section 4)."""

    header_fields_max: int = 2_048
    """Maximum fields of one header block: the number of smallest fields that fill `header_list_bytes_max`. Each field
    may change the compression table, so an oversized list must be decoded too; with more fields the connection is
    closed."""

    turn_work_max: int = 0
    """Maximum work of one `receive`, in units of about five microseconds: 1 for a frame, 20 more for a request, 6 for a
    stream that is reset, 1 for 8 bytes of a header block, 1 for a hundred streams whose windows change. The rest waits
    for the next call (`behind`), so that other connections have their turn. A listener divides it among all its
    clients, and counts their watch requests too: 12 for a create, 4 for a cancel, 3 for progress, 1 for 512 bytes.
    0: no limit."""

    resets_remembered: int = 1_000
    """Maximum ids of streams reset by us that are remembered, so that late frames for them are dropped without an
    answer. A late frame for a forgotten one is answered by one more RST_STREAM, which does no harm."""

    continuations_max: int = 64
    """Maximum CONTINUATION frames in one header block: 1 MiB of 16 KiB frames, far more than an accepted list needs."""

    resets_max: int = 10_000
    """Streams that ended badly: reset by the peer within `patience_s` and before any answer, refused, or ended by a
    stream error. Bounds the "rapid reset" attack (CVE-2023-44487) and "made you reset" (CVE-2025-8671); `turn_work_max`
    bounds their cost per turn. Leaves room for a client that cancels all its calls as soon as it makes them."""

    patience_s: float = 0.02
    """A stream that was open for at least this long when the peer reset it does not count for `resets_max`: the answer
    was late, as for many calls with the same deadline while etcd is slow."""

    pings_max: int = 1_000
    """PINGs, each of which needs an answer; bounds the unread answers too."""

    settings_max: int = 100
    """SETTINGS, each of which needs an answer and may change every stream."""

    empty_data_max: int = 1_000
    """DATA frames without data and without END_STREAM."""

    tiny_updates_max: int = 20_000
    """WINDOW_UPDATEs of less than `tiny_update_bytes`, with which a peer splits our data into tiny frames. Generous,
    because some clients send one for every small message, on many streams."""

    tiny_update_bytes: int = 1_024
    """WINDOW_UPDATEs of at least this many bytes are not counted."""

    ignored_max: int = 10_000
    """Frames without effect: PRIORITY, unknown types, informational responses, and frames for closed streams, except
    for two per stream that we ended, which were on their way."""

    paused_requests_max: int = 20_000
    """Requests that arrive while the transport is paused. The headers of their answers are written all the same, so
    this bounds the memory for a peer that never reads. Leaves room for a client that opens all its streams at once."""

    def with_floods_at(self, frames_max: int) -> Http2Limits:
        """Return these limits with every flood limit at `frames_max`, for a peer that mostly reacts to our frames."""
        floods = (
            "resets_max",
            "pings_max",
            "settings_max",
            "empty_data_max",
            "tiny_updates_max",
            "ignored_max",
        )
        return replace(self, **dict.fromkeys(floods, frames_max))

    def __post_init__(self) -> None:
        """Raise ValueError for values that the protocol cannot express."""
        if not FRAME_BYTES_MIN <= self.max_frame_bytes <= FRAME_BYTES_MAX:
            raise ValueError(f"max_frame_bytes is {self.max_frame_bytes}, not {FRAME_BYTES_MIN} to {FRAME_BYTES_MAX}")
        for name in ("initial_window", "connection_window", "max_streams"):
            if not 0 <= getattr(self, name) <= WINDOW_BYTES_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}, not 0 to {WINDOW_BYTES_MAX}")
