"""A session with very many watches of one range: neither its events nor its stalls are one long step."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from coalesce import CheckPermission, CoreLimits, CreateRequest, Deliver, Upstream, fanout, invariants
from coalesce.model import Group
from proto.scan import WatchResponse
from tests.coalesce.shell import Client, Shell, header, put


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "SHARED_WATCHES_MAX", 20)
    monkeypatch.setattr(fanout, "OWN_GROUP_WATCHES_MAX", 10)


LIMITS = CoreLimits(replay_events_max=300)


def _many(watches: int, limits: CoreLimits = LIMITS) -> tuple[Shell, Client, Upstream]:
    shell = Shell(limits)
    client = shell.client()
    trunk = shell.trunk(5, client)
    for _ in range(watches - 1):
        # Without the checks of the shell.
        (check,) = shell.core.create(client.session, CreateRequest(b"k", b"", 6), shell.now)
        assert isinstance(check, CheckPermission)
        shell.core.permission(check.check, None, shell.now)
    invariants.check(shell.core)
    return shell, client, trunk


def _delivered(shell: Shell, trunk: Upstream, revision: int) -> list[Deliver]:
    response = WatchResponse(header(revision), events=[put(revision)])
    effects = shell.core.upstream_response(trunk, response, shell.now)
    return [effect for effect in effects if isinstance(effect, Deliver)]


def _events_by_watch(lines: list[str]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    for line in lines:
        words = line.split()
        found[int(words[0][1:])] += [int(words[at + 1]) for at, word in enumerate(words) if word == "put"]
    return found


def test_an_event_for_300_watches_is_sent_in_parts() -> None:
    shell, client, trunk = _many(300)
    counts = [len(effect.watches) for effect in _delivered(shell, trunk, 6)]
    assert counts[:2] == [20, 10]
    assert sum(counts) < 150
    deadline = shell.core.next_deadline()
    while deadline is not None and deadline <= shell.now:
        counts += [len(each.watches) for each in shell.core.expire(shell.now) if isinstance(each, Deliver)]
        deadline = shell.core.next_deadline()
    assert sum(counts) == 300
    assert max(counts) == 20
    assert client.session.groups_behind == {}


def test_an_event_for_a_stalled_session_returns_few_watches() -> None:
    shell, client, trunk = _many(300)
    client.stall()
    shell.core.stalled(client.session)
    for revision in range(6, 10):
        # Once; later events have none for these watches.
        assert sum(len(each.watches) for each in _delivered(shell, trunk, revision)) == 20
    assert len(client.session.groups_behind) == 28


def test_a_stall_within_an_event_returns_few_watches() -> None:
    shell, client, trunk = _many(300)
    client.room = 25
    shell.events(trunk, put(6))
    assert len(client.lines) == 25
    assert shell.core.stats.returned < 150
    while client.unsent:
        client.drain(25)
        shell.settle()
    assert _events_by_watch(client.read()) == {watch_id: [6] for watch_id in range(300)}


def test_small_sessions_share_a_group_of_any_size() -> None:
    shell, client, trunk = _many(20)
    others = [shell.client() for _ in range(100)]
    for other in others:
        other.create(start=6)
    (deliver,) = _delivered(shell, trunk, 6)
    assert len(deliver.watches) == 120
    assert client.session.watches[19].group is others[99].session.watches[0].group


def test_sessions_with_many_ranges_share_the_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fanout, "SHARED_WATCHES_MAX", 5)
    shell = Shell()
    clients = [shell.client() for _ in range(9)]
    keys = [b"k%d" % number for number in range(9)]
    trunks = [shell.trunk(5, clients[0], key) for key in keys]
    for client in clients[1:]:
        for key in keys:
            client.create(key, start=6)
    for number, trunk in enumerate(trunks):
        (group,) = trunk.owner.groups.values()
        assert group.session is None
        (deliver,) = _delivered(shell, trunk, 6 + number)
        assert len(deliver.watches) == 9


def test_watches_with_fragment_have_no_own_groups() -> None:
    shell = Shell()
    client = shell.client()
    trunk = shell.trunk(5, client, fragment=True)
    for _ in range(40):
        client.create(start=6, fragment=True)
    (deliver,) = _delivered(shell, trunk, 6)
    assert len(deliver.watches) == 41


def test_own_groups_do_not_wait_for_the_run_of_other_watches() -> None:
    shell, client, trunk = _many(60)
    # More than a turn examines.
    for _ in range(40):
        client.create(start=6, fragment=True)
    for revision in (6, 7):
        # Further pieces follow.
        response = WatchResponse(header(revision), events=[put(revision)], fragment=True)
        shell.do(shell.core.upstream_response, trunk, response)
    for _ in range(20):
        shell.do(shell.core.expire)
    assert _events_by_watch([line for line in client.read() if "put" in line]) == {each: [6, 7] for each in range(60)}
    deadline = shell.core.next_deadline()
    assert deadline is not None
    assert deadline > shell.now


def test_watches_of_own_groups_that_end_leave_nothing() -> None:
    shell, client, trunk = _many(100)
    client.stall()
    shell.core.stalled(client.session)
    shell.events(trunk, put(6))
    assert shell.core.stats.lagging == 100
    for watch_id in range(20, 100):
        client.cancel(watch_id)
    assert client.session.groups_behind == {}
    assert [group.session for group in trunk.owner.groups.values()] == [None]
    assert shell.core.stats.lagging == 20
    client.close()
    shell.settle()
    assert shell.core.stats.lagging == 0


def test_a_large_event_is_replayed_watch_by_watch() -> None:
    shell, client, trunk = _many(100, CoreLimits(replay_bytes_max=200, replay_turn_bytes_max=200))
    shell.events(trunk, put(6, value=bytes(100)))
    shell.settle()
    assert _events_by_watch(client.read()) == {watch_id: [6] for watch_id in range(100)}
    assert shell.core.stats.lagging == 0


def test_events_that_the_history_lost_come_by_a_backfill() -> None:
    shell, client, trunk = _many(40, CoreLimits(history_revisions_max=2))
    client.stall()
    shell.core.stalled(client.session)
    for revision in range(6, 12):
        shell.events(trunk, put(revision))
    client.drain()
    shell.settle()
    (backfill,) = shell.opened[1:]
    assert backfill.start_revision == 6
    shell.events(backfill, *(put(revision) for revision in range(6, 12)))
    shell.settle()
    assert _events_by_watch(client.read()) == {watch_id: [*range(6, 12)] for watch_id in range(40)}


def test_a_group_behind_blocks_progress() -> None:
    shell, client, trunk = _many(100)
    client.progress()
    client.room = 30
    shell.events(trunk, put(6))
    shell.wait(0.05)
    shell.progressed(6)
    while client.unsent:
        assert not any("progress" in line for line in client.lines)
        client.drain(30)
        shell.settle()
    shell.wait(0.2)
    shell.progressed(6)
    *events, progress = client.read()
    assert progress == "#-1 @6 progress"
    assert _events_by_watch(events) == {watch_id: [6] for watch_id in range(100)}


@pytest.mark.parametrize("seed", range(8))
def test_each_event_arrives_once_whatever_happens(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    monkeypatch.setattr(fanout, "SHARED_WATCHES_MAX", rng.choice((0, 3, 10)))
    monkeypatch.setattr(fanout, "OWN_GROUP_WATCHES_MAX", rng.choice((1, 3, 10)))
    covers = (b"k",) if rng.random() < 0.3 else ()
    shell = Shell(CoreLimits(covers=covers, replay_bytes_max=rng.choice((300, 10_000)), step_watches_max=7))
    clients = [shell.client() for _ in range(3)]
    trunk = shell.trunk(5, clients[0])
    revision, starts = 5, [{0: 6}, {}, {}]
    groups: set[Group] = set()
    for _ in range(200):
        number = rng.choice((0, 0, 1, 2))
        client, mine = clients[number], starts[number]
        action = rng.random()
        if action < 0.4:
            mine[client.session.next_id] = revision + 1
            client.create(start=revision + 1)
        elif action < 0.6:
            revision += 1
            shell.events(trunk, put(revision))
        elif action < 0.75:
            client.room = rng.choice((0, 3, 20))
        elif action < 0.8 and client.session.watches:
            watch_id = rng.choice(list(client.session.watches))
            client.cancel(watch_id)
            del mine[watch_id]
        elif action < 0.95:
            client.drain(rng.choice((None, 5, 30)))
        else:
            shell.settle()
        groups.update(clients[0].session.groups_behind)
    for client in clients:
        client.drain()
    shell.settle()
    assert groups
    assert shell.core.stats.lagging == 0
    for client, mine in zip(clients, starts, strict=True):
        seen = _events_by_watch([line for line in client.read() if "put" in line])
        for watch_id, start in mine.items():
            assert seen[watch_id] == [*range(start, revision + 1)]
