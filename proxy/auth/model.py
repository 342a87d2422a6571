"""What is asked of etcd, and what is to be done: the questions, the calls that are made for them, and the effects.

A *question* is what somebody wants to know. A *call* is one transaction at etcd that executes nothing, made for a
question, again and again until it is answered or refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from coalesce.inputs import CreateRefusal, Granted
from proto.framing import Status
from proto.scan import Header
from proxy.auth.restore import AuthScope, ReadBaseline
from upstream.errors import status_name

if TYPE_CHECKING:
    from coalesce.session import PendingCreate, Session

Range = tuple[bytes, bytes]
"""Key and range_end."""

Outcome = Granted | Header | CreateRefusal
AnswerCallback = Callable[[Outcome], None]


class Query:
    """Something that is asked for as long as somebody wants to know it."""

    __slots__ = ("told",)

    def __init__(self, told: AnswerCallback | None = None) -> None:
        # Free for the code that does the I/O: where the answer goes.
        self.told = told

    @property
    def wanted(self) -> bool:
        """The answer is still waited for."""
        return True


class PermissionCheck(Query):
    """Whether a client may watch a range; `create` is None when it is not a client that asks."""

    __slots__ = ("asked", "create", "fresh", "number")

    def __init__(
        self, asked: AuthScope, create: PendingCreate | None = None, told: AnswerCallback | None = None
    ) -> None:
        super().__init__(told)
        self.asked = asked
        self.create = create
        # It came before the probe in flight began.
        self.fresh = False
        # Of its arrival among the checks; see `checks`.
        self.number = 0

    @property
    def session(self) -> Session | None:
        """The session that asks, if one does."""
        return None if self.create is None else self.create.session

    @property
    def wanted(self) -> bool:
        """The client is still there."""
        session = self.session
        return session is None or not session.ended

    def outcome(self, outcome: Outcome) -> list[QueryEffect]:
        """Return what the answer leads to."""
        return [DeliverAnswer(self, outcome)]

    def end(self, status: int, text: str) -> list[QueryEffect]:
        """Return what a failure leads to by which etcd would end the stream of the client."""
        session = self.session
        return (
            [DeliverAnswer(self, refusal_of(status, text))]
            if session is None
            else [RefuseSession(session, status, text)]
        )


class Recheck(PermissionCheck):
    """Whether a session that was let in while auth seemed to be off may watch a range."""

    __slots__ = ("_session",)

    def __init__(self, session: Session, asked: AuthScope) -> None:
        super().__init__(asked)
        self._session = session

    @property
    def session(self) -> Session:
        """The session that was let in."""
        return self._session

    def outcome(self, outcome: Outcome) -> list[QueryEffect]:
        """It goes on, or has to come again."""
        return [DisconnectSession(self._session, outcome)] if isinstance(outcome, CreateRefusal) else []


class Call:
    """One transaction that executes nothing, or, as a `login`, an attempt to log in as a user that does not exist."""

    __slots__ = ("backoff", "began_at", "begun", "linearizable", "login", "question", "ranges", "token")

    def __init__(self, question: Query, token: bytes | None, ranges: tuple[Range, ...], *, login: bool = False) -> None:
        """`ranges`: what is to be permitted; none: a read that needs no right, and tells what one member knows."""
        self.question = question
        self.token = token
        self.ranges = ranges
        self.login = login
        self.linearizable = True
        # Free for the code that does the I/O: how long it waits before it makes the call again.
        self.backoff: Any = None
        # Set by `Queries.begin`.
        self.begun = ReadBaseline(0, 0)
        self.began_at = 0.0

    @classmethod
    def by(cls, question: Query, asked: AuthScope) -> Call:
        """Return a call by somebody's right."""
        return cls(question, asked.token, (asked[1:],))


class SendCall(NamedTuple):
    """Make a call: now, or `later`, after a while that grows with each failure of this call."""

    call: Call
    later: bool = False


class DeliverAnswer(NamedTuple):
    """A question is answered."""

    question: Query
    outcome: Outcome


class DisconnectSession(NamedTuple):
    """A session was let in while auth was off, or its right is gone since: it has to come again and be checked."""

    session: Session
    refusal: CreateRefusal


class RefuseSession(NamedTuple):
    """A session sent what ends its stream at etcd as well."""

    session: Session
    status: int
    text: str


class RevisionRegressed(NamedTuple):
    """The store is older than it was."""

    header: Header
    known: int


QueryEffect = SendCall | DeliverAnswer | DisconnectSession | RefuseSession | RevisionRegressed

_NAMES: Final = {
    Status.PERMISSION_DENIED: "PermissionDenied",
    Status.UNAUTHENTICATED: "Unauthenticated",
    Status.INVALID_ARGUMENT: "InvalidArgument",
}


def refusal_of(status: int, text: str) -> CreateRefusal:
    """Return a failure as etcd's watch server words it in a cancel_reason (Go's status.Error)."""
    name = _NAMES.get(status) or status_name(status).title().replace("_", "")  # type: ignore[call-overload]
    return CreateRefusal(f"rpc error: code = {name} desc = {text}")
