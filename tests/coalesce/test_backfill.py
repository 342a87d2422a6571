"""Backfills: shared, paced by their sessions, left once the trunk can serve a watch; and the upgrade to prev_kv."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coalesce import CoreLimits, Upstream
from coalesce.batch import Batch
from coalesce.place import Place
from tests.coalesce.shell import Client, Shell, header, put


def behind(shell: Shell, start: int, trunk_at: int = 100, **more: bool) -> tuple[Client, Upstream]:
    """Return a client that starts far before the trunk's history, and its backfill, created."""
    if not shell.opened:
        shell.trunk(trunk_at, shell.client())
    client = shell.client()
    client.create(b"k", b"", start, **more)
    client.read()
    backfill = shell.opened[-1]
    if not backfill.created:
        shell.created(backfill, trunk_at)
    return client, backfill


def test_lagging_watch_catches_up_with_its_trunk(shell: Shell) -> None:
    client, backfill = behind(shell, 50)
    trunk = shell.opened[0]
    assert (backfill.start_revision, backfill.is_backfill, backfill.key) == (50, True, b"k")
    shell.events(backfill, put(60), put(70), at=100)
    # The header has the store's revision, which proves nothing.
    assert client.read() == ["#0 @70 put 60 k=v put 70 k=v"]
    shell.events(trunk, put(101))
    assert client.read() == []
    shell.events(backfill, put(90), put(101), at=101)
    assert client.read() == ["#0 @101 put 90 k=v put 101 k=v"]
    assert shell.closed == [backfill]
    shell.events(trunk, put(102))
    assert client.read() == ["#0 @102 put 102 k=v"]
    assert shell.core.stats.joins_backfill == 1


def test_revisions_that_the_trunk_holds_are_replayed_from_it(shell: Shell) -> None:
    client, backfill = behind(shell, 50)
    for revision in (101, 102, 103):
        shell.events(shell.opened[0], put(revision))
    shell.events(backfill, put(60), put(101), at=103)
    assert client.read() == ["#0 @101 put 60 k=v put 101 k=v", "#0 @103 put 102 k=v put 103 k=v"]
    assert shell.closed == [backfill]


def test_progress_proves_a_backfill_in_a_quiet_range(shell: Shell) -> None:
    client, backfill = behind(shell, 50)
    assert backfill in shell.asked[-1]
    shell.wait(0.1)
    assert len(shell.asked) == 2
    shell.progressed(99, backfill)
    assert shell.closed == []
    shell.progressed(100, backfill)
    assert shell.closed == [backfill]
    assert client.session.watches[0].place is Place.IN_STEP
    shell.wait(5)
    # No session waits any more; only bookmarks are requested.
    assert len(shell.asked) <= 4


def test_progress_notify_proves_a_backfill() -> None:
    shell = Shell(ordered_progress=False)
    _, backfill = behind(shell, 50)
    shell.progressed(100, backfill)
    assert shell.closed == []
    shell.bookmark(backfill, 100)
    assert shell.closed == [backfill]
    assert shell.asked == []


def test_lagging_watches_share_a_backfill(shell: Shell) -> None:
    early, backfill = behind(shell, 50)
    same, _ = behind(shell, 50)
    later, _ = behind(shell, 65)
    assert len(shell.opened) == 2
    shell.events(backfill, put(60), put(70), at=100)
    assert early.read() == same.read() == ["#0 @70 put 60 k=v put 70 k=v"]
    assert later.read() == ["#0 @70 put 70 k=v"]
    # It still holds its last batch, but not the ones before.
    held, _ = behind(shell, 55)
    assert len(shell.opened) == 2
    held.close()
    shell.events(backfill, put(80), at=100)
    _, other = behind(shell, 55)
    assert other is not backfill


def test_a_bounded_number_of_watches_share_a_backfill(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each event of a backfill examines all of its watches in one step."""
    monkeypatch.setattr("coalesce.placement.SHARED_BY_MAX", 2)
    clients = [behind(shell, 50)[0] for _ in range(5)]
    trunk, *backfills = shell.opened
    assert [(each.watchers, each.start_revision) for each in backfills] == [(2, 50), (2, 50), (1, 50)]
    for backfill in backfills:
        shell.events(backfill, put(60), at=100)
        shell.progressed(100, trunk, backfill)
    assert shell.closed == backfills
    shell.events(trunk, put(101))
    assert [client.read() for client in clients] == [["#0 @60 put 60 k=v", "#0 @101 put 101 k=v"]] * 5


def test_an_older_backfill_takes_over_those_with_no_event_yet() -> None:
    """Many watches that arrive with the newest start first share one backfill, like in any other order."""
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=30))
    newest, first = behind(shell, 60)
    newer, second = behind(shell, 50)
    oldest, third = behind(shell, 40)
    assert [each.start_revision for each in (first, second, third)] == [60, 50, 40]
    assert shell.closed == [first, second]
    assert shell.core.stats.backfills == 1
    shell.events(third, put(45), put(55), put(60), at=100)
    assert oldest.read() == ["#0 @60 put 45 k=v put 55 k=v put 60 k=v"]
    assert newer.read() == ["#0 @60 put 55 k=v put 60 k=v"]
    assert newest.read() == ["#0 @60 put 60 k=v"]
    shell.progressed(100, third)
    assert shell.closed == [first, second, third]


def test_a_backfill_with_too_many_watches_is_not_taken_over() -> None:
    """Many watches whose starts decrease would all be moved by each create."""
    shell = Shell(CoreLimits(step_watches_max=3))
    several = [behind(shell, 50) for _ in range(4)]
    behind(shell, 40)
    behind(shell, 30)
    assert shell.closed == [shell.opened[2]]
    assert len(several[0][1].owner.watches) == 4
    assert shell.core.stats.backfills == 2


def test_a_stalled_backfill_is_given_up_in_steps() -> None:
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=0, step_watches_max=10))
    slow, backfill = behind(shell, 50)
    for _ in range(25):
        slow.create(start=50)
    slow.stall()
    shell.events(backfill, put(50), at=100)
    waiting, _ = behind(shell, 60)
    left = [len(backfill.owner.watches)]
    while shell.core.next_deadline() == shell.now:
        shell.do(shell.core.expire)
        left.append(0 if backfill.closed else len(backfill.owner.watches))
    assert max(before - after for before, after in pairwise(left)) == 10
    assert backfill in shell.closed
    assert shell.opened[-1].start_revision == 60
    shell.created(shell.opened[-1], 100)
    shell.events(shell.opened[-1], put(60), at=100)
    assert waiting.read() == ["#0 @60 put 60 k=v"]


def test_a_backfill_that_brought_events_is_not_taken_over(shell: Shell) -> None:
    _, newer = behind(shell, 50)
    shell.events(newer, put(60), at=100)
    behind(shell, 40)
    assert shell.closed == []
    assert shell.core.stats.backfills == 2


def test_a_backfill_far_ahead_is_not_taken_over() -> None:
    shell = Shell(CoreLimits(backfill_share_revisions=30))
    behind(shell, 50)
    behind(shell, 75)
    behind(shell, 40)
    assert shell.closed == []
    assert shell.core.stats.backfills == 2


def test_a_backfill_without_prev_kv_takes_over_none_with_it(shell: Shell) -> None:
    behind(shell, 50, prev_kv=True)
    behind(shell, 40)
    assert shell.closed == []


def test_a_backfill_too_far_behind_is_not_shared() -> None:
    shell = Shell(CoreLimits(backfill_share_revisions=10))
    _, backfill = behind(shell, 50)
    _, near = behind(shell, 60)
    _, far = behind(shell, 61)
    assert near is backfill
    assert far is not backfill


def test_a_backfill_without_prev_kv_is_not_shared_with_prev_kv(shell: Shell) -> None:
    shell.trunk(100, shell.client(), prev_kv=True)
    plain, without = behind(shell, 50)
    wants, backfill = behind(shell, 50, prev_kv=True)
    also, shared = behind(shell, 50)
    assert (without.prev_kv, backfill.prev_kv) == (False, True)
    assert shared in (without, backfill)
    shell.events(backfill, put(60, prev=b"u"), at=100)
    shell.events(without, put(60), at=100)
    assert wants.read() == ["#0 @60 put 60 k=v (was u)"]
    assert plain.read() == also.read() == ["#0 @60 put 60 k=v"]


def test_a_slow_session_paces_its_backfill() -> None:
    shell = Shell(CoreLimits(backfill_bytes_max=1000))
    client, backfill = behind(shell, 50)
    client.stall()
    for revision in range(50, 60):
        shell.events(backfill, put(revision), at=100)
        if shell.paused:
            break
    assert shell.paused == [backfill]
    # Batches read before the pause took effect are kept.
    held = revision
    shell.events(backfill, put(held + 1), at=100)
    client.drain()
    assert shell.paused == []
    assert client.read() == [
        "#0 @50 put 50 k=v",
        f"#0 @{held + 1} " + " ".join(f"put {each} k=v" for each in range(51, held + 2)),
    ]
    shell.progressed(100, backfill)
    assert shell.closed == [backfill]


@pytest.mark.parametrize(("room", "held"), [(0, 3), (-1, 2)])
def test_memory_of_a_backfill_for_slow_sessions_is_bounded(room: int, held: int) -> None:
    """Three responses fit exactly: the fourth exceeds the limit. With one byte less the third does."""
    cost = Batch(header(100), (put(50),), len(put(50).encoded)).memory_bytes
    shell = Shell(CoreLimits(backfill_bytes_max=3 * cost + room))
    client, backfill = behind(shell, 50)
    client.stall()
    shell.events(backfill, put(50), at=100)
    for number in range(held):
        shell.events(backfill, put(51 + number), at=100)
        assert shell.paused == []
    shell.events(backfill, put(51 + held), at=100)
    assert shell.paused == [backfill]


def test_a_long_stalled_watch_later_gets_its_own_backfill() -> None:
    shell = Shell(CoreLimits(backfill_bytes_max=1000))
    quick, backfill = behind(shell, 50)
    slow, shared = behind(shell, 50)
    assert shared is backfill
    slow.stall()
    for revision in range(50, 70):
        shell.events(backfill, put(revision), at=100)
    assert len(quick.read()) == 20
    assert shell.paused == []
    assert slow.session.watches[0].source is None
    slow.drain()
    own = shell.opened[-1]
    assert own is not backfill
    assert own.start_revision == 51
    shell.created(own, 100)
    shell.events(own, put(51), at=100)
    assert slow.read() == ["#0 @50 put 50 k=v", "#0 @51 put 51 k=v"]


def test_a_briefly_stalled_watch_stays_on_its_backfill(shell: Shell) -> None:
    quick, backfill = behind(shell, 50)
    slow, _ = behind(shell, 50)
    slow.stall()
    shell.events(backfill, put(50), at=100)
    shell.events(backfill, put(51), at=100)
    shell.events(backfill, put(52), at=100)
    slow.drain()
    assert slow.read() == ["#0 @50 put 50 k=v", "#0 @52 put 51 k=v put 52 k=v"]
    assert len(shell.opened) == 2
    assert len(quick.read()) == 3


def test_the_last_watch_to_leave_closes_its_backfill(shell: Shell) -> None:
    one, backfill = behind(shell, 50)
    two, _ = behind(shell, 50)
    one.cancel(0)
    assert shell.closed == []
    two.close()
    assert shell.closed == [backfill]
    assert shell.core.stats.backfills == 0


def test_backfills_are_bounded_and_further_watches_are_queued() -> None:
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=0))
    first, backfill = behind(shell, 50)
    second, same = behind(shell, 60)
    third, _ = behind(shell, 70)
    assert same is backfill
    assert second.session.watches[0].place is Place.QUEUED
    assert shell.core.stats.queued == 2
    third.stall()
    third.cancel(0)
    assert shell.core.stats.queued == 1
    first.cancel(0)
    assert shell.opened[-1].start_revision == 60
    shell.created(shell.opened[-1], 100)
    shell.events(shell.opened[-1], put(60), at=100)
    assert second.read() == ["#0 @60 put 60 k=v"]


def test_a_queued_watch_that_stalls_leaves_the_queue() -> None:
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=0))
    first, _ = behind(shell, 50)
    second, _ = behind(shell, 60)
    second.stall()
    second.create(start=90)
    first.cancel(0)
    assert len(shell.opened) == 2
    second.drain()
    assert shell.opened[-1].start_revision == 60
    assert second.session.watches[1].place is Place.QUEUED


def queue_of(shell: Shell, starts: list[int]) -> tuple[Client, list[Client]]:
    """Return the client with the only backfill allowed, of another range, and clients whose watches are queued."""
    shell.trunk(100, shell.client())
    shell.trunk(100, shell.client(), b"other")
    first, others = shell.client(), [shell.client() for _ in starts]
    first.create(b"other", b"", 50)
    for client, start in zip(others, starts, strict=True):
        client.create(b"k", b"", start)
        client.read()
    assert shell.core.stats.queued == len(starts)
    return first, others


def test_a_backfill_takes_the_queued_watches_of_its_range() -> None:
    shell = Shell(CoreLimits(backfills_max=1))
    first, others = queue_of(shell, [60, 50, 90, 70])
    first.close()
    assert [each.start_revision for each in shell.opened[2:]] == [50, 50]
    assert shell.core.stats.queued == 0
    shell.created(shell.opened[-1], 100)
    shell.events(shell.opened[-1], put(55), put(65), put(95), at=100)
    assert [client.read()[0].count("put") for client in others] == [2, 3, 1, 1]
    shell.progressed(100, shell.opened[-1])
    assert shell.closed == shell.opened[2:]


def test_a_long_queue_is_placed_in_steps() -> None:
    shell = Shell(CoreLimits(backfills_max=1, step_watches_max=2))
    first, others = queue_of(shell, [60, 50, 50, 90, 70])
    first.close()
    assert shell.core.stats.queued == 3
    assert shell.core.next_deadline() == shell.now
    shell.settle()
    assert shell.core.stats.queued == 0
    assert [each.start_revision for each in shell.opened[2:]] == [50, 50]
    assert all(client.session.watches[0].source in shell.core._state.backfills for client in others)


def test_many_watches_of_a_backfill_move_in_steps() -> None:
    shell = Shell(CoreLimits(step_watches_max=2))
    clients = [behind(shell, 50)[0] for _ in range(5)]
    trunk, backfill = shell.opened
    shell.events(backfill, put(60), at=100)
    shell.progressed(100, backfill)
    assert len(backfill.owner.watches) == 3
    assert shell.core.next_deadline() == shell.now
    # Those that have not moved get their events from the backfill.
    shell.events(trunk, put(101))
    shell.events(backfill, put(101))
    assert all(client.read() == ["#0 @60 put 60 k=v", "#0 @101 put 101 k=v"] for client in clients)
    shell.settle()
    assert shell.closed == [backfill]
    shell.events(trunk, put(102))
    assert all(client.read() == ["#0 @102 put 102 k=v"] for client in clients)


def test_a_watch_that_stays_on_its_backfill_delays_no_other() -> None:
    shell = Shell(CoreLimits(step_watches_max=1, history_revisions_max=1))
    slow, backfill = behind(shell, 50)
    slow.stall()
    slow.create(start=50)
    other, _ = behind(shell, 50)
    # The only one in the history from now on.
    shell.events(shell.opened[0], put(105))
    shell.events(shell.opened[0], put(106))
    shell.events(backfill, put(60), put(105), at=106)
    shell.settle()
    assert [watch.source for watch in slow.session.watches.values()] == [backfill.owner] * 2
    assert other.session.watches[0].source is shell.opened[0].owner
    assert shell.core.next_deadline() != shell.now


def test_no_backfill_is_opened_for_a_session_that_has_ended() -> None:
    shell = Shell(CoreLimits(backfills_max=1, step_watches_max=2))
    first, others = queue_of(shell, [50])
    for number in range(40):
        shell.trunk(100, others[0], b"%d" % number)
        others[0].create(b"%d" % number, b"", 50)
    opened = len(shell.opened)
    others[0].close()
    first.close()
    shell.settle()
    assert shell.core.stats.watches == 2
    assert len(shell.opened) == opened


def test_watches_that_cannot_share_wait_behind_other_ranges() -> None:
    shell = Shell(CoreLimits(backfills_max=1, backfill_share_revisions=10))
    first, others = queue_of(shell, [90, 50, 85])
    late = shell.client()
    late.create(b"other", b"", 70)
    first.close()
    assert shell.core.stats.queued == 3
    # The oldest first.
    others[1].close()
    assert [(each.key, each.start_revision) for each in shell.opened[3:]] == [(b"k", 50), (b"other", 70)]
    late.close()
    assert (shell.opened[-1].key, shell.opened[-1].start_revision) == (b"k", 85)
    assert shell.core.stats.queued == 0


def test_compaction_cancels_backfill_watches_that_missed_events(shell: Shell) -> None:
    """A watch on the same backfill that missed nothing stays open, and others are not affected."""
    lost, backfill = behind(shell, 50)
    lives, shared = behind(shell, 80)
    assert shared is backfill
    shell.canceled(backfill, compact_revision=80)
    assert lost.read() == ["#0 @100 canceled compacted 80"]
    own = shell.opened[-1]
    assert own.start_revision == 80
    # etcd may send it twice.
    shell.canceled(backfill, compact_revision=80)
    shell.created(own, 100)
    shell.events(own, put(80), at=100)
    assert lives.read() == ["#0 @80 put 80 k=v"]
    assert backfill not in shell.closed


def test_compaction_behind_a_backfill_cancels_no_watch(shell: Shell) -> None:
    client, backfill = behind(shell, 50)
    shell.events(backfill, put(60), at=100)
    shell.canceled(backfill, compact_revision=61)
    again = shell.opened[-1]
    assert (again.start_revision, again.is_backfill) == (61, True)
    shell.created(again, 100)
    shell.events(again, put(62), at=100)
    assert client.read() == ["#0 @60 put 60 k=v", "#0 @62 put 62 k=v"]


def test_a_large_catch_up_response_is_split() -> None:
    size = len(put(50).encoded)
    shell = Shell(CoreLimits(response_bytes_max=2 * size))
    client, backfill = behind(shell, 50)
    shell.events(backfill, *[put(revision) for revision in range(50, 55)], at=100)
    assert client.read() == [
        "#0 @51 put 50 k=v put 51 k=v",
        "#0 @53 put 52 k=v put 53 k=v",
        "#0 @54 put 54 k=v",
    ]


# prev_kv


def test_an_unusable_backfill_is_not_read_further() -> None:
    """Other ranges took the memory, and its only watch does not read: that watch restarts at its position later."""
    shell = Shell(CoreLimits(history_bytes_total_max=1))
    shell.trunk(100, shell.client())
    client = shell.client()
    client.create(start=50)
    client.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    client.stall()
    for revision in (60, 61, 62, 63):
        shell.events(backfill, put(revision), at=100)
    assert shell.paused == [backfill]
    client.drain()
    shell.settle()
    assert client.read() == ["#0 @60 put 60 k=v"]
    assert shell.opened[-1].start_revision == 61
    assert shell.closed == [backfill]
