"""One HTTP/2 stream: its state and its flow-control windows, in as little memory as possible.

A connection may well have ten thousand of them, nearly all idle, so a stream owns no container until data has to wait
on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Protocol

from proto.http2.errors import ErrorCode


class StreamState(IntEnum):
    """The states of a `Stream` (RFC 9113 section 5.1); idle and reserved streams have no object."""

    OPEN = 0
    # We have sent END_STREAM.
    HALF_CLOSED_LOCAL = 1
    # The peer has sent END_STREAM.
    HALF_CLOSED_REMOTE = 2
    CLOSED = 3


class StreamObserver(Protocol):
    """Notified once of how a stream ends."""

    def ended(self, stream: Stream, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Our side ended the stream, with `headers` as the last header list; () if it ended with DATA."""

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Either side reset the stream, or its connection is lost (CANCEL)."""


class Stream:
    """A stream of a connection, compared by identity. The shell writes only `owner` and `observer`."""

    __slots__ = (
        "blocked",
        "bodiless",
        "content_left",
        "ending",
        "headers_seen",
        "id",
        "observer",
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
        # Bytes that the peer's window lets us send; may be negative after the peer lowered its initial window.
        self.send_window = send_window
        # Bytes that the peer may still send.
        self.receive_window = receive_window
        # Bytes consumed by the application but not yet returned to the peer by a WINDOW_UPDATE.
        self.unreturned = 0
        # Data waits to be sent: for this stream's window, the connection's window or the transport.
        self.blocked = False
        # Bytes of DATA that wait.
        self.unsent = 0
        # The pieces that wait (None if there are none), and how much of the first one is already sent.
        self.queue: deque[bytes] | None = None
        self.queue_offset = 0
        # Trailers that wait for the unsent data.
        self.trailers: list[tuple[bytes, bytes]] | None = None
        # The application has passed everything that it will send.
        self.ending = False
        # The stream is in the connection's round robin.
        self.waiting = False
        # The time at which it was opened, by the shell's clock, in seconds.
        self.opened_at = 0.0
        # We have sent headers on it: as a server, the response has begun.
        self.started = False
        # The peer's first header list has arrived (informational ones do not count); the next one is trailers.
        self.headers_seen = False
        # Bytes of the body that are left of the content-length; None if the peer sent none.
        self.content_left: int | None = None
        # Our request is HEAD: its response has no body, even with a content-length (RFC 9110 8.6).
        self.bodiless = False
        # Notified once of how the stream ends, then None. The shell sets it.
        self.observer: StreamObserver | None = None
        # The shell's own object for this stream.
        self.owner: Any = None

    def report_end(self, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Notify the observer that our side has ended the stream."""
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.ended(self, headers)

    def report_reset(self, code: ErrorCode) -> None:
        """Notify the observer that the stream was reset or lost."""
        observer, self.observer = self.observer, None
        if observer is not None:
            observer.reset(self, code)

    def __repr__(self) -> str:
        return f"<Stream {self.id} {self.state.name} window={self.send_window} unsent={self.unsent}>"
