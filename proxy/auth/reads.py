"""Asks etcd what `proxy/auth/queries.py` wants to know: the shell around it, which decides nothing.

Everything is one and the same call, a transaction that executes nothing: `Txn` without compares succeeds, so of
`failure=[Range, ...]` nothing is run, but etcd checks the permission of all of it and waits for a linearizable read
first (server/etcdserver/v3_server.go, Txn). It costs the same however large a range is, where a Range would read its
keys. The call goes to one endpoint after the other, see `upstream/hedged.py`; its time begins when it is sent.

What an answer leads to may be thousands of answers to clients. These are given in portions, and those of different
calls take turns, so that a crowd that is refused does not hold up the loop, or other clients.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from google.protobuf.message import DecodeError

from coalesce.inputs import CreateRefusal
from coalesce.session import Session
from coalesce.source import Upstream
from proto.framing import Status
from proto.pb import rpc_pb2
from proto.scan import Header
from proxy import logs
from proxy.auth.model import (
    Call,
    DeliverAnswer,
    DisconnectSession,
    PermissionCheck,
    QueryEffect,
    Range,
    RefuseSession,
    RevisionRegressed,
    SendCall,
)
from proxy.auth.queries import CHECKS_IN_FLIGHT_MAX, Queries, RevisionRead
from proxy.auth.restore import ANY_KEY
from upstream.endpoints import Backoff
from upstream.errors import NO_LEADER_TEXT, CallFailed, status_name
from upstream.namespace import Namespace
from upstream.unary import Answer

TXN = "/etcdserverpb.KV/Txn"
AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

INVALID_USER = b"watchmux-nobody"
"""The name and the token of a user there is not."""

AGAIN_S = 1.0
"""While nobody was answered since a new connection, others are tried after this: tokens are renewed, clients come
back."""

log = logs.logger("reads")


ANSWERS_AT_ONCE = 64
"""So many answers are given in one turn of the loop; each takes the core some 30 us."""


class Asking(Protocol):
    """A call that was sent."""

    def cancel(self) -> object:
        """Give it up."""


class Asker(Protocol):
    """What is needed of `upstream.pool.Pool`."""

    def ask(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[bytes, bytes]],
        timeout_s: float,
        told: Callable[[Answer | CallFailed], None],
        *,
        has_leader: bool = False,
    ) -> Asking: ...


@dataclass(slots=True, frozen=True)
class ReaderSettings:
    """Times and bounds of the reads."""

    timeout_s: float = 5.0
    """One try; etcd itself gives a leaderless linearizable read up after about 7 s."""

    probe_age_s_max: float = 1.0
    """How long "auth is off" is believed: clients that come within this share one probe."""

    checks_in_flight_max: int = CHECKS_IN_FLIGHT_MAX
    """Permission checks in flight at once, each of up to 128 ranges of one token; more wait in turn, by token. A check
    takes etcd a millisecond, so more at once would only wait there."""


class ReadListener(Protocol):
    """What concerns everybody goes to the engine."""

    @property
    def newest_revision(self) -> int:
        """The newest revision that the watches have seen."""

    @property
    def own_token(self) -> bytes | None:
        """The token of the proxy's own user."""

    def has_no_leader(self, find_out: bool) -> bool:
        """No endpoint has a leader, as the watch client knows; `find_out`: it has to find out from now on."""

    def not_authorized(self, session: Session, refusal: CreateRefusal) -> None:
        """The right by which a session was let in is none any more."""

    def end_session(self, session: Session, status: int, text: str) -> None:
        """A session sent what ends its stream at etcd."""

    def went_back(self, header: Header) -> None:
        """The store is older than it was."""


class Reader:
    """Asks, again and again until there is an answer; every question that is wanted ends in one call of its `told`."""

    def __init__(self, pool: Asker, settings: ReaderSettings | None = None, namespace: Namespace | None = None) -> None:
        self.settings = settings or ReaderSettings()
        self.reads = 0
        """Calls sent to etcd."""
        self.failed = {status.name: 0 for status in Status if status is not Status.OK}
        """Those that were not answered with OK, by the status."""
        self.listener: ReadListener | None = None
        """Set before the first question."""
        self.questions = Queries(self.settings.probe_age_s_max, self.settings.checks_in_flight_max)
        self._pool = pool
        # What a client's range is at etcd.
        self._interval = _as_it_is if namespace is None else namespace.interval
        self._loop = asyncio.get_running_loop()
        self._asking: dict[Call, Asking] = {}
        """Calls on their way."""
        self._pausing: dict[Call, asyncio.TimerHandle] = {}
        """Calls that have failed and are made again after a while."""
        self._answers: deque[deque[QueryEffect]] = deque()
        """What waits to be told, by the call that it follows from."""
        self._telling: asyncio.Handle | None = None
        """The next portion of that."""
        self._again: asyncio.TimerHandle | None = None
        """The next try to find out what a connection leads to."""

    @property
    def checks_waiting(self) -> int:
        """Permission checks that are not answered, those in flight included."""
        return self.questions.checks.waiting

    def stop(self) -> None:
        """Give every question up."""
        for asking in self._asking.values():
            asking.cancel()
        self._asking.clear()
        for handle in (self._again, self._telling, *self._pausing.values()):
            if handle is not None:
                handle.cancel()
        self._again = self._telling = None
        self._pausing.clear()
        self._answers.clear()

    def read(self, now: RevisionRead) -> None:
        """Read the store's revision, linearizable, beginning now."""
        self._do(self.questions.read(now))

    def check(self, may: PermissionCheck) -> None:
        """Find out whether a client may watch a range."""
        for effect in self.questions.check(may, self._loop.time()):
            if isinstance(effect, SendCall):
                self._ask(effect.call, effect.later)
            else:
                # Known already: at once, since what a client sends is taken in turns anyway.
                self._carry_out(effect)

    def session_over(self, session: Session) -> None:
        """A session has ended."""
        self.questions.session_over(session)

    def other_history(self, header: Header) -> None:
        """The store is known to be another one."""
        self._tell_all()
        self.questions.other_history(header)

    def connected(self, watches: Iterable[Upstream]) -> None:
        """There is a new connection for the watches that are open (`watches` may change)."""
        self.questions.connected()
        self._prove(watches)

    async def takes_any_token(self) -> bool:
        """Tell whether etcd answers a call with a made-up token: with auth off, only newer ones do (3.5.1: not)."""
        answer: asyncio.Future[bool] = self._loop.create_future()

        def told(outcome: Answer | CallFailed) -> None:
            if not answer.done():
                answer.set_result(not isinstance(outcome, CallFailed))

        message = self._transaction(((ANY_KEY, b""),), True)
        self._pool.ask(TXN, message, [(b"token", INVALID_USER)], self.settings.timeout_s, told)
        return await answer

    def _prove(self, watches: Iterable[Upstream]) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        own = None if self.listener is None else self.listener.own_token
        self._do(self.questions.prove(own, watches))
        if self.questions.rollback.unproven:
            self._again = self._loop.call_later(AGAIN_S, self._prove, watches)

    def _do(self, effects: list[QueryEffect]) -> None:
        """Carry out what follows from a call: calls at once, answers in portions."""
        answers: deque[QueryEffect] = deque()
        for effect in effects:
            if isinstance(effect, SendCall):
                self._ask(effect.call, effect.later)
            elif isinstance(effect, RevisionRegressed):
                # What was read before is told before.
                self._tell_all()
                self._carry_out(effect)
            else:
                answers.append(effect)
        if answers:
            self._answers.append(answers)
            if self._telling is None:
                self._tell_some()

    def _tell_some(self) -> None:
        """Give a portion of the answers, one of each call in turn."""
        self._telling = None
        for _ in range(ANSWERS_AT_ONCE):
            if not self._answers:
                return
            answers = self._answers.popleft()
            effect = answers.popleft()
            if answers:
                self._answers.append(answers)
            self._carry_out(effect)
        if self._answers:
            self._telling = self._loop.call_soon(self._tell_some)

    def _tell_all(self) -> None:
        while self._answers:
            for effect in self._answers.popleft():
                self._carry_out(effect)

    def _carry_out(self, effect: QueryEffect) -> None:
        listener = self.listener
        if isinstance(effect, DeliverAnswer):
            assert effect.question.told is not None, "a question that is told has somebody who waits"
            effect.question.told(effect.outcome)
        elif listener is None:
            return
        elif isinstance(effect, DisconnectSession):
            listener.not_authorized(effect.session, effect.refusal)
        elif isinstance(effect, RefuseSession):
            listener.end_session(effect.session, effect.status, effect.text)
        elif isinstance(effect, RevisionRegressed):
            log.error("the store went back", from_revision=effect.known, to_revision=effect.header.revision)
            listener.went_back(effect.header)

    def _ask(self, call: Call, later: bool) -> None:
        """Make one call, now or after a while."""
        if later:
            if call.backoff is None:
                call.backoff = Backoff()
            self._pausing[call] = self._loop.call_later(call.backoff.failed(self._loop.time()), self._ask_again, call)
            return
        known = 0 if self.listener is None else self.listener.newest_revision
        self.questions.begin(call, known, self._loop.time())
        self.reads += 1
        if call.login:
            path, message = AUTHENTICATE, _LOGIN
        else:
            path, message = TXN, self._transaction(call.ranges, call.linearizable)
        metadata = [] if call.token is None else [(b"token", call.token)]
        has_leader = call.linearizable and bool(call.ranges) and not call.login
        self._asking[call] = self._pool.ask(
            path, message, metadata, self.settings.timeout_s, partial(self._outcome, call), has_leader=has_leader
        )

    def _ask_again(self, call: Call) -> None:
        del self._pausing[call]
        self._do(self.questions.again(call))

    def _outcome(self, call: Call, outcome: Answer | CallFailed) -> None:
        """Do what follows from the outcome of a call; a bug in that does not break etcd's connection."""
        self._asking.pop(call, None)
        try:
            self._follow(call, outcome)
        except Exception:
            log.exception("a read failed in an unforeseen way")

    def _follow(self, call: Call, outcome: Answer | CallFailed) -> None:
        if isinstance(outcome, CallFailed):
            log.debug("a read failed", status=outcome.status, reason=outcome.text)
            self.failed[status_name(outcome.status)] += 1
            leaderless = self._is_leaderless(outcome)
            self._do(self.questions.failed(call, outcome.status, outcome.text, leaderless=leaderless))
            return
        try:
            header = Header.make(0, 0, 0, 0) if call.login else _header(outcome[0])
        except DecodeError:
            log.warning("etcd's answer to a read is not one")
            self._do(self.questions.failed(call, Status.INTERNAL, "it cannot be read"))
        else:
            self._do(self.questions.answered(call, header))

    def _is_leaderless(self, failed: CallFailed) -> bool:
        """Tell whether no endpoint has a leader, as the watch client knows; when all say so, it has to find out."""
        return self.listener is not None and self.listener.has_no_leader(failed.text == NO_LEADER_TEXT)

    def _transaction(self, ranges: Iterable[Range], linearizable: bool) -> bytes:
        request = rpc_pb2.TxnRequest()
        for each in ranges:
            key, range_end = self._interval(*each)
            request.failure.add().request_range.MergeFrom(
                rpc_pb2.RangeRequest(
                    key=key, range_end=range_end, limit=1, keys_only=True, serializable=not linearizable
                )
            )
        return request.SerializeToString()


_LOGIN = rpc_pb2.AuthenticateRequest(name=INVALID_USER.decode(), password="-").SerializeToString()
"""An attempt to log in as nobody, which is expected to fail."""


def _as_it_is(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    return key, range_end


def _header(data: bytes) -> Header:
    header = rpc_pb2.TxnResponse.FromString(data).header
    return Header.make(header.cluster_id, header.member_id, header.revision, header.raft_term)
