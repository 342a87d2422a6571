"""Where payloads leave the engine: the outlets of sessions, and groups of watches in order by connection.

What a group's watches have in common by their connections is done once for each connection, not for each watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from coalesce.session import Watch
from proto.http2 import Stream


class Outlet(Protocol):
    """Where a session's answers leave; `watch.WatchCall` is one. The fan-out uses its attributes directly."""

    connection: Any
    """The `listening.connection.ServerConnection`."""

    stream: Stream
    stalled: bool

    def send(self, message: bytes) -> bool:
        """Send one framed control answer; False when it waits because the stream is blocked."""

    def end(self, status: int, text: str) -> None:
        """End the stream; the session is gone."""


class Run:
    """Watches of a group that are on one connection under one id: they are sent the very same bytes."""

    __slots__ = ("connection", "streams", "watch_id", "watches")

    def __init__(self, connection: Any, watch_id: int) -> None:
        self.connection = connection
        self.watch_id = watch_id
        self.watches: list[Watch] = []
        self.streams: list[Stream] = []
        """Of the watches, in their order; all different, since a stream has an id only once."""


def runs_of(watches: Sequence[Watch]) -> list[Run]:
    """Put a group of watches in order by connection and id."""
    runs: dict[tuple[int, int], Run] = {}
    for watch in watches:
        outlet: Outlet = watch.outlet  # type: ignore[assignment]  # an object to the core, ours by open_session
        key = (id(outlet.connection), watch.watch_id)
        run = runs.get(key)
        if run is None:
            run = runs[key] = Run(outlet.connection, watch.watch_id)
        run.watches.append(watch)
        run.streams.append(outlet.stream)
    return list(runs.values())


def are_apart(watches: Sequence[Watch]) -> bool:
    """Whether these are all on different connections."""
    return len({watch.outlet.connection for watch in watches}) == len(watches)  # type: ignore[attr-defined]  # as above
