"""Every limit of an HTTP/2 connection, with its unit and its reason.

The peer decides how many streams it opens, how fast it sends and what; these numbers bound what that can cost. The
first group is announced in SETTINGS and is part of the protocol, the second one is ours alone (RFC 9113 section
10.5).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

FRAME_BYTES_MIN = 16_384
FRAME_BYTES_MAX = 2**24 - 1
WINDOW_BYTES_DEFAULT = 65_535
WINDOW_BYTES_MAX = 2**31 - 1
STREAM_ID_MAX = 2**31 - 1
HEADER_TABLE_BYTES_DEFAULT = 4_096
# Bytes of DATA we put into one frame however many the peer takes: a turn of the round robin, and what a reset, a PING
# or another stream's event may have to wait for.
FRAME_BYTES_SENT_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection allows its peer.

    Flood limits have no clock: each counts frames that cost us work and bring nothing, and one percent of the limit
    (of resets, a fifth of that) is forgiven whenever the shell takes the output of a connection that is not paused. A
    peer that keeps within what a turn of the event loop can do is never counted out, one that runs ahead of the loop
    is, and one that does not read its answers (so that the transport is paused) gets no forgiveness at all.
    """

    max_streams: int = 100_000
    """Streams the peer may have open; more are refused one by one. Bounds memory at some 400 bytes a stream."""

    initial_window: int = 262_144
    """Bytes a stream may receive before we have consumed any. Bounds what one call makes us hold."""

    connection_window: int = 1_048_576
    """Bytes all streams together may receive before we have consumed any (at least 65,535, which is given)."""

    max_frame_bytes: int = FRAME_BYTES_MIN
    """Bytes of a received frame's payload, checked before it is buffered. Bounds the receive buffer."""

    header_list_bytes_max: int = 65_536
    """Bytes of one header list, decoded, 32 per field included (RFC 9113 6.5.2).
    A longer one is not kept, its stream is refused with ENHANCE_YOUR_CALM (gRPC's RESOURCE_EXHAUSTED)."""

    header_table_bytes: int = HEADER_TABLE_BYTES_DEFAULT
    """Bytes of the table the peer's header compression may build on our side (RFC 7541 section 4)."""

    header_fields_max: int = 2_048
    """Fields of one header block: as many as the smallest need to fill `header_list_bytes_max`. Each may change the
    compression table, so what is too long cannot be passed over; with more fields the connection is cut off."""

    turn_work_max: int = 0
    """Work of one `receive`, in pieces of some five microseconds: 1 for a frame, 20 more for a request, 6 for a stream
    that is reset, 1 for 8 bytes of a header block, 1 for a hundred streams whose windows move. What is beyond waits for
    the next call (`behind`), so that others have their turn. A listener divides it among all of its clients, who pay
    for their watch requests as well: 12 for a create, 4 for a cancel, 3 for progress, 1 for 512 bytes. 0: no bound."""

    resets_remembered: int = 1_000
    """Ids of streams reset by us that are remembered, so that late frames for them are dropped in silence. A late frame
    of one that is forgotten is answered by one more RST_STREAM, which does no harm."""

    continuations_max: int = 64
    """CONTINUATION frames in one header block: with 16 KiB frames 1 MiB, far beyond any header list we would take."""

    resets_max: int = 10_000
    """Streams that ended badly: reset by the peer within `patience_s` and before any answer, refused, or broken by it.
    Bounds the "rapid reset" attack (CVE-2023-44487) and "made you reset" (CVE-2025-8671); what each costs is bounded by
    turns. Room for a client that cancels all its calls in the moment in which it makes them."""

    patience_s: float = 0.02
    """A stream that was open for so long before the peer reset it waited for an answer that did not come: that is no
    fault of the peer's, however many there are (calls with one deadline, while etcd is slow)."""

    pings_max: int = 1_000
    """PINGs, each of which asks for an answer: bounds the unread answers too."""

    settings_max: int = 100
    """SETTINGS, each of which asks for an answer and may touch every stream."""

    empty_data_max: int = 1_000
    """DATA frames that carry no data and do not end their stream."""

    tiny_updates_max: int = 20_000
    """WINDOW_UPDATEs of less than `tiny_update_bytes`; with them a peer cuts our data into tiny frames. Generous: some
    clients give back every small message at once, on many streams."""

    tiny_update_bytes: int = 1_024
    """Bytes from which on a WINDOW_UPDATE is not counted."""

    ignored_max: int = 10_000
    """Frames without effect: PRIORITY, unknown types, informational responses, frames for streams that are closed, but
    for two of each stream that we ended: those were on their way."""

    paused_requests_max: int = 20_000
    """Requests that arrive while the transport is paused: their answers' headers are written all the same, so this
    bounds what a peer that never reads can make us hold. Room for a client that opens all its streams at once."""

    def with_floods_at(self, frames_max: int) -> Limits:
        """Return these limits with every flood limit at `frames_max`: for a peer whose frames we mostly cause."""
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
        """Raise ValueError for what the protocol cannot express."""
        if not FRAME_BYTES_MIN <= self.max_frame_bytes <= FRAME_BYTES_MAX:
            raise ValueError(f"max_frame_bytes is {self.max_frame_bytes}, not {FRAME_BYTES_MIN} to {FRAME_BYTES_MAX}")
        for name in ("initial_window", "connection_window", "max_streams"):
            if not 0 <= getattr(self, name) <= WINDOW_BYTES_MAX:
                raise ValueError(f"{name} is {getattr(self, name)}, not 0 to {WINDOW_BYTES_MAX}")
