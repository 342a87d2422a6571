"""
Whether a member serves calls: a learner does not, nor does one that knows no leader.

Learned from Maintenance.Status, which every member answers: when a connection is made, when an answer to a call says
so, and from time to time while a member does not serve. A member that says nothing of the kind counts as one that
does: it may be older, newer, or no etcd.

Sources: etcd server/etcdserver/api/v3rpc/interceptor.go (what a learner refuses, no leader), maintenance.go (Status);
the texts are those of api/v3rpc/rpctypes/error.go.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

from google.protobuf.message import DecodeError

from proto.framing import Status
from proto.pb import rpc_pb2
from upstream.connection import ClientConnection, NotSent
from upstream.errors import LEARNER_TEXT, NO_LEADER_TEXT, CallFailed
from upstream.unary import call_unary

STATUS_PATH: Final = "/etcdserverpb.Maintenance/Status"

_REFUSED_BEFORE: Final = frozenset({LEARNER_TEXT, NO_LEADER_TEXT})
_TIMED_OUT: Final = "etcdserver: request timed out"


class Fitness(Enum):
    """What a member is good for."""

    SERVES = ""
    LEARNER = "it is a learner, which serves no writes and no linearizable reads"
    NO_LEADER = "it has no leader"


def is_refused_unserved(text: str) -> bool:
    """Tell whether a member refused a call with this text before it did anything: another one may be asked."""
    return text in _REFUSED_BEFORE


def is_suspicious(status: int, text: str) -> bool:
    """Tell whether an answer gives reason to ask its member whether it serves."""
    suspicious = text in _REFUSED_BEFORE or text.startswith(_TIMED_OUT)
    return suspicious and status in (Status.UNAVAILABLE, Status.FAILED_PRECONDITION)


async def read_fitness(connection: ClientConnection, timeout_s: float) -> Fitness:
    """Ask the member at the other end of a connection; SERVES when it does not say."""
    try:
        answer, _ = await call_unary(connection, STATUS_PATH, b"", (), timeout_s)
        status = rpc_pb2.StatusResponse.FromString(answer)
    except (NotSent, CallFailed, DecodeError):
        return Fitness.SERVES
    if not status.version:
        # Not an etcd: a service that answers anything.
        return Fitness.SERVES
    if status.isLearner:
        return Fitness.LEARNER
    return Fitness.SERVES if status.leader else Fitness.NO_LEADER
