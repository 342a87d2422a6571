"""Makes the calls to etcd for `proxy/auth/queries.py`: the I/O around it, without decisions of its own.

All calls are of one kind, a transaction that executes nothing: a `Txn` without compares succeeds, so nothing of
`failure=[Range, ...]` is executed, but etcd checks the permission of each range and waits for a linearizable read first
(server/etcdserver/v3_server.go, Txn). Its cost does not depend on the size of a range, while a Range would read the
keys. The call goes to one endpoint after the other, see `upstream/hedged.py`; its timeout starts when it is sent.

One answer of etcd may result in thousands of answers to clients. They are delivered in portions, and those of different
calls take turns, so that many refused clients do not block the event loop or other clients.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from coalesce.inputs import CreateRefusal
from coalesce.model import PendingCreate, PendingRead, Session, Upstream
from proto import etcd_errors
from proto.fields import ScanError
from proto.framing import Status
from proto.messages import decode_header, encode_login, encode_reads_not_made
from proto.scan import Header
from proxy import logs
from proxy.auth.model import (
    AnswerCheck,
    AnswerRead,
    AuthCall,
    DisconnectSession,
    Outcome,
    PermissionCheck,
    QueryEffect,
    Range,
    RefuseSession,
    RevisionRegressed,
    SendCall,
)
from proxy.auth.queries import CHECKS_IN_FLIGHT_MAX, Queries, RevisionRead
from proxy.auth.restore import ANY_KEY, AuthScope
from upstream.endpoints import Backoff
from upstream.errors import CallFailed, status_name
from upstream.namespace import Namespace
from upstream.unary import Answer

TXN = "/etcdserverpb.KV/Txn"
AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

INVALID_USER = b"watchmux-no-user"
"""Name and token of a user that does not exist."""

AGAIN_S = 1.0
"""While no token was accepted since a new connection, others are tried after this time: tokens are renewed, and clients
reconnect."""

log = logs.logger("reads")

ANSWERS_AT_ONCE = 64
"""Answers delivered in one turn of the loop; each takes the core some 30 us."""


class SentCall(Protocol):
    """A call that was sent."""

    def cancel(self) -> object:
        """Abort the call; it is not answered."""


class CallSender(Protocol):
    """The part of `upstream.pool.Pool` that is used here."""

    def ask(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[bytes, bytes]],
        timeout_s: float,
        callback: Callable[[Answer | CallFailed], None],
        *,
        has_leader: bool = False,
    ) -> SentCall: ...


@dataclass(slots=True, frozen=True)
class ReaderSettings:
    """Times and bounds of the reads."""

    timeout_s: float = 5.0
    """Timeout of one try; etcd itself gives up a linearizable read without a leader after about 7 s."""

    probe_age_s_max: float = 1.0
    """How long the answer "auth is off" is used: clients that arrive within this time share one probe."""

    checks_in_flight_max: int = CHECKS_IN_FLIGHT_MAX
    """Permission checks in flight at once, each of up to 128 ranges of one token; further ones wait, and tokens take
    turns. A check takes etcd a millisecond, so more at once would only wait there."""


class ReadListener(Protocol):
    """Receives the answers, and what concerns more than one query; the engine."""

    @property
    def newest_revision(self) -> int:
        """The newest revision that the watches have seen."""

    @property
    def own_token(self) -> bytes | None:
        """The token of the proxy's own user."""

    def has_no_leader(self, find_out: bool) -> bool:
        """Whether no endpoint has a leader, as known from the watch client; `find_out`: it checks from now on."""

    def permission(self, create: PendingCreate, outcome: Outcome) -> None:
        """The permission check of a create has its outcome."""

    def revision_read(self, read: PendingRead, header: Header) -> None:
        """A read of the revision is answered."""

    def not_authorized(self, session: Session, refusal: CreateRefusal) -> None:
        """A session was admitted while auth was off, or its permission was revoked."""

    def end_session(self, session: Session, status: int, text: str) -> None:
        """A session sent a request for which etcd ends the stream."""

    def went_back(self, header: Header) -> None:
        """The store's revision went backwards."""


class AuthReader:
    """Makes calls and retries them until there is an answer; the listener gets one for each query that stays wanted."""

    def __init__(
        self, pool: CallSender, settings: ReaderSettings | None = None, namespace: Namespace | None = None
    ) -> None:
        self.settings = settings or ReaderSettings()
        self.reads = 0
        """Calls sent to etcd."""
        self.failed = {status.name: 0 for status in Status if status is not Status.OK}
        """Calls that were not answered with OK, by status."""
        self.listener: ReadListener | None = None
        """To be set before the first query."""
        self._own_checks: dict[PermissionCheck, asyncio.Future[Outcome]] = {}
        """Checks that the proxy makes itself, without a create."""
        self.queries = Queries(self.settings.probe_age_s_max, self.settings.checks_in_flight_max)
        self._pool = pool
        # Maps a client's range to the range at etcd.
        self._interval = _as_it_is if namespace is None else namespace.interval
        # The transaction of nearly all calls while auth is off.
        self._usual = self._transaction(_ANY_RANGE, True)
        self._loop = asyncio.get_running_loop()
        self._asking: dict[AuthCall, SentCall] = {}
        """Calls in flight."""
        self._pausing: dict[AuthCall, asyncio.TimerHandle] = {}
        """Failed calls that wait for their retry."""
        self._answers: deque[deque[QueryEffect]] = deque()
        """Answers to be delivered, grouped by the call that caused them."""
        self._answering: asyncio.Handle | None = None
        """Delivers the next portion of them."""
        self._again: asyncio.TimerHandle | None = None
        """The next attempt to prove which store a connection leads to."""

    @property
    def checks_waiting(self) -> int:
        """Number of permission checks not answered yet, including those in flight."""
        return self.queries.checks.waiting

    def stop(self) -> None:
        """Abort all calls and drop all queries."""
        for asking in self._asking.values():
            asking.cancel()
        self._asking.clear()
        for handle in (self._again, self._answering, *self._pausing.values()):
            if handle is not None:
                handle.cancel()
        self._again = self._answering = None
        self._pausing.clear()
        self._answers.clear()

    def read(self, now: RevisionRead) -> None:
        """Start a linearizable read of the store's revision."""
        self._do(self.queries.read(now))

    def admit(self, session: Session, range_: Range) -> Header | None:
        """Return the header of a recent answer that found auth off; None: the watch needs a check."""
        return self.queries.admit(session, range_, self._loop.time())

    def check(self, check: PermissionCheck) -> None:
        """Start a permission check."""
        for effect in self.queries.check(check, self._loop.time()):
            if isinstance(effect, SendCall):
                self._ask(effect.call, effect.later)
            else:
                # The answer is known: deliver it at once, since requests of clients are handled in turns anyway.
                self._carry_out(effect)

    def session_over(self, session: Session) -> None:
        """Forget a session that has ended."""
        self.queries.session_over(session)

    def other_history(self, header: Header) -> None:
        """The store has been replaced."""
        self._answer_all()
        self.queries.other_history(header)

    def broken(self) -> None:
        """The connection for the watches was lost."""
        self.queries.broken()

    def connected(self, watches: Iterable[Upstream]) -> None:
        """There is a new connection for the open watches (`watches` may change later)."""
        self.queries.connected()
        self._prove(watches)

    async def requires_users(self) -> bool:
        """Return whether auth is on, by a probe that is not older than `probe_age_s_max`."""
        check = PermissionCheck(AuthScope())
        self._own_checks[check] = answer = self._loop.create_future()
        self.check(check)
        return isinstance(await answer, CreateRefusal)

    async def takes_any_token(self) -> bool:
        """Return whether etcd answers a call with an invalid token. With auth off only newer ones do (not 3.5.1)."""
        answer: asyncio.Future[bool] = self._loop.create_future()

        def callback(outcome: Answer | CallFailed) -> None:
            if not answer.done():
                answer.set_result(not isinstance(outcome, CallFailed))

        message = self._transaction(((ANY_KEY, b""),), True)
        self._pool.ask(TXN, message, [(b"token", INVALID_USER)], self.settings.timeout_s, callback)
        return await answer

    def _prove(self, watches: Iterable[Upstream]) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        own = None if self.listener is None else self.listener.own_token
        self._do(self.queries.prove(own, watches))
        if self.queries.rollback.unproven:
            self._again = self._loop.call_later(AGAIN_S, self._prove, watches)

    def _do(self, effects: list[QueryEffect]) -> None:
        """Carry out effects: calls at once, answers in portions."""
        answers: deque[QueryEffect] = deque()
        for effect in effects:
            if isinstance(effect, SendCall):
                self._ask(effect.call, effect.later)
            elif isinstance(effect, RevisionRegressed):
                # Deliver the answers of earlier reads first.
                self._answer_all()
                self._carry_out(effect)
            else:
                answers.append(effect)
        if answers:
            self._answers.append(answers)
            if self._answering is None:
                self._answer_some()

    def _answer_some(self) -> None:
        """Deliver a portion of the answers, one per call in turn."""
        self._answering = None
        for _ in range(ANSWERS_AT_ONCE):
            if not self._answers:
                return
            answers = self._answers.popleft()
            effect = answers.popleft()
            if answers:
                self._answers.append(answers)
            self._carry_out(effect)
        if self._answers:
            self._answering = self._loop.call_soon(self._answer_some)

    def _answer_all(self) -> None:
        while self._answers:
            for effect in self._answers.popleft():
                self._carry_out(effect)

    def _carry_out(self, effect: QueryEffect) -> None:
        if isinstance(effect, AnswerCheck) and effect.check.create is None:
            answer = self._own_checks.pop(effect.check)
            if not answer.done():
                answer.set_result(effect.outcome)
        elif self.listener is not None:
            self._report(self.listener, effect)

    def _report(self, listener: ReadListener, effect: QueryEffect) -> None:
        match effect:
            case AnswerCheck(check=PermissionCheck(create=create)) if create is not None:
                listener.permission(create, effect.outcome)
            case AnswerRead():
                listener.revision_read(effect.read, effect.header)
            case DisconnectSession():
                listener.not_authorized(effect.session, effect.refusal)
            case RefuseSession():
                listener.end_session(effect.session, effect.status, effect.text)
            case RevisionRegressed():
                known, now = effect.known, effect.header.revision
                log.error("etcd's revision went backwards; watches are cancelled", from_revision=known, to_revision=now)
                listener.went_back(effect.header)

    def _ask(self, call: AuthCall, later: bool) -> None:
        """Make one call, now or after a delay."""
        if later:
            if call.backoff is None:
                call.backoff = Backoff()
            self._pausing[call] = self._loop.call_later(call.backoff.failed(self._loop.time()), self._ask_again, call)
            return
        known = 0 if self.listener is None else self.listener.newest_revision
        self.queries.begin(call, known, self._loop.time())
        self.reads += 1
        if call.login:
            path, message = AUTHENTICATE, _LOGIN
        else:
            is_usual = call.linearizable and call.ranges == _ANY_RANGE
            path, message = TXN, self._usual if is_usual else self._transaction(call.ranges, call.linearizable)
        metadata = [] if call.token is None else [(b"token", call.token)]
        has_leader = call.linearizable and bool(call.ranges) and not call.login
        self._asking[call] = self._pool.ask(
            path, message, metadata, self.settings.timeout_s, partial(self._outcome, call), has_leader=has_leader
        )

    def _ask_again(self, call: AuthCall) -> None:
        del self._pausing[call]
        self._do(self.queries.again(call))

    def _outcome(self, call: AuthCall, outcome: Answer | CallFailed) -> None:
        """Handle the outcome of a call; an exception in it must not break the connection to etcd."""
        self._asking.pop(call, None)
        try:
            self._follow(call, outcome)
        except Exception:
            log.exception("unexpected error in a read")

    def _follow(self, call: AuthCall, outcome: Answer | CallFailed) -> None:
        if isinstance(outcome, CallFailed):
            log.debug("read failed", status=outcome.status, reason=outcome.text)
            self.failed[status_name(outcome.status)] += 1
            leaderless = self._is_leaderless(outcome)
            self._do(self.queries.failed(call, outcome.status, outcome.text, leaderless=leaderless))
            return
        try:
            header = Header.make(0, 0, 0, 0) if call.login else decode_header(outcome[0])
        except ScanError:
            log.warning("malformed response to a read from etcd")
            self._do(self.queries.failed(call, Status.INTERNAL, "malformed response from etcd"))
        else:
            self._do(self.queries.answered(call, header))

    def _is_leaderless(self, failed: CallFailed) -> bool:
        """Whether no endpoint has a leader, as known from the watch client; it checks once all endpoints say so."""
        return self.listener is not None and self.listener.has_no_leader(failed.text == etcd_errors.NO_LEADER)

    def _transaction(self, ranges: Iterable[Range], linearizable: bool) -> bytes:
        return encode_reads_not_made([self._interval(*each) for each in ranges], serializable=not linearizable)


_ANY_RANGE = (AuthScope()[1:],)

_LOGIN = encode_login(INVALID_USER.decode(), "-")
"""An attempt to log in as a user that does not exist, which is expected to fail."""


def _as_it_is(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    return key, range_end
