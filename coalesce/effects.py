"""Effects, the return value of every input: what the shell has to do.

The shell carries them out in the order of their list, before the next input. There are no callbacks: each answer is an
input of its own (`revision_read`, `permission`, `upstream_response`, ...).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from coalesce.batch import Payload
from coalesce.model import PendingCreate, PendingRead, Session, Upstream, Watch


@dataclass(slots=True, eq=False)
class Deliver:
    """Send one payload to many watches: the fan-out.

    For each watch the shell writes `payload.pieces(watch.watch_id)` to `watch.outlet`. When a write is incomplete, the
    outlet queues the rest and the payload counts as delivered; the shell calls `stalled(watch.session)` at once. For a
    watch of a session that is stalled, it calls `undelivered(watch, payload)` instead of writing.
    """

    payload: Payload
    watches: Sequence[Watch]


@dataclass(slots=True, eq=False)
class Send:
    """Send control answers on a session, after everything sent to it before, even when it is stalled.

    Each of the messages is an encoded WatchResponse after its 5 byte gRPC prefix, as in a payload. Answers that follow
    each other on a session are one effect.
    """

    session: Session
    messages: list[bytes]


@dataclass(slots=True, eq=False)
class TakeRequests:
    """Read requests of a session again: its queue is short, after `Session.line_full` was True.

    Waiting for it is optional; a session whose shell does not wait ends at `queue_max`.
    """

    session: Session


@dataclass(slots=True, eq=False)
class EndSession:
    """End a session's stream with a gRPC status. The core has forgotten the session already."""

    session: Session
    status: int
    text: str


@dataclass(slots=True, eq=False)
class OpenUpstream:
    """Open an upstream watch with the attributes of `upstream`; its answers come by `upstream_response`."""

    upstream: Upstream


@dataclass(slots=True, eq=False)
class CloseUpstream:
    """Cancel an upstream watch. The shell may drop later responses; the core ignores them."""

    upstream: Upstream


@dataclass(slots=True, eq=False)
class PauseUpstream:
    """Stop reading a backfill's stream, since its sessions are too slow. Bytes already read may still be passed in."""

    upstream: Upstream


@dataclass(slots=True, eq=False)
class ResumeUpstream:
    """Resume reading a paused backfill."""

    upstream: Upstream


@dataclass(slots=True, eq=False)
class ReadRevision:
    """Read the store's revision, linearizable, by a call that begins now; answer with `revision_read(read, ...)`."""

    read: PendingRead


@dataclass(slots=True, eq=False)
class CheckPermission:
    """Check whether check.session.identity may read [check.key, check.range_end); answer with `permission`.

    The shell may answer within the same turn, as the next input, when it knows that auth is off.
    """

    check: PendingCreate


@dataclass(slots=True, eq=False)
class RequestProgress:
    """Request manual progress from etcd on the streams of `upstreams` only.

    Where progress is not ordered, `upstreams` is empty: the request is for the store's revision only, on any stream.
    Answers come by `upstream_progress`, or never (etcd drops requests it cannot answer). The shell does not retry: the
    core asks again by itself. `number` identifies the request: an answer is at least as new as the request it names.
    """

    upstreams: tuple[Upstream, ...]
    number: int


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
