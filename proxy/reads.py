"""Asks etcd what `proxy/deciding/questions.py` wants to know: the shell around it, which decides nothing.

Everything is one and the same call, a transaction that executes nothing: `Txn` without compares succeeds, so of
`failure=[Range]` nothing is run, but etcd checks the permission of all of it and waits for a linearizable read first
(server/etcdserver/v3_server.go, Txn). It costs the same however large the range is, where a Range would read its keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from google.protobuf.message import DecodeError

from coalesce.inputs import Refusal
from coalesce.session import Session
from coalesce.source import Upstream
from proto.framing import Status
from proto.pb import rpc_pb2
from proto.scan import Header
from proxy import logs
from proxy.deciding.questions import NO_RIGHT, Ask, Call, Effect, May, Now, Questions, SendAway, Tell, WentBack
from proxy.deciding.rollback import ANY_KEY
from upstream.endpoints import Backoff
from upstream.errors import CallFailed, status_name
from upstream.namespace import Namespace

TXN = "/etcdserverpb.KV/Txn"
AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

NOBODY = b"watchmux-nobody"
"""The name and the token of a user there is not."""

AGAIN_S = 1.0
"""While nobody was answered since a new connection, others are tried after this: tokens are renewed, clients come
back."""

log = logs.logger("reads")


class Unary(Protocol):
    """What is needed of `upstream.pool.Pool`."""

    async def unary(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[bytes, bytes]] = (),
        timeout_s: float = 10.0,
        *,
        has_leader: bool = False,
        idempotent: bool = False,
    ) -> tuple[bytes, list[tuple[bytes, bytes]]]: ...


@dataclass(slots=True, frozen=True)
class ReaderSettings:
    """Times of the reads."""

    timeout_s: float = 5.0
    """One try; etcd itself gives a leaderless linearizable read up after about 7 s."""

    probe_age_s_max: float = 1.0
    """How long "auth is off" is believed: clients that come within this share one probe."""


class Listener(Protocol):
    """Who hears what concerns everybody: the engine."""

    @property
    def newest_revision(self) -> int:
        """The newest revision that the watches have seen."""

    @property
    def own_token(self) -> bytes | None:
        """The token of the proxy's own user."""

    def not_authorized(self, session: Session, refusal: Refusal) -> None:
        """The right by which a session was let in is none any more."""

    def went_back(self, header: Header) -> None:
        """The store is older than it was."""


class Reader:
    """Asks, again and again until there is an answer; every question that is wanted ends in one call of its `told`."""

    def __init__(self, pool: Unary, settings: ReaderSettings | None = None, namespace: Namespace | None = None) -> None:
        self.settings = settings or ReaderSettings()
        self.reads = 0
        """Calls sent to etcd."""
        self.failed = {status.name: 0 for status in Status if status is not Status.OK}
        """Those that were not answered with OK, by the status."""
        self.listener: Listener | None = None
        """Set before the first question."""
        self.questions = Questions(self.settings.probe_age_s_max)
        self._pool = pool
        # What a client's range is at etcd.
        self._interval = _as_it_is if namespace is None else namespace.interval
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._backoffs: dict[Call, Backoff] = {}
        """Of the calls that have failed."""
        self._again: asyncio.TimerHandle | None = None
        """The next try to find out what a connection leads to."""

    def stop(self) -> None:
        """Give every question up."""
        for task in tuple(self._tasks):
            task.cancel()
        if self._again is not None:
            self._again.cancel()
            self._again = None

    def read(self, now: Now) -> None:
        """Read the store's revision, linearizable, beginning now."""
        self._do(self.questions.read(now))

    def check(self, may: May) -> None:
        """Find out whether somebody may watch a range."""
        self._do(self.questions.check(may, self._loop.time()))

    def other_history(self, header: Header) -> None:
        """The store is known to be another one."""
        self.questions.other_history(header)

    def connected(self, watches: Iterable[Upstream]) -> None:
        """There is a new connection for the watches that are open (`watches` may change)."""
        self.questions.connected()
        self._prove(watches)

    async def takes_any_token(self) -> bool:
        """Tell whether etcd answers a call with nobody's token: with auth off, only newer ones do (3.5.1: not)."""
        try:
            message = _nothing(*self._interval(ANY_KEY, b""), True)
            await self._pool.unary(TXN, message, [(b"token", NOBODY)], self.settings.timeout_s, idempotent=True)
        except CallFailed:
            return False
        return True

    def _prove(self, watches: Iterable[Upstream]) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        own = None if self.listener is None else self.listener.own_token
        self._do(self.questions.prove(own, watches))
        if self.questions.rollback.unproven:
            self._again = self._loop.call_later(AGAIN_S, self._prove, watches)

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Ask):
                self._begin(self._call(effect.call, effect.later))
            elif isinstance(effect, Tell):
                assert effect.question.told is not None, "who asks waits for an answer"
                effect.question.told(effect.outcome)
            elif isinstance(effect, SendAway):
                if self.listener is not None:
                    self.listener.not_authorized(effect.session, effect.refusal)
            elif isinstance(effect, WentBack):
                log.error("the store went back", from_revision=effect.known, to_revision=effect.header.revision)
                if self.listener is not None:
                    self.listener.went_back(effect.header)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a read failed in an unforeseen way", error=repr(error))

    async def _call(self, call: Call, later: bool) -> None:
        """Make one call, maybe after a while, and do what follows from its outcome."""
        if later:
            backoff = self._backoffs.setdefault(call, Backoff())
            await asyncio.sleep(backoff.failed(self._loop.time()))
            if not (effects := self.questions.again(call)):
                self._backoffs.pop(call, None)
            self._do(effects)
            return
        known = 0 if self.listener is None else self.listener.newest_revision
        self.questions.begin(call, known, self._loop.time())
        self.reads += 1
        try:
            header = await (self._log_in() if call.login else self._transact(call))
        except DecodeError:
            log.warning("etcd's answer to a read is not one")
            effects = self.questions.failed(call, Status.INTERNAL, "it cannot be read")
        except CallFailed as failed:
            log.debug("a read failed", status=failed.status, reason=failed.text)
            self.failed[status_name(failed.status)] += 1
            effects = self.questions.failed(call, failed.status, failed.text)
        else:
            effects = self.questions.answered(call, header)
        if not any(isinstance(effect, Ask) and effect.call is call for effect in effects):
            self._backoffs.pop(call, None)
        self._do(effects)

    async def _transact(self, call: Call) -> Header:
        """Run the transaction that executes nothing. Raises CallFailed and DecodeError."""
        asked, linearizable = call.asked, call.linearizable
        metadata = [] if asked.token is None else [(b"token", asked.token)]
        message = b"" if asked == NO_RIGHT else _nothing(*self._interval(asked.key, asked.range_end), linearizable)
        data, _ = await self._pool.unary(
            TXN, message, metadata, self.settings.timeout_s, has_leader=linearizable, idempotent=True
        )
        return _header(data)

    async def _log_in(self) -> Header:
        """Try to log in as nobody. Raises CallFailed, which is what one expects."""
        request = rpc_pb2.AuthenticateRequest(name=NOBODY.decode(), password="-").SerializeToString()
        await self._pool.unary(AUTHENTICATE, request, (), self.settings.timeout_s, idempotent=True)
        return Header.make(0, 0, 0, 0)


def _as_it_is(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    return key, range_end


def _nothing(key: bytes, range_end: bytes, linearizable: bool) -> bytes:
    wanted = rpc_pb2.RangeRequest(key=key, range_end=range_end, limit=1, keys_only=True, serializable=not linearizable)
    return rpc_pb2.TxnRequest(failure=[rpc_pb2.RequestOp(request_range=wanted)]).SerializeToString()


def _header(data: bytes) -> Header:
    header = rpc_pb2.TxnResponse.FromString(data).header
    return Header.make(header.cluster_id, header.member_id, header.revision, header.raft_term)
