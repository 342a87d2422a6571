"""The upgrade of a trunk to prev_kv."""

from __future__ import annotations

import pytest

from coalesce import Upstream
from tests.coalesce.shell import Client, Shell, delete, put


def test_prev_kv_is_requested_only_when_a_watch_wants_it(shell: Shell) -> None:
    trunk = shell.trunk(5, shell.client())
    other = shell.trunk(5, shell.client(), b"j", prev_kv=True)
    assert (trunk.prev_kv, other.prev_kv) == (False, True)


def test_a_trunk_with_prev_kv_serves_watches_without_it(shell: Shell) -> None:
    wants, plain = shell.client(), shell.client()
    trunk = shell.trunk(5, wants, prev_kv=True)
    plain.create(start=6)
    shell.events(trunk, put(6, prev=b"u"), delete(7, prev=b"v"))
    assert wants.read() == ["#0 @7 put 6 k=v (was u) delete 7 k (was v)"]
    assert plain.read()[1:] == ["#0 @7 put 6 k=v delete 7 k"]


def upgrade(shell: Shell) -> tuple[Client, Client, Upstream, Upstream]:
    """Return a plain client on a trunk, one that wants prev_kv from now, and both upstream watches."""
    plain, wants = shell.client(), shell.client()
    old = shell.trunk(5, plain)
    wants.create(prev_kv=True)
    shell.read_now(5)
    new = shell.opened[-1]
    assert wants.read() == ["#0 @5 created"]
    assert (new.prev_kv, new.is_backfill, new.start_revision) == (True, False, 6)
    return plain, wants, old, new


def test_the_first_watch_with_prev_kv_opens_an_upgrade(shell: Shell) -> None:
    plain, wants, old, new = upgrade(shell)
    shell.events(old, put(6))
    assert plain.read() == ["#0 @6 put 6 k=v"]
    assert wants.read() == []
    shell.created(new, 6)
    assert shell.closed == []
    shell.events(new, put(6, prev=b"u"))
    assert wants.read() == ["#0 @6 put 6 k=v (was u)"]
    assert shell.closed == [old]
    shell.events(old, put(7))
    shell.events(new, put(7, prev=b"v"))
    assert plain.read() == ["#0 @7 put 7 k=v"]
    assert wants.read() == ["#0 @7 put 7 k=v (was v)"]
    assert shell.core.stats.upgrades == 1


def test_a_bounded_number_of_watches_wait_on_an_upgrade(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """They move to the trunk in one step; further ones have a backfill with prev_kv meanwhile."""
    monkeypatch.setattr("coalesce.placement.UPGRADED_MAX", 2)
    plain, first, old, new = upgrade(shell)
    others = [shell.client() for _ in range(3)]
    for client in others:
        client.create(start=6, prev_kv=True)
        assert client.read() == ["#0 @5 created"]
    backfill = shell.opened[-1]
    assert (new.watchers, backfill.watchers) == (2, 2)
    assert (backfill.prev_kv, backfill.is_backfill, backfill.start_revision) == (True, True, 6)
    shell.created(new, 6)
    shell.created(backfill, 6)
    shell.events(old, put(6))
    shell.events(new, put(6, prev=b"u"))
    assert shell.closed == [old]
    shell.events(backfill, put(6, prev=b"u"))
    assert shell.closed == [old, backfill]
    shell.events(new, put(7, prev=b"v"))
    assert plain.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]
    assert [each.read() for each in (first, *others)] == [["#0 @6 put 6 k=v (was u)", "#0 @7 put 7 k=v (was v)"]] * 4


def test_an_upgrade_may_be_ahead_of_its_trunk(shell: Shell) -> None:
    plain, wants, old, new = upgrade(shell)
    shell.created(new, 6)
    shell.events(new, put(6, prev=b"u"))
    assert plain.read() == ["#0 @6 put 6 k=v"]
    assert wants.read() == ["#0 @6 put 6 k=v (was u)"]
    assert shell.closed == [old]


def test_live_watches_do_not_wait_for_an_upgrade(shell: Shell) -> None:
    plain, wants, old, new = upgrade(shell)
    shell.created(new, 6)
    for revision in (6, 7, 8):
        shell.events(old, put(revision))
    shell.events(new, put(6, prev=b"u"), at=8)
    assert shell.closed == []
    shell.events(old, put(9))
    assert [line[:4] for line in plain.read()] == ["#0 @"] * 4
    shell.events(new, put(7, prev=b"v"), put(8, prev=b"v"), put(9, prev=b"v"), at=9)
    assert shell.closed == [old]
    assert wants.read()[-1].startswith("#0 @9 put 7")
    assert plain.read() == []


def test_progress_completes_an_upgrade_in_a_quiet_range(shell: Shell) -> None:
    plain, wants, old, new = upgrade(shell)
    shell.created(new, 5)
    assert new in shell.asked[-1]
    shell.progressed(5)
    assert shell.closed == [old]
    shell.events(new, put(6, prev=b"u"))
    assert plain.read() == ["#0 @6 put 6 k=v"]
    assert wants.read() == ["#0 @6 put 6 k=v (was u)"]


def test_below_the_upgrade_the_history_has_no_prev_kv(shell: Shell) -> None:
    plain, _, old, new = upgrade(shell)
    shell.events(old, put(6))
    shell.created(new, 6)
    shell.events(new, put(6, prev=b"u"))
    shell.events(new, put(7, prev=b"v"))
    late, early, without = shell.client(), shell.client(), shell.client()
    without.create(start=6)
    assert without.read()[1:] == ["#0 @7 put 6 k=v put 7 k=v"]
    late.create(start=7, prev_kv=True)
    assert late.read()[1:] == ["#0 @7 put 7 k=v (was v)"]
    early.create(start=6, prev_kv=True)
    backfill = shell.opened[-1]
    assert (backfill.start_revision, backfill.prev_kv, backfill.is_backfill) == (6, True, True)
    shell.created(backfill, 7)
    shell.events(backfill, put(6, prev=b"u"), at=7)
    assert early.read()[1:] == ["#0 @6 put 6 k=v (was u)", "#0 @7 put 7 k=v (was v)"]
    assert plain.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]


def test_an_unused_upgrade_is_closed(shell: Shell) -> None:
    _, wants, _, new = upgrade(shell)
    wants.cancel(0)
    assert shell.closed == [new]


def test_a_stall_during_an_upgrade_loses_nothing(shell: Shell) -> None:
    plain, wants, old, new = upgrade(shell)
    shell.created(new, 5)
    wants.stall()
    plain.stall()
    shell.events(new, put(6, prev=b"u"))
    shell.events(new, put(7, prev=b"v"))
    assert shell.closed == [old]
    plain.drain()
    wants.drain()
    assert plain.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]
    assert wants.read() == ["#0 @6 put 6 k=v (was u)", "#0 @7 put 7 k=v (was v)"]


def test_an_upgrade_does_not_start_below_the_compact_revision(shell: Shell) -> None:
    """It was opened, cancelled and opened again at the same revision without end."""
    plain, wants, past = shell.client(), shell.client(), shell.client()
    old = shell.trunk(5, plain)
    wants.create(start=12, prev_kv=True)
    shell.created(shell.opened[-1], 11)
    shell.canceled(shell.opened[-1], compact_revision=10)
    again = shell.opened[-1]
    assert (again.start_revision, again.is_backfill) == (10, False)
    shell.created(again, 11)
    # It cannot take over before the trunk has brought the revisions in between.
    shell.progressed(11, again)
    assert shell.closed == []
    shell.events(old, put(8), at=11)
    shell.progressed(11, old)
    shell.wait(0.2)
    shell.progressed(11, again)
    assert shell.closed == [old]
    past.create(start=6)
    assert plain.read() == ["#0 @8 put 8 k=v"]
    assert past.read()[-1] == "#0 @8 put 8 k=v"
    shell.events(again, put(12, prev=b"u"))
    assert wants.read()[-1] == "#0 @12 put 12 k=v (was u)"


def test_an_upgrade_stays_for_watches_on_other_backfills(shell: Shell) -> None:
    """It was closed with its last own watch, and watches with prev_kv could never move to the trunk."""
    plain, wants, future = shell.client(), shell.client(), shell.client()
    trunk = shell.trunk(100, plain)
    wants.create(start=50, prev_kv=True)
    upgrade, backfill = shell.opened[-2:]
    assert (upgrade.is_backfill, backfill.is_backfill) == (False, True)
    future.create(start=150, prev_kv=True)
    future.cancel(0)
    assert shell.closed == []
    for each in (upgrade, backfill):
        shell.created(each, 100)
    shell.progressed(100)
    shell.wait(0.2)
    shell.progressed(100)
    assert shell.closed == [trunk, backfill]
    wants.read()
    shell.events(upgrade, put(101, prev=b"u"))
    assert wants.read() == ["#0 @101 put 101 k=v (was u)"]
    assert plain.read() == ["#0 @101 put 101 k=v"]


def test_a_compacted_upgrade_is_reopened_if_needed(shell: Shell) -> None:
    wants, near = shell.client(), shell.client()
    trunk = shell.trunk(100, shell.client())
    wants.create(start=50, prev_kv=True)
    upgrade, backfill = shell.opened[-2:]
    near.create(start=101, prev_kv=True)
    shell.created(backfill, 110)
    shell.created(upgrade, 110)
    shell.canceled(upgrade, compact_revision=105)
    assert near.read() == ["#0 @100 created", "#0 @110 canceled compacted 105"]
    again = shell.opened[-1]
    assert (again.prev_kv, again.is_backfill, again.start_revision) == (True, False, 105)
    assert trunk not in shell.closed
