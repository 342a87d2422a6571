"""The data model of permission checks and reads: queries, the calls made for them, and effects.

A *query* is a question to be answered by etcd. A *call* is one transaction at etcd that executes nothing; it is made
for a query and retried until etcd answers or refuses it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coalesce.inputs import CreateRefusal, Granted
from proto.etcd_errors import reason_of
from proto.scan import Header
from proxy.auth.restore import AuthScope, ReadBaseline

if TYPE_CHECKING:
    from coalesce.model import PendingCreate, PendingRead, Session

Range = tuple[bytes, bytes]
"""Key and range_end."""

Outcome = Granted | Header | CreateRefusal


class Query:
    """A question to etcd that is retried for as long as its answer is wanted."""

    __slots__ = ()

    @property
    def wanted(self) -> bool:
        """Whether the answer is still needed."""
        return True


class PermissionCheck(Query):
    """A check whether a client may watch a range; `create` is None for a check that the proxy makes itself."""

    __slots__ = ("asked", "create", "fresh", "number")

    def __init__(self, asked: AuthScope, create: PendingCreate | None = None) -> None:
        self.asked = asked
        self.create = create
        # Requested before the probe in flight began.
        self.fresh = False
        # Sequence number of its arrival; see `Checks`.
        self.number = 0

    @classmethod
    def of(cls, create: PendingCreate) -> PermissionCheck:
        """Return the check of a client's create."""
        return cls(AuthScope(create.session.identity.token, create.key, create.range_end), create)

    @property
    def range(self) -> Range:
        """The range."""
        return self.asked.key, self.asked.range_end

    @property
    def session(self) -> Session | None:
        """The session of the client, if there is one."""
        return None if self.create is None else self.create.session

    @property
    def wanted(self) -> bool:
        """Whether the client's session is still open."""
        session = self.session
        return session is None or not session.ended

    def outcome(self, outcome: Outcome) -> list[QueryEffect]:
        """Return the effects of the answer."""
        return [AnswerCheck(self, outcome)]

    def end(self, status: int, text: str) -> list[QueryEffect]:
        """Return the effects of a failure for which etcd would end the client's stream."""
        session = self.session
        return (
            [AnswerCheck(self, refusal_of(status, text))] if session is None else [RefuseSession(session, status, text)]
        )


class Recheck(PermissionCheck):
    """A check whether a session that was admitted while auth seemed to be off may watch a range."""

    __slots__ = ("_session",)

    def __init__(self, session: Session, asked: AuthScope) -> None:
        super().__init__(asked)
        self._session = session

    @property
    def session(self) -> Session:
        """The session that was admitted."""
        return self._session

    def outcome(self, outcome: Outcome) -> list[QueryEffect]:
        """Return no effect if permission is granted; otherwise the session has to reconnect."""
        return [DisconnectSession(self._session, outcome)] if isinstance(outcome, CreateRefusal) else []


class AuthCall:
    """One transaction that executes nothing, or, as a `login`, an attempt to log in as a user that does not exist."""

    __slots__ = ("backoff", "began_at", "begun", "linearizable", "login", "query", "ranges", "token")

    def __init__(self, query: Query, token: bytes | None, ranges: tuple[Range, ...], *, login: bool = False) -> None:
        """`ranges`: the ranges to check; none: a read that needs no permission and returns one member's state."""
        self.query = query
        self.token = token
        self.ranges = ranges
        self.login = login
        self.linearizable = True
        # The delay before the next retry; used only by the code that does the I/O.
        self.backoff: Any = None
        # Set by `Queries.begin`.
        self.begun = ReadBaseline(0, 0)
        self.began_at = 0.0

    @classmethod
    def by(cls, query: Query, asked: AuthScope) -> AuthCall:
        """Return a call with the token and the range of an `AuthScope`."""
        return cls(query, asked.token, (asked[1:],))


@dataclass(slots=True)
class SendCall:
    """Make a call: now, or `later`, after a delay that grows with each failure of this call."""

    call: AuthCall
    later: bool = False


@dataclass(slots=True)
class AnswerCheck:
    """A permission check has its outcome."""

    check: PermissionCheck
    outcome: Outcome


@dataclass(slots=True)
class AnswerRead:
    """A read of the revision is answered."""

    read: PendingRead
    header: Header


@dataclass(slots=True)
class DisconnectSession:
    """Disconnect a session that was admitted while auth was off or whose permission was revoked.

    It has to reconnect, to be checked again.
    """

    session: Session
    refusal: CreateRefusal


@dataclass(slots=True)
class RefuseSession:
    """End a session for a request for which etcd would end its stream as well."""

    session: Session
    status: int
    text: str


@dataclass(slots=True)
class RevisionRegressed:
    """Report that the store's revision went backwards."""

    header: Header
    known: int


QueryEffect = SendCall | AnswerCheck | AnswerRead | DisconnectSession | RefuseSession | RevisionRegressed


def refusal_of(status: int, text: str) -> CreateRefusal:
    """Return a failure in the words of etcd's watch server in a cancel_reason (Go's status.Error)."""
    return CreateRefusal(reason_of(status, text))
