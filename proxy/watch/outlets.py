"""Where payloads leave the engine: the outlets of sessions, and groups of watches in order by connection.

What a group's watches have in common by their connections is done once for each connection, not for each watch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from coalesce.session import Watch
from proto.http2 import Stream, StreamBatch
from proto.scan import encode_watch_id


class Outlet(Protocol):
    """Where a session's answers leave; `watch.WatchCall` is one. The fan-out uses its attributes directly."""

    connection: Any
    """The `listening.connection.ServerConnection`."""

    stream: Stream
    stalled: bool

    def send(self, message: bytes) -> bool:
        """Send one framed control answer; False when it waits because the stream is blocked."""

    def take_requests(self) -> None:
        """Go on with what the client asks, after the session's line was full."""

    def end(self, status: int, text: str) -> None:
        """End the stream; the session is gone."""


class ConnectionBatch:
    """Watches of a group that are on one connection, under ids of one length: what they are sent has the same size."""

    __slots__ = ("connection", "ids", "together", "watches")

    def __init__(self, watches: Sequence[Watch]) -> None:
        # By id, so that each id's messages are made once and then repeated.
        self.watches = sorted(watches, key=attrgetter("watch_id"))
        outlets: list[Outlet] = [watch.outlet for watch in self.watches]  # type: ignore[misc]  # as below
        self.connection = outlets[0].connection
        counts = Counter(watch.watch_id for watch in self.watches)
        self.ids = [(watch_id, encode_watch_id(watch_id), count) for watch_id, count in counts.items()]
        """As `Payload.columns` takes them, in the order of the watches."""
        self.together = StreamBatch([outlet.stream for outlet in outlets])
        """The streams of the watches, in their order."""


class DeliveryPlan(NamedTuple):
    """A group of watches in order by connection."""

    runs: list[ConnectionBatch]
    # Those that are the only ones on their connection: a run would be nothing but more work.
    apart: list[Watch]


def plan_delivery(watches: Sequence[Watch]) -> DeliveryPlan:
    """Put a group of watches in order by connection."""
    groups: dict[tuple[int, int], list[Watch]] = {}
    for watch in watches:
        outlet: Outlet = watch.outlet  # type: ignore[assignment]  # an object to the core, ours by open_session
        groups.setdefault((id(outlet.connection), len(encode_watch_id(watch.watch_id))), []).append(watch)
    runs = [ConnectionBatch(group) for group in groups.values() if len(group) > 1]
    return DeliveryPlan(runs, [group[0] for group in groups.values() if len(group) == 1])


def on_distinct_connections(watches: Sequence[Watch]) -> bool:
    """Whether these are all on different connections."""
    return len({watch.outlet.connection for watch in watches}) == len(watches)  # type: ignore[attr-defined]  # as above
