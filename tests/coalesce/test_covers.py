"""Stories of covers: many ranges, one upstream watch."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import count

import pytest

from coalesce import CoreLimits, UpstreamLost
from coalesce.batch import Batch
from coalesce.cover import SCANNED_BATCHES_MAX, KeyedHistory, _chain_of
from coalesce.history import HistoryBudget
from coalesce.losing import COVER_RETRY_S
from coalesce.stats import Stats
from proto.framing import Status
from proto.scan import WatchResponse
from tests.coalesce.shell import Client, Shell, delete, header, put
from tests.coalesce.test_history import batch

# No default of a limit matters in these stories.
LIMITS = CoreLimits(covers=(b"/s/",))


def covered(revision: int = 10, **limits: object) -> tuple[Shell, Client]:
    """Return a shell with an open cover of /s/, and the client whose watch of /s/a opened it."""
    shell = Shell(replace(LIMITS, **limits))  # type: ignore[arg-type]  # keywords of the settings
    client = shell.client()
    upstream = shell.trunk(revision, client, b"/s/a")
    assert (upstream.key, upstream.range_end) == (b"/s/", b"/s0")
    return shell, client


def joined(shell: Shell, key: bytes, range_end: bytes = b"", start: int | None = 11, **more: bool) -> Client:
    """Return a client with a watch that has joined without an upstream call."""
    opened, client = len(shell.opened), shell.client()
    client.create(key, range_end, start, **more)
    assert len(shell.opened) == opened
    assert "created" in client.lines.pop(0)
    return client


def test_ranges_below_a_cover_share_one_upstream_watch() -> None:
    shell, a = covered()
    b, both, outside = joined(shell, b"/s/b"), joined(shell, b"/s/a", b"/s/c"), shell.client()
    (cover,) = shell.opened
    shell.events(cover, put(11, b"/s/b"))
    shell.events(cover, put(12, b"/s/c"))
    shell.events(cover, put(13, b"/s/a"))
    assert a.read() == ["#0 @13 put 13 /s/a=v"]
    assert b.read() == ["#0 @11 put 11 /s/b=v"]
    assert both.read() == ["#0 @11 put 11 /s/b=v", "#0 @13 put 13 /s/a=v"]
    outside.create(b"/t", b"", 11)
    assert len(shell.opened) == 2


def test_a_transaction_reaches_each_branch_whole_and_alone() -> None:
    shell, a = covered()
    b, both = joined(shell, b"/s/b"), joined(shell, b"/s/", b"/s0")
    shell.events(shell.opened[0], put(11, b"/s/a"), put(11, b"/s/b"), delete(11, b"/s/c"), put(12, b"/s/b"))
    assert a.read() == ["#0 @11 put 11 /s/a=v"]
    assert b.read() == ["#0 @12 put 11 /s/b=v put 12 /s/b=v"]
    assert both.read() == ["#0 @12 put 11 /s/a=v put 11 /s/b=v delete 11 /s/c put 12 /s/b=v"]


def test_a_start_inside_the_window_is_replayed_from_the_cover() -> None:
    shell, _ = covered()
    (cover,) = shell.opened
    shell.events(cover, put(11, b"/s/b"), put(11, b"/s/c"))
    shell.events(cover, put(12, b"/s/a"))
    shell.events(cover, delete(13, b"/s/b"))
    assert joined(shell, b"/s/b").read() == ["#0 @13 put 11 /s/b=v delete 13 /s/b"]
    assert joined(shell, b"/s/b", b"", 12).read() == ["#0 @13 delete 13 /s/b"]
    assert joined(shell, b"/s/b", b"/s/c", no_delete=True).read() == ["#0 @11 put 11 /s/b=v"]
    assert joined(shell, b"/s/d").read() == []


def test_long_replays_of_a_key_use_the_index_in_bounded_steps() -> None:
    shell, _ = covered(replay_events_max=50, replay_turn_events_max=100)
    (cover,) = shell.opened
    last = 11 + 4 * SCANNED_BATCHES_MAX
    for revision in range(11, last):
        shell.events(cover, put(revision, b"/s/b" if revision % 40 == 0 else b"/s/x"))
    client = shell.client()
    client.create(b"/s/b", b"", 11)
    shell.settle()
    assert client.lines[1:] == ["#0 @120 " + " ".join(f"put {revision} /s/b=v" for revision in (40, 80, 120))]
    # Evicted batches are forgotten, and the index goes on after them.
    shell.core.limits = replace(shell.core.limits, history_revisions_max=SCANNED_BATCHES_MAX + 8)
    for revision in range(last, last + 2 * SCANNED_BATCHES_MAX):
        shell.events(cover, put(revision, b"/s/b" if revision % 40 == 0 else b"/s/x"))
    again = shell.client()
    again.create(b"/s/b", b"", last + SCANNED_BATCHES_MAX - 7)
    shell.settle()
    assert again.lines[1:] == ["#0 @200 put 200 /s/b=v"]


def test_keys_of_one_chain_of_the_index_get_their_own_events() -> None:
    shell, _ = covered()
    other = next(key for key in (b"/s/x%d" % n for n in count()) if _chain_of(key) == _chain_of(b"/s/b"))
    for revision in range(11, 11 + 4 * SCANNED_BATCHES_MAX):
        shell.events(shell.opened[0], put(revision, b"/s/b" if revision % 40 == 0 else other))
    client = shell.client()
    client.create(b"/s/b", b"", 11)
    shell.settle()
    assert client.lines[1:] == ["#0 @120 put 40 /s/b=v put 80 /s/b=v put 120 /s/b=v"]


@pytest.mark.parametrize(("events", "batches"), [(1, 200), (100, 45)])
def test_the_index_of_a_cover_takes_at_most_an_eighth(events: int, batches: int) -> None:
    def events_of(revision: int) -> Batch:
        return batch(*[put(revision, b"/s/%04d/%04d" % (revision, n)) for n in range(events)])

    limits = CoreLimits(history_bytes_max=batches * events_of(8 * batches).memory_bytes)
    made = KeyedHistory(HistoryBudget(limits, Stats()), 1, False)
    tracemalloc.start()
    for revision in range(1, 8 * batches):
        made.append(events_of(revision), 0.0)
        made.replay_key(made.floor, 0, limits, b"/s/other")
        assert made.index_bytes <= made.index_bytes_max
    snapshot = tracemalloc.take_snapshot()
    tracemalloc.stop()
    traces = snapshot.filter_traces([tracemalloc.Filter(True, "*/coalesce/cover.py")]).traces
    assert len(made) == batches
    assert sum(trace.size for trace in traces) - (17 << 10) <= made.bytes // 8
    # Though it was built again several times, a replay reaches its end.
    turns = 1
    while made.replay_key(made.floor, 0, limits, b"/s/other").following is not None:
        turns += 1
    assert turns <= 4
    # It shrinks with the history, without a replay.
    made.evict_below(8 * batches - 2)
    assert made.index_bytes <= made.index_bytes_max


def test_now_on_a_branch_needs_a_read_but_no_upstream_watch() -> None:
    shell, _ = covered()
    client = shell.client()
    shell.events(shell.opened[0], put(11, b"/s/b"))
    client.create(b"/s/b")
    shell.read_now(11)
    assert client.read() == ["#0 @11 created"]
    assert len(shell.opened) == 1
    shell.events(shell.opened[0], put(12, b"/s/b"))
    assert client.read() == ["#0 @12 put 12 /s/b=v"]


def test_a_watch_of_the_future_meets_the_cover() -> None:
    shell, _ = covered()
    late, inside = joined(shell, b"/s/b", b"", 15), joined(shell, b"/s/a", b"/s/d", 13)
    shell.events(shell.opened[0], put(11, b"/s/b"), put(12, b"/s/a"), put(13, b"/s/b"), put(14, b"/s/x"))
    assert (late.read(), inside.read()) == ([], ["#0 @13 put 13 /s/b=v"])
    shell.bookmark(shell.opened[0], 20)
    shell.events(shell.opened[0], put(21, b"/s/b"))
    assert late.read() == inside.read() == ["#0 @21 put 21 /s/b=v"]


def test_a_bookmark_moves_every_branch() -> None:
    shell, a = covered(history_revisions_max=1)
    b = joined(shell, b"/s/b", progress_notify=True)
    shell.bookmark(shell.opened[0], 500)
    assert b.read() == ["#0 @500 progress"]
    a.progress()
    shell.progressed(600)
    assert a.read() == ["#-1 @600 progress"]
    # After the cover is lost to a compaction below its bookmark, nothing was missed.
    shell.canceled(shell.opened[0], compact_revision=550)
    assert (a.read(), b.read()) == ([], [])
    assert shell.opened[1].start_revision == 601


def test_a_quiet_branch_is_notified_on_a_busy_cover() -> None:
    shell, _ = covered()
    quiet, busy = joined(shell, b"/s/q", progress_notify=True), joined(shell, b"/s/b", progress_notify=True)
    for revision in range(11, 16):
        shell.events(shell.opened[0], put(revision, b"/s/b"))
        shell.wait(0.3)
    assert any("progress" in line for line in quiet.read())
    assert not any("progress" in line for line in busy.read())


def test_a_stalled_branch_is_replayed_and_others_go_on() -> None:
    shell, a = covered()
    b = joined(shell, b"/s/b")
    b.stall()
    for revision in (11, 12, 13):
        shell.events(shell.opened[0], put(revision, b"/s/b"), put(revision, b"/s/a"))
    assert len(a.read()) == 3
    b.drain()
    assert b.read() == ["#0 @11 put 11 /s/b=v", "#0 @13 put 12 /s/b=v put 13 /s/b=v"]


def test_a_start_before_the_window_is_a_backfill_of_its_range() -> None:
    shell, _ = covered(revision=100)
    client, other = shell.client(), shell.client()
    client.create(b"/s/b", b"", 50)
    other.create(b"/s/c", b"", 50)
    backfills = shell.opened[1:]
    assert [(each.key, each.is_backfill) for each in backfills] == [(b"/s/b", True), (b"/s/c", True)]
    for backfill in backfills:
        shell.created(backfill, 100)
    shell.events(backfills[0], put(60, b"/s/b"), at=100)
    shell.progressed(101)
    assert backfills[0] in shell.closed
    shell.events(shell.opened[0], put(102, b"/s/b"))
    assert client.read() == ["#0 @100 created", "#0 @60 put 60 /s/b=v", "#0 @102 put 102 /s/b=v"]
    assert other.read() == ["#0 @100 created"]


def test_prev_kv_gets_a_cover_that_takes_all_watches_over() -> None:
    shell, a = covered()
    client = shell.client()
    client.create(b"/s/b", b"", 11, prev_kv=True)
    upgraded = shell.opened[1]
    assert (upgraded.key, upgraded.prev_kv) == (b"/s/", True)
    shell.created(upgraded, 10)
    shell.settle()
    shell.wait(2)
    assert shell.opened[0] in shell.closed
    shell.events(upgraded, put(11, b"/s/b", prev=b"u"), put(11, b"/s/a", prev=b"u"))
    assert client.read() == ["#0 @10 created", "#0 @11 put 11 /s/b=v (was u)"]
    assert a.read() == ["#0 @11 put 11 /s/a=v"]


def test_a_watch_that_joins_a_left_cover_moves_as_well() -> None:
    shell, a = covered(linger_s=10.0)
    a.close()
    wants_prev_kv, late = shell.client(), shell.client()
    wants_prev_kv.create(b"/s/b", b"", 11, prev_kv=True)
    shell.created(shell.opened[1], 10)
    # The first cover has no watches and lingers, so there is nothing to move.
    shell.wait(2)
    late.create(b"/s/c", b"", 9)
    backfill = shell.opened[2]
    assert backfill.is_backfill
    shell.created(backfill, 10)
    shell.progressed(10)
    shell.wait(20)
    assert {shell.opened[0], backfill} == set(shell.closed)
    shell.events(shell.opened[1], put(11, b"/s/c"))
    assert late.read() == ["#0 @10 created", "#0 @11 put 11 /s/c=v"]


def test_a_run_holds_back_only_the_branches_it_reaches() -> None:
    shell, _ = covered(fragment_bytes=40)
    held, other = joined(shell, b"/s/b", fragment=True), joined(shell, b"/s/c", fragment=True)
    (cover,) = shell.opened
    piece = shell.core.upstream_response
    shell.do(piece, cover, WatchResponse(header(12), 0, fragment=True, events=[put(11, b"/s/b"), put(11, b"/s/b")]))
    assert held.read() == []
    shell.do(piece, cover, WatchResponse(header(12), 0, events=[put(12, b"/s/c"), put(12, b"/s/b")]))
    assert [line.split()[2] for line in held.read()] == ["fragment", "fragment", "put"]
    assert other.read() == ["#0 @12 put 12 /s/c=v"]


def test_a_cover_lingers_and_keeps_its_history() -> None:
    shell, a = covered(linger_s=1.0, history_linger_s=30.0)
    shell.events(shell.opened[0], put(11, b"/s/a"), put(12, b"/s/b"))
    a.close()
    shell.wait(1)
    assert shell.opened[0] in shell.closed
    client = shell.client()
    shell.core.header_seen(shell.core.header or pytest.fail("no header"))
    client.create(b"/s/b", b"", 12)
    assert shell.opened[1].start_revision == 13
    shell.created(shell.opened[1], 12)
    shell.settle()
    assert client.read() == ["#0 @12 created", "#0 @12 put 12 /s/b=v"]


def test_a_refused_cover_gives_way_to_trunks() -> None:
    shell, a = covered()
    b = joined(shell, b"/s/b")
    b.stall()
    shell.events(shell.opened[0], put(11, b"/s/b"))
    refusal = UpstreamLost(7, "etcdserver: permission denied")
    shell.do(shell.core.upstream_lost, shell.opened[0], refusal)
    shell.settle()
    trunks = {upstream.key: upstream for upstream in shell.opened[1:]}
    assert {key: upstream.start_revision for key, upstream in trunks.items()} == {b"/s/a": 12, b"/s/b": 12}
    stats = shell.core.stats.covers[b"/s/"]
    assert (stats.refused, stats.problem) == (1, "etcdserver: permission denied")
    for upstream in trunks.values():
        shell.created(upstream, 12)
    shell.events(trunks[b"/s/a"], put(12, b"/s/a"))
    assert a.read() == ["#0 @12 put 12 /s/a=v"]
    assert a.ended is None


def test_creates_that_wait_for_a_refused_cover_get_trunks() -> None:
    shell = Shell(LIMITS)
    shell.auth = True
    client = shell.client(b"token")
    client.create(b"/s/a", b"", 11)
    shell.do(shell.core.permission, shell.checks.pop(), None)
    shell.read_now(11)
    (cover,) = shell.opened
    # The token of a client is never used for a cover.
    assert cover.token is None
    shell.canceled(cover, reason="etcdserver: permission denied", at=11)
    (_, trunk) = shell.opened
    assert (trunk.key, trunk.token) == (b"/s/a", b"token")
    shell.created(trunk, 11)
    assert client.read() == ["#0 @11 created"]


def test_a_watch_of_a_lost_cover_gets_what_it_missed() -> None:
    """The trunk starts at "now", above what the watch needs: a backfill brings the events between."""
    shell, a = covered()
    late = shell.client()
    late.create(b"/s/a")
    shell.do(shell.core.upstream_lost, shell.opened[0], UpstreamLost(Status.UNAVAILABLE, "lost"))
    shell.settle()
    trunk, backfill = shell.opened[1:]
    assert (trunk.key, trunk.start_revision) == (b"/s/a", None)
    assert (backfill.key, backfill.start_revision, backfill.is_backfill) == (b"/s/a", 11, True)
    shell.created(trunk, 12)
    shell.created(backfill, 12)
    shell.events(backfill, put(11, b"/s/a"), put(12, b"/s/a"))
    shell.progressed(12, backfill)
    shell.settle()
    shell.events(trunk, put(13, b"/s/a"))
    assert a.read() == ["#0 @12 put 11 /s/a=v put 12 /s/a=v", "#0 @13 put 13 /s/a=v"]
    assert backfill in shell.closed


def test_an_upgrade_waits_until_its_trunk_has_a_start() -> None:
    """Found by the simulator, seed 10510: it started at 0, which is "now", and the watch lost the events before."""
    shell = Shell(LIMITS)
    client, late = shell.client(), shell.client()
    cover = shell.trunk(10, client, b"/s/a", prev_kv=True)
    late.create(b"/s/a")
    shell.do(shell.core.upstream_lost, cover, UpstreamLost(Status.UNAVAILABLE, "lost"))
    shell.settle()
    trunk, backfill = shell.opened[1:]
    assert (trunk.start_revision, trunk.prev_kv, backfill.start_revision, backfill.prev_kv) == (None, False, 11, True)
    shell.created(trunk, 12)
    shell.created(backfill, 12)
    upgrade = shell.opened[-1]
    assert (upgrade.start_revision, upgrade.prev_kv, upgrade.is_backfill) == (13, True, False)
    shell.created(upgrade, 12)
    shell.events(backfill, put(11, b"/s/a"), put(12, b"/s/a"))
    shell.progressed(12, trunk, upgrade, backfill)
    shell.settle()
    shell.events(upgrade, put(13, b"/s/a"))
    assert client.read() == ["#0 @12 put 11 /s/a=v put 12 /s/a=v", "#0 @13 put 13 /s/a=v"]
    assert (shell.core.stats.backfills, trunk in shell.closed) == (0, True)


def test_a_refused_cover_is_tried_again() -> None:
    shell, a = covered()
    shell.do(shell.core.upstream_lost, shell.opened[0], UpstreamLost(7, "denied"))
    shell.settle()
    trunk = shell.opened[1]
    shell.created(trunk, 10)
    shell.wait(COVER_RETRY_S + 1)
    cover = shell.opened[-1]
    assert (cover.key, cover.start_revision) == (b"/s/", None)
    shell.created(cover, 12)
    shell.events(trunk, put(11, b"/s/a"), put(12, b"/s/a"))
    shell.wait(2)
    assert trunk in shell.closed
    shell.events(cover, put(13, b"/s/a"))
    assert a.read() == ["#0 @12 put 11 /s/a=v put 12 /s/a=v", "#0 @13 put 13 /s/a=v"]


def test_covers_change_while_clients_are_connected() -> None:
    shell = Shell(replace(LIMITS, covers=()))
    clients = [shell.client() for _ in range(3)]
    trunks = [shell.trunk(10, client, b"/s/%d" % place) for place, client in enumerate(clients)]
    shell.core.limits = LIMITS
    shell.settle()
    cover = shell.opened[-1]
    assert cover.key == b"/s/"
    shell.created(cover, 11)
    # A quiet trunk waits for its next bookmark; the cover has nothing below its start.
    shell.wait(2)
    shell.progressed(11, *trunks[1:])
    shell.wait(2)
    assert [trunk in shell.closed for trunk in trunks] == [False, True, True]
    shell.events(trunks[0], put(11, b"/s/0"))
    shell.events(cover, put(12, b"/s/0"), put(12, b"/s/1"))
    shell.wait(2)
    assert trunks[0] in shell.closed
    assert clients[0].read() == ["#0 @11 put 11 /s/0=v", "#0 @12 put 12 /s/0=v"]
    assert clients[1].read() == ["#0 @12 put 12 /s/1=v"]
    shell.core.limits = replace(LIMITS, covers=())
    shell.settle()
    assert cover in shell.closed
    assert sorted((each.key, each.start_revision) for each in shell.opened[-3:]) == [
        (b"/s/0", 13),
        (b"/s/1", 13),
        (b"/s/2", 13),
    ]


def test_a_cover_that_is_tried_again_outlives_the_refused_one() -> None:
    """Found by the simulator, seed 1249: the linger of the refused cover removed the new one of the same name."""
    shell = Shell(replace(LIMITS, covers=()))
    client = shell.client()
    trunk = shell.trunk(10, client, b"/s/a")
    shell.core.limits = LIMITS
    shell.settle()
    shell.do(shell.core.upstream_lost, shell.opened[-1], UpstreamLost(Status.PERMISSION_DENIED, "denied"))
    # The event loop is late: one call does all that is due.
    shell.now += COVER_RETRY_S + 1
    shell.do(shell.core.expire)
    cover = shell.opened[-1]
    assert (cover.key, cover in shell.closed) == (b"/s/", False)
    shell.wait(3)
    shell.created(cover, 10)
    shell.wait(3)
    assert shell.closed[-1] is trunk
    shell.events(cover, put(11, b"/s/a"))
    assert client.read()[-1] == "#0 @11 put 11 /s/a=v"


def test_many_waiting_trunks_cause_no_busy_loop() -> None:
    shell = Shell(replace(LIMITS, covers=(), step_watches_max=2))
    client = shell.client()
    for place in range(5):
        shell.trunk(10, client, b"/s/%d" % place)
    shell.core.limits = replace(LIMITS, step_watches_max=2)
    # It would not end.
    shell.settle()
    assert shell.core.next_deadline() is not None


def test_watches_that_cannot_move_yet_delay_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coalesce.moving.EXAMINED_MAX", 1)
    shell = Shell(replace(LIMITS, covers=()))
    slow, other = shell.client(), shell.client()
    trunk = shell.trunk(10, slow, b"/s/a")
    other.create(b"/s/a", start=11)
    slow.stall()
    shell.events(trunk, put(11, b"/s/a", b"v" * 100), put(11, b"/s/b"))
    shell.events(trunk, put(12, b"/s/a"))
    shell.core.limits = LIMITS
    shell.settle()
    cover = shell.opened[-1]
    shell.created(cover, 12)
    shell.wait(5)
    # What the slow client needs next is below the start of the cover.
    assert slow.session.watches[0].trunk is trunk.owner
    assert other.session.watches[0].trunk is cover.owner


def test_a_removed_cover_keeps_watches_beyond_trunks_max() -> None:
    shell, client = covered(trunks_max=3)
    for key in (b"/s/b", b"/s/c"):
        joined(shell, key)
    shell.core.limits = replace(LIMITS, covers=(), trunks_max=3)
    shell.wait(5)
    cover = shell.opened[0]
    assert (len(cover.owner.watches), shell.core.stats.trunks) == (1, 3)
    shell.events(cover, put(11, b"/s/a"))
    assert client.read() == ["#0 @11 put 11 /s/a=v"]
    # A range is not needed any more.
    shell.core.limits = replace(LIMITS, covers=(), trunks_max=4)
    shell.wait(5)
    assert cover in shell.closed


def test_a_refused_cover_opens_no_trunks_beyond_trunks_max() -> None:
    """Sessions of further watches would receive nothing, so they end; the others go on."""
    shell, a = covered(trunks_max=2)
    others = [joined(shell, b"/s/%d" % number) for number in range(5)]
    a.create(b"/s/0", b"", 11)
    a.read()
    shell.do(shell.core.upstream_lost, shell.opened[0], UpstreamLost(7, "denied"))
    shell.wait(5)
    assert (shell.core.stats.trunks, len(shell.opened)) == (2, 3)
    reason = (14, "watchmux: the limit of 2 different ranges is reached, and etcd refuses a cover")
    ended = [client for client in (a, *others) if client.ended]
    assert {client.ended for client in ended} == {reason}
    assert len(ended) == shell.core.stats.refused_at["trunks_max"] == 4
    assert shell.core.stats.watches == 2
    again = shell.client()
    again.create(b"/s/new", b"", 11)
    assert "limit of 2 different ranges" in again.read()[0]


def test_a_restore_cancels_the_watches_of_all_branches() -> None:
    shell, a = covered()
    b, future = joined(shell, b"/s/b"), joined(shell, b"/s/c", b"", 900)
    shell.do(shell.core.other_history, header(5))
    shell.settle()
    assert all("compacted 5" in client.read()[0] for client in (a, b))
    assert future.read() == []
    assert shell.opened[-1].key == b"/s/"


def test_what_no_client_watches_is_counted() -> None:
    shell, _ = covered()
    wanted, unwanted = put(11, b"/s/a"), put(12, b"/s/x")
    shell.events(shell.opened[0], wanted)
    shell.events(shell.opened[0], unwanted)
    stats = shell.core.stats.covers[b"/s/"]
    assert (stats.events, stats.unwanted_events) == (2, 1)
    assert (stats.bytes, stats.unwanted_bytes) == (len(wanted.encoded) + len(unwanted.encoded), len(unwanted.encoded))


def test_the_longest_cover_that_contains_a_range_serves_it() -> None:
    shell = Shell(replace(LIMITS, covers=(b"", b"/s/", b"/s/deep/")))
    client = shell.client()
    for key in (b"/s/deep/x", b"/s/x", b"/x"):
        shell.trunk(10, client, key)
    client.create(b"/s/", b"", 11)
    assert [upstream.key for upstream in shell.opened] == [b"/s/deep/", b"/s/", b"\x00"]


def test_branches_do_not_count_as_different_ranges() -> None:
    shell, _ = covered(trunks_max=1)
    joined(shell, b"/s/b")
    other = shell.client()
    other.create(b"/t", b"", 11)
    assert "limit of 1 different ranges" in other.read()[0]


def test_a_round_goes_on_while_its_watches_move(monkeypatch: pytest.MonkeyPatch) -> None:
    """All watches of the rest got the revision of the first one's trunk, although they were on different trunks."""
    shell, a = covered()
    for _ in range(3):
        a.create(b"/s/a", b"", 11, progress_notify=True)
    b = joined(shell, b"/s/b", progress_notify=True)
    a.read()
    # Two watches get it in two steps; then all move, and the rest of the round follows.
    monkeypatch.setattr("coalesce.notifying.WATCHES_PER_STEP", 1)
    shell.bookmark(shell.opened[0], 12)
    shell.core.limits = replace(shell.core.limits, covers=())
    shell.do(shell.core.expire)
    monkeypatch.setattr("coalesce.notifying.WATCHES_PER_STEP", 1000)
    trunks = {upstream.key: upstream for upstream in shell.opened[1:]}
    shell.created(trunks[b"/s/a"], 12)
    shell.bookmark(trunks[b"/s/a"], 50)
    shell.settle()
    shell.events(trunks[b"/s/b"], put(20, b"/s/b"))
    assert b.read() == ["#0 @12 progress", "#0 @20 put 20 /s/b=v"]


def test_a_refused_cover_is_not_asked_for_progress() -> None:
    """Found by the simulator with short steps, seed 100712: its watches leave it over several steps."""
    shell, _ = covered(step_watches_max=1, progress_notify_s=1.0)
    clients = [joined(shell, b"/s/%d" % place, progress_notify=True) for place in range(3)]
    (cover,) = shell.opened
    shell.bookmark(cover, 12)
    shell.wait(1.5)
    assert shell.asked.pop() == (cover,)
    shell.asked.clear()
    shell.do(shell.core.upstream_lost, cover, UpstreamLost(Status.PERMISSION_DENIED, "denied"))
    shell.now += 10
    shell.do(shell.core.expire)
    shell.settle()
    for upstream in shell.opened[1:]:
        shell.created(upstream, 12)
        shell.bookmark(upstream, 13)
    assert [client.read() for client in clients] == [["#0 @12 progress", "#0 @13 progress"]] * 3
    assert cover not in [upstream for asked in shell.asked for upstream in asked]
