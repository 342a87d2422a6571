"""What is asked of etcd beside the watches, and what is made of the answers: without any I/O."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coalesce.inputs import Identity
from proto.framing import Status
from proto.scan import Header
from proxy.auth.model import (
    Call,
    DeliverAnswer,
    DisconnectSession,
    PermissionCheck,
    QueryEffect,
    RefuseSession,
    RevisionRegressed,
    SendCall,
)
from proxy.auth.queries import Queries, RevisionRead
from proxy.auth.restore import ANY_KEY, AuthScope
from upstream.errors import NO_LEADER_TEXT


def at(revision: int) -> Header:
    return Header.make(1, 2, revision, 3)


def waiting(*tokens: bytes) -> RevisionRead:
    """Sessions with these tokens wait for "now"."""
    sessions = [SimpleNamespace(identity=Identity(token), ended=False) for token in tokens]
    creates = [SimpleNamespace(session=each, refusal=None, key=b"k", range_end=b"") for each in sessions]
    read: Any = SimpleNamespace(waiting=creates)
    return RevisionRead(read)


def begun(questions: Queries, effects: list[QueryEffect], known: int) -> Call:
    """Begin the one call that is to be made."""
    (effect,) = effects
    assert isinstance(effect, SendCall)
    assert not effect.later
    questions.begin(effect.call, known, 0.0)
    return effect.call


def test_an_answer_from_before_it_went_back_is_asked_for_anew() -> None:
    questions = Queries(1.0)
    early = begun(questions, questions.read(waiting(b"t")), 10)
    late = begun(questions, questions.read(waiting(b"t")), 10)
    assert [type(effect) for effect in questions.answered(early, at(5))] == [RevisionRegressed, DeliverAnswer]
    # It was answered by the store that is no more: 11 is not "now".
    again = begun(questions, questions.answered(late, at(11)), 5)
    assert again is late
    (told,) = questions.answered(again, at(6))
    assert isinstance(told, DeliverAnswer)
    assert isinstance(told.outcome, Header)
    assert told.outcome.revision == 6


def test_that_auth_is_off_is_believed_for_a_while() -> None:
    questions = Queries(1.0)

    def check(when: float) -> list[QueryEffect]:
        return questions.check(PermissionCheck(AuthScope(None, b"a", b"")), when)

    (ask,) = check(0.0)
    assert isinstance(ask, SendCall)
    questions.begin(ask.call, 0, 10.0)
    assert [type(effect) for effect in questions.answered(ask.call, at(5))] == [DeliverAnswer]
    assert [type(effect) for effect in check(11.0)] == [DeliverAnswer]
    assert [type(effect) for effect in check(11.001)] == [SendCall]


def test_who_has_no_right_is_sent_away_and_the_next_one_asked() -> None:
    questions = Queries(1.0)
    questions.auth_on = True
    now = waiting(b"old", b"good")
    call = begun(questions, questions.read(now), 0)
    away, ask = questions.failed(call, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert isinstance(away, DisconnectSession)
    assert away.session.identity.token == b"old"
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_without_a_leader_it_is_asked_at_once_of_a_member_and_then_anew() -> None:
    questions = Queries(1.0)
    call = begun(questions, questions.read(waiting(b"t")), 0)
    # One that says so is not enough: another may have one.
    assert questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT) == [SendCall(call, later=True)]
    assert begun(questions, questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT, leaderless=True), 0) is call
    assert not call.linearizable
    assert questions.failed(call, Status.UNAVAILABLE, "gone", leaderless=True) == [SendCall(call, later=True)]
    assert call.linearizable
    again = begun(questions, questions.again(call), 0)
    assert again.question is call.question
    assert again.linearizable


def test_with_auth_off_now_needs_no_clients_key() -> None:
    questions = Queries(1.0)
    now = waiting(b"t")
    next(iter(now.read.waiting)).key = b"x" * (2 << 20)
    call = begun(questions, questions.read(now), 0)
    assert (call.token, call.ranges) == (None, ((ANY_KEY, b""),))


def test_a_read_that_fails_for_a_key_goes_on_with_the_next() -> None:
    questions = Queries(1.0)
    questions.auth_on = True
    call = begun(questions, questions.read(waiting(b"poison", b"good")), 0)
    text = "grpc: received message larger than max (2 vs. 1)"
    end, ask = questions.failed(call, Status.RESOURCE_EXHAUSTED, text)
    assert isinstance(end, RefuseSession)
    assert (end.session.identity.token, end.status, end.text) == (b"poison", Status.RESOURCE_EXHAUSTED, text)
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_an_invalid_token_sends_all_away_who_have_it() -> None:
    questions = Queries(1.0)
    questions.auth_on = True
    call = begun(questions, questions.read(waiting(b"old", b"old", b"good", b"old")), 0)
    *away, ask = questions.failed(call, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert [type(effect) for effect in away] == [DisconnectSession] * 3
    assert isinstance(ask, SendCall)
    assert ask.call.token == b"good"


def test_without_a_leader_now_is_not_below_what_is_known() -> None:
    questions = Queries(1.0)
    call = begun(questions, questions.read(waiting(b"t")), 10)
    begun(questions, questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT, leaderless=True), 10)
    (told,) = questions.answered(call, at(7))
    assert isinstance(told, DeliverAnswer)
    assert isinstance(told.outcome, Header)
    assert told.outcome.revision == 10


def test_without_a_leader_no_permission_is_granted() -> None:
    questions = Queries(1.0)
    questions.auth_on = True
    call = begun(questions, questions.check(PermissionCheck(AuthScope(b"t", b"a", b"")), 0.0), 0)
    (again,) = questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT, leaderless=True)
    assert again == SendCall(call, later=True)
    assert call.linearizable


def test_that_auth_was_on_is_not_forgotten_for_one_member() -> None:
    questions = Queries(1.0)
    questions.auth_on = True
    call = begun(questions, questions.check(PermissionCheck(AuthScope(None, b"a", b"")), 0.0), 0)
    begun(questions, questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT, leaderless=True), 0)
    assert questions.answered(call, at(7)) == [SendCall(call, later=True)]
    assert questions.auth_on
    assert call.linearizable


class Session:
    """One that has a token and may end."""

    def __init__(self, token: bytes | None) -> None:
        self.identity = Identity(token)
        self.ended = False


def let_in(questions: Queries, session: Session, key: bytes, when: float) -> list[QueryEffect]:
    """A session asks for a key."""
    create: Any = SimpleNamespace(session=session)
    return questions.check(PermissionCheck(AuthScope(session.identity.token, key), create), when)


def test_when_auth_comes_those_let_in_since_are_asked_about() -> None:
    questions = Queries(1.0)
    early, plain, known, gone = Session(None), Session(None), Session(b"t"), Session(None)
    probe = begun(questions, let_in(questions, early, b"a", 0.0), 0)
    questions.answered(probe, at(5))
    # The next probe finds auth off: those before it are proven.
    probe = begun(questions, let_in(questions, Session(None), b"a", 2.0), 0)
    questions.answered(probe, at(5))
    for session, key in ((plain, b"a"), (known, b"a"), (known, b"b"), (known, b"a"), (gone, b"a")):
        assert [type(effect) for effect in let_in(questions, session, key, 0.5)] == [DeliverAnswer]
    questions.session_over(gone)  # type: ignore[arg-type]  # a stand-in
    probe = begun(questions, let_in(questions, Session(None), b"a", 9.0), 0)
    effects = questions.failed(probe, Status.INVALID_ARGUMENT, "etcdserver: user name is empty")
    away: list[Any] = [effect.session for effect in effects if isinstance(effect, DisconnectSession)]
    assert plain in away
    assert early not in away
    assert gone not in away
    (check,) = [effect.call for effect in effects if isinstance(effect, SendCall)]
    assert check.token == b"t"
    # One call was sent for the first range, the second one follows.
    questions.begin(check, 0, 9.0)
    (after,) = questions.answered(check, at(5))
    assert isinstance(after, SendCall)
    (sent_away,) = questions.failed(after.call, Status.PERMISSION_DENIED, "etcdserver: permission denied")
    assert isinstance(sent_away, DisconnectSession)
    assert sent_away.session == known  # type: ignore[comparison-overlap]  # a stand-in
