"""One HTTP/2 stream: its state and its share of the flow-control ledger, in as little memory as can be.

Ten thousand of them on a connection are normal here and nearly all are idle, so a stream owns no container until data
has to wait on it.
"""

from __future__ import annotations

from collections import deque
from enum import IntEnum
from typing import Any


class StreamState(IntEnum):
    """The states a stream of ours can be in (RFC 9113 section 5.1); idle and reserved ones do not exist as objects."""

    OPEN = 0
    # We have sent END_STREAM.
    HALF_CLOSED_LOCAL = 1
    # The peer has sent END_STREAM.
    HALF_CLOSED_REMOTE = 2
    CLOSED = 3


class Stream:
    """A stream of a connection; compared by identity. All fields but `owner` are the connection's to write."""

    __slots__ = (
        "blocked",
        "bodiless",
        "content_left",
        "ending",
        "headers_seen",
        "id",
        "opened_at",
        "owner",
        "queue",
        "queue_offset",
        "receive_window",
        "send_window",
        "started",
        "state",
        "trailers",
        "unreturned",
        "unsent",
        "waiting",
    )

    def __init__(self, stream_id: int, send_window: int, receive_window: int) -> None:
        self.id = stream_id
        self.state = StreamState.OPEN
        # Bytes the peer's window lets us send; below zero after the peer has lowered its initial window.
        self.send_window = send_window
        # Bytes the peer may still send.
        self.receive_window = receive_window
        # Bytes consumed by the application that no WINDOW_UPDATE has told the peer about yet.
        self.unreturned = 0
        # Something waits to be sent: for this stream's window, the connection's window or the transport.
        self.blocked = False
        # Bytes of DATA that wait.
        self.unsent = 0
        # The pieces that wait, and how much of the first one is sent already. None when nothing ever waited.
        self.queue: deque[bytes] | None = None
        self.queue_offset = 0
        # Trailers that wait for the data before them.
        self.trailers: list[tuple[bytes, bytes]] | None = None
        # The application has handed over everything it will ever send.
        self.ending = False
        # The stream is in the connection's round robin.
        self.waiting = False
        # When it was opened, on the shell's clock, in seconds.
        self.opened_at = 0.0
        # We have sent something on it: as a server, our answer has begun.
        self.started = False
        # The peer's first header list has arrived (informational ones do not count): the next ones are trailers.
        self.headers_seen = False
        # Bytes of the body that the content-length still promises; None when the peer promised nothing.
        self.content_left: int | None = None
        # A request of ours whose response has no body whatever its content-length says: HEAD (RFC 9110 8.6).
        self.bodiless = False
        # The shell's own object for this stream.
        self.owner: Any = None

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.state.name} window={self.send_window} unsent={self.unsent}>"
