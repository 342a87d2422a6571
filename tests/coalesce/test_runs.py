"""One response of etcd reaches a watch with fragment as one run, regardless of the number of pieces it arrived in."""

from __future__ import annotations

from coalesce import CoreLimits, Upstream
from coalesce.runs import PATIENCE_S
from proto.scan import Event, WatchResponse
from tests.coalesce.shell import Client, Shell, header, put

# One event of about 100 bytes in each fragment.
LIMITS = CoreLimits(fragment_bytes=150)


def large(revision: int) -> Event:
    """Return an event that fills a fragment."""
    return put(revision, value=b"x" * 90)


def piece(shell: Shell, upstream: Upstream, *revisions: int, last: bool = False) -> None:
    """Pass in one piece of a response."""
    events = [large(revision) for revision in revisions]
    response = WatchResponse(header(99), 0, fragment=not last, events=events)
    response.plain = last
    shell.do(shell.core.upstream_response, upstream, response)


def whole(*revisions: int, watch_id: int = 0) -> list[str]:
    """Return a run of fragments with these revisions, as a client reads it."""
    *rest, last = revisions
    lines = [f"#{watch_id} @{last} fragment put {revision} k=[90]" for revision in rest]
    return [*lines, f"#{watch_id} @{last} put {last} k=[90]"]


def two_kinds(shell: Shell) -> tuple[Client, Client, Upstream]:
    """Return a client with fragment, one without, and their trunk."""
    client, plain = shell.client(), shell.client()
    trunk = shell.trunk(5, client, fragment=True)
    plain.create(start=6)
    plain.read()
    return client, plain, trunk


def test_pieces_are_one_run_or_separate_responses() -> None:
    shell = Shell(LIMITS)
    client, plain, trunk = two_kinds(shell)
    for revision in (6, 7):
        piece(shell, trunk, revision)
        assert client.read() == []
        assert plain.read() == [f"#0 @{revision} put {revision} k=[90]"]
    piece(shell, trunk, 8, last=True)
    assert client.read() == whole(6, 7, 8)
    shell.events(trunk, large(9))
    assert client.read() == ["#0 @9 put 9 k=[90]"]
    assert shell.core.next_deadline() is not None
    assert len(shell.opened) == 1


def test_nothing_is_sent_between_fragments() -> None:
    """Not even answers for another watch of the stream: clientv3 would drop the fragments before."""
    shell = Shell(LIMITS)
    client, _, trunk = two_kinds(shell)
    piece(shell, trunk, 6)
    client.create(start=9, watch_id=7)
    piece(shell, trunk, 7)
    client.create(start=3)
    client.cancel(7)
    piece(shell, trunk, 8, last=True)
    shell.settle()
    lines = client.read()
    first = lines.index("#0 @8 fragment put 6 k=[90]")
    assert lines[first : first + 3] == whole(6, 7, 8)
    assert {line.split()[2] for line in lines[:first] + lines[first + 3 :]} <= {"created", "canceled"}


def test_a_backfills_response_is_one_run() -> None:
    shell = Shell(LIMITS)
    client, plain = shell.client(), shell.client()
    shell.trunk(100, shell.client())
    for each, fragment in ((client, True), (plain, False)):
        each.create(start=50, fragment=fragment)
        each.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    piece(shell, backfill, 60, 70)
    assert (client.read(), len(plain.read())) == ([], 1)
    piece(shell, backfill, 80, 101, last=True)
    assert client.read() == whole(60, 70, 80, 101)
    assert len(plain.read()) == 1


def test_a_split_response_is_one_run() -> None:
    shell = Shell(CoreLimits(fragment_bytes=150, response_bytes_max=250))
    client, plain, trunk = two_kinds(shell)
    shell.events(trunk, *(large(revision) for revision in range(6, 12)))
    assert client.read() == whole(*range(6, 12))
    assert len(plain.read()) == 3


def test_a_replay_from_the_history_is_one_run() -> None:
    shell = Shell(CoreLimits(fragment_bytes=150, replay_bytes_max=250))
    _, _, trunk = two_kinds(shell)
    for revision in range(6, 12):
        shell.events(trunk, large(revision))
    client, plain = shell.client(), shell.client()
    client.create(start=6, fragment=True)
    plain.create(start=6)
    shell.settle()
    assert client.read()[1:] == whole(*range(6, 12))
    assert len(plain.read()) == 1 + 3


def test_at_its_bound_a_run_ends_between_two_revisions() -> None:
    limit = 3 * (len(large(6).encoded) + 700)
    shell = Shell(CoreLimits(fragment_bytes=150, fragment_run_bytes_max=limit))
    client, _, trunk = two_kinds(shell)
    for revision in range(6, 10):
        piece(shell, trunk, revision)
    assert client.read() == whole(6, 7, 8)
    piece(shell, trunk, 10, last=True)
    assert client.read() == whole(9, 10)


def test_a_run_is_never_larger_than_the_history() -> None:
    for limits in (
        CoreLimits(history_bytes_max=1),
        CoreLimits(history_bytes_total_max=1),
        CoreLimits(history_revisions_max=1),
    ):
        shell = Shell(limits)
        client, _, trunk = two_kinds(shell)
        piece(shell, trunk, 6)
        piece(shell, trunk, 7)
        piece(shell, trunk, 8, last=True)
        assert [line.split()[3] for line in client.read()] == ["6", "7", "8"]
        assert len(shell.opened) == 1


def test_an_incomplete_run_is_sent_after_a_timeout() -> None:
    """After a broken connection the watch is registered again after the pieces received, and its range may be quiet."""
    shell = Shell(LIMITS)
    client, _, trunk = two_kinds(shell)
    piece(shell, trunk, 6)
    shell.wait(PATIENCE_S / 2)
    piece(shell, trunk, 7)
    shell.wait(PATIENCE_S * 0.9)
    assert client.read() == []
    shell.wait(PATIENCE_S * 0.2)
    assert client.read() == whole(6, 7)
    piece(shell, trunk, 8)
    # Progress is ordered with events: no further piece of the run can follow.
    shell.bookmark(trunk, 20)
    assert client.read() == ["#0 @8 put 8 k=[90]"]


def test_a_stalled_client_gets_the_run_when_it_reads_again() -> None:
    shell = Shell(LIMITS)
    client, _, trunk = two_kinds(shell)
    client.stall()
    piece(shell, trunk, 6)
    piece(shell, trunk, 7, last=True)
    assert client.unsent == whole(6, 7)
    piece(shell, trunk, 8)
    client.drain()
    assert client.read() == whole(6, 7)
    piece(shell, trunk, 9, last=True)
    assert client.read() == whole(8, 9)


def test_a_watch_cancelled_during_a_run_gets_nothing_of_it() -> None:
    shell = Shell(LIMITS)
    client, plain, trunk = two_kinds(shell)
    piece(shell, trunk, 6)
    client.cancel(0)
    client.close()
    plain.close()
    shell.wait(60)
    assert client.read() == ["#0 @99 canceled"]
    assert shell.core.stats.lagging == 0


def test_a_waiting_watch_is_served_though_its_turn_ended_early() -> None:
    """Other watches of the session use up the turn; then only the watch that waits for the run is left."""
    shell = Shell(CoreLimits(fragment_bytes=150, replay_bytes_max=1))
    client = shell.client()
    trunk = shell.trunk(5, client)
    client.create(start=6, fragment=True)
    client.read()
    client.stall()
    shell.events(trunk, large(6))
    piece(shell, trunk, 7)
    client.drain()
    shell.settle()
    assert client.read() == ["#0 @6 put 6 k=[90]", "#0 @7 put 7 k=[90]"]
    piece(shell, trunk, 8, last=True)
    shell.settle()
    assert [line for line in client.read() if line.startswith("#1")] == whole(6, 7, 8, watch_id=1)


def test_a_run_at_its_bound_is_sent_before_it_can_be_evicted() -> None:
    """However busy other sessions are: otherwise the watch would restart at the same revision again and again."""
    memory = put(6, value=b"x" * 90)
    limits = CoreLimits(
        fragment_bytes=150,
        fragment_run_bytes_max=2 * (len(memory.encoded) + 700),
        backfill_bytes_max=1,
        replay_turn_bytes_max=1,
    )
    shell = Shell(limits)
    shell.trunk(100, shell.client())
    clients = [shell.client() for _ in range(3)]
    for client in clients:
        client.create(start=50, fragment=True)
        client.read()
    plain = shell.client()
    plain.create(start=50)
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    for revision in range(60, 65):
        piece(shell, backfill, revision)
    piece(shell, backfill, 99, last=True)
    shell.settle()
    for client in clients:
        assert [line.split()[-2] for line in client.read()] == ["60", "61", "62", "63", "64", "99"]
    assert len(shell.opened) == 2


def held_back(limits: CoreLimits) -> tuple[Shell, list[Client], Upstream]:
    """Return clients with fragment that share a backfill, after the pieces 60 and 61, the last of a run."""
    shell = Shell(limits)
    shell.trunk(100, shell.client())
    clients = [shell.client() for _ in range(2)]
    for client in clients:
        client.create(start=50, fragment=True)
        client.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    piece(shell, backfill, 60)
    piece(shell, backfill, 61, last=True)
    return shell, clients, backfill


def revisions(client: Client) -> list[str]:
    """Return the revisions of the events that a client has received."""
    return [line.split()[-2] for line in client.read()]


# One turn serves one of the clients, and the next run would evict the events that the other one waits for.
SCARCE = CoreLimits(
    fragment_bytes=150, replay_turn_events_max=1, history_bytes_total_max=3 * (len(large(60).encoded) + 700)
)


def test_a_whole_run_is_sent_before_the_next_evicts_it() -> None:
    shell, clients, backfill = held_back(SCARCE)
    got = [revisions(client) for client in clients]
    assert sorted(got) == [[], ["60", "61"]]
    for revision in range(62, 66):
        piece(shell, backfill, revision)
    piece(shell, backfill, 99, last=True)
    shell.settle()
    for client, before in zip(clients, got, strict=True):
        assert before + revisions(client) == ["60", "61", "62", "63", "64", "65", "99"]
    assert len(shell.opened) == 2


def test_a_whole_run_is_sent_before_it_is_too_old() -> None:
    shell, clients, _ = held_back(CoreLimits(fragment_bytes=150, replay_turn_events_max=1, history_age_s=5))
    shell.now += 6
    shell.do(shell.core.expire)
    assert [revisions(client) for client in clients] == [["60", "61"], ["60", "61"]]
    assert len(shell.opened) == 2


def test_a_run_is_sent_before_other_ranges_evict_it() -> None:
    shell, clients, backfill = held_back(SCARCE)
    shell.settle()
    assert [revisions(client) for client in clients] == [["60", "61"], ["60", "61"]]
    other = shell.trunk(100, shell.client(), key=b"other")
    for revision in (62, 63):
        piece(shell, backfill, revision)
    for revision in range(101, 105):
        shell.events(other, put(revision, key=b"other", value=b"x" * 90))
    assert [revisions(client) for client in clients] == [["62", "63"], ["62", "63"]]
    piece(shell, backfill, 99, last=True)
    shell.settle()
    assert [revisions(client) for client in clients] == [["99"], ["99"]]
    assert len(shell.opened) == 3


def test_a_watch_without_source_does_not_wait_for_the_run() -> None:
    """Events evicted while the client did not read are not sent at the end of the run."""
    shell = Shell(SCARCE)
    shell.trunk(100, shell.client())
    client = shell.client()
    client.create(start=50, fragment=True)
    client.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    client.stall()
    piece(shell, backfill, 60, last=True)
    for revision in range(61, 66):
        piece(shell, backfill, revision)
    assert len(shell.opened) == 2
    client.drain()
    shell.settle()
    assert len(shell.opened) == 3
    assert shell.opened[-1].start_revision in (60, 61)


def test_no_progress_overtakes_pieces_that_age_out() -> None:
    """The timer that evicts held-back events by age, and so sends them, may also answer a progress request."""
    shell = Shell(CoreLimits(fragment_bytes=150, history_age_s=4.0))
    client = shell.client()
    trunk = shell.trunk(5, client, fragment=True)
    client.create(start=6, fragment=True)
    piece(shell, trunk, 6)
    client.progress()
    shell.probed(6)
    for revision in range(7, 11):
        shell.wait(0.9)
        piece(shell, trunk, revision)
    client.read()
    client.room = 1
    # The loop is late, so both are due.
    shell.now += 0.95
    shell.do(shell.core.expire)
    client.drain()
    shell.settle()
    # The events for the other watch were returned, and are to be read from etcd again.
    assert client.read() == whole(6, 7, 8, 9, 10)
    assert shell.opened[-1].is_backfill
