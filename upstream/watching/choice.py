"""Which server carries the watches, and when to leave it: decided from servers' answers, without I/O.

No leader. Streams require a leader (`hasleader`), so that a member cut off from its cluster ends them instead of
staying silent. Then the other endpoints are tried. When every endpoint has failed, at least one of them for lack of a
leader, watches continue without `hasleader`, as events may still arrive, until an endpoint with a leader is found.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from enum import Enum
from typing import Final, Protocol

from proto import etcd_errors
from proto.framing import Status
from upstream.watching.stream import StreamEndAction

# Statuses of a server that shuts down and of a lost connection; one create may be the cause of any other status.
_SERVERS: Final = frozenset({Status.OK, Status.CANCELLED, Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED})


class SearchGoal(Enum):
    """What kind of server to look for in place of the one in use."""

    NOTHING = "the one in use is good enough"
    LEADER = "one that has a leader"
    ENDPOINT = "one that is in the list of endpoints"
    SOURCE = "a proxy that has a server for its own watches"


class EndpointHealth(Protocol):
    """What is known about an endpoint since the current search began."""

    # It has failed.
    tried: bool
    # Its last answer was that it has no leader.
    leaderless: bool
    # Its last answer was that it has no Watch service.
    unimplemented: bool


class EndedStream(Protocol):
    """What the decision needs from a stream that ended: `WatchStream`."""

    @property
    def token(self) -> bytes | None: ...

    # The server has answered a create on it.
    @property
    def answered(self) -> bool: ...

    # It began with a probe, a create that belongs to no watch.
    @property
    def tested(self) -> bool: ...

    @property
    def unanswered(self) -> Sequence[Unanswered]: ...

    # Its creates that were sent and not answered.
    @property
    def creating(self) -> Sized: ...


class Unanswered(Protocol):
    """A watch whose create was not answered."""

    # Consecutive times before this one.
    ends: int


class EndpointPolicy:
    """Which servers are acceptable."""

    def __init__(self) -> None:
        # No endpoint has a leader: watches are opened without `hasleader`.
        self.leaderless = False
        # The server in use is a proxy that has no server for its own watches.
        self.cut_off = False

    def is_acceptable(self, has_leader: bool) -> bool:
        """Whether a server can be used."""
        return has_leader or self.leaderless

    def is_better(self, wanted: SearchGoal, has_leader: bool) -> bool:
        """Whether a server can replace the one in use."""
        return has_leader if wanted is SearchGoal.LEADER else self.is_acceptable(has_leader)

    def used(self, has_leader: bool) -> None:
        """Record that a server is in use from now on."""
        self.cut_off = False
        if has_leader:
            self.leaderless = False

    def wanted(self, is_endpoint: bool) -> SearchGoal:
        """What to look for while a server is in use, given whether it is still in the list of endpoints."""
        if self.leaderless:
            return SearchGoal.LEADER
        if self.cut_off:
            return SearchGoal.SOURCE
        return SearchGoal.NOTHING if is_endpoint else SearchGoal.ENDPOINT

    def failed(self, endpoints: Iterable[EndpointHealth], in_use: bool) -> bool:
        """Record a failed attempt. Return whether it is now known that no endpoint has a leader."""
        if self.leaderless or in_use:
            return False
        known = list(endpoints)
        self.leaderless = all(each.tried for each in known) and any(each.leaderless for each in known)
        return self.leaderless


def on_stream_end(
    stream: EndedStream,
    status: int,
    text: str,
    server: EndpointHealth,
    endpoints: Iterable[EndpointHealth],
    *,
    moved: bool,
    healthy: bool,
    works: bool,
    streams: Iterable[EndedStream],
) -> StreamEndAction:
    """Decide what to do after a stream at `server` ended with a status.

    `moved`: the stream ended because its connection did; `healthy`: there is another connection to the server; `works`:
    the server has answered a create since it is in use, on any stream; `streams`: the streams at the server.
    """
    if etcd_errors.is_auth_refusal(status, text):
        return StreamEndAction.LOST
    if status == Status.UNIMPLEMENTED:
        server.unimplemented = True
        if all(each.unimplemented for each in endpoints):
            return StreamEndAction.LOST
    if stream.answered:
        server.unimplemented = False
    if not healthy:
        return StreamEndAction.NOTHING
    if status == Status.UNAVAILABLE and text == etcd_errors.NO_LEADER:
        server.leaderless = True
        return StreamEndAction.ELSEWHERE
    if moved:
        return StreamEndAction.MOVED
    if status == Status.UNIMPLEMENTED:
        return StreamEndAction.HERE if stream.answered else StreamEndAction.ELSEWHERE
    of_server = status in _SERVERS
    if stream.tested and not stream.answered:
        # Not even the probe was answered: no watch's create is the cause.
        if stream.token is not None and not of_server:
            if works:
                return StreamEndAction.TOKEN
            if any(each.token != stream.token and each.creating for each in streams):
                # The answer to another token will show whether the server works: this token does not disconnect others.
                return StreamEndAction.HERE
    elif any(not of_server or (works and each.ends) for each in stream.unanswered):
        return StreamEndAction.APART
    return StreamEndAction.HERE if works else StreamEndAction.ELSEWHERE
