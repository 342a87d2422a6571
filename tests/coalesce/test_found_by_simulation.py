"""Bugs that the simulator found in the core, as the shortest tests that show them; seeds are of early versions."""

from __future__ import annotations

from coalesce import CoreLimits, UpstreamLost
from tests.coalesce.shell import Client, Shell, header, put

INTERNAL, UNAUTHENTICATED = 13, 16


def test_an_upgrade_takes_over_only_at_the_trunks_position(shell: Shell) -> None:
    """Seeds 11033, 14069: while the trunk reopened the upgrade advanced, and the events in between were skipped."""
    one, two = shell.client(b"one"), shell.client(b"two")
    trunk = shell.trunk(5, one)
    two.create(start=6, prev_kv=True)
    upgrade = shell.opened[-1]
    shell.created(upgrade, 5)
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(UNAUTHENTICATED, "etcdserver: invalid auth token"))
    again = shell.opened[-1]
    assert (again.start_revision, again.is_backfill) == (6, False)
    shell.events(upgrade, put(6), put(7))
    shell.created(again, 8)
    shell.events(upgrade, put(8))
    assert one.read() == []
    shell.events(again, put(6), put(7), put(8))
    shell.events(upgrade, put(9))
    assert one.read() == ["#0 @8 put 6 k=v put 7 k=v put 8 k=v", "#0 @9 put 9 k=v"]
    assert two.read() == ["#0 @5 created", "#0 @7 put 6 k=v put 7 k=v", "#0 @8 put 8 k=v", "#0 @9 put 9 k=v"]
    assert again in shell.closed


def test_creates_do_not_join_a_lost_trunk(shell: Shell, client: Client) -> None:
    """Seed 2804: after the refusal of the first create the second was decided while the trunk was being removed."""
    client.create()
    client.create(start=9)
    trunk = shell.opened[-1]
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(INTERNAL, "gone"))
    for _ in shell.reads[:]:
        shell.read_now(5)
    assert client.read() == ["#-1 @5 created canceled (gone)"] * 2
    assert shell.core.stats.trunks == 0


def test_progress_after_a_restore_ignores_old_revisions(shell: Shell) -> None:
    """Seed 833: the groups of a trunk kept the sent revisions of the discarded history."""
    one, two = shell.client(), shell.client()
    trunk = shell.trunk(5, one)
    two.create(start=20)
    shell.events(trunk, put(9))
    shell.do(shell.core.other_history, header(6))
    assert [line.split(" (")[0] for line in one.read()] == ["#0 @9 put 9 k=v", "#0 @6 canceled compacted 6"]
    again = shell.opened[-1]
    assert again.start_revision is not None
    assert again.start_revision <= 7
    shell.created(again, 6)
    three = shell.client()
    three.create()
    shell.read_now(6)
    three.progress()
    shell.progressed(7)
    assert three.read() == ["#0 @6 created", "#-1 @7 progress"]


def test_a_stalled_session_does_not_occupy_a_backfill() -> None:
    """Seeds 39, 1604: a session that stalled during its backfill kept it, and all queued watches starved."""
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=0))
    live, one, two = shell.client(), shell.client(), shell.client()
    trunk = shell.trunk(9, live)
    one.create(start=2)
    first = shell.opened[-1]
    shell.created(first, 9)
    one.stall()
    shell.events(first, put(2), put(3), at=9)
    two.create(start=6)
    second = shell.opened[-1]
    assert first in shell.closed
    assert (second.start_revision, second.is_backfill) == (6, True)
    shell.created(second, 9)
    shell.events(second, put(6), put(9))
    assert two.read() == ["#0 @9 created", "#0 @9 put 6 k=v put 9 k=v"]
    one.drain()
    third = shell.opened[-1]
    assert (third.start_revision, third.is_backfill) == (4, True)
    shell.created(third, 9)
    shell.events(third, put(6), put(9))
    shell.events(trunk, put(10))
    assert one.read() == [
        "#0 @9 created",
        "#0 @3 put 2 k=v put 3 k=v",
        "#0 @9 put 6 k=v put 9 k=v",
        "#0 @10 put 10 k=v",
    ]
