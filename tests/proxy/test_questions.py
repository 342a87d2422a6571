"""What is asked of etcd beside the watches, and what is made of the answers: without any I/O."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from coalesce.inputs import Identity
from proto.framing import Status
from proto.scan import Header
from proxy.deciding.questions import Ask, Call, Effect, May, Now, Questions, SendAway, Tell, WentBack
from proxy.deciding.rollback import Asked
from upstream.errors import NO_LEADER_TEXT


def at(revision: int) -> Header:
    return Header.make(1, 2, revision, 3)


def waiting(*tokens: bytes) -> Now:
    """Sessions with these tokens wait for "now"."""
    sessions = [SimpleNamespace(identity=Identity(token), ended=False) for token in tokens]
    creates = [SimpleNamespace(session=each, refusal=None, key=b"k", range_end=b"") for each in sessions]
    read: Any = SimpleNamespace(waiting=creates)
    return Now(read)


def begun(questions: Questions, effects: list[Effect], known: int) -> Call:
    """Begin the one call that is to be made."""
    (effect,) = effects
    assert isinstance(effect, Ask)
    assert not effect.later
    questions.begin(effect.call, known, 0.0)
    return effect.call


def test_an_answer_from_before_it_went_back_is_asked_for_anew() -> None:
    questions = Questions(1.0)
    early = begun(questions, questions.read(waiting(b"t")), 10)
    late = begun(questions, questions.read(waiting(b"t")), 10)
    assert [type(effect) for effect in questions.answered(early, at(5))] == [WentBack, Tell]
    # It was answered by the store that is no more: 11 is not "now".
    again = begun(questions, questions.answered(late, at(11)), 5)
    assert again is late
    (told,) = questions.answered(again, at(6))
    assert isinstance(told, Tell)
    assert isinstance(told.outcome, Header)
    assert told.outcome.revision == 6


def test_that_auth_is_off_is_believed_for_a_while() -> None:
    questions = Questions(1.0)

    def check(when: float) -> list[Effect]:
        return questions.check(May(Asked(None, b"a", b"")), when)

    (ask,) = check(0.0)
    assert isinstance(ask, Ask)
    questions.begin(ask.call, 0, 10.0)
    assert [type(effect) for effect in questions.answered(ask.call, at(5))] == [Tell]
    assert [type(effect) for effect in check(11.0)] == [Tell]
    assert [type(effect) for effect in check(11.001)] == [Ask]


def test_who_has_no_right_is_sent_away_and_the_next_one_asked() -> None:
    questions = Questions(1.0)
    now = waiting(b"old", b"good")
    call = begun(questions, questions.read(now), 0)
    away, ask = questions.failed(call, Status.UNAUTHENTICATED, "etcdserver: invalid auth token")
    assert isinstance(away, SendAway)
    assert away.session.identity.token == b"old"
    assert isinstance(ask, Ask)
    assert ask.call.asked.token == b"good"


def test_without_a_leader_it_is_asked_at_once_of_a_member_and_then_anew() -> None:
    questions = Questions(1.0)
    call = begun(questions, questions.read(waiting(b"t")), 0)
    assert begun(questions, questions.failed(call, Status.UNAVAILABLE, NO_LEADER_TEXT), 0) is call
    assert not call.linearizable
    assert questions.failed(call, Status.UNAVAILABLE, "gone") == [Ask(call, later=True)]
    assert call.linearizable
    assert begun(questions, questions.again(call), 0) is call
