"""An unused trunk is parked: its watch at etcd is closed, and clients that reconnect resume from its history."""

from __future__ import annotations

import pytest

from coalesce import CoreLimits, Upstream
from tests.coalesce.shell import Client, Shell, header, put


def parked(shell: Shell, *, key: bytes = b"k", events: int = 3, prev_kv: bool = False) -> Upstream:
    """Let a client watch from revision 5 on, get events from 6 on, and leave for longer than a trunk lingers."""
    client = shell.client()
    trunk = shell.trunk(5, client, key, prev_kv=prev_kv)
    for revision in range(6, 6 + events):
        shell.events(trunk, put(revision, key))
    client.close()
    shell.wait(shell.core.limits.linger_s)
    assert shell.closed[-1] is trunk
    return trunk


def come_back(shell: Shell, start: int | None, newest: int, *, prev_kv: bool = False) -> tuple[Client, Upstream]:
    """Let a client watch again, while the store is at `newest`; return it and the upstream watch that was opened."""
    client = shell.client()
    client.create(start=start, prev_kv=prev_kv)
    shell.read_now(newest)
    return client, shell.opened[-1]


def test_a_returning_client_resumes_from_the_history(shell: Shell) -> None:
    parked(shell)
    assert (shell.core.stats.trunks, shell.core.stats.parked) == (0, 1)
    shell.wait(20)
    client, trunk = come_back(shell, 7, 20)
    # It starts at the revision that the history needs next, and nothing else is opened.
    assert (trunk.start_revision, len(shell.opened)) == (9, 2)
    shell.created(trunk, 20)
    assert client.read() == ["#0 @20 created", "#0 @8 put 7 k=v put 8 k=v"]
    shell.events(trunk, put(12), put(20))
    assert client.read() == ["#0 @20 put 12 k=v put 20 k=v"]
    assert (shell.core.stats.parked, shell.core.stats.resumed, len(shell.opened)) == (0, 1, 2)


def test_by_default_the_upstream_watch_closes_within_a_second() -> None:
    assert CoreLimits().linger_s <= 0.5


@pytest.mark.parametrize(("start", "opened"), [(None, None), (21, 21), (30, 21)])
def test_a_watch_from_now_does_not_wait_for_a_catch_up(start: int | None, opened: int | None, shell: Shell) -> None:
    """Etcd catches up first, for up to 100 ms, and a compaction meanwhile would cancel a watch that missed nothing."""
    parked(shell)
    client, trunk = come_back(shell, start, 20)
    assert trunk.start_revision == opened
    shell.settle()
    assert (shell.core.stats.resumed, shell.core.stats.history_bytes) == (0, 0)
    shell.created(trunk, 20)
    shell.events(trunk, put(21), put(30))
    assert client.read()[-1].endswith("put 30 k=v")


@pytest.mark.parametrize(
    ("start", "behind", "resumed"),
    [(7, 10_000, True), (7, 10_001, False), (5, 1000, True), (5, 1001, False), (10, 1000, True), (10, 1001, False)],
)
def test_no_watch_waits_for_a_long_catch_up(start: int, behind: int, resumed: bool, shell: Shell) -> None:
    """A watch that the history serves would wait as long for a backfill; others must not wait."""
    parked(shell)
    _, trunk = come_back(shell, start, 8 + 1 + behind)
    assert (trunk.start_revision == 9) is resumed
    assert shell.core.stats.resumed == resumed
    shell.settle()
    assert bool(shell.core.stats.history_bytes) is resumed


def test_a_compaction_while_parked_drops_the_history(shell: Shell) -> None:
    parked(shell)
    client, trunk = come_back(shell, 7, 50)
    waiting = shell.client()
    waiting.create()
    shell.canceled(trunk, compact_revision=40)
    again = shell.opened[-1]
    assert again.start_revision == 40
    assert shell.core.stats.history_bytes == 0
    assert client.read() == ["#0 @50 created", "#0 @8 put 7 k=v put 8 k=v", "#0 @50 canceled compacted 40"]


def test_a_known_compaction_drops_the_history_at_once(shell: Shell) -> None:
    parked(shell)
    other = shell.trunk(100, shell.client(), b"other")
    shell.canceled(other, compact_revision=40)
    shell.wait(1)
    come_back(shell, 7, 100)
    assert shell.core.stats.resumed == 0


def test_a_parked_history_is_dropped_after_its_time() -> None:
    shell = Shell(CoreLimits(history_linger_s=30))
    parked(shell)
    shell.wait(29.9)
    assert shell.core.stats.history_batches == 3
    shell.wait(0.2)
    stats = shell.core.stats
    assert (stats.parked, stats.history_bytes, stats.evicted_at["history_linger_s"]) == (0, 0, 3)
    shell.wait(600)
    assert shell.core.next_deadline() is None


def test_the_oldest_parked_history_is_dropped_at_the_limit() -> None:
    shell = Shell(CoreLimits(parked_max=2))
    for key in (b"a", b"b", b"c"):
        parked(shell, key=key)
    assert (shell.core.stats.parked, shell.core.stats.evicted_at["parked_max"]) == (2, 3)
    shell = Shell(CoreLimits(history_linger_s=0))
    parked(shell)
    assert (shell.core.stats.parked, shell.core.stats.history_bytes) == (0, 0)


def test_a_trunk_without_events_is_not_parked(shell: Shell) -> None:
    """A new trunk starts where its next client needs it, at no more cost."""
    parked(shell, events=0)
    assert shell.core.stats.parked == 0


def test_a_restored_store_drops_parked_histories(shell: Shell) -> None:
    parked(shell)
    shell.do(shell.core.other_history, header(4))
    shell.settle()
    assert (shell.core.stats.parked, shell.core.stats.history_bytes) == (0, 0)


def test_a_reopened_trunk_may_add_prev_kv(shell: Shell) -> None:
    parked(shell)
    client, trunk = come_back(shell, 9, 9, prev_kv=True)
    assert trunk.prev_kv
    shell.created(trunk, 9)
    shell.events(trunk, put(9, prev=b"old"))
    assert client.read() == ["#0 @9 created", "#0 @9 put 9 k=v (was old)"]
    assert len(shell.opened) == 2


def test_a_client_that_leaves_early_leaves_the_trunk_parked(shell: Shell) -> None:
    parked(shell)
    client, _ = come_back(shell, 7, 9)
    client.close()
    shell.wait(1)
    assert shell.core.stats.parked == 1
    client, trunk = come_back(shell, 7, 9)
    shell.created(trunk, 9)
    assert client.read() == ["#0 @9 created", "#0 @8 put 7 k=v put 8 k=v"]


def test_the_history_of_a_range_that_ends_is_discarded_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalesce.history.EVICTED_MAX", 4)
    shell = Shell(CoreLimits(history_linger_s=5))
    parked(shell, events=10)
    client, trunk = come_back(shell, None, 5_000)
    shell.created(trunk, 5_000)
    counts = [shell.core.stats.history_batches]
    while shell.core.next_deadline() == shell.now or counts[-1]:
        shell.do(shell.core.expire)
        counts.append(shell.core.stats.history_batches)
    assert counts[-4:] == [10, 6, 2, 0]
    shell.events(trunk, put(5_001))
    assert client.read()[-1] == "#0 @5001 put 5001 k=v"
