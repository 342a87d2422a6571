"""Places for the streams of watches: the connections to the server in use, and the streams that wait for a place."""

from __future__ import annotations

from collections.abc import Callable

from upstream.connection import ClientConnection, NotSent
from upstream.connections import Connections, full_text
from upstream.dial import Server
from upstream.unary import Metadata
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.stream import StreamKind, WatchStream


class StreamPlaces:
    """See the module. `metadata` returns the metadata of a stream's call."""

    def __init__(self, metadata: Callable[[WatchStream], Metadata]) -> None:
        self._metadata = metadata
        # The server in use, and the connections to it; None while there is none.
        self.server: Server | None = None
        self._connections: Connections | None = None
        # Streams that wait for a place, oldest first, and their calls.
        self._waiting: dict[WatchStream, UpstreamWatchCall] = {}
        # Connections to members that do not answer progress requests in order with events.
        self.unordered: set[ClientConnection] = set()

    @property
    def waiting(self) -> int:
        """The number of streams that wait for a place."""
        return len(self._waiting)

    @property
    def connection_count(self) -> int:
        """The number of connections that take calls."""
        return 0 if self._connections is None else self._connections.count

    @property
    def alive(self) -> bool:
        """Streams can be opened, now or once the next connection is open."""
        return self._connections is not None and self._connections.alive

    @property
    def full(self) -> str:
        """Why watches wait although etcd is connected; "" when they do not wait, or not for long."""
        if self._connections is None or not self._connections.full:
            return ""
        return full_text("watches", self._connections.count)

    def use(self, server: Server, connections: Connections) -> None:
        """Open streams on these connections to a server from now on."""
        self.server = server
        self._connections = connections

    def leave(self) -> None:
        """Close the connections, and forget the waiting streams."""
        self.server = None
        self._waiting.clear()
        self.unordered.clear()
        connections, self._connections = self._connections, None
        if connections is not None:
            connections.close()

    def pick(self) -> ClientConnection | None:
        """Return a connection with a place for one more stream; None when there is none now."""
        return None if self._connections is None else self._connections.pick()

    def own(self, server: Server) -> ClientConnection:
        """Return a connection for one of the proxy's own calls to a server, with a reserved place if it is in use."""
        connections = self._connections if server is self.server else None
        return (connections.pick(own=True) if connections is not None else None) or server.connection

    def open(self, stream: WatchStream, call: UpstreamWatchCall) -> None:
        """Start the call of a stream, or queue it for a place."""
        if self._waiting or not self._begin(stream, call):
            self._waiting[stream] = call

    def forget(self, stream: WatchStream) -> None:
        """Remove a stream that has ended from the queue."""
        self._waiting.pop(stream, None)

    def begin_waiting(self) -> None:
        """Start the waiting calls, trunks first: many clients share each trunk."""
        for stream in sorted(self._waiting, key=lambda each: each.kind is StreamKind.BACKFILL):
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
