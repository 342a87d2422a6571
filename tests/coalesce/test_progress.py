"""Progress: never too early, never backwards, and as soon as it is true."""

from __future__ import annotations

from tests.coalesce.shell import Client, Shell, put


def test_a_request_is_answered_when_etcd_has_answered(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.progress()
    assert client.read() == []
    assert shell.asked == [(trunk,)]
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]
    shell.wait(3)
    assert len(shell.asked) == 1


def test_a_revision_known_before_is_not_an_answer(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    shell.bookmark(trunk, 8)
    client.progress()
    shell.wait(0.2)
    assert client.read() == []
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_events_in_flight_are_not_an_answer(shell: Shell, client: Client) -> None:
    """A put acknowledged before the request may be above them; etcd's answer covers it, if there is one."""
    trunk = shell.trunk(5, client)
    client.progress()
    shell.events(trunk, put(6))
    client.read()
    shell.wait(0.15)
    assert len(shell.asked) == 2
    assert client.read() == []
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]
    client.progress()
    shell.wait(0.03)
    shell.events(trunk, put(9))
    client.read()
    shell.wait(0.5)
    assert client.read() == []
    # Etcd drops the request, and reports the revision of the event as its own.
    shell.probed(9)
    assert client.read() == ["#-1 @9 progress"]


def test_a_late_answer_does_not_answer_a_newer_request(shell: Shell) -> None:
    """Two upstream streams (two tokens) answer separately; a proof is only as new as the request it answers."""
    one, two = shell.client(b"one"), shell.client(b"two")
    first, second = shell.trunk(5, one), shell.trunk(5, two, b"j")
    one.progress()
    shell.progressed(6, first)
    assert one.read() == ["#-1 @6 progress"]
    two.progress()
    shell.wait(0.03)
    assert len(shell.asked) == 2
    # The late answer to the first request; then that to the second on the first stream.
    shell.progressed(6, second, number=1)
    shell.progressed(9, first)
    assert two.read() == []
    shell.progressed(9, second)
    assert two.read() == ["#-1 @9 progress"]


def test_an_event_in_flight_does_not_replace_a_streams_answer(shell: Shell) -> None:
    one, two = shell.client(b"one"), shell.client(b"two")
    first, second = shell.trunk(5, one), shell.trunk(5, two, b"j")
    two.progress()
    shell.events(second, put(7, b"j"))
    two.read()
    shell.progressed(9, first)
    shell.wait(0.5)
    assert two.read() == []
    shell.events(second, put(9, b"j"))
    shell.wait(1)
    assert two.read() == ["#0 @9 put 9 j=v", "#-1 @9 progress"]


def test_an_answer_without_number_waits_for_a_target(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    client.progress()
    shell.progressed(8, number=0)
    assert client.read() == []
    shell.probed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_progress_is_the_least_of_all_watches(shell: Shell, client: Client) -> None:
    """Progress is the least proven revision; a watch on another trunk may be behind."""
    one, two = shell.trunk(5, client), shell.trunk(5, client, b"j")
    client.progress()
    shell.progressed(9, one)
    assert client.read() == []
    shell.progressed(8, two)
    assert client.read() == ["#-1 @8 progress"]


def test_progress_is_never_below_a_watchs_events(shell: Shell, client: Client) -> None:
    """clientv3 resumes all watches from progress + 1: below an event it would get that event twice."""
    one, two = shell.trunk(5, client), shell.trunk(5, client, b"j")
    client.progress()
    shell.events(one, put(12))
    shell.progressed(9, one, two)
    assert client.read() == ["#0 @12 put 12 k=v"]
    shell.progressed(12, two)
    shell.wait(0.1)
    shell.progressed(12, one, two)
    assert client.read() == ["#-1 @12 progress"]


def test_progress_never_decreases(shell: Shell, client: Client) -> None:
    one = shell.trunk(5, client)
    client.progress()
    shell.progressed(20, one)
    assert client.read() == ["#-1 @20 progress"]
    two = shell.trunk(15, client, b"j")
    client.cancel(0)
    client.read()
    client.progress()
    shell.progressed(18, two)
    assert client.read() == []
    shell.wait(0.1)
    shell.progressed(20, two)
    assert client.read() == ["#-1 @20 progress"]


def test_no_progress_before_a_watch_of_the_future(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.create(start=9)
    client.read()
    client.progress()
    shell.progressed(7)
    shell.wait(0.2)
    shell.progressed(8)
    assert client.read() == []
    shell.wait(0.2)
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]
    assert trunk in shell.asked[-1]


def test_no_progress_below_now(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, shell.client())
    client.create()
    shell.read_now(8)
    client.progress()
    client.read()
    shell.progressed(7)
    assert client.read() == []
    shell.wait(0.1)
    shell.events(trunk, put(7))
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]


def test_a_progress_request_queues_after_earlier_creates(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.create(b"j")
    client.progress()
    assert shell.asked == []
    shell.progressed(9, trunk)
    assert client.read() == []
    shell.created(shell.opened[-1], 9)
    shell.read_now(9)
    shell.progressed(10)
    assert client.read() == ["#1 @9 created", "#-1 @10 progress"]


def test_a_later_create_does_not_block_progress(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    client.progress()
    client.create(b"j")
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]


def test_no_progress_while_bytes_are_unsent(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(5, client)
    client.stall()
    shell.events(trunk, put(6))
    shell.events(trunk, put(7))
    client.progress()
    shell.progressed(9)
    shell.wait(1)
    assert client.unsent == ["#0 @6 put 6 k=v"]
    client.drain()
    shell.wait(0.2)
    shell.progressed(9)
    assert client.read() == ["#0 @6 put 6 k=v", "#0 @7 put 7 k=v", "#-1 @9 progress"]


def test_no_progress_while_a_watch_is_on_a_backfill(shell: Shell, client: Client) -> None:
    trunk = shell.trunk(100, client)
    client.create(start=50)
    client.read()
    backfill = shell.opened[-1]
    shell.created(backfill, 100)
    client.progress()
    shell.progressed(100, trunk)
    assert client.read() == []
    shell.events(backfill, put(60), at=100)
    shell.wait(0.1)
    shell.progressed(101, trunk, backfill)
    assert client.read() == ["#1 @60 put 60 k=v", "#-1 @101 progress"]


def test_a_compacted_id_does_not_block_progress(shell: Shell, client: Client) -> None:
    """In etcd it silences the stream; here the client has received its cancel."""
    trunk = shell.trunk(100, client)
    client.create(start=50)
    shell.created(shell.opened[-1], 100)
    shell.canceled(shell.opened[-1], compact_revision=90)
    # The answer to the request for the backfill.
    shell.progressed(100, trunk)
    client.read()
    client.progress()
    shell.wait(0.03)
    shell.progressed(100, trunk)
    assert client.read() == ["#-1 @100 progress"]


def test_without_watches_a_request_is_dropped(shell: Shell) -> None:
    client, other = shell.client(), shell.client()
    trunk = shell.trunk(5, other)
    client.progress()
    assert shell.asked == []
    client.create(start=6)
    client.read()
    client.progress()
    client.cancel(0)
    shell.progressed(9, trunk)
    assert client.read() == ["#0 @5 canceled"]


def test_requests_of_a_session_are_merged_except_first_and_last(shell: Shell, client: Client) -> None:
    shell.trunk(5, client)
    for _ in range(5):
        client.progress()
    assert len(shell.asked) == 1
    shell.progressed(7)
    assert client.read() == ["#-1 @7 progress"]
    shell.wait(0.03)
    shell.progressed(8)
    assert client.read() == ["#-1 @8 progress"]
    shell.wait(1)
    assert client.read() == []


def test_nothing_is_proven_for_a_watch_before_its_created(shell: Shell, client: Client) -> None:
    client.create()
    trunk = shell.opened[0]
    shell.progressed(50, trunk)
    shell.created(trunk, 5)
    shell.read_now(5)
    assert client.read() == ["#0 @5 created"]
    shell.events(trunk, put(6))
    assert client.read() == ["#0 @6 put 6 k=v"]


# many upstream streams: one for each token


# servers without ordered progress


# progress_notify


# bookmarks
