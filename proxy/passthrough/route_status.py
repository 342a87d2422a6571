"""Maintenance.Status along the route of the watches, for proxies that take their watches from this one.

Such a proxy (a leaf) asks with the metadata WATCH_ROUTE: the call goes to the server that the watches of this proxy are
at, instead of any endpoint. So the leaf learns whether watches here have a server; one that has none is not used while
another one has. A leaf that gets its own call back takes its watches from itself: see upstream/watch_route.py.
"""

from __future__ import annotations

from typing import Protocol

from proto.framing import Status
from proto.http2 import Stream
from proxy.listening.calls import CallRefusal, ConnectionHandle, Handler, Headers
from proxy.passthrough.relay import Passthrough
from upstream.connection import ClientConnection
from upstream.watch_route import WATCH_ROUTE, Route, refusal


class WatchServer(Protocol):
    """The part of `WatchClient` that is used here."""

    @property
    def onward(self) -> Route:
        """The address that is tried for watches, and the route from there."""

    def free_connection(self) -> ClientConnection | None:
        """Return a connection to the server in use with a place for a client's call; None while there is none."""


class RouteStatus:
    """The handler factory of Maintenance.Status: passes calls on, those of leaves along the route of the watches."""

    def __init__(self, passthrough: Passthrough, watches: WatchServer, own_id: bytes) -> None:
        self._passthrough = passthrough
        self._watches = watches
        self._own_id = own_id

    def __call__(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> Handler | None:
        """Handle a new call. Raises CallRefusal: UNAVAILABLE in a loop, or without a server."""
        origin = next((value for name, value in headers if name == WATCH_ROUTE), None)
        if origin is None or end_stream:
            return self._passthrough(connection, stream, headers, end_stream)
        if origin == self._own_id:
            raise CallRefusal(200, Status.UNAVAILABLE, refusal(self._own_id.decode()))
        upstream = self._watches.free_connection()
        relay = self._passthrough.relay(connection, stream, headers)
        # Another server's status would be that of another route.
        relay.tries_left = 0
        if upstream is None or not relay.start(upstream):
            raise CallRefusal(200, Status.UNAVAILABLE, refusal(self._own_id.decode(), self._watches.onward))
        self._passthrough.stats.calls += 1
        return relay
