"""progress_notify: as often as etcd sends it, to every watch that asked and was quiet."""

from __future__ import annotations

import itertools

import pytest

from coalesce import CoreLimits
from coalesce.model import Upstream
from coalesce.notifying import PACE_S_MIN, UNKNOWN_PACE_S, NotifyInterval
from tests.coalesce.shell import Client, Shell, put

# Etcd's interval in these tests: kubeadm's.
INTERVAL_S = 5.0


def learn_the_pace(shell: Shell) -> Upstream:
    """Notify another, quiet trunk at etcd's interval; return it."""
    quiet = shell.trunk(5, shell.client(), b"quiet")
    shell.bookmark(quiet, 5)
    for _ in range(2):
        shell.wait(INTERVAL_S)
        shell.bookmark(quiet, 5)
    return quiet


def test_notifications_of_etcd_are_passed_on(shell: Shell) -> None:
    client, other, without = shell.client(), shell.client(), shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    other.create(start=6, watch_id=7, progress_notify=True)
    without.create(start=6)
    other.read(), without.read()
    for revision in (6, 9, 9):
        shell.bookmark(trunk, revision)
        assert client.read() == [f"#0 @{revision} progress"]
        assert other.read() == [f"#7 @{revision} progress"]
        shell.wait(INTERVAL_S)
    assert without.read() == []
    # Etcd's own notifications are enough: nothing was requested.
    assert shell.asked == []
    assert shell.core.stats.progress_notifies == 6


def test_a_watch_that_had_events_is_skipped_once(shell: Shell) -> None:
    """As in etcd, a watch whose filter dropped the event is quiet."""
    client, filtered = shell.client(), shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    filtered.create(start=6, progress_notify=True, no_put=True)
    filtered.read()
    shell.events(trunk, put(6))
    shell.bookmark(trunk, 8)
    assert client.read() == ["#0 @6 put 6 k=v"]
    assert filtered.read() == ["#0 @8 progress"]
    shell.bookmark(trunk, 8)
    assert client.read() == filtered.read() == ["#0 @8 progress"]


def test_no_progress_before_the_start_or_while_lagging(shell: Shell) -> None:
    slow, future = shell.client(), shell.client()
    trunk = shell.trunk(5, slow, progress_notify=True)
    future.create(start=9, progress_notify=True)
    future.read()
    slow.stall()
    shell.events(trunk, put(6))
    shell.bookmark(trunk, 8)
    assert (future.read(), slow.unsent) == ([], ["#0 @6 put 6 k=v"])
    slow.drain()
    shell.bookmark(trunk, 9)
    assert slow.read() == ["#0 @6 put 6 k=v", "#0 @9 progress"]
    assert future.read() == ["#0 @9 progress"]


def test_undelivered_progress_moves_no_watch_back(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client, progress_notify=True)
    client.create(start=6, progress_notify=True)
    client.read()
    client.stall()
    # The session's second watch is in the same delivery as the first, whose message stalls the session.
    shell.bookmark(trunk, 9)
    assert client.unsent == ["#0 @9 progress"]
    client.drain()
    shell.events(trunk, put(10))
    assert client.read() == ["#0 @9 progress", "#0 @10 put 10 k=v", "#1 @10 put 10 k=v"]


@pytest.mark.parametrize("ordered", [True, False])
def test_a_quiet_watch_on_a_busy_trunk_is_notified_at_the_pace(ordered: bool) -> None:
    """Etcd skips the trunk, since it has events; the watch has none."""
    shell = Shell(ordered_progress=ordered)
    client, busy = shell.client(), shell.client()
    trunk = shell.trunk(5, client, progress_notify=True, no_put=True)
    busy.create(start=6, progress_notify=True)
    quiet = learn_the_pace(shell)
    client.read(), busy.read()
    found, revision = [], 100
    for _ in range(100):
        shell.wait(0.5)
        revision += 1
        shell.events(trunk, put(revision))
        if shell.now % INTERVAL_S == 0:
            shell.bookmark(quiet, revision)
        found += [(shell.now, line) for line in client.read()]
        assert all("put" in line for line in busy.read())
    at = [each for each, _ in found]
    assert len(at) >= 9
    assert max(later - earlier for earlier, later in itertools.pairwise(at)) <= 1.1 * INTERVAL_S + 0.5
    told = [int(line.split("@")[1].split()[0]) for _, line in found]
    assert told == sorted(told)
    # Not later than the interval, even if etcd does not answer.
    assert told[-1] >= revision - 2 * 2 * INTERVAL_S


def test_progress_is_as_new_as_its_round_if_etcd_answers(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client, progress_notify=True, no_put=True)
    learn_the_pace(shell)
    client.read()
    shell.events(trunk, put(20))
    while not shell.asked:
        shell.wait(0.1)
    assert client.read() == []
    shell.progressed(30)
    assert client.read() == ["#0 @30 progress"]


def test_a_new_watch_does_not_wait_for_a_quiet_interval() -> None:
    """Etcd skips its trunk because of an earlier event; without the proxy it would not skip the watch."""
    shell = Shell(ordered_progress=False)
    trunk = shell.trunk(5, shell.client())
    learn_the_pace(shell)
    shell.events(trunk, put(6))
    client = shell.client()
    client.create(progress_notify=True)
    shell.read_now(6)
    client.read()
    shell.wait(1.1 * INTERVAL_S)
    assert client.read() == ["#0 @6 progress"]


def test_busy_trunks_have_the_shortest_pace_until_it_is_known() -> None:
    """All trunks are busy, so that etcd never notifies any."""
    shell = Shell(ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True, no_put=True)
    at, revision = [], 5
    for _ in range(100):
        shell.wait(0.1)
        revision += 1
        shell.events(trunk, put(revision))
        at += [shell.now for _ in client.read()]
    assert len(at) >= 8
    assert max(later - earlier for earlier, later in itertools.pairwise(at)) <= 1.2 * UNKNOWN_PACE_S


def test_a_quiet_trunk_without_notification_slows_the_pace() -> None:
    """The interval must be longer than half of the time without a notification."""
    shell = Shell(ordered_progress=False)
    quiet, client = shell.client(), shell.client()
    shell.trunk(5, quiet, b"quiet", progress_notify=True)
    trunk = shell.trunk(5, client, progress_notify=True, no_put=True)
    shell.wait(60)
    at, revision = [], 5
    for _ in range(120):
        shell.wait(1)
        revision += 1
        shell.events(trunk, put(revision))
        at += [shell.now for _ in client.read()]
    assert 2 <= len(at) <= 5
    assert quiet.read() == []


def test_the_setting_makes_notifications_more_frequent() -> None:
    shell = Shell(CoreLimits(progress_notify_s=2))
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    learn_the_pace(shell)
    client.read()
    for revision in range(10, 15):
        shell.wait(2)
        shell.progressed(revision)
        assert client.read() == [f"#0 @{revision} progress"]
    # But never less frequent.
    shell = Shell(CoreLimits(progress_notify_s=600))
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    shell.wait(1)
    shell.bookmark(trunk, 7)
    assert client.read() == ["#0 @7 progress"]


def test_a_setting_not_shorter_than_etcds_pace_has_no_effect() -> None:
    """As the default is not, if etcd notifies."""
    for setting_s in (INTERVAL_S * 0.95, INTERVAL_S, INTERVAL_S * 2):
        shell = Shell(CoreLimits(progress_notify_s=setting_s, bookmark_s=1000))
        client = shell.client()
        trunk = shell.trunk(5, client, progress_notify=True)
        learn_the_pace(shell)
        shell.progressed(5)
        shell.bookmark(trunk, 5)
        client.read()
        asked = len(shell.asked)
        for _ in range(5):
            shell.wait(INTERVAL_S * 1.04)
            shell.bookmark(trunk, 5)
            assert client.read() == ["#0 @5 progress"]
        assert len(shell.asked) == asked


def test_an_overdue_notification_is_requested(shell: Shell, client: Client) -> None:
    """Etcd dropped it, or the trunk was registered again between two notifications."""
    shell.trunk(5, client, progress_notify=True)
    learn_the_pace(shell)
    shell.wait(1.2 * INTERVAL_S + 0.6)
    shell.progressed(8)
    assert client.read() == ["#0 @8 progress"]


def test_a_large_round_is_made_in_steps(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    per_step = 50
    monkeypatch.setattr("coalesce.notifying.WATCHES_PER_STEP", per_step)
    clients = [shell.client() for _ in range(per_step + 10)]
    trunk = shell.trunk(5, clients[0], progress_notify=True)
    for client in clients[1:]:
        client.create(start=6, progress_notify=True)
        client.read()
    shell.bookmark(trunk, 9)
    assert sum(len(client.lines) for client in clients) == per_step
    shell.events(trunk, put(10))
    shell.settle()
    # The watches that waited had an event meanwhile.
    assert sum(len(client.lines) for client in clients) == per_step + len(clients)
    shell.bookmark(trunk, 11)
    shell.bookmark(trunk, 12)
    shell.settle()
    assert all(client.read()[-1] == "#0 @12 progress" for client in clients)


def test_the_pace_is_learnt_from_more_than_one_interval() -> None:
    pace = NotifyInterval()
    assert (pace.is_known, pace.seconds) == (False, UNKNOWN_PACE_S)
    pace.learn(5.2, 10.0)
    # A notification of the same tick, on the same stream.
    for _ in range(5):
        pace.learn(5.2, 10.0)
    assert not pace.is_known
    # A delayed notification, and so close to the next one.
    pace.learn(7.2, 17.2)
    pace.learn(3.2, 20.4)
    pace.learn(PACE_S_MIN / 2, 20.5)
    assert not pace.is_known
    pace.learn(5.4, 25.8)
    pace.learn(5.2, 31.0)
    assert (pace.is_known, pace.seconds) == (True, 5.2)
    pace.learn(50.0, 81.0)
    assert pace.seconds == 5.2
    pace.start_over(82.0)
    assert not pace.is_known


def test_a_new_connection_resets_the_pace() -> None:
    shell = Shell(ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client, progress_notify=True)
    shell.bookmark(trunk, 5)
    shell.wait(2)
    shell.core.ordered_progress = False
    shell.wait(30)
    # The time in between is a break, not an interval.
    shell.bookmark(trunk, 5)
    for _ in range(2):
        assert not shell.core._notifying.pace.is_known
        shell.wait(2)
        shell.bookmark(trunk, 5)
    assert shell.core._notifying.pace.seconds == 2


def test_on_an_old_server_a_notification_answers_a_request() -> None:
    """Every server orders notifications with events; old ones do not order answers to requests."""
    shell = Shell(ordered_progress=False)
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.progress()
    shell.probed(8)
    assert client.read() == []
    shell.bookmark(trunk, 8)
    assert client.read() == ["#-1 @8 progress"]


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


def test_rounds_that_one_answer_proves_begin_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalesce.notifying.WATCHES_PER_STEP", 2)
    shell = Shell(CoreLimits(progress_notify_s=2))
    clients = [shell.client() for _ in range(5)]
    trunks = [shell.trunk(5, client, b"%d" % place, progress_notify=True) for place, client in enumerate(clients)]
    shell.wait(2.5)
    sent = shell.core.stats.progress_notifies
    shell.progressed(9, *trunks)
    counts = [shell.core.stats.progress_notifies - sent]
    while shell.core.next_deadline() == shell.now:
        shell.do(shell.core.expire)
        counts.append(shell.core.stats.progress_notifies - sent)
    assert counts == [2, 4, 5]
    assert [client.read() for client in clients] == [["#0 @9 progress"]] * 5
