"""The engine's queries to etcd apart from watches, and the effects of their answers. Pure: it makes no calls itself.

The queries: which revision is "now" (`RevisionRead`), whether a client may watch a range (`PermissionCheck`), whether
auth is on (`AuthProbe`), and whether the store is still the same (`RestoreCheck`). The calls are made by the code that
carries out the effects: `proxy/auth/reads.py`, or the simulator.

etcd does not report without permission whether auth is on. So it is probed by a call without a token: if the call is
answered, auth is off and everything is allowed; if it is refused, each client is checked with its own token
(`permission_checks`). One probe, not older than `probe_age_s_max`, serves all clients.

Answers are linearizable. Only while no endpoint has a leader, as known from the watch client, is one member's own
answer accepted, for two queries: for "now", which is then at least the revision known here, and for a probe, until the
next linearizable probe. Such an answer never grants a permission: a member that lags may not know that it was revoked.
These creates wait for a leader, without which nothing can be written either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

from coalesce.inputs import CreateRefusal, Granted
from proto import etcd_errors
from proto.framing import Status
from proto.scan import Header
from proxy.auth.admitted import AdmittedSessions
from proxy.auth.model import (
    AnswerCheck,
    AnswerRead,
    AuthCall,
    DisconnectSession,
    PermissionCheck,
    Query,
    QueryEffect,
    Range,
    Recheck,
    RefuseSession,
    RevisionRegressed,
    SendCall,
    refusal_of,
)
from proxy.auth.permission_checks import CheckBatch, Checks
from proxy.auth.restore import AuthorizedRange, AuthScope, RestoreDetector
from upstream.attempts import is_about_request, is_too_large

if TYPE_CHECKING:
    from coalesce.model import PendingCreate, PendingRead, Session

NO_RIGHT: Final = ()
"""The ranges of a read that needs no permission and returns one member's state: an empty transaction."""

CHECKS_IN_FLIGHT_MAX: Final = 32


class RevisionRead(Query):
    """A read of the current revision, for the creates that wait for a read of the core."""

    __slots__ = ("_refused", "asking", "read")

    def __init__(self, read: PendingRead) -> None:
        self.read = read
        # The session whose token is used; None: the read needs no client's token.
        self.asking: Session | None = None
        # Ids of the sessions whose tokens were refused.
        self._refused: set[int] = set()

    def asker(self, auth_on: bool) -> AuthCall | None:
        """Choose which client's token to read with; None if no client is waiting. With auth off none is needed."""
        self.asking = None
        waiting = self._waiting()
        first = next(waiting, None)
        if first is None:
            return None
        if not auth_on:
            return AuthCall.by(self, AuthScope())
        permitted = [create for create in (first, *waiting) if create.refusal is None]
        if not permitted:
            # All are refused already and only need a header for the refusal.
            return AuthCall(self, None, NO_RIGHT)
        create = next((create for create in permitted if create.session.identity.token is not None), permitted[0])
        self.asking = create.session
        return AuthCall(self, create.session.identity.token, ((create.key, create.range_end),))

    def _waiting(self) -> Iterator[PendingCreate]:
        """Walk the creates whose clients still wait."""
        for create in self.read.waiting:
            if not create.session.ended and id(create.session) not in self._refused:
                yield create

    def refused(self, whole_token: bool) -> list[Session]:
        """Return the sessions to refuse, since the token used was refused; they are left out of further reads.

        `whole_token`: the token is invalid, so all sessions with the same token are refused.
        """
        asking = self.asking
        if asking is None:
            return []
        sessions = {id(asking): asking}
        if whole_token:
            for create in self.read.waiting:
                if create.session.identity.token == asking.identity.token and not create.session.ended:
                    sessions[id(create.session)] = create.session
        self._refused |= sessions.keys()
        return list(sessions.values())


class RestoreCheck(Query):
    """A check whether the store is still the same; only `RestoreDetector` uses the answer."""

    __slots__ = ("_rollback",)

    def __init__(self, rollback: RestoreDetector) -> None:
        self._rollback = rollback

    @property
    def wanted(self) -> bool:
        """Whether it has not been proven by another read."""
        return self._rollback.unproven


class AuthProbe(Query):
    """A probe whether auth is on, for all checks that wait for it."""

    __slots__ = ("waiting",)

    def __init__(self) -> None:
        self.waiting: list[PermissionCheck] = []

    @property
    def wanted(self) -> bool:
        """Drop the checks that are no longer wanted; return whether any is left."""
        self.waiting = [check for check in self.waiting if check.wanted]
        return bool(self.waiting)


class Queries:
    """All open queries. Inputs return effects, in order."""

    def __init__(self, probe_age_s_max: float, checks_in_flight_max: int = CHECKS_IN_FLIGHT_MAX) -> None:
        """`probe_age_s_max`: how long, in seconds, the answer "auth is off" is used."""
        self.rollback = RestoreDetector()
        self.checks = Checks(checks_in_flight_max)
        # The newest probe was refused: etcd requires users.
        self.auth_on = False
        # The proxy's certificate has a CN, which etcd with auth on may take as the user of a probe without a token.
        self.named = False
        self._probe_age_s_max = probe_age_s_max
        # When the newest probe that found auth off began, and its header.
        self._auth_off: tuple[float, Header] | None = None
        # The probe in flight.
        self._probe: AuthProbe | None = None
        self._let_in = AdmittedSessions()

    def read(self, now: RevisionRead) -> list[QueryEffect]:
        """Read the current revision, once for all creates that wait.

        With auth on it is read with the token of one of them: etcd has no linearizable read that needs no permission.
        """
        call = now.asker(self.auth_on)
        # The core waits for an answer even if no client does; the empty header carries no information.
        return [SendCall(call) if call is not None else AnswerRead(now.read, Header.make(0, 0, 0, 0))]

    def check(self, check: PermissionCheck, at: float) -> list[QueryEffect]:
        """Start a permission check. The answer is a refusal, or the header that was read.

        The header is in a `Granted` if the read began after this call, so that it is valid as "now"; bare if an earlier
        probe read it.
        """
        if self.auth_on and check.asked.token is not None:
            return self.checks.add(check)
        header = self.admit(check.session, check.range, at)
        if header is not None:
            return [AnswerCheck(check, header)]
        if self._probe is not None:
            self._probe.waiting.append(check)
            return []
        self._probe = AuthProbe()
        self._probe.waiting.append(check)
        return [SendCall(AuthCall(self._probe, None, (AuthScope()[1:],), login=self.named))]

    def admit(self, session: Session | None, range_: Range, at: float) -> Header | None:
        """Admit a watch if a recent probe has found auth off, and return the header that the probe read; else None.

        `session`: None for a check that the proxy makes itself.
        """
        if self._auth_off is None or at - self._auth_off[0] > self._probe_age_s_max:
            return None
        self._let_in.add(session, range_)
        return self._auth_off[1]

    def broken(self) -> None:
        """The connection for the watches was lost: a new probe shows whether the store behind the next one is older."""
        self._auth_off = None

    def connected(self) -> None:
        """There is a new connection for the watches; call `prove` until the store behind it is known."""
        self.rollback.connected()

    def prove(self, own_token: bytes | None, watches: Iterable[AuthorizedRange]) -> list[QueryEffect]:
        """Read with the candidate scopes of `RestoreDetector` to find out whether the store is still the same."""
        rights = self.rollback.candidate_scopes(own_token, watches)
        if not self.auth_on:
            # With auth off no permission is needed, so a client's range is not read.
            rights = [AuthScope() if asked.token is None else asked for asked in rights]
        return [SendCall(AuthCall.by(RestoreCheck(self.rollback), asked)) for asked in rights]

    def other_history(self, header: Header) -> None:
        """The store has been replaced: earlier answers prove nothing about the new one."""
        self.rollback.other_history(header)
        self._auth_off = None

    def session_over(self, session: Session) -> None:
        """Forget a session that has ended."""
        self._let_in.forget(session)

    def begin(self, call: AuthCall, known: int, at: float) -> None:
        """A call is sent now; `known` is the newest revision that the watches have seen."""
        call.begun, call.began_at = self.rollback.begin(known), at
        query = call.query
        if isinstance(query, AuthProbe):
            self._let_in.probe_began()
            for check in query.waiting:
                check.fresh = True
        elif isinstance(query, CheckBatch):
            self.checks.sent(query)

    def answered(self, call: AuthCall, header: Header) -> list[QueryEffect]:
        """etcd answered a call."""
        query = call.query
        if call.login:
            # etcd accepted a user that does not exist, which proves nothing: probe without logging in.
            return [SendCall(AuthCall(query, call.token, call.ranges))]
        if self.rollback.is_stale(call.begun):
            # The answer may come from the store before the restore, so its revision is not valid here.
            return [SendCall(call)]
        linearizable = call.linearizable and call.ranges != NO_RIGHT
        effects: list[QueryEffect] = []
        if self.rollback.answered(call.begun, header, linearizable):
            effects.append(RevisionRegressed(header, call.begun.known))
            self._auth_off = None
        elif not linearizable and header.revision < call.begun.known:
            # The member lags: the revision known here is newer.
            header = header.at(call.begun.known)
        if isinstance(query, RevisionRead):
            effects.append(AnswerRead(query.read, header))
        elif isinstance(query, CheckBatch):
            effects += self.checks.granted(query, header)
        elif isinstance(query, AuthProbe):
            if self.auth_on and not linearizable:
                # Auth was on in the last linearizable answer; this member may lag and not know it.
                call.linearizable = True
                return [*effects, SendCall(call, later=True)]
            effects += self._probed(query, call, header)
        return effects

    def failed(self, call: AuthCall, status: int, text: str, *, leaderless: bool = False) -> list[QueryEffect]:
        """etcd refused a call, or the call failed at every endpoint; `leaderless`: no endpoint has a leader."""
        query = call.query
        if call.login:
            if status == Status.INVALID_ARGUMENT and isinstance(query, AuthProbe):
                return self._probed(query, call, refusal_of(Status.INVALID_ARGUMENT, etcd_errors.USER_EMPTY))
            return [SendCall(AuthCall(query, call.token, call.ranges))]
        if isinstance(query, CheckBatch):
            return self.checks.failed(query, status, text)
        if is_about_request(status, text):
            return self._refused(query, call, status, text)
        if leaderless and call.linearizable and isinstance(query, RevisionRead | AuthProbe):
            call.linearizable = False
            return [SendCall(call)]
        call.linearizable = True
        return [SendCall(call, later=True)]

    def again(self, call: AuthCall) -> list[QueryEffect]:
        """The delay after a failure is over: retry the call if its answer is still wanted."""
        query = call.query
        if isinstance(query, CheckBatch):
            return self.checks.again(query)
        if isinstance(query, RevisionRead):
            # With another client's token, if the first client has left.
            effects = self.read(query)
            for effect in effects:
                if isinstance(effect, SendCall):
                    effect.call.backoff = call.backoff
            return effects
        if query.wanted:
            return [SendCall(call)]
        if query is self._probe:
            self._probe = None
        return []

    def _refused(self, query: Query, call: AuthCall, status: int, text: str) -> list[QueryEffect]:
        refusal = refusal_of(status, text)
        if isinstance(query, AuthProbe):
            return self._probed(query, call, refusal)
        effects: list[QueryEffect] = []
        if isinstance(query, RevisionRead):
            if query.asking is None:
                # No client's token was used, so this refusal proves that auth is on.
                effects += self._found_auth_on(refusal)
            for session in query.refused(whole_token=status == Status.UNAUTHENTICATED):
                if is_too_large(status, text):
                    effects.append(RefuseSession(session, status, text))
                else:
                    effects.append(DisconnectSession(session, refusal))
            effects += self.read(query)
        return effects

    def _found_auth_on(self, refusal: CreateRefusal) -> list[QueryEffect]:
        """Auth is on: check the sessions that were admitted since it was last proven to be off."""
        self.auth_on = True
        self._auth_off = None
        effects: list[QueryEffect] = []
        for session, ranges in self._let_in.take():
            token = session.identity.token
            if token is None or ranges is None:
                effects.append(DisconnectSession(session, refusal))
                continue
            for each in ranges:
                effects += self.checks.add(Recheck(session, AuthScope(token, *each)))
        return effects

    def _probed(self, probe: AuthProbe, call: AuthCall, answer: Header | CreateRefusal) -> list[QueryEffect]:
        """The probe has been answered: answer all checks that wait for it."""
        self._probe = None
        if isinstance(answer, CreateRefusal):
            effects = self._found_auth_on(answer)
            for check in probe.waiting:
                # Without a token the refusal is etcd's own text, which also depends on the proxy's certificate.
                effects += [AnswerCheck(check, answer)] if check.asked.token is None else self.checks.add(check)
            return effects
        self.auth_on = False
        self._auth_off = (call.began_at, answer)
        if call.linearizable:
            self._let_in.auth_was_off()
        for check in probe.waiting:
            self._let_in.add(check.session, check.range)
        return [AnswerCheck(check, Granted(answer) if check.fresh else answer) for check in probe.waiting]
