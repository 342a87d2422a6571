"""Very many watches end, or get another source, in bounded steps: others are served between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from coalesce import CoreLimits, UpstreamLost, invariants
from tests.coalesce.shell import Client, Shell, header, put

UNAVAILABLE = 14
LIMITS = CoreLimits(step_watches_max=10)


def in_steps(shell: Shell, count: Callable[[], int], between: Callable[[], None] = lambda: None) -> list[int]:
    """Let the core do what is due, one `expire` at a time; return by how much each step has lowered a number."""
    lowered = []
    while shell.core.next_deadline() == shell.now:
        before = count()
        shell.do(shell.core.expire)
        lowered.append(before - count())
        between()
    return lowered


def many(shell: Shell, clients: int, each: int = 1, start: int = 6) -> list[Client]:
    """Return clients with so many watches each, on the range that the first watch has opened."""
    made = [shell.client() for _ in range(clients)]
    for client in made:
        for _ in range(each):
            client.create(start=start)
        client.read()
    return made


def test_a_compaction_cancels_many_watches_in_steps() -> None:
    shell = Shell(LIMITS)
    other, future, late = shell.client(), shell.client(), shell.client()
    bystander = shell.trunk(5, other, b"j")
    trunk = shell.trunk(5, shell.client())
    [client] = many(shell, 1, 45)
    future.create(start=12)
    watches = shell.core.stats.watches
    shell.canceled(trunk, compact_revision=10)
    assert watches - shell.core.stats.watches == 10
    # A create waits for the new upstream watch, wherever it starts.
    late.create(start=6)
    late.create(start=11)
    revision = 5

    def event() -> None:
        nonlocal revision
        revision += 1
        shell.events(bystander, put(revision, b"j"))

    lowered = in_steps(shell, lambda: shell.core.stats.watches, event)
    assert max(lowered) == 10
    assert sum(lowered) == 36
    assert len(other.read()) == revision - 5
    assert [line.split(" @")[0] for line in client.read()] == [f"#{number}" for number in range(45)]
    again = shell.opened[-1]
    assert (again.start_revision, shell.closed) == (10, [])
    assert late.read() == []
    shell.created(again, 20)
    assert future.read() == ["#0 @5 created"]
    assert late.read() == ["#0 @20 created", "#1 @20 created"]
    shell.events(again, put(12))
    assert (future.read(), late.read()) == (["#0 @12 put 12 k=v"], ["#1 @12 put 12 k=v"])


def test_a_compacted_backfill_cancels_many_watches_in_steps() -> None:
    """Those that missed nothing go on to the trunk; the backfill is closed in the end."""
    shell = Shell(LIMITS)
    shell.trunk(100, shell.client())
    [client] = many(shell, 1, 25, start=10)
    [kept] = many(shell, 1, 25, start=60)
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    watches = shell.core.stats.watches
    shell.canceled(backfill, compact_revision=50)
    many(shell, 1, 1, start=70)
    lowered = in_steps(shell, lambda: shell.core.stats.watches)
    assert max(lowered) == 10
    assert watches + 1 - shell.core.stats.watches == 25
    assert len(client.read()) == 25
    assert [each.start_revision for each in shell.opened[2:]] == [70, 60]
    again = shell.opened[-1]
    for each in shell.opened[2:]:
        shell.created(each, 100)
    shell.events(again, put(80))
    assert len(kept.read()) == 25


def test_a_lost_upstream_watch_ends_many_sessions_in_steps() -> None:
    shell = Shell(LIMITS)
    other, waiting = shell.client(), shell.client()
    kept = shell.trunk(5, other, b"j")
    trunk = shell.trunk(5, shell.client())
    clients = many(shell, 20, 3)
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(UNAVAILABLE, "gone"))
    waiting.create(start=6)
    assert waiting.read() == []
    lowered = in_steps(shell, lambda: shell.core.stats.sessions, lambda: shell.bookmark(kept, 6))
    assert max(lowered) == 1
    assert {client.ended for client in clients} == {(UNAVAILABLE, "gone")}
    # It came later, and has another upstream watch.
    assert [line.split()[2] for line in waiting.read()] == ["created"]
    assert other.ended is None
    assert (shell.core.stats.watches, shell.core.stats.trunks) == (2, 2)


def test_a_create_that_comes_while_sessions_end_is_not_lost() -> None:
    """Its token may be valid, and that of the lost upstream watch was refused."""
    shell = Shell(LIMITS)
    trunk = shell.trunk(5, shell.client(b"old"))
    for _ in range(20):
        shell.client(b"old").create(start=6)
    fresh = shell.client(b"new")
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(16, "etcdserver: invalid auth token"))
    fresh.create(start=6)
    in_steps(shell, lambda: shell.core.stats.watches)
    assert shell.core.stats.watches == 0
    assert fresh.ended is None
    assert shell.opened[-1].token == b"new"
    shell.created(shell.opened[-1], 5)
    assert fresh.read() == ["#0 @5 created"]


def test_a_lost_upgrade_ends_many_watches_with_prev_kv_in_steps() -> None:
    shell = Shell(LIMITS)
    first = shell.client()
    shell.trunk(100, first)
    plain = many(shell, 10, 3, start=101)
    wants = [shell.client() for _ in range(10)]
    for client in wants:
        client.create(start=101, prev_kv=True)
    [upgrade] = [each for each in shell.opened if each.prev_kv and not each.is_backfill]
    shell.do(shell.core.upstream_lost, upgrade, UpstreamLost(UNAVAILABLE, "gone"))
    lowered = in_steps(shell, lambda: shell.core.stats.sessions)
    assert max(lowered) == 1
    assert {client.ended for client in wants} == {(UNAVAILABLE, "gone")}
    assert {client.ended for client in plain} == {None}
    assert shell.core.stats.watches == 31


def test_a_create_that_comes_while_an_upgrade_ends_is_not_lost() -> None:
    shell = Shell(LIMITS)
    shell.trunk(100, shell.client(b"old"))
    for _ in range(20):
        shell.client(b"old").create(start=101, prev_kv=True)
    [upgrade] = [each for each in shell.opened if each.prev_kv and not each.is_backfill]
    shell.do(shell.core.upstream_lost, upgrade, UpstreamLost(16, "etcdserver: invalid auth token"))
    fresh = shell.client(b"new")
    fresh.create(start=101, prev_kv=True)
    in_steps(shell, lambda: shell.core.stats.sessions)
    assert (fresh.ended, shell.core.stats.sessions) == (None, 2)
    again = shell.opened[-1]
    assert (again.token, again.prev_kv, again.closed) == (b"new", True, False)
    shell.created(again, 100)
    shell.events(again, put(101, prev=b"u"))
    assert fresh.read() == ["#0 @100 created", "#0 @101 put 101 k=v (was u)"]


@pytest.mark.parametrize("prev_kv", [False, True])
@pytest.mark.parametrize("refused", [False, True])
def test_no_watch_moves_to_a_trunk_whose_watches_end(prev_kv: bool, refused: bool) -> None:
    """A cover is removed or refused, and etcd has just refused the token of another watch of the range."""
    shell = Shell(LIMITS)
    covered = replace(LIMITS, covers=(b"/s/",))
    moved, other = shell.client(b"new"), shell.client(b"new")
    trunk = shell.trunk(10, moved, b"/s/a", prev_kv=prev_kv)
    shell.core.limits = covered
    shell.settle()
    cover = shell.opened[-1]
    shell.created(cover, 10)
    # The watches of a cover leave it in the opposite order.
    other.create(b"/s/b", start=11)
    shell.wait(1)
    assert moved.session.watches[0].trunk is cover.owner
    # The trunk lingers, so it serves new watches until these move as well.
    for _ in range(20):
        shell.client(b"old").create(b"/s/a", start=11, prev_kv=prev_kv)
    # The event loop is late: to move watches is due as well.
    shell.now += 1
    shell.do(shell.core.upstream_lost, trunk, UpstreamLost(16, "etcdserver: invalid auth token"))
    if refused:
        shell.do(shell.core.upstream_lost, cover, UpstreamLost(7, "denied"))
    else:
        shell.core.limits = LIMITS
    in_steps(shell, lambda: shell.core.stats.sessions)
    shell.wait(2)
    assert (moved.ended, other.ended, shell.core.stats.sessions) == (None, None, 2)
    assert cover.closed
    again = {each.key: each for each in shell.opened if not each.closed}
    assert {key: each.start_revision for key, each in again.items()} == {b"/s/a": 11, b"/s/b": 11}
    shell.created(again[b"/s/a"], 10)
    shell.events(again[b"/s/a"], put(11, b"/s/a"))
    assert moved.read()[-1] == "#0 @11 put 11 /s/a=v"


def test_without_a_leader_many_sessions_end_in_steps() -> None:
    shell = Shell(LIMITS)
    shell.trunk(5, shell.client())
    clients = [shell.client(has_leader=True) for _ in range(20)]
    for client in clients:
        client.create(start=6)
    shell.do(shell.core.no_leader)
    clients[-1].close()
    assert in_steps(shell, lambda: shell.core.stats.sessions) == [1] * 18
    assert {client.ended for client in clients[:-1]} == {(UNAVAILABLE, "etcdserver: no leader")}


def test_clients_may_leave_while_their_watches_end() -> None:
    shell = Shell(LIMITS)
    trunk = shell.trunk(5, shell.client())
    clients = many(shell, 5, 20)
    shell.canceled(trunk, compact_revision=10)

    def leave() -> None:
        if clients:
            clients.pop().close()

    in_steps(shell, lambda: 0, leave)
    assert (shell.core.stats.watches, shell.core.stats.trunks) == (0, 0)
    assert len(shell.opened) == 1


def test_a_restore_ends_many_watches_in_steps() -> None:
    """No watch gets events of both histories, and no request is decided meanwhile; watches of the future stay."""
    shell = Shell(LIMITS)
    reason = "canceled compacted 20 (watchmux: the history of the store was replaced (restored from a snapshot?))"
    first, second, future, slow, late = (shell.client() for _ in range(5))
    early = shell.trunk(50, first)
    other = shell.trunk(50, second, b"j")
    for client, key in ((first, b"k"), (second, b"j"), (slow, b"j")):
        for _ in range(20):
            client.create(key, start=51)
        client.read()
    future.create(b"j", start=90)
    future.read()
    slow.create(b"j", start=30)
    backfill = shell.opened[-1]
    slow.stall()
    shell.events(other, put(55, b"j"))
    second.read()
    watches = shell.core.stats.watches
    shell.do(shell.core.other_history, header(20))
    late.create(b"j")
    late.create(b"k", start=21)
    late.progress()

    def between() -> None:
        # What arrives for the old upstream watches is of the new history.
        for upstream in (early, other, backfill):
            shell.created(upstream, 25)
            shell.events(upstream, put(60, b"j"))
        if shell.core.next_deadline() == shell.now:
            assert late.read() == []

    lowered = in_steps(shell, lambda: shell.core.stats.watches, between)
    assert max(lowered) <= 10
    assert (watches, shell.core.stats.watches) == (64, 1)
    assert {line.split(" @20 ")[1] for line in first.read() + second.read()} == {reason}
    assert sorted(shell.closed, key=id) == sorted((early, other, backfill), key=id)
    [again] = [each for each in shell.opened if each.key == b"j" and not each.closed]
    assert again.start_revision == 21
    shell.created(again, 25)
    shell.read_now(25)
    assert late.read()[0] == "#0 @25 created"
    slow.drain()
    assert {line.split(" @20 ")[-1] for line in slow.read()[2:]} == {reason}
    shell.events(again, put(90, b"j"))
    assert future.read() == ["#0 @90 put 90 j=v"]


def test_parked_histories_are_dropped_in_steps_after_a_restore() -> None:
    shell = Shell(LIMITS)
    client = shell.client()
    for number in range(25):
        trunk = shell.trunk(5, client, b"%d" % number)
        shell.events(trunk, put(6, b"%d" % number))
        client.cancel(number)
    shell.wait(1)
    parked = shell.core.stats.parked
    assert parked == 25
    shell.do(shell.core.other_history, header(3))
    client.create(b"1", start=6)
    assert in_steps(shell, lambda: shell.core.stats.parked) == [10, 5, 0]
    # Its history was the old one's.
    shell.read_now(3)
    assert shell.opened[-1].start_revision == 4


def test_a_restore_reopens_what_was_lost_before_it_opened() -> None:
    """Creates that wait for a lost range end in steps; those left when the store was restored go on."""
    shell = Shell(LIMITS)
    clients = [shell.client() for _ in range(25)]
    for client in clients:
        client.create()
    [lost] = shell.opened
    shell.do(shell.core.upstream_lost, lost, UpstreamLost(UNAVAILABLE, "gone"))
    shell.do(shell.core.other_history, header(20))
    invariants.check(shell.core)
    in_steps(shell, lambda: shell.core.stats.watches)
    again = shell.opened[-1]
    assert (again is not lost, again.closed) == (True, False)
    late = shell.client()
    late.create()
    shell.created(again, 25)
    shell.read_now(25)
    in_steps(shell, lambda: shell.core.stats.watches)
    while shell.reads:
        shell.read_now(25)
        in_steps(shell, lambda: shell.core.stats.watches)
    assert late.read() == ["#0 @25 created"]
