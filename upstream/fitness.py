"""Whether a member serves calls: a learner does not, and neither does a member without a leader.

This is read from Maintenance.Status, which every member answers: when a connection is opened, when the answer to a call
is a reason to check, and repeatedly while a member does not serve. A member whose status does not show it counts as
serving: it may be older, newer, or not an etcd.

Sources: etcd server/etcdserver/api/v3rpc/interceptor.go (what a learner refuses, no leader), maintenance.go (Status);
the texts are those of api/v3rpc/rpctypes/error.go.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from proto import etcd_errors
from proto.fields import ScanError
from proto.framing import Status
from proto.messages import decode_status
from upstream.connection import ClientConnection, NotSent
from upstream.errors import CallFailed
from upstream.heads import IN_A_LOOP
from upstream.unary import call_unary
from upstream.watch_route import LoopOfProxies, RouteIds, parse, unusable

STATUS_PATH: Final = "/etcdserverpb.Maintenance/Status"

_REFUSED_BEFORE: Final = frozenset({etcd_errors.LEARNER, etcd_errors.NO_LEADER})


class Fitness(Enum):
    """Whether a member serves, and if not, why."""

    SERVES = ""
    LEARNER = "it is a learner, which serves no writes and no linearizable reads"
    NO_LEADER = "it has no leader"


def is_refused_unserved(text: str) -> bool:
    """Whether this is the text of a member that refused a call unprocessed: another member may get the call."""
    return text in _REFUSED_BEFORE


def is_suspicious(status: int, text: str) -> bool:
    """Whether an answer is a reason to check if its member serves."""
    suspicious = text in _REFUSED_BEFORE or text.startswith(etcd_errors.TIMED_OUT) or IN_A_LOOP in text
    return suspicious and status in (Status.UNAVAILABLE, Status.FAILED_PRECONDITION)


async def read_fitness(connection: ClientConnection, timeout_s: float, ids: RouteIds) -> Fitness:
    """Read whether the member at the other end of a connection serves; SERVES when it does not answer.

    Raises LoopOfProxies if calls on it come back to this proxy, which has these ids.
    """
    try:
        answer, _ = await call_unary(connection, STATUS_PATH, b"", ids.metadata(False), timeout_s)
        status = decode_status(answer)
    except CallFailed as error:
        where, route = connection.endpoint.text, parse(error.text)
        if route and isinstance(loop := unusable(where, route, ids.calls, False), LoopOfProxies):
            raise loop from None
        return Fitness.SERVES
    except (NotSent, ScanError):
        return Fitness.SERVES
    if not status.version:
        # Not an etcd: a service that answers any call.
        return Fitness.SERVES
    if status.is_learner:
        return Fitness.LEARNER
    return Fitness.SERVES if status.leader else Fitness.NO_LEADER
