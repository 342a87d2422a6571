"""Queries to etcd apart from the watches, and the effects of their answers, without I/O."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from coalesce.inputs import Identity
from proto.etcd_errors import NO_LEADER
from proto.framing import Status
from proto.scan import Header
from proxy.auth.model import (
    AnswerCheck,
    AnswerRead,
    AuthCall,
    DisconnectSession,
    PermissionCheck,
    QueryEffect,
    RefuseSession,
    RevisionRegressed,
    SendCall,
)
from proxy.auth.queries import Queries, RevisionRead
from proxy.auth.restore import ANY_KEY, AuthScope


@pytest.fixture
def queries() -> Queries:
    return Queries(1.0)


def at(revision: int) -> Header:
    return Header.make(1, 2, revision, 3)


def waiting(*tokens: bytes) -> RevisionRead:
    """Return the read of sessions with these tokens that wait for "now"."""
    sessions = [SimpleNamespace(identity=Identity(token), ended=False) for token in tokens]
    creates = [SimpleNamespace(session=each, refusal=None, key=b"k", range_end=b"") for each in sessions]
    read: Any = SimpleNamespace(waiting=creates)
    return RevisionRead(read)


def begun(queries: Queries, effects: list[QueryEffect], known: int) -> AuthCall:
    """Begin the only call of these effects."""
    (effect,) = effects
    assert isinstance(effect, SendCall)
    assert not effect.later
    queries.begin(effect.call, known, 0.0)
    return effect.call


def test_a_read_that_began_before_a_restore_is_repeated(queries: Queries) -> None:
    early = begun(queries, queries.read(waiting(b"t")), 10)
    late = begun(queries, queries.read(waiting(b"t")), 10)
    assert [type(effect) for effect in queries.answered(early, at(5))] == [RevisionRegressed, AnswerRead]
    # The store before the restore answered: 11 is not "now".
    again = begun(queries, queries.answered(late, at(11)), 5)
    assert again is late
    (told,) = queries.answered(again, at(6))
    assert isinstance(told, AnswerRead)
    assert told.header.revision == 6


def test_auth_off_is_remembered_for_probe_age_s_max() -> None:
    queries = Queries(1.0)

    def check(when: float) -> list[QueryEffect]:
        return queries.check(PermissionCheck(AuthScope(None, b"a", b"")), when)

    (ask,) = check(0.0)
    assert isinstance(ask, SendCall)
    queries.begin(ask.call, 0, 10.0)
    assert [type(effect) for effect in queries.answered(ask.call, at(5))] == [AnswerCheck]
    assert [type(effect) for effect in check(11.0)] == [AnswerCheck]
    assert [type(effect) for effect in check(11.001)] == [SendCall]


def test_no_probe_from_before_a_break_admits_a_watch() -> None:
    """A store that was restored within a second is read before the first watch continues from the old history."""
    queries = Queries(1.0)
    check = PermissionCheck(AuthScope(None, b"a", b""))
    queries.answered(begun(queries, queries.check(check, 0.0), 10), at(10))
    assert queries.admit(None, check.range, 0.5) is not None
    queries.broken()
    probe = begun(queries, queries.check(check, 0.5), 10)
    assert [type(effect) for effect in queries.answered(probe, at(5))] == [RevisionRegressed, AnswerCheck]


def test_a_refused_session_is_closed_and_the_next_token_used(queries: Queries) -> None:
    queries.auth_on = True
    now = waiting(b"old", b"good")
    call = begun(queries, queries.read(now), 0)
    away, ask = queries.failed(call, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert isinstance(away, DisconnectSession)
    assert away.session.identity.token == b"old"
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_without_a_leader_a_read_is_serializable_once(queries: Queries) -> None:
    call = begun(queries, queries.read(waiting(b"t")), 0)
    # One endpoint without a leader is not enough: another may have one.
    assert queries.failed(call, Status.UNAVAILABLE, NO_LEADER) == [SendCall(call, later=True)]
    assert begun(queries, queries.failed(call, Status.UNAVAILABLE, NO_LEADER, leaderless=True), 0) is call
    assert not call.linearizable
    assert queries.failed(call, Status.UNAVAILABLE, "gone", leaderless=True) == [SendCall(call, later=True)]
    assert call.linearizable
    again = begun(queries, queries.again(call), 0)
    assert again.query is call.query
    assert again.linearizable


def test_with_auth_off_now_needs_no_clients_key(queries: Queries) -> None:
    now = waiting(b"t")
    next(iter(now.read.waiting)).key = b"x" * (2 << 20)
    call = begun(queries, queries.read(now), 0)
    assert (call.token, call.ranges) == (None, ((ANY_KEY, b""),))


def test_a_read_refused_for_a_key_continues_with_the_next(queries: Queries) -> None:
    queries.auth_on = True
    call = begun(queries, queries.read(waiting(b"poison", b"good")), 0)
    text = "grpc: received message larger than max (2 vs. 1)"
    end, ask = queries.failed(call, Status.RESOURCE_EXHAUSTED, text)
    assert isinstance(end, RefuseSession)
    assert (end.session.identity.token, end.status, end.text) == (b"poison", Status.RESOURCE_EXHAUSTED, text)
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_an_invalid_token_disconnects_all_its_sessions(queries: Queries) -> None:
    queries.auth_on = True
    call = begun(queries, queries.read(waiting(b"old", b"old", b"good", b"old")), 0)
    *away, ask = queries.failed(call, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert [type(effect) for effect in away] == [DisconnectSession] * 3
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_without_a_leader_now_is_at_least_the_known_revision(queries: Queries) -> None:
    call = begun(queries, queries.read(waiting(b"t")), 10)
    begun(queries, queries.failed(call, Status.UNAVAILABLE, NO_LEADER, leaderless=True), 10)
    (told,) = queries.answered(call, at(7))
    assert isinstance(told, AnswerRead)
    assert told.header.revision == 10


def test_without_a_leader_no_permission_is_granted(queries: Queries) -> None:
    queries.auth_on = True
    call = begun(queries, queries.check(PermissionCheck(AuthScope(b"t", b"a", b"")), 0.0), 0)
    (again,) = queries.failed(call, Status.UNAVAILABLE, NO_LEADER, leaderless=True)
    assert again == SendCall(call, later=True)
    assert call.linearizable


def test_auth_stays_on_without_a_linearizable_probe(queries: Queries) -> None:
    queries.auth_on = True
    call = begun(queries, queries.check(PermissionCheck(AuthScope(None, b"a", b"")), 0.0), 0)
    begun(queries, queries.failed(call, Status.UNAVAILABLE, NO_LEADER, leaderless=True), 0)
    assert queries.answered(call, at(7)) == [SendCall(call, later=True)]
    assert queries.auth_on
    assert call.linearizable


class Session:
    """A session that has a token and may end."""

    def __init__(self, token: bytes | None) -> None:
        self.identity = Identity(token)
        self.ended = False


def let_in(queries: Queries, session: Session, key: bytes, when: float) -> list[QueryEffect]:
    """Check a session's permission for a key."""
    create: Any = SimpleNamespace(session=session)
    return queries.check(PermissionCheck(AuthScope(session.identity.token, key), create), when)


def test_when_auth_turns_on_recent_sessions_are_checked(queries: Queries) -> None:
    early, plain, known, gone = Session(None), Session(None), Session(b"t"), Session(None)
    probe = begun(queries, let_in(queries, early, b"a", 0.0), 0)
    queries.answered(probe, at(5))
    # The next probe finds auth off, which proves it for the sessions before it.
    probe = begun(queries, let_in(queries, Session(None), b"a", 2.0), 0)
    queries.answered(probe, at(5))
    for session, key in ((plain, b"a"), (known, b"a"), (known, b"b"), (known, b"a"), (gone, b"a")):
        assert [type(effect) for effect in let_in(queries, session, key, 0.5)] == [AnswerCheck]
    queries.session_over(gone)  # type: ignore[arg-type]  # a stand-in
    probe = begun(queries, let_in(queries, Session(None), b"a", 9.0), 0)
    effects = queries.failed(probe, Status.INVALID_ARGUMENT, "etcdserver: user name is empty")
    away: list[Any] = [effect.session for effect in effects if isinstance(effect, DisconnectSession)]
    assert plain in away
    assert early not in away
    assert gone not in away
    (check,) = [effect.call for effect in effects if isinstance(effect, SendCall)]
    assert check.token == b"t"
    # One call was sent for the first range; the call for the second follows.
    queries.begin(check, 0, 9.0)
    (after,) = queries.answered(check, at(5))
    assert isinstance(after, SendCall)
    (sent_away,) = queries.failed(after.call, Status.PERMISSION_DENIED, "etcdserver: permission denied")
    assert isinstance(sent_away, DisconnectSession)
    assert sent_away.session == known  # type: ignore[comparison-overlap]  # a stand-in
