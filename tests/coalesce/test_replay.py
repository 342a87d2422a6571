"""Stalled sessions cost nothing, delay no other session and lose nothing."""

from __future__ import annotations

import pytest

from coalesce import CoreLimits, CreateRequest, Deliver, invariants
from coalesce.effects import CheckPermission
from coalesce.place import Place
from proto.scan import WatchResponse
from tests.coalesce.shell import Client, Shell, delete, header, put
from tests.steps import steps


def test_a_slow_client_catches_up_without_affecting_others(shell: Shell) -> None:
    slow, quick = shell.client(), shell.client()
    trunk = shell.trunk(5, quick)
    slow.create(start=6)
    slow.read()
    slow.stall()
    for revision in range(6, 10):
        shell.events(trunk, put(revision))
    assert quick.read() == [f"#0 @{revision} put {revision} k=v" for revision in range(6, 10)]
    # The first event is written in part and queued; the others wait in the history.
    assert slow.unsent == ["#0 @6 put 6 k=v"]
    assert slow.session.watches[0].place is Place.LAGGING
    slow.drain()
    assert slow.read() == ["#0 @6 put 6 k=v", "#0 @9 put 7 k=v put 8 k=v put 9 k=v"]
    shell.events(trunk, put(10))
    assert slow.read() == ["#0 @10 put 10 k=v"]
    assert len(shell.opened) == 1


def test_a_stalled_session_gets_one_delivery_per_watch(shell: Shell) -> None:
    slow, quick = shell.client(), shell.client()
    trunk = shell.trunk(5, quick)
    slow.create(start=6)
    slow.read()
    slow.create(start=6)
    slow.stall()
    shell.core.stalled(slow.session)
    sessions = []
    for revision in (6, 7):
        response = WatchResponse(header(revision), events=[put(revision)])
        (deliver,) = shell.core.upstream_response(trunk, response, shell.now)
        assert isinstance(deliver, Deliver)
        sessions.append([watch.session for watch in deliver.watches])
        for watch in deliver.watches:
            if watch.session is slow.session:
                shell.core.undelivered(watch, deliver.payload)
        invariants.check(shell.core)
    assert sessions == [[quick.session, slow.session, slow.session], [quick.session]]


def test_a_session_that_drains_between_events_moves_nothing(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    watch = client.session.watches[0]
    group = watch.group
    assert group is not None
    for revision in range(6, 9):
        client.stall()
        shell.events(trunk, put(revision))
        assert client.session.stalled
        assert shell.core.stats.lagging == 0
        client.drain()
        assert watch.group is group
    assert client.read() == [f"#0 @{revision} put {revision} k=v" for revision in range(6, 9)]
    assert shell.core.stats.replays == 0


def test_an_event_moves_only_its_watch_of_a_stalled_session(shell: Shell, client: Client) -> None:
    first = shell.trunk(5, client, b"a")
    second = shell.trunk(5, client, b"b")
    third = shell.trunk(5, client, b"c")
    client.stall()
    shell.events(first, put(6, b"a"))
    shell.events(second, put(7, b"b"))
    places = [watch.place for watch in client.session.watches.values()]
    assert places == [Place.IN_STEP, Place.LAGGING, Place.IN_STEP]
    shell.events(second, put(8, b"b"))
    shell.bookmark(third, 8)
    client.drain()
    shell.events(third, put(9, b"c"))
    assert client.read() == ["#0 @6 put 6 a=v", "#1 @8 put 7 b=v put 8 b=v", "#2 @9 put 9 c=v"]


def test_a_stall_costs_the_same_with_20_000_watches() -> None:
    def costs(watches: int) -> list[int]:
        shell = Shell()
        client = shell.client()
        trunk = shell.trunk(5, client)
        session, request = client.session, CreateRequest(b"k", b"", 6)
        for _ in range(watches - 1):
            (check,) = shell.core.create(session, request, shell.now)
            assert isinstance(check, CheckPermission)
            shell.core.permission(check.check, None, shell.now)
        assert len(trunk.owner.watches) == watches
        assert len(session.watches) == watches
        stalling = steps(lambda: shell.core.stalled(session))
        return [stalling, steps(lambda: shell.core.drained(session, None, shell.now))]

    assert costs(2) == costs(20_000)


def test_a_stalled_session_gets_no_progress(shell: Shell, client: Client) -> None:
    """Neither that of progress_notify nor an answer, although its watch is in step."""
    trunk = shell.trunk(5, client, progress_notify=True)
    client.stall()
    shell.events(trunk, put(6))
    client.progress()
    shell.bookmark(trunk, 8)
    shell.progressed(8)
    assert client.session.watches[0].place is Place.IN_STEP
    assert client.unsent == ["#0 @6 put 6 k=v"]
    assert shell.core.stats.returned == 0
    shell.events(trunk, put(9))
    client.drain()
    shell.progressed(9)
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @9 put 9 k=v", "#-1 @9 progress"]


def test_the_age_of_a_stall_counts_without_missed_events() -> None:
    shell = Shell(CoreLimits(lagging_age_s_max=30.0))
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.stall()
    shell.events(trunk, put(6))
    shell.wait(29)
    assert client.ended is None
    shell.wait(2)
    assert client.ended is not None
    assert shell.core.stats.refused_at["lagging_age_s_max"] == 1


def test_undelivered_payloads_are_sent_again() -> None:
    """A session stalls in the middle of a list of effects: the rest of the list is returned undelivered."""
    shell = Shell(CoreLimits(response_bytes_max=1))
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.create(start=6)
    client.read()
    client.room = 1
    shell.events(trunk, put(6), put(7), put(8))
    assert client.read() == ["#0 @6 put 6 k=v"]
    assert client.unsent == ["#1 @6 put 6 k=v"]
    assert shell.core.stats.returned == 4
    client.drain()
    assert client.read() == [
        "#1 @6 put 6 k=v",
        "#0 @8 put 7 k=v put 8 k=v",
        "#1 @8 put 7 k=v put 8 k=v",
    ]


def test_a_control_answer_may_stall_a_session(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    shell.events(trunk, put(6))
    client.read()
    client.stall()
    client.create(start=6)
    assert client.unsent == ["#1 @6 created"]
    shell.events(trunk, put(7))
    client.drain()
    assert client.read() == ["#1 @6 created", "#1 @7 put 6 k=v put 7 k=v", "#0 @7 put 7 k=v"]


def test_answers_of_a_stalled_session_follow_its_unsent_bytes(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.stall()
    shell.events(trunk, put(6))
    client.create(start=5)
    client.cancel(0)
    shell.events(trunk, put(7))
    assert client.unsent == ["#0 @6 put 6 k=v", "#1 @6 created", "#0 @6 canceled"]
    assert len(shell.opened) == 1
    client.drain()
    assert client.read()[3:] == []
    assert shell.opened[-1].start_revision == 5
    shell.created(shell.opened[-1], 7)
    shell.events(shell.opened[-1], put(5), at=7)
    shell.progressed(7)
    assert client.read() == ["#1 @5 put 5 k=v", "#1 @7 put 6 k=v put 7 k=v"]


def test_replays_are_split_and_continue_by_timer() -> None:
    limits = CoreLimits(replay_bytes_max=3 * len(put(6, b"k").encoded))
    shell = Shell(limits)
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.stall()
    for revision in range(6, 16):
        shell.events(trunk, put(revision))
    client.drain()
    first = "#0 @9 put 7 k=v put 8 k=v put 9 k=v"
    assert client.read() == ["#0 @6 put 6 k=v", first]
    assert shell.core.next_deadline() == shell.now
    # Live events continue meanwhile, after the replay.
    shell.events(trunk, put(16))
    assert client.read() == []
    shell.settle()
    assert client.read() == [
        "#0 @12 put 10 k=v put 11 k=v put 12 k=v",
        "#0 @15 put 13 k=v put 14 k=v put 15 k=v",
        "#0 @16 put 16 k=v",
    ]
    assert client.session.watches[0].place is Place.IN_STEP


def test_a_stall_ends_the_replay_and_a_drain_continues_it() -> None:
    limits = CoreLimits(replay_bytes_max=2 * len(put(6).encoded))
    shell = Shell(limits)
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.stall()
    for revision in range(6, 13):
        shell.events(trunk, put(revision))
    client.drain(room=0)
    shell.settle()
    assert client.unsent == ["#0 @8 put 7 k=v put 8 k=v"]
    assert shell.core.next_deadline() != shell.now
    client.drain(room=1)
    shell.settle()
    assert client.read() == [
        "#0 @6 put 6 k=v",
        "#0 @8 put 7 k=v put 8 k=v",
        "#0 @10 put 9 k=v put 10 k=v",
    ]
    client.drain()
    assert client.read() == ["#0 @12 put 11 k=v put 12 k=v"]


def test_watches_of_a_session_are_replayed_in_turn() -> None:
    size = len(put(6).encoded)
    shell = Shell(CoreLimits(replay_bytes_max=2 * size))
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.create(start=6)
    client.read()
    client.stall()
    for revision in range(6, 11):
        shell.events(trunk, put(revision))
    client.drain()
    shell.settle()
    assert client.read() == [
        "#0 @6 put 6 k=v",
        "#1 @7 put 6 k=v put 7 k=v",
        "#0 @8 put 7 k=v put 8 k=v",
        "#1 @9 put 8 k=v put 9 k=v",
        "#0 @10 put 9 k=v put 10 k=v",
        "#1 @10 put 10 k=v",
    ]


def herd(turn_bytes_max: int) -> list[list[int]]:
    """Drain eight sessions at once, each with one response left to replay; return the responses' sizes turn by turn."""
    size = len(put(6).encoded)
    shell = Shell(CoreLimits(replay_bytes_max=4 * size, replay_turn_bytes_max=turn_bytes_max))
    clients = [shell.client() for _ in range(8)]
    trunk = shell.trunk(5, clients[0])
    for client in clients[1:]:
        client.create(start=6)
    for client in clients:
        client.read()
        client.stall()
    for revision in range(6, 14):
        shell.events(trunk, put(revision))
    for client in clients:
        assert len(shell.core.drained(client.session, None, shell.now)) == 1
    turns = []
    while shell.core.next_deadline() == shell.now:
        effects = shell.core.expire(shell.now)
        turns.append([effect.payload.size for effect in effects if isinstance(effect, Deliver)])
    return turns


def test_many_sessions_are_served_in_turns() -> None:
    """The bound applies to all sessions together, so that live events come in between; a turn serves at least one."""
    turns = herd(1)
    (size,) = turns[0]
    assert turns == [[size]] * 8
    assert herd(size) == [[size]] * 8
    assert herd(size + 1) == [[size] * 2] * 4
    assert herd(3 * size + 1) == [[size] * 4] * 2


def test_replays_with_all_events_filtered_take_turns() -> None:
    """Events examined are bounded over all inputs between two timers, even if none of them is sent."""
    shell = Shell(CoreLimits(replay_events_max=100, replay_turn_events_max=300))
    quick = shell.client()
    trunk = shell.trunk(5, quick)
    for revision in range(6, 406):
        shell.events(trunk, put(revision))
    quick.read()
    clients = [shell.client() for _ in range(20)]
    for place, client in enumerate(clients):
        client.create(start=6 + place, no_put=True)
        client.read()
    # Three had their first turn; the others wait for theirs, and these three for their next one.
    assert [client.session.watches[0].place for client in clients] == [Place.LAGGING] * 20
    assert sum(client.session.watches[0].position > 105 for client in clients) == 3
    rings = 0
    while shell.core.next_deadline() == shell.now:
        before = [client.session.watches[0].position for client in clients]
        shell.core.expire(shell.now)
        invariants.check(shell.core)
        after = [client.session.watches[0].position for client in clients]
        assert 0 < sum(after) - sum(before) <= 300 + 100
        rings += 1
        # Fair: no session is two turns ahead of another.
        behind = [position for position in after if position < 406]
        assert not behind or max(behind) - min(behind) <= 220
    assert rings >= 20
    assert {client.session.watches[0].place for client in clients} == {Place.IN_STEP}
    shell.events(trunk, delete(406))
    assert [client.read() for client in clients] == [["#0 @406 delete 406 k"]] * 20


def test_watches_of_one_session_are_placed_in_turns() -> None:
    """In a stalled session with many watches, placing those that missed nothing also counts for a turn."""
    shell = Shell(CoreLimits(replay_events_max=100, replay_turn_events_max=100))
    client = shell.client()
    trunk = shell.trunk(5, client)
    for _ in range(99):
        client.create(start=6)
    client.read()
    client.stall()
    shell.events(trunk, put(6))
    client.drain()
    assert shell.core.stats.lagging > 80
    shell.settle()
    assert sorted(client.read()) == sorted(f"#{number} @6 put 6 k=v" for number in range(100))
    assert shell.core.stats.lagging == 0


def test_a_drained_session_is_replayed_only_what_it_takes() -> None:
    def replayed(room_bytes: int | None) -> list[list[int]]:
        """Drain a session with five lagging watches; return the sizes of the responses, turn by turn."""
        shell = Shell()
        client = shell.client()
        trunk = shell.trunk(5, client)
        for _ in range(4):
            client.create(start=6)
        client.stall()
        shell.core.stalled(client.session)
        shell.events(trunk, put(6))
        client.unsent.clear()
        turns = [shell.core.drained(client.session, room_bytes, shell.now)]
        while shell.core.next_deadline() == shell.now:
            turns.append(shell.core.expire(shell.now))
        invariants.check(shell.core)
        return [[effect.payload.size for effect in turn if isinstance(effect, Deliver)] for turn in turns]

    ((size, *rest),) = replayed(None)
    assert rest == [size] * 4
    # One at least: what exceeds the room stalls the session, which then waits. Without a stall the rest follows.
    assert replayed(0) == replayed(1) == replayed(size) == [[size], [size] * 4]
    assert replayed(size + 1) == replayed(2 * size) == [[size] * 2, [size] * 3]
    assert replayed(100 * size) == [[size] * 5]


def test_sessions_that_stalled_together_share_replays(shell: Shell) -> None:
    clients = [shell.client() for _ in range(3)]
    trunk = shell.trunk(5, clients[0])
    for client in clients[1:]:
        client.create(start=6)
    for client in clients:
        client.stall()
    for revision in (6, 7, 8):
        shell.events(trunk, put(revision))
    for client in clients:
        client.room = None
        client.unsent.clear()
    payloads = []
    for client in clients:
        (deliver,) = shell.core.drained(client.session, None, shell.now)
        assert isinstance(deliver, Deliver)
        payloads.append(deliver.payload)
    assert payloads[0].pieces(0) == payloads[2].pieces(0)


def test_a_watch_advances_over_filtered_events(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client, no_put=True)
    shell.events(trunk, put(6))
    shell.events(trunk, put(7), delete(8), put(9))
    assert client.read() == ["#0 @8 delete 8 k"]
    client.stall()
    shell.events(trunk, delete(10))
    shell.events(trunk, put(11))
    shell.events(trunk, put(12))
    client.drain()
    assert client.read() == ["#0 @10 delete 10 k"]
    assert client.session.watches[0].next_revision == 13


def test_evicted_revisions_come_by_a_backfill() -> None:
    shell = Shell(CoreLimits(history_revisions_max=2))
    client, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    client.create(start=6)
    client.read()
    client.stall()
    for revision in range(6, 12):
        shell.events(trunk, put(revision))
    # Not before it drains: a stalled session costs nothing.
    assert len(shell.opened) == 1
    client.drain()
    backfill = shell.opened[-1]
    assert (backfill.start_revision, backfill.is_backfill) == (7, True)
    shell.created(backfill, 11)
    shell.events(backfill, put(7), put(8), put(9), at=11)
    assert client.read() == [
        "#0 @6 put 6 k=v",
        "#0 @9 put 7 k=v put 8 k=v put 9 k=v",
        "#0 @11 put 10 k=v put 11 k=v",
    ]
    assert shell.closed == [backfill]
    shell.events(trunk, put(12))
    assert client.read() == ["#0 @12 put 12 k=v"]
    assert other.read()[-1] == "#0 @12 put 12 k=v"


def test_a_future_watch_of_a_stalled_session_loses_nothing(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, shell.client())
    client.create(start=8)
    client.read()
    client.stall()
    client.create(start=6)
    shell.events(trunk, put(6))
    shell.events(trunk, put(7), put(8))
    client.drain()
    assert client.read() == ["#1 @5 created", "#1 @8 put 6 k=v put 7 k=v put 8 k=v", "#0 @8 put 8 k=v"]


def test_fragments_are_one_delivery() -> None:
    shell = Shell(CoreLimits(fragment_bytes=150))
    client = shell.client()
    trunk = shell.trunk(5, client, fragment=True)
    client.room = 1
    shell.events(trunk, put(6, b"a", b"x" * 90), put(6, b"b", b"x" * 90), put(6, b"c", b"x" * 90))
    shell.events(trunk, put(7, b"a"))
    client.create(start=8)
    assert client.read() == ["#0 @6 fragment put 6 a=[90]"]
    client.drain()
    assert client.read() == [
        "#0 @6 fragment put 6 b=[90]",
        "#0 @6 put 6 c=[90]",
        "#1 @7 created",
        "#0 @7 put 7 a=v",
    ]


@pytest.mark.parametrize("limit", [None, 30.0])
def test_a_session_behind_for_too_long_is_ended(limit: float | None) -> None:
    shell = Shell(CoreLimits(lagging_age_s_max=limit))
    slow, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    slow.create(start=6)
    slow.stall()
    shell.events(trunk, put(6))
    shell.wait(29.9)
    assert slow.ended is None
    shell.wait(1)
    if limit is None:
        assert slow.ended is None
        return
    assert slow.ended == (14, "watchmux: the client has been behind for more than 30 s")
    assert other.ended is None
    assert shell.core.stats.sessions == 1


def test_a_session_that_catches_up_at_times_is_not_ended() -> None:
    shell = Shell(CoreLimits(lagging_age_s_max=30.0))
    client = shell.client()
    trunk = shell.trunk(5, client)
    for revision in range(6, 12):
        client.stall()
        shell.events(trunk, put(revision))
        shell.wait(20)
        client.drain()
    assert client.ended is None
    assert len(client.read()) == 6


def test_an_unexpected_drain_is_harmless(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    shell.do(shell.core.drained, client.session, None)
    shell.core.stalled(client.session)
    shell.core.stalled(client.session)
    shell.do(shell.core.drained, client.session, None)
    shell.events(trunk, put(6))
    assert client.read() == ["#0 @6 put 6 k=v"]


def test_the_first_event_and_stalls_move_the_deadline() -> None:
    """The engine does not read a deadline that has not moved; the simulator checks this for every input."""
    shell = Shell(CoreLimits(lagging_age_s_max=1.0))
    client = shell.client()
    trunk = shell.trunk(5, client)
    shell.core.next_deadline()
    shell.events(trunk, put(6))
    assert shell.core.deadline_moved
    before = shell.core.next_deadline()
    shell.events(trunk, put(7), put(8))
    shell.events(trunk, put(9))
    assert not shell.core.deadline_moved
    assert shell.core.next_deadline() == before
    client.stall()
    shell.events(trunk, put(10))
    assert shell.core.deadline_moved
    assert shell.core.next_deadline() == shell.now + 1.0
