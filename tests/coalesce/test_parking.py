"""A trunk that nobody watches any more is parked: etcd is rid of the watch, and who comes back finds the history."""

from __future__ import annotations

import pytest

from coalesce import CoreLimits, Upstream
from tests.coalesce.shell import Client, Shell, header, put


def parked(shell: Shell, *, key: bytes = b"k", events: int = 3, prev_kv: bool = False) -> Upstream:
    """Have a client watch from revision 5 on, get events from 6 on, and go for longer than a trunk lingers."""
    client = shell.client()
    trunk = shell.trunk(5, client, key, prev_kv=prev_kv)
    for revision in range(6, 6 + events):
        shell.events(trunk, put(revision, key))
    client.close()
    shell.wait(shell.core.limits.linger_s)
    assert shell.closed[-1] is trunk
    return trunk


def come_back(shell: Shell, start: int | None, newest: int, *, prev_kv: bool = False) -> tuple[Client, Upstream]:
    """Have a client watch again, while the store is at `newest`; return it and the upstream watch that was opened."""
    client = shell.client()
    client.create(start=start, prev_kv=prev_kv)
    shell.read_now(newest)
    return client, shell.opened[-1]


def test_a_client_that_comes_back_goes_on_from_the_history() -> None:
    shell = Shell()
    parked(shell)
    assert (shell.core.stats.trunks, shell.core.stats.parked) == (0, 1)
    shell.wait(20)
    client, trunk = come_back(shell, 7, 20)
    # From what the history needs next, and nothing else is opened.
    assert (trunk.start_revision, len(shell.opened)) == (9, 2)
    shell.created(trunk, 20)
    assert client.read() == ["#0 @20 created", "#0 @8 put 7 k=v put 8 k=v"]
    shell.events(trunk, put(12), put(20))
    assert client.read() == ["#0 @20 put 12 k=v put 20 k=v"]
    assert (shell.core.stats.parked, shell.core.stats.resumed, len(shell.opened)) == (0, 1, 2)


def test_by_default_etcd_is_rid_of_the_watch_within_a_second() -> None:
    assert CoreLimits().linger_s <= 0.5


@pytest.mark.parametrize(("start", "opened"), [(None, None), (21, 21), (30, 21)])
def test_a_watch_from_now_on_is_not_behind_a_catch_up(start: int | None, opened: int | None) -> None:
    """Etcd looks back first, for up to 100 ms, and a compaction meanwhile would cancel what has missed nothing."""
    shell = Shell()
    parked(shell)
    client, trunk = come_back(shell, start, 20)
    assert trunk.start_revision == opened
    assert (shell.core.stats.resumed, shell.core.stats.history_bytes) == (0, 0)
    shell.created(trunk, 20)
    shell.events(trunk, put(21), put(30))
    assert client.read()[-1].endswith("put 30 k=v")


@pytest.mark.parametrize(
    ("start", "behind", "resumed"),
    [(7, 10_000, True), (7, 10_001, False), (5, 1000, True), (5, 1001, False), (10, 1000, True), (10, 1001, False)],
)
def test_nobody_waits_behind_a_long_catch_up(start: int, behind: int, resumed: bool) -> None:
    """Who is served by the history would wait for a backfill as long; others are not to wait."""
    shell = Shell()
    parked(shell)
    _, trunk = come_back(shell, start, 8 + 1 + behind)
    assert (trunk.start_revision == 9) is resumed
    assert shell.core.stats.resumed == resumed
    assert bool(shell.core.stats.history_bytes) is resumed


def test_what_is_compacted_meanwhile_drops_the_history() -> None:
    shell = Shell()
    parked(shell)
    client, trunk = come_back(shell, 7, 50)
    shell.canceled(trunk, compact_revision=40)
    again = shell.opened[-1]
    assert again.start_revision == 40
    assert shell.core.stats.history_bytes == 0
    shell.created(again, 50)
    backfill = shell.opened[-1]
    assert (backfill.start_revision, backfill.is_backfill) == (7, True)
    shell.canceled(backfill, compact_revision=40)
    assert client.read() == ["#0 @50 created", "#0 @50 canceled compacted 40"]


def test_a_known_compaction_is_not_found_out_again() -> None:
    shell = Shell()
    parked(shell)
    other = shell.trunk(100, shell.client(), b"other")
    shell.canceled(other, compact_revision=40)
    shell.wait(1)
    come_back(shell, 7, 100)
    assert shell.core.stats.resumed == 0


def test_it_is_dropped_in_the_end() -> None:
    shell = Shell(CoreLimits(history_linger_s=30))
    parked(shell)
    shell.wait(29.9)
    assert shell.core.stats.history_batches == 3
    shell.wait(0.2)
    stats = shell.core.stats
    assert (stats.parked, stats.history_bytes, stats.evicted_at["history_linger_s"]) == (0, 0, 3)
    shell.wait(600)
    assert shell.core.next_deadline() is None


def test_so_many_are_kept_and_the_oldest_goes() -> None:
    shell = Shell(CoreLimits(parked_max=2))
    for key in (b"a", b"b", b"c"):
        parked(shell, key=key)
    assert (shell.core.stats.parked, shell.core.stats.evicted_at["parked_max"]) == (2, 3)
    shell = Shell(CoreLimits(history_linger_s=0))
    parked(shell)
    assert (shell.core.stats.parked, shell.core.stats.history_bytes) == (0, 0)


def test_without_events_nothing_is_kept() -> None:
    """It opens where its next client needs it, at no more cost."""
    shell = Shell()
    parked(shell, events=0)
    assert shell.core.stats.parked == 0


def test_a_restored_store_has_another_history() -> None:
    shell = Shell()
    parked(shell)
    shell.do(shell.core.other_history, header(4))
    assert (shell.core.stats.parked, shell.core.stats.history_bytes) == (0, 0)


def test_prev_kv_is_asked_for_from_there_on() -> None:
    shell = Shell()
    parked(shell)
    client, trunk = come_back(shell, 9, 9, prev_kv=True)
    assert trunk.prev_kv
    shell.created(trunk, 9)
    shell.events(trunk, put(9, prev=b"old"))
    assert client.read() == ["#0 @9 created", "#0 @9 put 9 k=v (was old)"]
    assert len(shell.opened) == 2


def test_who_goes_before_it_is_open_again_leaves_it_parked() -> None:
    shell = Shell()
    parked(shell)
    client, _ = come_back(shell, 7, 9)
    client.close()
    shell.wait(1)
    assert shell.core.stats.parked == 1
    client, trunk = come_back(shell, 7, 9)
    shell.created(trunk, 9)
    assert client.read() == ["#0 @9 created", "#0 @8 put 7 k=v put 8 k=v"]
