"""Maintenance.Status along the routes of watches and of calls, for proxies that this one is an endpoint of.

A proxy that takes its watches from this one (a leaf) asks with the metadata WATCH_ROUTE: the call goes to the server
that the watches of this proxy are at, instead of any endpoint. So the leaf learns whether watches here have a server;
one that has none is not used while another one has. A proxy that sends its calls here asks with CALL_ROUTE. A proxy
that gets its own call back is in a loop: see upstream/watch_route.py.
"""

from __future__ import annotations

from typing import Protocol

from proto.framing import Status
from proto.http2 import Stream
from proxy.listening.calls import CallRefusal, ConnectionHandle, Handler, Headers
from proxy.passthrough.relay import Passthrough
from upstream.connection import ClientConnection
from upstream.watch_route import CALL_ROUTE, WATCH_ROUTE, Route, RouteIds, refusal


class WatchServer(Protocol):
    """The part of `WatchClient` that is used here."""

    @property
    def onward(self) -> Route:
        """The address that is tried for watches, and the route from there."""

    def free_connection(self) -> ClientConnection | None:
        """Return a connection to the server in use with a place for a client's call; None while there is none."""


class CallServer(Protocol):
    """The part of `Pool` that is used here."""

    @property
    def onward(self) -> Route:
        """The address that leads calls into a loop, and the route from there."""

    @property
    def connected(self) -> bool:
        """An endpoint is connected."""


class RouteStatus:
    """The handler factory of Maintenance.Status: passes calls on, those of leaves along the route of the watches."""

    def __init__(self, passthrough: Passthrough, watches: WatchServer, calls: CallServer, ids: RouteIds) -> None:
        self._passthrough = passthrough
        self._watches = watches
        self._calls = calls
        self._ids = ids

    def __call__(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> Handler | None:
        """Handle a new call. Raises CallRefusal: UNAVAILABLE in a loop, or without a server."""
        name, origin = next((field for field in headers if field[0] in (WATCH_ROUTE, CALL_ROUTE)), (b"", b""))
        if (found := origin.decode(errors="replace")) in self._ids:
            raise _refusal(found)
        if name == CALL_ROUTE and not self._calls.connected:
            # It must not wait here: proxies in a loop would wait for each other.
            raise _refusal(self._ids.calls, self._calls.onward)
        if name != WATCH_ROUTE or end_stream:
            return self._passthrough(connection, stream, headers, end_stream)
        upstream = self._watches.free_connection()
        relay = self._passthrough.relay(connection, stream, headers)
        # Another server's status would be that of another route.
        relay.tries_left = 0
        if upstream is None or not relay.start(upstream):
            raise _refusal(self._ids.watches, self._watches.onward)
        self._passthrough.stats.calls += 1
        return relay


def _refusal(own_id: str, onward: Route = ()) -> CallRefusal:
    return CallRefusal(200, Status.UNAVAILABLE, refusal(own_id, onward))
