"""How watches, sessions and trunks end, and which of them stay open."""

from __future__ import annotations

from itertools import pairwise

import pytest

from coalesce import CoreLimits, UpstreamLost
from tests.coalesce.shell import Client, Shell, header, put

UNAVAILABLE = 14


# by the client


def test_cancel(shell: Shell) -> None:
    client, other = shell.client(), shell.client()
    trunk = shell.trunk(5, client)
    other.create(start=6)
    shell.events(trunk, put(6))
    client.cancel(0)
    shell.events(trunk, put(7))
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @6 canceled"]
    assert other.read() == ["#0 @5 created", "#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]


def test_a_trunk_lingers_with_its_history() -> None:
    shell = Shell(CoreLimits(linger_s=2))
    client = shell.client()
    trunk = shell.trunk(5, client)
    shell.events(trunk, put(6))
    client.cancel(0)
    shell.events(trunk, put(7))
    shell.wait(1.9)
    assert shell.closed == []
    client.create(start=6)
    assert client.read()[-1] == "#1 @7 put 6 k=v put 7 k=v"
    shell.wait(60)
    assert shell.closed == []
    client.close()
    shell.wait(2)
    assert shell.closed == [trunk]
    assert shell.core.stats.trunks == 0
    assert len(shell.opened) == 1


def test_responses_of_a_closed_upstream_watch_are_ignored(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.cancel(0)
    shell.wait(10)
    shell.events(trunk, put(6))
    shell.bookmark(trunk, 7)
    shell.created(trunk, 8)
    shell.canceled(trunk, 9)
    shell.progressed(10, trunk)
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(UNAVAILABLE, "gone"))
    assert shell.core.stats.trunks == 0


# by a compaction


def test_a_compaction_cancels_only_watches_that_missed_events(shell: Shell) -> None:
    """Watches that need the compact revision or later stay open, on a new upstream watch."""
    live, future, edge, other = (shell.client() for _ in range(4))
    trunk = shell.trunk(5, live)
    future.create(start=12)
    edge.create(start=10)
    kept = shell.trunk(5, other, b"j")
    for client in (live, future, edge):
        client.read()
    shell.canceled(trunk, compact_revision=10)
    assert live.read() == ["#0 @5 canceled compacted 10"]
    assert future.read() == edge.read() == other.read() == []
    again = shell.opened[-1]
    assert again.start_revision == 10
    assert shell.closed == []
    shell.created(again, 20)
    shell.events(again, put(10), put(12), at=20)
    assert edge.read() == ["#0 @12 put 10 k=v put 12 k=v"]
    assert future.read() == ["#0 @12 put 12 k=v"]
    shell.events(kept, put(21, b"j"))
    assert other.read() == ["#0 @21 put 21 j=v"]


def test_a_compaction_by_which_no_event_was_missed(shell: Shell) -> None:
    client, slow = shell.client(), shell.client()
    trunk = shell.trunk(5, client)
    slow.create(start=6)
    slow.stall()
    shell.events(trunk, put(6))
    shell.events(trunk, put(7))
    shell.canceled(trunk, compact_revision=8)
    again = shell.opened[-1]
    assert again.start_revision == 8
    shell.created(again, 9)
    shell.events(again, put(9))
    slow.drain()
    assert slow.read()[1:] == ["#0 @6 put 6 k=v", "#0 @9 put 7 k=v put 9 k=v"]
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v", "#0 @9 put 9 k=v"]


def test_an_unused_compacted_trunk_is_removed(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.close()
    shell.canceled(trunk, compact_revision=10)
    assert shell.core.stats.trunks == 0
    assert len(shell.opened) == 1


def test_a_compacted_start_is_created_and_then_canceled(shell: Shell, client: Client) -> None:
    client.create(start=98)
    shell.read_now(100)
    shell.created(shell.opened[0], 100)
    assert client.read() == ["#0 @100 created"]
    shell.canceled(shell.opened[0], compact_revision=99)
    assert client.read() == ["#0 @100 canceled compacted 99"]
    assert shell.core.stats.trunks == 0


def test_a_trunk_compacted_before_its_created_is_reopened(shell: Shell) -> None:
    past, now = shell.client(), shell.client()
    past.create(start=98)
    shell.read_now(100)
    assert past.read() == ["#0 @100 created"]
    now.create()
    shell.canceled(shell.opened[0], compact_revision=100)
    assert past.read() == ["#0 @100 canceled compacted 100"]
    assert shell.opened[-1].start_revision == 100
    shell.read_now(101)
    shell.created(shell.opened[-1], 101)
    assert now.read() == ["#0 @101 created"]


def test_a_cancel_follows_the_unsent_bytes_of_a_stalled_watch(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.stall()
    shell.events(trunk, put(6))
    shell.canceled(trunk, compact_revision=10)
    shell.opened.clear()
    client.drain()
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @6 canceled compacted 10"]
    assert shell.opened == []


def test_an_upgrade_does_not_outlive_its_trunk(shell: Shell) -> None:
    plain, wants = shell.client(), shell.client()
    trunk = shell.trunk(5, plain)
    wants.create(start=12, prev_kv=True)
    upgrade = shell.opened[-1]
    plain.read()
    shell.canceled(trunk, compact_revision=10)
    assert plain.read() == ["#0 @5 canceled compacted 10"]
    again = shell.opened[-1]
    assert shell.closed == [upgrade]
    assert (again.start_revision, again.prev_kv) == (10, True)
    shell.created(again, 20)
    shell.events(again, put(11), put(12, prev=b"u"), at=20)
    assert wants.read() == ["#0 @5 created", "#0 @12 put 12 k=v (was u)"]


# lost, refused, no leader


def test_a_lost_trunk_ends_its_sessions_and_no_others(shell: Shell) -> None:
    client, behind, waiting, other = (shell.client() for _ in range(4))
    kept = shell.trunk(100, other, b"j")
    trunk = shell.trunk(100, client)
    behind.create(start=10)
    backfill = shell.opened[-1]
    waiting.create()
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(UNAVAILABLE, "no endpoint"))
    assert client.ended == behind.ended == waiting.ended == (UNAVAILABLE, "no endpoint")
    assert other.ended is None
    assert shell.closed == [backfill]
    shell.events(kept, put(101, b"j"))
    assert other.read() == ["#0 @101 put 101 j=v"]


def test_any_loss_ends_the_stream_but_refuses_a_create(shell: Shell) -> None:
    """Python's etcd3 and aetcd wait without end on a `canceled` without compact_revision."""
    client, waiting = shell.client(), shell.client()
    trunk = shell.trunk(5, client)
    waiting.create()
    client.create(b"j", start=6)
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(3, "what is this"))
    assert client.ended == (UNAVAILABLE, "what is this")
    assert client.read() == ["#1 @5 created"]
    assert waiting.ended is None
    assert waiting.read() == ["#-1 @5 created canceled (what is this)"]
    assert shell.core.stats.watches == 0


def test_a_create_too_large_for_etcd_ends_its_stream(shell: Shell) -> None:
    """As in etcd: there is no answer to such a create."""
    large, other = shell.client(), shell.client()
    shell.trunk(5, other)
    large.create(b"large")
    text = "grpc: received message larger than max (3 vs. 2)"
    shell.do(shell.core.upstream_lost, shell.opened[-1], UpstreamLost(8, text))
    assert (large.ended, large.read()) == ((8, text), [])
    assert other.ended is None


def test_a_lost_backfill_ends_only_its_sessions(shell: Shell) -> None:
    client, behind = shell.client(), shell.client()
    shell.trunk(100, client)
    behind.create(start=10)
    shell.do(shell.core.upstream_lost, shell.opened[-1], UpstreamLost(UNAVAILABLE, "gone"))
    assert behind.ended == (UNAVAILABLE, "gone")
    assert client.ended is None
    assert shell.core.stats.backfills == 0


def test_another_token_replaces_a_refused_one(shell: Shell) -> None:
    one, two = shell.client(b"one"), shell.client(b"two")
    trunk = shell.trunk(5, one)
    two.create(start=6)
    assert trunk.token == b"one"
    shell.events(trunk, put(6))
    shell.canceled(trunk, reason="rpc error: code = Unauthenticated desc = etcdserver: invalid auth token")
    again = shell.opened[-1]
    assert (again.start_revision, again.token) == (7, b"two")
    shell.created(again, 7)
    shell.events(again, put(7))
    assert one.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v"]
    # A token refused once may be tried again after a success.
    assert again.token == b"one"
    shell.canceled(again, reason="no")
    shell.canceled(shell.opened[-1], reason="no")
    assert one.ended == two.ended == (UNAVAILABLE, "no")


@pytest.mark.parametrize(
    "reason",
    [
        UpstreamLost(16, "etcdserver: invalid auth token"),
        UpstreamLost(7, "etcdserver: permission denied"),
        UpstreamLost(3, "etcdserver: user name is empty"),
        UpstreamLost(3, "etcdserver: revision of auth store is old"),
    ],
)
def test_another_token_replaces_one_refused_at_registration(reason: UpstreamLost, shell: Shell) -> None:
    one, two = shell.client(b"one"), shell.client(b"two")
    trunk = shell.trunk(5, one)
    two.create(start=6)
    assert trunk.token == b"one"
    # The refusal applies to the token that was used, even if its session has ended meanwhile.
    one.close()
    shell.do(shell.core.upstream_lost, trunk, reason)
    again = shell.opened[-1]
    assert (again.start_revision, again.token) == (6, b"two")
    shell.do(shell.core.upstream_lost, again, reason)
    assert two.ended == (UNAVAILABLE, reason.text)
    assert shell.core.stats.trunks == 0


def test_a_trunk_refused_at_once_opens_with_another_token(shell: Shell) -> None:
    one, two = shell.client(b"one"), shell.client(b"two")
    one.create()
    two.create()
    shell.canceled(shell.opened[0], reason="no")
    assert (shell.opened[1].start_revision, shell.opened[1].token) == (None, b"two")
    shell.read_now(5)
    shell.read_now(5)
    shell.created(shell.opened[1], 5)
    assert one.read() == two.read() == ["#0 @5 created"]


def test_no_leader_ends_sessions_with_hasleader(shell: Shell) -> None:
    asked, waits = shell.client(has_leader=True), shell.client()
    trunk = shell.trunk(5, asked)
    waits.create(start=6)
    shell.do(shell.core.no_leader)
    assert asked.ended == (UNAVAILABLE, "etcdserver: no leader")
    assert waits.ended is None
    shell.events(trunk, put(6))
    assert waits.read() == ["#0 @5 created", "#0 @6 put 6 k=v"]


def test_a_restored_store(shell: Shell) -> None:
    """Watches that received anything end as by a compaction: it is unknown where the histories begin to differ."""
    client, slow, future = shell.client(), shell.client(), shell.client()
    trunk = shell.trunk(50, client)
    slow.create(start=51)
    future.create(start=90)
    slow.stall()
    shell.events(trunk, put(55, value=b"untrue"))
    slow.unsent.clear()
    shell.events(trunk, put(60, value=b"untrue"))
    for each in (client, slow, future):
        each.read()
    client.progress()
    shell.progressed(60)
    assert client.read() == ["#-1 @60 progress"]
    shell.do(shell.core.other_history, header(57))
    reason = "watchmux: the history of the store was replaced (restored from a snapshot?)"
    assert client.read() == [f"#0 @57 canceled compacted 57 ({reason})"]
    assert shell.closed == [trunk]
    again = shell.opened[-1]
    assert again.start_revision == 58
    shell.created(again, 57)
    slow.drain()
    assert slow.read() == [f"#0 @57 canceled compacted 57 ({reason})"]
    slow.create(start=57)
    backfill = shell.opened[-1]
    assert backfill.start_revision == 57
    shell.created(backfill, 57)
    shell.events(backfill, put(57, value=b"true"))
    assert slow.read() == ["#1 @57 created", "#1 @57 put 57 k=true"]
    shell.events(again, put(90, value=b"true"))
    assert future.read() == ["#0 @90 put 90 k=true"]


def test_a_restored_store_that_grew_past_the_known_revision(shell: Shell) -> None:
    client, near, far = shell.client(), shell.client(), shell.client()
    shell.trunk(50, client)
    near.create(start=60)
    far.create(start=90)
    for each in (client, near, far):
        each.read()
    shell.do(shell.core.other_history, header(70))
    reason = "watchmux: the history of the store was replaced (restored from a snapshot?)"
    # Revision 60 exists already, with an event that was never sent.
    assert client.read() == near.read() == [f"#0 @70 canceled compacted 70 ({reason})"]
    again = shell.opened[-1]
    assert again.start_revision == 71
    shell.created(again, 70)
    shell.events(again, put(90))
    assert far.read() == ["#0 @90 put 90 k=v"]
    client.create(start=60)
    assert shell.opened[-1].start_revision == 60, "the old history is gone"


def test_a_create_rereads_now_after_a_restore(shell: Shell, client: Client) -> None:
    client.create()
    shell.read_now(50)
    shell.do(shell.core.other_history, header(20))
    shell.created(shell.opened[0], 20)
    assert client.read() == []
    shell.read_now(21)
    assert client.read() == ["#0 @21 created"]


def test_progress_after_a_restore_ignores_old_targets(shell: Shell) -> None:
    client, future = shell.client(), shell.client()
    trunk = shell.trunk(50, client)
    shell.events(trunk, put(60))
    client.close()
    future.create(start=61)
    future.cancel(0)
    late = shell.client()
    late.create(start=20)
    late.read()
    shell.do(shell.core.other_history, header(30))
    late.create(start=20)
    for upstream in shell.opened:
        if not upstream.closed:
            shell.created(upstream, 30)
    late.read()
    late.progress()
    for _ in range(3):
        shell.wait(0.2)
        shell.progressed(30)
    assert late.read() == ["#-1 @30 progress"]


# many watches


def test_a_session_of_many_watches_ends_in_steps() -> None:
    """Others are served meanwhile, and nothing of the session is left in the end."""
    shell = Shell(CoreLimits(step_watches_max=10))
    leaver, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    for _ in range(50):
        leaver.create(start=6)
    leaver.read()
    leaver.close()
    left = [shell.core.stats.watches - 1]
    assert shell.core.stats.sessions == 1
    while shell.core.next_deadline() == shell.now:
        shell.events(trunk, put(5 + len(left)))
        shell.do(shell.core.expire)
        left.append(shell.core.stats.watches - 1)
    assert left[0] == 42
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) <= 10
    assert len(other.read()) == len(left) - 1


def test_a_trunk_is_lost_while_a_session_is_leaving_it() -> None:
    shell = Shell(CoreLimits(step_watches_max=1))
    leaver, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    for _ in range(30):
        leaver.create(start=6)
    leaver.close()
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(UNAVAILABLE, "gone"))
    shell.settle()
    assert other.ended == (UNAVAILABLE, "gone")
    assert leaver.ended is None
    assert (shell.core.stats.watches, shell.core.stats.trunks) == (0, 0)


def test_many_ranges_are_closed_in_steps() -> None:
    shell = Shell(CoreLimits(step_watches_max=10, linger_s=2))
    client = shell.client()
    for number in range(35):
        client.create(b"%d" % number, start=5)
    shell.read_now(5)
    shell.read_now(5)
    shell.settle()
    for upstream in shell.opened:
        shell.created(upstream, 5)
    client.close()
    shell.settle()
    shell.now += 2
    closed = [len(shell.closed)]
    while (due := shell.core.next_deadline()) is not None and due <= shell.now:
        shell.do(shell.core.expire)
        closed.append(len(shell.closed))
    assert closed == [0, 10, 20, 30, 35]
