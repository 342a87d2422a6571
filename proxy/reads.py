"""What the engine asks etcd beside the watches: the revision that is "now", and whether a client may watch a range.

Both are one and the same call, a transaction that executes nothing: `Txn` without compares succeeds, so of
`failure=[Range]` nothing is run, but etcd checks the permission of all of it and waits for a linearizable read first
(server/etcdserver/v3_server.go, Txn). It costs the same however large the range is, where a Range would read its keys.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from google.protobuf.message import DecodeError

from coalesce.inputs import Granted, Refusal
from proto.framing import Status
from proto.pb import rpc_pb2
from proto.scan import Header
from proxy import logs
from upstream.endpoints import Backoff
from upstream.errors import CallFailed
from upstream.namespace import Namespace
from upstream.pool import NO_LEADER_TEXT

TXN = "/etcdserverpb.KV/Txn"

ANY_KEY = b"\x00"
"""The key of the reads that are about no key in particular."""

AUTHENTICATE = "/etcdserverpb.Auth/Authenticate"

NOBODY = b"watchmux-nobody"
"""The name and the token of a user there is not."""

USER_EMPTY = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"
"""What etcd tells a client without a token when auth is on."""

REFUSALS = {
    Status.PERMISSION_DENIED: "PermissionDenied",
    Status.UNAUTHENTICATED: "Unauthenticated",
    Status.INVALID_ARGUMENT: "InvalidArgument",
}
"""What etcd says about who asks, in the names that its cancel reasons use; everything else is about etcd itself, and
is asked again."""

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


Done = Callable[[Header], None]
Take = Callable[[Header, bool], None]
"""(header, whether the read was linearizable)."""


class Asked(NamedTuple):
    """By whose right a read is made: a token, and a range that its user may read."""

    token: bytes | None = None
    key: bytes = ANY_KEY
    range_end: bytes = b""


NO_RIGHT = Asked(key=b"")
"""A read that needs no right, and tells only what the member at hand knows: a transaction of nothing at all."""

Asker = Callable[[], Asked | None]
Refused = Callable[[Refusal], None]
Decided = Callable[[Granted | Header | Refusal], None]
Wanted = Callable[[], bool]
"""Tells whether anybody still waits for the answer; nobody asks on for a client that is gone."""


@dataclass(slots=True)
class _Question:
    """One client's wish to watch a range, waiting to know whether auth is on."""

    token: bytes | None
    key: bytes
    range_end: bytes
    decided: Decided
    wanted: Wanted
    fresh: bool = False
    """It came before the probe in flight began."""


class _Answer(NamedTuple):
    """What etcd answered."""

    header: Header
    linearizable: bool


class Reader:
    """Asks, again and again until there is an answer; every question ends in one call of its `done` or `decided`."""

    def __init__(self, pool: Unary, settings: ReaderSettings | None = None, namespace: Namespace | None = None) -> None:
        self.settings = settings or ReaderSettings()
        self.reads = 0
        """Calls sent to etcd."""
        self.auth_on = False
        """The newest probe was refused: etcd asks for users."""
        self.observe: Callable[[], Take] = lambda: lambda _header, _linearizable: None
        """Called when a read begins; what it returns hears the answer before anybody else."""
        self.named = False
        """The proxy's certificate has a CN: with auth on etcd may take that for the user of a probe without a token."""
        self._pool = pool
        # What a client's range is at etcd.
        self._interval = _as_it_is if namespace is None else namespace.interval
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._auth_off: tuple[float, Header] | None = None
        """When the newest probe that found auth off was sent, and what it read."""
        self._probing: list[_Question] = []
        """Who waits for the probe in flight."""
        self._probe_in_flight = False

    def stop(self) -> None:
        """Give every question up."""
        for task in tuple(self._tasks):
            task.cancel()

    def read(self, done: Done, asker: Asker, refused: Refused) -> None:
        """Read the store's revision, linearizable, beginning now.

        With auth on it is read by the right of whom `asker` names: etcd has no linearizable read that needs no right.
        When that is refused `refused` is told, and `asker` is asked for another one; None from it is the end. With no
        leader the read is serializable: a watch needs no quorum, and "now" is then what the member at hand knows.
        """
        self._begin(self._read(done, asker, refused))

    def check(self, token: bytes | None, key: bytes, range_end: bytes, decided: Decided, wanted: Wanted) -> None:
        """Find out whether `token` may read a range.

        `decided` gets the refusal, or else the header of what was read: as Granted when the read began after this call,
        so that it is good for "now"; bare when it came from an earlier probe. With auth off everything is allowed.
        It is not called when `wanted` has become False.
        """
        question = _Question(token, key, range_end, decided, wanted)
        if self.auth_on and token is not None:
            self._begin(self._ask(question))
            return
        known = self._auth_off
        if known is not None and self._loop.time() - known[0] <= self.settings.probe_age_s_max:
            decided(known[1])
            return
        self._probing.append(question)
        if not self._probe_in_flight:
            self._probe_in_flight = True
            self._begin(self._probe())

    def prove(self, asked: Asked, wanted: Wanted) -> None:
        """Read for `observe` alone, until there is an answer, or a refusal, or it is not `wanted` any more."""
        self._begin(self._prove(asked, wanted))

    async def _prove(self, asked: Asked, wanted: Wanted) -> None:
        await self._transact(*asked, wanted)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a read failed in an unforeseen way", error=repr(error))

    async def _read(self, done: Done, asker: Asker, refused: Refused) -> None:
        while (asked := asker()) is not None:
            answer = await self._transact(*asked, _always)
            if isinstance(answer, _Answer):
                done(answer.header)
                return
            # Auth is on, whatever was believed.
            self._auth_off = None
            if answer is not None:
                refused(answer)

    async def _probe(self) -> None:
        """Find out whether auth is on, and answer everybody who waits for that."""
        sent_at = self._loop.time()
        for question in self._probing:
            question.fresh = True
        answer: _Answer | Refusal | None
        if self.named and await self._refuses_nobody():
            answer = Refusal(USER_EMPTY)
        else:
            answer = await self._transact(None, ANY_KEY, b"", self._probe_wanted)
        questions, self._probing = self._probing, []
        self._probe_in_flight = False
        if answer is None:
            return
        self.auth_on = isinstance(answer, Refusal)
        self._auth_off = (sent_at, answer.header) if isinstance(answer, _Answer) else None
        for question in questions:
            if isinstance(answer, _Answer):
                question.decided(Granted(answer.header) if question.fresh else answer.header)
            elif question.token is None:
                # In etcd's words, which go by the certificate that it is shown as well.
                question.decided(answer)
            else:
                self._begin(self._ask(question))

    async def _refuses_nobody(self) -> bool:
        """Tell whether auth is on by trying to log in as nobody; False also when etcd does not answer that."""
        request = rpc_pb2.AuthenticateRequest(name=NOBODY.decode(), password="-").SerializeToString()
        try:
            await self._pool.unary(AUTHENTICATE, request, (), self.settings.timeout_s, idempotent=True)
        except CallFailed as failed:
            return failed.status == Status.INVALID_ARGUMENT
        return False

    async def takes_any_token(self) -> bool:
        """Tell whether etcd answers a call with nobody's token: with auth off, only newer ones do (3.5.1: not)."""
        try:
            message = _nothing(*self._interval(ANY_KEY, b""), True)
            await self._pool.unary(TXN, message, [(b"token", NOBODY)], self.settings.timeout_s, idempotent=True)
        except CallFailed:
            return False
        return True

    def _probe_wanted(self) -> bool:
        """Forget those who do not wait any more; tell whether anybody does."""
        self._probing = [question for question in self._probing if question.wanted()]
        return bool(self._probing)

    async def _ask(self, question: _Question) -> None:
        answer = await self._transact(question.token, question.key, question.range_end, question.wanted)
        if answer is not None:
            question.decided(Granted(answer.header) if isinstance(answer, _Answer) else answer)

    async def _transact(
        self, token: bytes | None, key: bytes, range_end: bytes, wanted: Wanted
    ) -> _Answer | Refusal | None:
        """Run the transaction that executes nothing until etcd answers or refuses; None when nobody waits any more."""
        metadata = [] if token is None else [(b"token", token)]
        backoff = Backoff()
        linearizable = True
        while True:
            self.reads += 1
            take = self.observe()
            message = _nothing(*self._interval(key, range_end), linearizable)
            try:
                data, _ = await self._pool.unary(
                    TXN, message, metadata, self.settings.timeout_s, has_leader=linearizable, idempotent=True
                )
                answer = _Answer(_header(data), linearizable and key != NO_RIGHT.key)
                take(*answer)
                return answer
            except DecodeError:
                log.warning("etcd's answer to a read is not one")
            except CallFailed as failed:
                if failed.status in REFUSALS:
                    code = REFUSALS[Status(failed.status)]
                    return Refusal(f"rpc error: code = {code} desc = {failed.text}")
                if failed.text == NO_LEADER_TEXT and linearizable:
                    linearizable = False
                    continue
                linearizable = True
                log.debug("reading the revision failed; trying again", status=failed.status, reason=failed.text)
            await asyncio.sleep(backoff.failed(self._loop.time()))
            if not wanted():
                return None


def _as_it_is(key: bytes, range_end: bytes) -> tuple[bytes, bytes]:
    return key, range_end


def _always() -> bool:
    return True


def _nothing(key: bytes, range_end: bytes, linearizable: bool) -> bytes:
    if key == NO_RIGHT.key:
        return b""
    wanted = rpc_pb2.RangeRequest(key=key, range_end=range_end, limit=1, keys_only=True, serializable=not linearizable)
    return rpc_pb2.TxnRequest(failure=[rpc_pb2.RequestOp(request_range=wanted)]).SerializeToString()


def _header(data: bytes) -> Header:
    header = rpc_pb2.TxnResponse.FromString(data).header
    return Header.make(header.cluster_id, header.member_id, header.revision, header.raft_term)
