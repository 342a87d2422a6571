"""
Where the streams of watches have their places: the connections to the server in use, and those streams that wait.
"""

from __future__ import annotations

from collections.abc import Callable

from upstream.connection import ClientConnection, NotSent
from upstream.connections import Connections, full_text
from upstream.unary import Metadata
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.stream import Kind, WatchStream


class Places:
    """See the module. `metadata` returns what the call of a stream begins with."""

    def __init__(self, metadata: Callable[[WatchStream], Metadata]) -> None:
        self._metadata = metadata
        # Those to the server in use; None while there is none.
        self._connections: Connections | None = None
        # Streams that wait for a place, and their calls, oldest first.
        self._waiting: dict[WatchStream, UpstreamWatchCall] = {}
        # Connections to members that do not answer requests for progress in order with events.
        self.unordered: set[ClientConnection] = set()

    @property
    def waiting(self) -> int:
        """Streams that wait for a place."""
        return len(self._waiting)

    @property
    def connection_count(self) -> int:
        """Connections that take calls."""
        return 0 if self._connections is None else self._connections.count

    @property
    def alive(self) -> bool:
        """Streams can be opened, now or when the next connection is there."""
        return self._connections is not None and self._connections.alive

    @property
    def full(self) -> str:
        """Why watches wait though an etcd is there; "" when they do not, or not for long."""
        if self._connections is None or not self._connections.full:
            return ""
        return full_text("watches", self._connections.count)

    def use(self, connections: Connections) -> None:
        """Open streams on these from now on."""
        self._connections = connections

    def leave(self) -> None:
        """Close the connections, and forget who waits."""
        self._waiting.clear()
        self.unordered.clear()
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    def pick(self) -> ClientConnection | None:
        """Return a connection with a place for one more stream; None when there is none now."""
        return None if self._connections is None else self._connections.pick()

    def own(self) -> ClientConnection | None:
        """Return a connection with a place for a call of our own; None when there is none now."""
        return None if self._connections is None else self._connections.pick(own=True)

    def open(self, stream: WatchStream, call: UpstreamWatchCall) -> None:
        """Begin the call of a stream, or have it wait for a place."""
        if self._waiting or not self._begin(stream, call):
            self._waiting[stream] = call

    def forget(self, stream: WatchStream) -> None:
        """A stream is over: it does not wait any more."""
        self._waiting.pop(stream, None)

    def begin_waiting(self) -> None:
        """Begin what waits, trunks first: many clients share each of them."""
        for stream in sorted(self._waiting, key=lambda each: each.kind is Kind.BACKFILL):
            if not self._begin(stream, self._waiting[stream]):
                break
            del self._waiting[stream]

    def _begin(self, stream: WatchStream, call: UpstreamWatchCall) -> bool:
        connection = self.pick()
        if connection is None:
            return False
        try:
            call.begin(connection, self._metadata(stream))
        except NotSent:
            return False
        stream.ordered = connection not in self.unordered
        return True
