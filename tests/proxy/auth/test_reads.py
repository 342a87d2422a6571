"""Reads and permission checks, over a scripted pool."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from coalesce.inputs import CreateRefusal, Granted, Identity
from coalesce.model import PendingCreate, PendingRead, Session
from proto.etcd_errors import NO_LEADER
from proto.framing import Status
from proto.pb import rpc_pb2
from proto.scan import Header
from proxy.auth.model import Outcome, PermissionCheck
from proxy.auth.queries import RevisionRead
from proxy.auth.reads import AUTHENTICATE, TXN, AuthReader, ReaderSettings
from proxy.auth.restore import AuthScope
from tests.waiting import until_async
from upstream.errors import CallFailed
from upstream.unary import Answer

INVALID = CallFailed(Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
EMPTY = CallFailed(Status.INVALID_ARGUMENT, "etcdserver: user name is empty")
DENIED = CallFailed(Status.PERMISSION_DENIED, "etcdserver: permission denied")


class Call:
    """One call that the pool received."""

    def __init__(self, message: bytes, metadata: Sequence[tuple[bytes, bytes]], has_leader: bool) -> None:
        txn = rpc_pb2.TxnRequest.FromString(message)
        assert not txn.compare
        assert not txn.success
        self.ranges = [each.request_range for each in txn.failure]
        self.range = self.ranges[0] if self.ranges else rpc_pb2.RangeRequest()
        self.token = dict(metadata).get(b"token")
        self.has_leader = has_leader
        self.answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()


class ScriptedPool:
    """Keeps each call until the test answers it, or answers at once with `auto`."""

    def __init__(self) -> None:
        self.asked: list[Call] = []
        self.auto: Callable[[Call], int | CallFailed] | None = None
        self.login = CallFailed(Status.UNAVAILABLE, "gone")

    def ask(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[bytes, bytes]],
        timeout_s: float,
        callback: Callable[[Answer | CallFailed], None],
        *,
        has_leader: bool = False,
    ) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(
            self._answer(path, message, metadata, timeout_s, callback, has_leader)
        )

    async def _answer(
        self,
        path: str,
        message: bytes,
        metadata: Sequence[tuple[bytes, bytes]],
        timeout_s: float,
        callback: Callable[[Answer | CallFailed], None],
        has_leader: bool,
    ) -> None:
        if path == AUTHENTICATE:
            callback(self.login)
            return
        assert path == TXN
        assert timeout_s > 0
        asked = Call(message, metadata, has_leader)
        self.asked.append(asked)
        if self.auto is not None:
            answer = self.auto(asked)
            if isinstance(answer, CallFailed):
                callback(answer)
                return
            revision = answer
        else:
            revision = await asked.answer
        header = rpc_pb2.ResponseHeader(cluster_id=1, member_id=2, revision=revision, raft_term=3)
        callback((rpc_pb2.TxnResponse(header=header).SerializeToString(), []))

    async def count(self, count: int) -> Call:
        """Wait for `count` calls, and return the last one."""
        await until_async(lambda: len(self.asked) >= count, f"{count} calls")
        assert len(self.asked) == count
        return self.asked[-1]


def kinds(outcomes: Sequence[Outcome]) -> list[tuple[str, int | str]]:
    """Return outcomes in a form that tests can compare."""
    return [
        (type(outcome).__name__, outcome.text)
        if isinstance(outcome, CreateRefusal)
        else (type(outcome).__name__, outcome.header.revision if isinstance(outcome, Granted) else outcome.revision)
        for outcome in outcomes
    ]


class FakeSession:
    """A session that has a token, and may end."""

    def __init__(self, token: bytes | None = None) -> None:
        self.identity = Identity(token)
        self.ended = False


def has(got: Sequence[Outcome], count: int) -> bool:
    """Whether there are `count` outcomes."""
    return len(got) == count


def now(*sessions: FakeSession, refusal: str | None = None) -> RevisionRead:
    """Return the read of sessions that wait for "now"."""
    waiting = [SimpleNamespace(session=each, refusal=refusal, key=b"k", range_end=b"l") for each in sessions]
    read: Any = SimpleNamespace(waiting=waiting)
    return RevisionRead(read)


def check_of(token: bytes | None, key: bytes, range_end: bytes = b"") -> PermissionCheck:
    """Return the check of a create."""
    create: Any = SimpleNamespace(session=FakeSession(token), key=key, range_end=range_end)
    return PermissionCheck.of(create)


class Seen:
    """A listener that records its calls."""

    newest_revision = 0
    own_token: bytes | None = None
    leaderless = False

    def __init__(self) -> None:
        self.away: list[CreateRefusal] = []
        self.ended: list[tuple[int, str]] = []
        self.back: list[int] = []
        self.got: list[Outcome] = []
        """All answers."""
        self.by_token: dict[bytes | None, Outcome] = {}
        """The newest answer to a check of each token."""
        self.on_answer: Callable[[], object] = lambda: None

    def permission(self, create: PendingCreate, outcome: Outcome) -> None:
        self.got.append(outcome)
        self.by_token[create.session.identity.token] = outcome
        self.on_answer()

    def revision_read(self, read: PendingRead, header: Header) -> None:
        assert read.waiting is not None
        self.got.append(header)
        self.on_answer()

    def not_authorized(self, session: Session, refusal: CreateRefusal) -> None:
        self.away.append(refusal)
        assert isinstance(session, FakeSession)

    def has_no_leader(self, find_out: bool) -> bool:
        assert find_out is not None
        return self.leaderless

    def end_session(self, session: Session, status: int, text: str) -> None:
        assert isinstance(session, FakeSession)
        self.ended.append((status, text))

    def went_back(self, header: Header) -> None:
        self.newest_revision = header.revision
        self.back.append(header.revision)


def reader_on(pool: ScriptedPool, settings: ReaderSettings | None = None) -> tuple[AuthReader, Seen]:
    """Return a reader and its listener."""
    reader = AuthReader(pool, settings)
    reader.listener = seen = Seen()
    return reader, seen


@pytest.fixture
def pool() -> ScriptedPool:
    return ScriptedPool()


async def test_a_read_is_linearizable_and_requires_a_leader(pool: ScriptedPool) -> None:
    reader, seen = reader_on(pool)
    reader.read(now(FakeSession()))
    asked = await pool.count(1)
    assert asked.has_leader
    assert not asked.range.serializable
    assert (asked.range.limit, asked.range.keys_only) == (1, True)
    asked.answer.set_result(42)
    await until_async(lambda: seen.got, "the answer")
    header = seen.got[0]
    assert isinstance(header, Header)
    assert (header.revision, header.cluster_id, header.member_id, header.raft_term) == (42, 1, 2, 3)


async def test_a_serializable_read_does_not_report_a_rollback(pool: ScriptedPool) -> None:
    pool.auto = lambda asked: 7 if asked.range.serializable else CallFailed(Status.UNAVAILABLE, NO_LEADER)
    reader, seen = reader_on(pool)
    seen.newest_revision = 9
    seen.leaderless = True
    reader.read(now(FakeSession()))
    await until_async(lambda: seen.got, "the answer")
    assert seen.back == []
    # The member lags: "now" is at least the revision known here.
    assert kinds(seen.got) == [("Header", 9)]
    assert [(asked.range.serializable, asked.has_leader) for asked in pool.asked] == [(False, True), (True, False)]


async def test_a_rollback_is_reported_before_the_read_is_answered(pool: ScriptedPool) -> None:
    pool.auto = lambda _: 7
    reader, seen = reader_on(pool)
    seen.newest_revision = 9
    reported: list[list[int]] = []
    seen.on_answer = lambda: reported.append(list(seen.back))
    reader.read(now(FakeSession()))
    await until_async(lambda: reported, "the answer")
    assert reported == [[7]]


async def test_a_read_is_retried_until_it_succeeds(pool: ScriptedPool) -> None:
    failures = [CallFailed(Status.UNAVAILABLE, "gone"), CallFailed(Status.DEADLINE_EXCEEDED, "slow")]
    pool.auto = lambda _: failures.pop(0) if failures else 9
    reader, seen = reader_on(pool)
    reader.read(now(FakeSession()))
    await until_async(lambda: seen.got, "the answer")
    assert kinds(seen.got) == [("Header", 9)]
    assert not any(asked.range.serializable for asked in pool.asked)


@pytest.mark.parametrize("tokens", [[b"bad", b"good"], [b"bad", b"bad"]])
async def test_a_refused_read_is_retried_with_another_token(tokens: list[bytes], pool: ScriptedPool) -> None:
    pool.auto = lambda call: 5 if call.token == b"good" else DENIED
    reader, seen = reader_on(pool)
    reader.queries.auth_on = True
    reader.read(now(*map(FakeSession, tokens)))
    await until_async(lambda: seen.got, "the read to end")
    # If no client is left, the core still gets an answer, without information.
    assert kinds(seen.got) == [("Header", 5 * tokens.count(b"good"))]
    assert len(seen.away) == tokens.count(b"bad")
    assert (pool.asked[-1].range.key, pool.asked[-1].range.range_end) == (b"k", b"l")


async def test_a_read_without_permission_is_not_linearizable(pool: ScriptedPool) -> None:
    pool.auto = lambda call: 3 if not call.range.key else DENIED
    reader, seen = reader_on(pool)
    reader.queries.auth_on = True
    reader.read(now(FakeSession(), refusal="no"))
    await until_async(lambda: seen.got, "the answer")
    assert kinds(seen.got) == [("Header", 3)]
    assert seen.back == []


async def test_with_a_cn_the_probe_is_first_an_invalid_login() -> None:
    """With auth on the login is refused as invalid; with any other answer a probe without a token follows."""
    for refused in (True, False):
        pool = ScriptedPool()
        pool.auto = lambda _: 5
        pool.login = CallFailed(Status.INVALID_ARGUMENT if refused else Status.FAILED_PRECONDITION, "no")
        reader = AuthReader(pool)
        reader.queries.named = True
        assert await reader.requires_users() is refused
        assert len(pool.asked) == (0 if refused else 1)


async def test_with_auth_off_one_probe_serves_all(pool: ScriptedPool) -> None:
    reader, seen = reader_on(pool)
    reader.check(check_of(None, b"a"))
    asked = await pool.count(1)
    reader.check(check_of(b"a token is not looked at with auth off", b"b"))
    asked.answer.set_result(5)
    await until_async(lambda: len(seen.got) == 2, "both answers")
    reader.check(check_of(None, b"c"))
    # Only the first check arrived before the read began, so only for it the header is "now".
    assert kinds(seen.got) == [("Granted", 5), ("Header", 5), ("Header", 5)]
    assert [asked.token for asked in pool.asked] == [None]
    assert not reader.queries.auth_on


async def test_a_probe_expires(pool: ScriptedPool) -> None:
    pool.auto = lambda _: 5
    reader, seen = reader_on(pool, ReaderSettings(probe_age_s_max=-1.0))
    for count in (1, 2):
        reader.check(check_of(None, b"a"))
        await until_async(functools.partial(has, seen.got, count), "the answer")
    assert kinds(seen.got) == [("Granted", 5)] * 2
    assert len(pool.asked) == 2


async def test_with_auth_on_each_client_is_checked_by_its_token(pool: ScriptedPool) -> None:
    verdicts: dict[bytes | None, int | CallFailed] = {None: EMPTY, b"good": 8, b"bad": DENIED}
    pool.auto = lambda asked: verdicts[asked.token]
    reader, seen = reader_on(pool)
    for token in (b"good", b"bad", None):
        reader.check(check_of(token, b"k", b"l"))
    await until_async(lambda: len(seen.got) == 3, "all answers")
    assert kinds([seen.by_token[b"good"]]) == [("Granted", 8)]
    denied = "rpc error: code = PermissionDenied desc = etcdserver: permission denied"
    assert kinds([seen.by_token[b"bad"]]) == [("CreateRefusal", denied)]
    empty = "rpc error: code = InvalidArgument desc = etcdserver: user name is empty"
    assert kinds([seen.by_token[None]]) == [("CreateRefusal", empty)]
    assert reader.queries.auth_on
    assert [(asked.range.key, asked.range.range_end) for asked in pool.asked if asked.token is not None] == [
        (b"k", b"l")
    ] * 2
    # Auth is known to be on: a token is checked without another probe.
    before = len(pool.asked)
    reader.check(check_of(b"good", b"m"))
    await until_async(lambda: len(seen.got) == 4, "the answer")
    assert len(pool.asked) == before + 1


async def test_switching_auth_off_is_noticed(pool: ScriptedPool) -> None:
    answers: list[int | CallFailed] = [EMPTY, 6]
    pool.auto = lambda _: answers.pop(0)
    reader, seen = reader_on(pool)
    for count in (1, 2):
        reader.check(check_of(None, b"a"))
        await until_async(functools.partial(has, seen.got, count), "the answer")
    assert isinstance(seen.got[0], CreateRefusal)
    assert kinds(seen.got[1:]) == [("Granted", 6)]
    assert not reader.queries.auth_on


@pytest.mark.parametrize("auth_on", [False, True])
async def test_checks_of_closed_sessions_are_not_retried(auth_on: bool, pool: ScriptedPool) -> None:
    pool.auto = lambda _: CallFailed(Status.UNAVAILABLE, "gone")
    reader, seen = reader_on(pool)
    reader.queries.auth_on = auth_on
    create: Any = SimpleNamespace(session=FakeSession())
    for _ in range(3):
        reader.check(PermissionCheck(AuthScope(b"t", b"a"), create))
    await until_async(lambda: len(pool.asked) > 5, "some tries")
    create.session.ended = True
    await until_async(lambda: not reader._asking and not reader._pausing, "the calls to end")
    assert not reader.checks_waiting
    pool.auto = lambda _: 4
    reader.check(check_of(b"t", b"a"))
    await until_async(lambda: seen.got, "an answer for the next one")
    assert len(seen.got) == 1


async def test_stop_aborts_all_calls(pool: ScriptedPool) -> None:
    reader, seen = reader_on(pool)
    reader.read(now(FakeSession()))
    await pool.count(1)
    reader.stop()
    assert not reader._asking
    assert not seen.got
