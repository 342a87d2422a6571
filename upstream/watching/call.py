"""The call that carries one `WatchStream`: from DATA to responses, flow control, and holding data while paused.

One read of a socket can bring events for a million watches of clients, or the answers to thousands of creates. Once a
turn has lasted for TURN_S, only events of upstream watches that serve few clients are passed on; all other responses
wait for the next turn. Events for very many clients also wait while an earlier one is being written (`Cork.behind`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from typing import Final, Protocol

from proto.fields import ScanError
from proto.framing import FramingError, Status, frame
from proto.http2 import Headers
from proto.scan import WatchResponse
from upstream.connection import ClientConnection, UpstreamCall
from upstream.heads import request_headers
from upstream.settings import UpstreamSettings
from upstream.unary import Metadata
from upstream.watching.feed import LargeMessage, ResponseOrder, joined
from upstream.watching.stream import SentCreate, StreamKind, WatchStream

WATCH_PATH: Final = b"/etcdserverpb.Watch/Watch"

_RETURNS_PER_WINDOW: Final = 16
"""How often flow control is returned while a stream's window is read."""

_UNREAD_BYTES_MAX: Final = 16 * 1024 * 1024
"""While more than this of large responses waits to be read, flow control is not returned, and the stream stalls. Below
it, responses that follow the large ones can overtake them."""

_UNREAD_ALONE_BYTES_MAX: Final = 256 * 1024
"""The same for a stream with one watch, where nothing can overtake."""

TURN_S: Final = 0.01
"""Once what one read brought has taken this long, all but events for few clients waits for the next turn."""

MANY_CLIENTS: Final = 32
"""From this number of watches on; the events of other upstream watches never wait."""


def _no_clients(_watch_id: int) -> int:
    return 0


class CallOwner(Protocol):
    """The owner of the calls, which gets their responses: the watch client."""

    # DATA of watch streams read since the start, in bytes.
    received_bytes: int

    @property
    def scan(self) -> Callable[[bytes], WatchResponse]:
        """Reads a message. Raises ScanError."""

    def take(self, stream: WatchStream, response: WatchResponse) -> None:
        """Handle a response."""

    def stream_ended(self, stream: WatchStream, status: int, text: str) -> None:
        """Handle a stream that the server or the connection ended."""


class UpstreamWatchCall:
    """See the module; a `CallHandler`."""

    def __init__(self, owner: CallOwner, stream: WatchStream, settings: UpstreamSettings) -> None:
        self._owner = owner
        self._stream = stream
        self._loop = asyncio.get_running_loop()
        self._feed = ResponseOrder(owner.scan, settings.watch_message_bytes_max)
        # The next step of a large response is scheduled.
        self._goes_on = False
        # Messages to write when the call starts, which may have to wait for a place at the server.
        self._unsent: list[bytes] = []
        # Data that arrived while paused, unread and not returned to flow control: at most one stream window.
        self._held: list[tuple[bytes, int]] = []
        # Bytes read but not yet returned to flow control: done for many messages at once, see _RETURNS_PER_WINDOW.
        self._taken = 0
        self._taken_max = settings.connection.stream_window_bytes // _RETURNS_PER_WINDOW
        # The oldest unanswered create at the last check, and when it was first seen as the oldest.
        self._oldest: SentCreate | None = None
        self._oldest_since = 0.0
        # The create last reported as unanswered.
        self._reported: SentCreate | None = None
        # None before it starts, and after it has ended.
        self.call: UpstreamCall | None = None

    def begin(self, connection: ClientConnection, metadata: Metadata) -> None:
        """Start the call. Raises NotSent."""
        self.call = call = connection.request(request_headers(connection, WATCH_PATH, metadata), self)
        unsent, self._unsent = self._unsent, []
        if unsent:
            call.write(unsent, sum(map(len, unsent)))

    def write(self, message: bytes) -> None:
        """Send a message, or keep it until the call starts."""
        framed = frame(message)
        if self.call is not None:
            self.call.write((framed,), len(framed))
        else:
            self._unsent.append(framed)

    def flush_now(self) -> None:
        """Send the queued output before any other output of this turn of the loop."""
        if self.call is not None:
            self.call.connection.flush_now()

    @property
    def moved(self) -> bool:
        """The call ended with its connection or because of it, not because of a message sent on it."""
        return self.call is not None and (self.call.unprocessed or not self.call.connection.healthy)

    def waits_for(self, now: float) -> float:
        """Return for how many seconds the oldest create has been seen unanswered."""
        creating = self._stream.creating
        oldest = creating[0] if creating and self.call is not None and not self._stream.paused else None
        if oldest is None or oldest is not self._oldest:
            self._oldest, self._oldest_since = oldest, now
        return now - self._oldest_since

    def report(self) -> bool:
        """Return whether to report the oldest create as unanswered: true once per create."""
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
            self._give_back(call)
        if call.http_status != 200:
            return
        self._owner.received_bytes += len(data)
        self._take(call, data)

    def _give_back(self, call: UpstreamCall) -> None:
        unread_max = _UNREAD_ALONE_BYTES_MAX if self._stream.kind is StreamKind.BACKFILL else _UNREAD_BYTES_MAX
        if self._feed.unread <= unread_max or not self._feed.behind:
            call.consumed(self._taken)
            self._taken = 0

    def _take(self, call: UpstreamCall, data: bytes | None = None) -> None:
        """Handle the responses that can be read now, of new `data` or of those that waited; schedule the rest."""
        stream, owner, feed, connection = self._stream, self._owner, self._feed, call.connection
        late_at = connection.heard_at + TURN_S
        has_events = False
        try:
            # Nothing is joined to a run of fragments.
            clients = self._clients if not stream.held else _no_clients
            responses = feed.step(clients) if data is None else feed.feed(data)
            in_order: Iterable[WatchResponse] = responses
            cork = connection.cork
            behind = cork is not None and cork.behind
            if data is not None and (behind or len(responses) > 1 or self._loop.time() >= late_at):
                in_order = feed.pass_on(joined(responses, clients), partial(self._waits, late_at))
            for response in in_order:
                if call.ended:
                    break
                owner.take(stream, response)
                has_events = has_events or response.plain
        except FramingError as error:
            self._broken(call, error.code, error.text)
        except ScanError as error:
            self._broken(call, Status.INTERNAL, str(error))
        if has_events and connection.batches.interval_s:
            connection.batches.events_came()
        if feed.waiting and feed.behind and not self._goes_on and not stream.paused and self.call is not None:
            self._goes_on = True
            self._loop.call_soon(self._go_on)

    def _waits(self, late_at: float, response: WatchResponse) -> bool:
        """Return whether a response must wait: because the stream is paused, or at `late_at` or later.

        Events for few clients do not wait when it is late; those for very many also wait for the output.
        """
        if self._stream.paused:
            return True
        is_late = self._loop.time() >= late_at
        if not response.plain:
            return is_late
        return (is_late and self._clients(response.watch_id) >= MANY_CLIENTS) or self._waits_for_output(response)

    def _waits_for_output(self, response: LargeMessage | WatchResponse) -> bool:
        """Return whether a response is for very many clients while output for so many is being written."""
        cork = self.call.connection.cork if self.call is not None else None
        if cork is None or not cork.behind or response.watch_id is None:
            return False
        return self._clients(response.watch_id) > cork.part

    def _clients(self, watch_id: int) -> int:
        """Return how many clients the watch of this id serves; 0 if it is not known."""
        registration = self._stream.by_id.get(watch_id)
        return 0 if registration is None else registration.watch.watchers

    def _go_on(self) -> None:
        """Read the next piece of a large response, or responses that waited, as far as this turn allows."""
        self._goes_on = False
        call = self.call
        if call is None or self._stream.paused:
            return
        cork, waiting = call.connection.cork, self._feed.waiting
        if cork is not None and waiting and self._waits_for_output(waiting[0]):
            self._goes_on = True
            cork.when_written(self._go_on)
            return
        end = self._loop.time() + TURN_S
        if cork is not None:
            cork.cork()
        try:
            self._take(call)
            while self._feed.has_next and self._loop.time() < end and self.call is not None and not self._stream.paused:
                if self._waits_for_output(waiting[0]):
                    break
                self._take(call)
        finally:
            if cork is not None:
                cork.uncork()
        if self._taken >= self._taken_max and self.call is not None:
            self._give_back(call)

    def _broken(self, call: UpstreamCall, status: int, text: str) -> None:
        """End the stream after data that is not a valid response."""
        call.reset()
        self._owner.stream_ended(self._stream, status, text)
        self.leave()

    def on_drained(self) -> None:
        pass

    def on_end(self, status: int, message: str, trailers: Headers) -> None:  # noqa: ARG002 - CallHandler's signature
        self._owner.stream_ended(self._stream, status, message)
        self.leave()

    def resume(self) -> None:
        """Read the data held while paused."""
        self._go_on()
        held, self._held = self._held, []
        read = 0
        while read < len(held) and not self._stream.paused and self.call is not None:
            self.on_data(*held[read])
            read += 1
        if self.call is not None:
            self._held = held[read:]

    def leave(self) -> None:
        """End the call if it is open, and drop the references between it, its stream and this object."""
        call, self.call = self.call, None
        self._held.clear()
        self._unsent.clear()
        self._stream.shell = None
        if call is not None and not call.ended:
            call.reset()
