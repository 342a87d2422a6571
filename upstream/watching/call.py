"""
The call that carries one `WatchStream`: from DATA to messages, flow control, and holding what comes while paused.
"""

from __future__ import annotations

from typing import Final, Protocol

from proto.fields import ScanError
from proto.framing import FramingError, Status, Unframer, frame
from proto.http2 import Headers
from upstream.connection import ClientConnection, UpstreamCall
from upstream.heads import request_headers
from upstream.settings import Settings
from upstream.unary import Metadata
from upstream.watching.stream import Create, WatchStream

WATCH_PATH: Final = b"/etcdserverpb.Watch/Watch"

_RETURNED_SHARE: Final = 1 / 16
"""Flow control is given back when this part of a stream's window has been read."""


class Owner(Protocol):
    """Who gets what comes on the calls: the watch client."""

    # DATA of watch streams read since the start, in bytes.
    received_bytes: int

    def take(self, stream: WatchStream, message: bytes) -> None:
        """Take a message. Raises ScanError."""

    def stream_ended(self, stream: WatchStream, status: int, text: str, final: bool = False) -> None:
        """A stream is over without our doing; `final`: the same would happen again."""


class WatchCall:
    """See the module; a `CallHandler`."""

    __slots__ = (
        "_held",
        "_oldest",
        "_oldest_since",
        "_owner",
        "_reported",
        "_stream",
        "_taken",
        "_taken_max",
        "_unframer",
        "_unsent",
        "call",
    )

    def __init__(self, owner: Owner, stream: WatchStream, settings: Settings) -> None:
        self._owner = owner
        self._stream = stream
        self._unframer = Unframer(settings.watch_message_bytes_max)
        # What is to be written when the call has begun, which may have to wait for a place at the server.
        self._unsent: list[bytes] = []
        # What came while paused, unread and without credit: at most one stream window.
        self._held: list[tuple[bytes, int]] = []
        # Bytes read that have not been given back yet: that is done for many messages at once, see _RETURNED_SHARE.
        self._taken = 0
        self._taken_max = settings.connection.stream_window_bytes * _RETURNED_SHARE
        # The create that has waited for longest when last looked at, and since when it has been that.
        self._oldest: Create | None = None
        self._oldest_since = 0.0
        # The create that was last reported as unanswered.
        self._reported: Create | None = None
        # None before it has begun, and when it is over.
        self.call: UpstreamCall | None = None

    def begin(self, connection: ClientConnection, metadata: Metadata) -> None:
        """Start the call. Raises NotSent."""
        self.call = call = connection.request(request_headers(connection, WATCH_PATH, metadata), self)
        unsent, self._unsent = self._unsent, []
        if unsent:
            call.write(unsent, sum(map(len, unsent)))

    def write(self, message: bytes) -> None:
        """Send a message, or keep it until the call begins."""
        framed = frame(message)
        if self.call is not None:
            self.call.write((framed,), len(framed))
        else:
            self._unsent.append(framed)

    def hurry(self) -> None:
        """Send what was written ahead of what else this turn of the loop brings."""
        if self.call is not None:
            self.call.connection.hurry()

    @property
    def moved(self) -> bool:
        """The call ended with its connection, or because of it, and not by what was sent on it."""
        return self.call is not None and (self.call.unprocessed or not self.call.connection.healthy)

    def waits_for(self, now: float) -> float:
        """Return for how long (seconds) the oldest create has been seen unanswered."""
        creating = self._stream.creating
        oldest = creating[0] if creating and self.call is not None and not self._stream.paused else None
        if oldest is None or oldest is not self._oldest:
            self._oldest, self._oldest_since = oldest, now
        return now - self._oldest_since

    def report(self) -> bool:
        """Return whether the oldest create is to be reported as unanswered, which is done once."""
        repeated, self._reported = self._reported is self._oldest, self._oldest
        return not repeated

    def on_headers(self, headers: Headers) -> None:
        pass

    def on_data(self, data: bytes, flow_size: int) -> None:
        stream = self._stream
        if stream.paused or self._held:
            self._held.append((data, flow_size))
            return
        call = self.call
        if call is None:
            return
        self._taken += flow_size
        if self._taken >= self._taken_max:
            call.consumed(self._taken)
            self._taken = 0
        if call.http_status != 200:
            return
        owner = self._owner
        owner.received_bytes += len(data)
        try:
            for message in self._unframer.feed(data):
                if call.ended:
                    break
                owner.take(stream, message)
        except FramingError as error:
            call.reset()
            owner.stream_ended(stream, error.code, error.text, final=error.code == Status.RESOURCE_EXHAUSTED)
            self.leave()
        except ScanError as error:
            call.reset()
            owner.stream_ended(stream, Status.INTERNAL, str(error))
            self.leave()

    def on_drained(self) -> None:
        pass

    def on_end(self, status: int, message: str, trailers: Headers) -> None:  # noqa: ARG002 - CallHandler's signature
        self._owner.stream_ended(self._stream, status, message)
        self.leave()

    def resume(self) -> None:
        """Read what was held."""
        held, self._held = self._held, []
        read = 0
        while read < len(held) and not self._stream.paused and self.call is not None:
            self.on_data(*held[read])
            read += 1
        if self.call is not None:
            self._held = held[read:]

    def leave(self) -> None:
        """End the call, if it has not, and let go of call and stream: they hold this in turn."""
        call, self.call = self.call, None
        self._held.clear()
        self._unsent.clear()
        self._stream.shell = None
        if call is not None and not call.ended:
            call.reset()
