"""Where payloads go: the outlets of sessions, and groups of watches ordered by connection.

Work that depends only on the connection is done once per connection of a group, not once per watch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, Protocol

from coalesce.model import GroupWatches, Watch
from proto.http2 import Stream, StreamBatch
from proto.scan import encode_watch_id


class Outlet(Protocol):
    """The destination of a session's answers; `service.WatchCall` is one. The fan-out uses its attributes directly."""

    connection: Any
    """The `listening.connection.ServerConnection`."""

    stream: Stream
    stalled: bool

    def send(self, messages: Sequence[bytes]) -> bool:
        """Send framed control answers; False if the stream is blocked, so that some of them wait."""

    def take_requests(self) -> None:
        """Read the client's requests again, after the session's queue was full."""

    def end(self, status: int, text: str) -> None:
        """End the stream; the session is gone."""


class Output(Protocol):
    """What is queued for all clients; implemented by `listening.write_queue.WriteQueue`, which describes all of it."""

    part: int
    on_written: Callable[[float], None] | None
    since: float
    queued_bytes: int
    corks: int

    def cork(self) -> None: ...
    def uncork(self) -> None: ...
    def relieve(self) -> None: ...


class ConnectionBatch:
    """Watches of a group on one connection, whose ids have the same encoded length, so that their messages do too."""

    __slots__ = ("connection", "ids", "together", "watches")

    def __init__(self, watches: Sequence[Watch]) -> None:
        # Sorted by id, so that each id's messages are encoded once and then repeated.
        self.watches = sorted(watches, key=attrgetter("watch_id"))
        outlets: list[Outlet] = [watch.outlet for watch in self.watches]
        self.connection = outlets[0].connection
        counts = Counter(watch.watch_id for watch in self.watches)
        self.ids = [(watch_id, encode_watch_id(watch_id), count) for watch_id, count in counts.items()]
        """In the form that `Payload.columns` takes, in the order of the watches."""
        self.together = StreamBatch([outlet.stream for outlet in outlets])
        """The streams of the watches, in their order."""


class DeliveryPlan(NamedTuple):
    """A group of watches ordered by connection."""

    runs: list[ConnectionBatch]
    # Watches alone on their connection; batching them gains nothing.
    apart: list[Watch]


_DELIVERED_ONCE = DeliveryPlan([], [])
_ALL_APART = DeliveryPlan([], [])
"""Each watch is alone on its connection, so the group is in the right order as it is: no second list is kept."""


def plan_delivery(watches: Sequence[Watch]) -> DeliveryPlan:
    """Order a group of watches by connection."""
    if len({watch.outlet.connection for watch in watches}) == len(watches):
        return _ALL_APART
    groups: dict[tuple[int, int], list[Watch]] = {}
    for watch in watches:
        outlet: Outlet = watch.outlet
        groups.setdefault((id(outlet.connection), len(encode_watch_id(watch.watch_id))), []).append(watch)
    runs = [ConnectionBatch(group) for group in groups.values() if len(group) > 1]
    return DeliveryPlan(runs, [group[0] for group in groups.values() if len(group) == 1])


def plan_of(watches: Sequence[Watch]) -> DeliveryPlan | None:
    """Return the delivery plan of a group, from the second delivery to the same watches on.

    None: the payload is delivered watch by watch. The watches are all on different connections, or are listed for one
    delivery. The plan stays valid for as long as the tuple exists, since the attributes of watches and outlets that it
    is made from never change.
    """
    if type(watches) is not GroupWatches:
        return None
    plan = watches.shell
    if plan is None:
        watches.shell = _DELIVERED_ONCE
        return None
    if plan is _DELIVERED_ONCE:
        plan = watches.shell = plan_delivery(watches)
    assert isinstance(plan, DeliveryPlan), "only this module sets it"
    return None if plan is _ALL_APART else plan


def on_distinct_connections(watches: Sequence[Watch]) -> bool:
    """Whether all of the watches are on different connections; of a large group this is known once it has a plan."""
    if type(watches) is GroupWatches:
        return watches.shell is _ALL_APART
    return len({watch.outlet.connection for watch in watches}) == len(watches)
