"""Requests for progress to etcd: how often, for whom, and what an answer proves."""

from __future__ import annotations

from itertools import chain

import pytest

from coalesce import CoreLimits, Session, Upstream, invariants
from coalesce.progress_requests import STREAMS_PER_REQUEST_MAX
from coalesce.waiting import FreshnessTargets, ProgressWaiters
from tests.coalesce.shell import Client, Shell, put


def test_one_upstream_request_serves_all_waiting_sessions(shell: Shell) -> None:
    clients = [shell.client() for _ in range(4)]
    shell.trunk(5, clients[0])
    for client in clients[1:]:
        client.create(start=6)
    for client in clients:
        client.read()
    clients[0].progress()
    for client in clients[1:]:
        client.progress()
    assert len(shell.asked) == 1
    shell.progressed(9)
    # The answer in flight may be older than the later requests.
    assert [client.read() for client in clients] == [["#-1 @9 progress"], [], [], []]
    shell.wait(0.03)
    assert len(shell.asked) == 2
    shell.progressed(10)
    assert [client.read() for client in clients[1:]] == [["#-1 @10 progress"]] * 3
    assert len(shell.asked) == 2


def test_requests_are_repeated_while_a_session_waits(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    client.progress()
    counts = []
    for _ in range(6):
        shell.wait(0.5)
        counts.append(len(shell.asked))
    assert counts[0] >= 3
    assert counts[-1] - counts[-3] == 1
    shell.progressed(7)
    assert client.read() == ["#-1 @7 progress"]


def test_etcd_is_not_asked_too_often() -> None:
    shell = Shell(CoreLimits(progress_interval_s=0.01))
    clients = [shell.client() for _ in range(3)]
    shell.trunk(5, clients[0])
    for client in clients[1:]:
        client.create(start=6)
    for turn in range(100):
        clients[turn % 3].progress()
        shell.progressed(6 + turn)
        shell.wait(0.001)
    assert 9 <= len(shell.asked) <= 12
    shell.wait(0.01)
    shell.progressed(200)
    assert all(client.read()[-1] == "#-1 @200 progress" for client in clients)


def test_pauses_between_repeated_requests_grow() -> None:
    """After progress_retry_s, then after twice as long each time, up to progress_retry_s_max."""
    shell = Shell(CoreLimits(progress_retry_s=0.125, progress_retry_s_max=0.5))
    client = shell.client()
    shell.trunk(5, client)
    client.progress()
    asked, at = [], 0.0
    while at < 2:
        before = len(shell.asked)
        at += 0.0625
        shell.wait(0.0625)
        asked += [at] * (len(shell.asked) - before)
    assert asked == [0.125, 0.375, 0.875, 1.375, 1.875]


def test_a_request_asks_only_for_waiting_sessions() -> None:
    shell = Shell(CoreLimits(bookmark_s=1000))
    one, two, quiet = (shell.client(token) for token in (b"1", b"2", b"3"))
    first, second = shell.trunk(5, one, b"1"), shell.trunk(5, two, b"2")
    shell.trunk(5, quiet, b"3")
    one.progress()
    two.progress()
    assert shell.asked == [(first,)]
    shell.progressed(9, first)
    shell.wait(0.03)
    assert shell.asked == [(first,), (second,)]
    shell.progressed(9, second)
    assert one.read() == two.read() == ["#-1 @9 progress"]
    shell.wait(5)
    assert len(shell.asked) == 2


def test_a_slow_stream_does_not_block_other_sessions() -> None:
    shell = Shell(CoreLimits(bookmark_s=1000))
    stuck, other = shell.client(b"1"), shell.client(b"2")
    owes, answers = shell.trunk(5, stuck, b"1"), shell.trunk(5, other, b"2")
    stuck.progress()
    for revision in range(6, 16):
        before = len(shell.asked)
        other.progress()
        shell.wait(0.06)
        assert any(answers in asked for asked in shell.asked[before:])
        shell.progressed(revision, answers)
        assert other.read() == [f"#-1 @{revision} progress"]
    # The slow stream is asked again, at its own intervals.
    assert 3 <= sum(owes in asked for asked in shell.asked) <= 7
    shell.progressed(16, owes)
    assert stuck.read() == ["#-1 @16 progress"]


def test_a_request_asks_a_bounded_number_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(CoreLimits(bookmark_s=1000))
    # Only at the end, since each check walks over all of them.
    check = invariants.check
    monkeypatch.setattr(invariants, "check", lambda _: None)
    count = 2 * STREAMS_PER_REQUEST_MAX + 1
    clients = [shell.client(b"%d" % number) for number in range(count)]
    trunks = [shell.trunk(5, client, b"%d" % number) for number, client in enumerate(clients)]
    assert len({trunk.token for trunk in trunks}) == count
    for client in clients:
        client.progress()
    shell.wait(0.09)
    # The first was asked alone; the others arrived while its request was the newest.
    assert [len(asked) for asked in shell.asked] == [1, STREAMS_PER_REQUEST_MAX, STREAMS_PER_REQUEST_MAX]
    assert {trunk for asked in shell.asked for trunk in asked} == set(trunks)
    check(shell.core)
    for trunk in trunks:
        shell.progressed(9, trunk)
    assert all(client.read() == ["#-1 @9 progress"] for client in clients)


def test_a_session_with_very_many_ranges_asks_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another session is asked for in between, and the session is answered when all parts are."""
    monkeypatch.setattr("coalesce.progress_requests._LOOKED_AT_MAX", 10)
    shell = Shell()
    many, other = shell.client(), shell.client()
    kept = shell.trunk(5, other, b"other")
    trunks = [shell.trunk(5, many, b"%d" % number) for number in range(25)]
    many.progress()
    other.progress()
    shell.wait(0.02)
    assert shell.asked == [tuple(trunks[:10])]
    shell.wait(0.07)
    assert max(map(len, shell.asked)) == 10
    assert shell.asked[2][0] is kept
    assert set(chain(*shell.asked)) == {kept, *trunks}
    shell.progressed(9)
    assert (many.read(), other.read()) == (["#-1 @9 progress"], ["#-1 @9 progress"])


def test_sessions_do_not_wait_for_old_bookmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(CoreLimits(bookmark_s=40))
    monkeypatch.setattr(invariants, "check", lambda _: None)
    count = 3 * STREAMS_PER_REQUEST_MAX
    trunks = [shell.trunk(5, shell.client(b"%d" % number), b"%d" % number) for number in range(count)]
    assert len({trunk.token for trunk in trunks}) == count
    shell.wait(19)
    client = shell.client(b"late")
    late = shell.trunk(5, client, b"late")
    assert late.token == b"late"
    shell.wait(1)
    assert [len(asked) for asked in shell.asked] == [STREAMS_PER_REQUEST_MAX]
    client.progress()
    shell.wait(0.03)
    assert late in shell.asked[1]
    shell.wait(0.1)
    assert {trunk for asked in shell.asked for trunk in asked} == {*trunks, late}


def test_an_answer_costs_work_only_for_its_own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(CoreLimits(bookmark_s=1000))
    monkeypatch.setattr(invariants, "check", lambda _: None)
    clients = [shell.client(b"%d" % number) for number in range(200)]
    trunks = [shell.trunk(5, client, b"%d" % number) for number, client in enumerate(clients)]
    for client in clients:
        client.progress()
    shell.wait(0.03)
    looks = 0
    answer = ProgressWaiters._answer

    def counted(waiting: ProgressWaiters, session: Session) -> int:
        nonlocal looks
        looks += 1
        return answer(waiting, session)

    monkeypatch.setattr(ProgressWaiters, "_answer", counted)
    for trunk in trunks:
        shell.progressed(9, trunk)
        shell.settle()
    assert all(client.read() == ["#-1 @9 progress"] for client in clients)
    # All of them once, when the freshness target became known, and then each with its own stream.
    assert looks <= 3 * len(clients)


def asked_by(shell: Shell, clients: int, watches: int) -> tuple[Upstream, list[Client]]:
    """Let clients ask for progress of their watches of one trunk, by one request; an earlier one was answered."""
    first, others = shell.client(), [shell.client() for _ in range(clients)]
    trunk = shell.trunk(5, first)
    first.progress()
    for client in others:
        for _ in range(watches):
            client.create(start=6)
        client.read()
        client.progress()
    shell.progressed(6)
    shell.wait(0.03)
    return trunk, others


def test_many_sessions_are_answered_in_steps(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with what is proven in its turn; a create and an event in between keep their places."""
    monkeypatch.setattr("coalesce.waiting.ANSWERED_SESSIONS_MAX", 3)
    trunk, clients = asked_by(shell, 8, watches=1)
    shell.progressed(9)
    assert [client.read() for client in clients] == [["#-1 @9 progress"]] * 3 + [[]] * 5
    clients[6].create(start=10)
    shell.events(trunk, put(11))
    clients[7].close()
    shell.do(shell.core.expire)
    assert [client.read() for client in clients[3:6]] == [["#0 @11 put 11 k=v", "#-1 @11 progress"]] * 3
    shell.do(shell.core.expire)
    assert clients[6].read() == ["#1 @9 created", "#0 @11 put 11 k=v", "#1 @11 put 11 k=v", "#-1 @11 progress"]
    assert shell.core.stats.progress_answers == 7 + 1


def test_sessions_with_many_watches_are_examined_in_steps(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalesce.waiting.CHECKED_WATCHES_MAX", 20)
    asked_by(shell, 4, watches=6)
    counts = []
    shell.progressed(9)
    while shell.core.next_deadline() == shell.now:
        counts.append(shell.core.stats.progress_answers)
        shell.do(shell.core.expire)
    assert [*counts, shell.core.stats.progress_answers] == [2 + 1, 4 + 1]


def test_an_old_servers_answer_proves_only_its_revision() -> None:
    shell = Shell(ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.progress()
    shell.progressed(50, trunk)
    shell.wait(5)
    assert client.read() == []
    shell.probed(7)
    shell.events(trunk, put(6))
    shell.wait(1)
    assert client.read() == ["#0 @6 put 6 k=v"]
    shell.events(trunk, put(7))
    shell.wait(1)
    assert client.read() == ["#0 @7 put 7 k=v", "#-1 @7 progress"]
    asked = len(shell.asked)
    client.progress()
    shell.wait(0.03)
    shell.probed(20)
    shell.wait(10)
    assert len(shell.asked) == asked + 1
    shell.bookmark(trunk, 20)
    shell.wait(1)
    assert client.read() == ["#-1 @20 progress"]


def test_the_version_may_become_known_later() -> None:
    shell = Shell(ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.progress()
    shell.core.ordered_progress = True
    shell.wait(1)
    assert shell.asked
    shell.progressed(6, trunk)
    assert client.read() == ["#-1 @6 progress"]


@pytest.mark.parametrize("busy", [False, True])
def test_quiet_trunks_renew_their_bookmarks(busy: bool) -> None:
    shell = Shell(CoreLimits(bookmark_s=30))
    client = shell.client()
    trunk = shell.trunk(5, client)
    for revision in range(6, 46):
        shell.wait(2)
        if busy:
            shell.events(trunk, put(revision))
    if busy:
        assert shell.asked == []
        return
    assert 2 <= len(shell.asked) <= 12
    shell.progressed(60)
    asked = len(shell.asked)
    shell.wait(14)
    assert len(shell.asked) == asked
    shell.wait(10)
    assert len(shell.asked) == asked + 1


def test_many_quiet_trunks_are_examined_and_asked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalesce.progress.TRUNKS_PER_LOOK_MAX", 3)
    monkeypatch.setattr("coalesce.progress_requests.UPSTREAMS_PER_REQUEST_MAX", 2)
    shell = Shell(CoreLimits(bookmark_s=40, progress_retry_s=1000, progress_retry_s_max=1000))
    client = shell.client()
    trunks = [shell.trunk(5, client, key=b"%d" % number) for number in range(10)]
    for _ in range(400):
        shell.wait(0.1)
    assert [len(asked) for asked in shell.asked] == [2, 1, 2, 1, 2, 1, 1]
    assert {upstream for asked in shell.asked for upstream in asked} == set(trunks)
    assert shell.core.stats.bookmark_age_s >= 30


@pytest.mark.parametrize("at_once", [1, 10_000], ids=["in parts", "at once"])
def test_the_age_of_the_oldest_bookmark_is_measured(monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr("coalesce.progress.TRUNKS_PER_LOOK_MAX", at_once)
    shell = Shell(CoreLimits(bookmark_s=30))
    client = shell.client()
    trunk = shell.trunk(5, client)
    shell.wait(100)
    assert 90 <= shell.core.stats.bookmark_age_s <= 100
    shell.events(trunk, put(6))
    shell.wait(10)
    assert shell.core.stats.bookmark_age_s <= 10


def test_a_target_is_the_least_revision_seen_after_a_request() -> None:
    targets = FreshnessTargets()
    assert targets.of(1) is None
    targets.learn(2, 20)
    targets.learn(4, 40)
    assert [targets.of(number) for number in range(1, 6)] == [20, 20, 40, 40, None]
    # A later request found a lower revision, on another stream.
    targets.learn(3, 15)
    assert [targets.of(number) for number in range(1, 6)] == [15, 15, 15, 40, None]
    targets.learn(3, 18)
    targets.learn(4, 35)
    assert [targets.of(number) for number in range(1, 6)] == [15, 15, 15, 35, None]
    for number in range(5, 500):
        targets.learn(number, 10 * number)
    # The oldest use the target of a later one, which is never lower than their own.
    assert (targets.of(1), targets.of(499), targets.of(500)) == (4360, 4990, None)
    targets.clear()
    assert targets.of(1) is None


def test_without_trunks_there_is_no_deadline(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    client.close()
    shell.wait(60)
    assert shell.core.next_deadline() is None
    assert shell.core.stats.trunks == 0
