"""Progress: never too early, never backwards, and as soon as it is true."""

from __future__ import annotations

import pytest

from coalesce import CoreLimits, Session
from coalesce.progress_requests import STREAMS_PER_REQUEST_MAX
from coalesce.waiting import FreshnessTargets, ProgressWaiters
from tests.coalesce.shell import Shell, put


def test_a_request_is_answered_when_etcd_has_answered() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.progress()
    assert client.read() == []
    assert shell.asked == [(trunk,)]
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]
    shell.wait(3)
    assert len(shell.asked) == 1


def test_a_revision_known_before_is_not_an_answer() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    shell.bookmark(trunk, 8)
    client.progress()
    shell.wait(0.2)
    assert client.read() == []
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_one_upstream_request_serves_all_waiting_sessions() -> None:
    shell = Shell()
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


def test_requests_are_repeated_while_a_session_waits() -> None:
    shell = Shell()
    client = shell.client()
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


def test_events_in_flight_are_not_an_answer() -> None:
    """A put acknowledged before the request may be above them; etcd's answer covers it, if there is one."""
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.progress()
    shell.events(trunk, put(6))
    client.read()
    shell.wait(0.15)
    assert len(shell.asked) == 2
    assert client.read() == []
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]
    client.progress()
    shell.wait(0.03)
    shell.events(trunk, put(9))
    client.read()
    shell.wait(0.5)
    assert client.read() == []
    # Etcd drops the request, and reports the revision of the event as its own.
    shell.probed(9)
    assert client.read() == ["#-1 @9 progress"]


def test_a_late_answer_does_not_answer_a_newer_request() -> None:
    """Two upstream streams (two tokens) answer separately; a proof is only as new as the request it answers."""
    shell = Shell()
    one, two = shell.client(b"one"), shell.client(b"two")
    first, second = shell.trunk(5, one), shell.trunk(5, two, b"j")
    one.progress()
    shell.progressed(6, first)
    assert one.read() == ["#-1 @6 progress"]
    two.progress()
    shell.wait(0.03)
    assert len(shell.asked) == 2
    # The late answer to the first request; then that to the second on the first stream.
    shell.progressed(6, second, number=1)
    shell.progressed(9, first)
    assert two.read() == []
    shell.progressed(9, second)
    assert two.read() == ["#-1 @9 progress"]


def test_an_event_in_flight_does_not_replace_a_streams_answer() -> None:
    shell = Shell()
    one, two = shell.client(b"one"), shell.client(b"two")
    first, second = shell.trunk(5, one), shell.trunk(5, two, b"j")
    two.progress()
    shell.events(second, put(7, b"j"))
    two.read()
    shell.progressed(9, first)
    shell.wait(0.5)
    assert two.read() == []
    shell.events(second, put(9, b"j"))
    shell.wait(1)
    assert two.read() == ["#0 @9 put 9 j=v", "#-1 @9 progress"]


def test_an_answer_without_number_waits_for_a_target() -> None:
    shell = Shell()
    client = shell.client()
    shell.trunk(5, client)
    client.progress()
    shell.progressed(8, number=0)
    assert client.read() == []
    shell.probed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_progress_is_the_least_of_all_watches() -> None:
    """Progress is the least proven revision; a watch on another trunk may be behind."""
    shell = Shell()
    client = shell.client()
    one, two = shell.trunk(5, client), shell.trunk(5, client, b"j")
    client.progress()
    shell.progressed(9, one)
    assert client.read() == []
    shell.progressed(8, two)
    assert client.read() == ["#-1 @8 progress"]


def test_progress_is_never_below_a_watchs_events() -> None:
    """clientv3 resumes all watches from progress + 1: below an event it would get that event twice."""
    shell = Shell()
    client = shell.client()
    one, two = shell.trunk(5, client), shell.trunk(5, client, b"j")
    client.progress()
    shell.events(one, put(12))
    shell.progressed(9, one, two)
    assert client.read() == ["#0 @12 put 12 k=v"]
    shell.progressed(12, two)
    shell.wait(0.1)
    shell.progressed(12, one, two)
    assert client.read() == ["#-1 @12 progress"]


def test_progress_never_decreases() -> None:
    shell = Shell()
    client = shell.client()
    one = shell.trunk(5, client)
    client.progress()
    shell.progressed(20, one)
    assert client.read() == ["#-1 @20 progress"]
    two = shell.trunk(15, client, b"j")
    client.cancel(0)
    client.read()
    client.progress()
    shell.progressed(18, two)
    assert client.read() == []
    shell.wait(0.1)
    shell.progressed(20, two)
    assert client.read() == ["#-1 @20 progress"]


def test_no_progress_before_a_watch_of_the_future() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.create(start=9)
    client.read()
    client.progress()
    shell.progressed(7)
    shell.wait(0.2)
    shell.progressed(8)
    assert client.read() == []
    shell.wait(0.2)
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]
    assert trunk in shell.asked[-1]


def test_no_progress_below_now() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, shell.client())
    client.create()
    shell.read_now(8)
    client.progress()
    client.read()
    shell.progressed(7)
    assert client.read() == []
    shell.wait(0.1)
    shell.events(trunk, put(7))
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_a_progress_request_queues_after_earlier_creates() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.create(b"j")
    client.progress()
    assert shell.asked == []
    shell.progressed(9, trunk)
    assert client.read() == []
    shell.created(shell.opened[-1], 9)
    shell.read_now(9)
    shell.progressed(10)
    assert client.read() == ["#1 @9 created", "#-1 @10 progress"]


def test_a_later_create_does_not_block_progress() -> None:
    shell = Shell()
    client = shell.client()
    shell.trunk(5, client)
    client.progress()
    client.create(b"j")
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]


def test_no_progress_while_bytes_are_unsent() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.stall()
    shell.events(trunk, put(6))
    shell.events(trunk, put(7))
    client.progress()
    shell.progressed(9)
    shell.wait(1)
    assert client.unsent == ["#0 @6 put 6 k=v"]
    client.drain()
    shell.wait(0.2)
    shell.progressed(9)
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v", "#-1 @9 progress"]


def test_no_progress_while_a_watch_is_on_a_backfill() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(100, client)
    client.create(start=50)
    client.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    client.progress()
    shell.progressed(100, trunk)
    assert client.read() == []
    shell.events(backfill, put(60), at=100)
    shell.wait(0.1)
    shell.progressed(101, trunk, backfill)
    assert client.read() == ["#1 @60 put 60 k=v", "#-1 @101 progress"]


def test_a_compacted_id_does_not_block_progress() -> None:
    """In etcd it silences the stream; here the client has received its cancel."""
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(100, client)
    client.create(start=50)
    shell.created(shell.opened[-1], 100)
    shell.canceled(shell.opened[-1], compact_revision=90)
    # The answer to the request for the backfill.
    shell.progressed(100, trunk)
    client.read()
    client.progress()
    shell.wait(0.03)
    shell.progressed(100, trunk)
    assert client.read() == ["#-1 @100 progress"]


def test_without_watches_a_request_is_dropped() -> None:
    shell = Shell()
    client, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    client.progress()
    assert shell.asked == []
    client.create(start=6)
    client.read()
    client.progress()
    client.cancel(0)
    shell.progressed(9, trunk)
    assert client.read() == ["#0 @5 canceled"]


def test_requests_of_a_session_are_merged_except_first_and_last() -> None:
    shell = Shell()
    client = shell.client()
    shell.trunk(5, client)
    for _ in range(5):
        client.progress()
    assert len(shell.asked) == 1
    shell.progressed(7)
    assert client.read() == ["#-1 @7 progress"]
    shell.wait(0.03)
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]
    shell.wait(1)
    assert client.read() == []


def test_nothing_is_proven_for_a_watch_before_its_created() -> None:
    shell = Shell()
    client = shell.client()
    client.create()
    trunk = shell.opened[0]
    shell.progressed(50, trunk)
    shell.created(trunk, 5)
    shell.read_now(5)
    assert client.read() == ["#0 @5 created"]
    shell.events(trunk, put(6))
    assert client.read() == ["#0 @6 put 6 k=v"]


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


# many upstream streams: one for each token


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
    check = shell.core.check
    monkeypatch.setattr(shell.core, "check", lambda: None)
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
    check()
    for trunk in trunks:
        shell.progressed(9, trunk)
    assert all(client.read() == ["#-1 @9 progress"] for client in clients)


def test_sessions_do_not_wait_for_old_bookmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    shell = Shell(CoreLimits(bookmark_s=40))
    monkeypatch.setattr(shell.core, "check", lambda: None)
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
    monkeypatch.setattr(shell.core, "check", lambda: None)
    clients = [shell.client(b"%d" % number) for number in range(200)]
    trunks = [shell.trunk(5, client, b"%d" % number) for number, client in enumerate(clients)]
    for client in clients:
        client.progress()
    shell.wait(0.03)
    looks = 0
    answer = ProgressWaiters._answer

    def counted(waiting: ProgressWaiters, session: Session) -> None:
        nonlocal looks
        looks += 1
        answer(waiting, session)

    monkeypatch.setattr(ProgressWaiters, "_answer", counted)
    for trunk in trunks:
        shell.progressed(9, trunk)
    assert all(client.read() == ["#-1 @9 progress"] for client in clients)
    # All of them once, when the freshness target became known, and then each with its own stream.
    assert looks <= 3 * len(clients)


# servers without ordered progress


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


# progress_notify


def test_quiet_watches_get_progress_notifications() -> None:
    shell = Shell(CoreLimits(progress_notify_s=60))
    client, without = shell.client(), shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    without.create(start=6)
    without.read()
    shell.wait(59.9)
    assert client.read() == []
    shell.wait(0.1)
    assert trunk in shell.asked[-1]
    shell.progressed(30)
    assert client.read() == ["#0 @30 progress"]
    shell.wait(60)
    shell.progressed(31)
    assert client.read() == ["#0 @31 progress"]
    assert without.read() == []


def test_a_short_interval_waits_for_an_old_servers_proof() -> None:
    shell = Shell(CoreLimits(progress_notify_s=0.2), ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    shell.wait(0.15)
    for _ in range(8):
        shell.wait(0.2)
        shell.probed(30)
        shell.bookmark(trunk, 30)
    assert "#0 @30 progress" in client.read()


def test_watches_with_recent_events_get_no_notification() -> None:
    shell = Shell(CoreLimits(progress_notify_s=60, bookmark_s=1000))
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    shell.wait(30)
    shell.events(trunk, put(6))
    shell.wait(30)
    assert shell.asked == []
    shell.wait(60)
    shell.events(trunk, put(7))
    shell.progressed(8)
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]
    shell.wait(120)
    shell.progressed(9)
    assert client.read() == ["#0 @9 progress"]


def test_future_and_lagging_watches_get_no_notification() -> None:
    shell = Shell(CoreLimits(progress_notify_s=60))
    future, slow = shell.client(), shell.client()
    trunk = shell.trunk(5, slow, progress_notify=True)
    future.create(start=50, progress_notify=True)
    future.read()
    slow.stall()
    shell.events(trunk, put(6))
    shell.wait(60)
    shell.progressed(30)
    assert future.read() == []
    assert slow.unsent == ["#0 @6 put 6 k=v"]
    shell.wait(60)
    shell.progressed(50)
    shell.wait(60)
    shell.progressed(50)
    assert future.read() == ["#0 @50 progress"]


def test_progress_is_not_below_a_watchs_notification() -> None:
    shell = Shell(CoreLimits(progress_notify_s=60))
    client = shell.client()
    one, two = shell.trunk(5, client, progress_notify=True), shell.trunk(5, client, b"j")
    shell.wait(60)
    shell.progressed(30, one)
    assert client.read() == ["#0 @30 progress"]
    client.progress()
    shell.progressed(29, two)
    shell.progressed(29, one, two)
    assert client.read() == []
    shell.wait(1)
    shell.progressed(30, one, two)
    assert client.read() == ["#-1 @30 progress"]


def test_an_ended_watch_gets_no_notification() -> None:
    shell = Shell(CoreLimits(progress_notify_s=60))
    client = shell.client()
    shell.trunk(5, client, progress_notify=True)
    shell.wait(60)
    client.cancel(0)
    shell.progressed(30)
    assert client.read() == ["#0 @5 canceled"]


# bookmarks


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


def test_without_trunks_there_is_no_deadline() -> None:
    shell = Shell()
    client = shell.client()
    shell.trunk(5, client)
    client.close()
    shell.wait(60)
    assert shell.core.next_deadline() is None
    assert shell.core.stats.trunks == 0
