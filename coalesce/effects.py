"""What the core asks its shell to do: the return value of every input.

Effects are carried out in the order of their list, before the next input. Nothing in them is a callback: an answer
comes back as an input of its own (`revision_read`, `permission`, `received`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from coalesce.batch import Payload
    from coalesce.joining import PendingRead
    from coalesce.session import PendingCreate, Session, Watch
    from coalesce.source import Upstream


class Deliver:
    """Send one payload to many watches: the fan-out.

    For each watch the shell writes `payload.pieces(watch.watch_id)` to `watch.outlet`. When a write does not go out
    whole, the rest is queued there and the payload counts as delivered: the shell calls `stalled(watch.session)` at
    once. For a watch whose session has stalled earlier, while the same list of effects was carried out, it calls
    `returned(watch, payload)` instead of writing.
    """

    __slots__ = ("payload", "watches")

    def __init__(self, payload: Payload, watches: Sequence[Watch]) -> None:
        self.payload = payload
        self.watches = watches


class Send:
    """Send a control answer on a session, after everything sent to it before, also when it is stalled.

    `message` is one encoded WatchResponse behind its 5 byte gRPC prefix, as the messages of a payload are.
    """

    __slots__ = ("message", "session")

    def __init__(self, session: Session, message: bytes) -> None:
        self.session = session
        self.message = message


class TakeRequests:
    """The line of a session is short again: hand in what its client asks, after `Session.line_full` was True.

    A shell that does not wait is not wrong; its client ends at `queue_max`.
    """

    __slots__ = ("session",)

    def __init__(self, session: Session) -> None:
        self.session = session


class EndSession:
    """End a session's stream with a gRPC status. The core has forgotten the session already."""

    __slots__ = ("session", "status", "text")

    def __init__(self, session: Session, status: int, text: str) -> None:
        self.session = session
        self.status = status
        self.text = text


class OpenUpstream:
    """Open an upstream watch with the attributes of `upstream`; its answers come back by `received`."""

    __slots__ = ("upstream",)

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream


class CloseUpstream:
    """Cancel an upstream watch; what it still sends may be dropped, and is ignored if it is not."""

    __slots__ = ("upstream",)

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream


class PauseUpstream:
    """Stop reading a backfill's stream: its sessions take no more. What is already read may still be handed in."""

    __slots__ = ("upstream",)

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream


class ResumeUpstream:
    """Read a paused backfill on."""

    __slots__ = ("upstream",)

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream


class ReadRevision:
    """Read the store's revision, linearizable, by a call that begins now; answer with `revision_read(read, ...)`."""

    __slots__ = ("read",)

    def __init__(self, read: PendingRead) -> None:
        self.read = read


class CheckPermission:
    """Find out whether check.session.identity may read [check.key, check.range_end); answer with `permission`.

    The shell may answer within the same turn, as the next input, when it knows that auth is off.
    """

    __slots__ = ("check",)

    def __init__(self, check: PendingCreate) -> None:
        self.check = check


class RequestProgress:
    """Ask etcd for manual progress on the streams of `upstreams`, and on no others; where progress is not ordered
    (`upstreams` is empty) for nothing but its revision, on any stream. Answers come by `progressed`, or never (etcd
    drops requests it cannot answer). The core asks again by itself; nothing is to be retried. `number` says later which
    request an answer is at least as new as."""

    __slots__ = ("number", "upstreams")

    def __init__(self, upstreams: tuple[Upstream, ...], number: int) -> None:
        self.upstreams = upstreams
        self.number = number


Effect: TypeAlias = (
    Deliver
    | Send
    | TakeRequests
    | EndSession
    | OpenUpstream
    | CloseUpstream
    | PauseUpstream
    | ResumeUpstream
    | ReadRevision
    | CheckPermission
    | RequestProgress
)
