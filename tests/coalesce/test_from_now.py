"""Watches from "now" whose trunk is not proven so far yet: they are in step at once, and get no earlier event."""

from __future__ import annotations

import pytest

from coalesce.place import Place
from tests.coalesce.shell import Client, Shell, put
from tests.coalesce.test_covers import covered


@pytest.fixture(name="late")
def _late(shell: Shell) -> tuple[Shell, Client]:
    """A shell whose trunk is at 5, and a client that has read "now", 9, for its watch."""
    shell.trunk(5, shell.client())
    client = shell.client()
    client.create()
    shell.read_now(9)
    assert client.read() == ["#0 @9 created"]
    return shell, client


def test_a_watch_from_now_is_in_step_at_once(late: tuple[Shell, Client]) -> None:
    shell, client = late
    assert client.session.watches[0].place is Place.IN_STEP
    assert client.session.watches[0].next_revision == 10
    shell.wait(0.2)
    assert not shell.asked
    shell.events(shell.opened[0], put(12))
    assert client.read() == ["#0 @12 put 12 k=v"]


def test_events_before_now_that_arrive_late_are_not_for_it(late: tuple[Shell, Client]) -> None:
    shell, client = late
    places = []
    for revision in (7, 9):
        shell.events(shell.opened[0], put(revision))
        places.append(client.session.watches[0].place)
    assert places == [Place.AHEAD, Place.IN_STEP]
    assert client.read() == []
    shell.events(shell.opened[0], put(10))
    assert client.read() == ["#0 @10 put 10 k=v"]


def test_now_inside_a_batch_divides_it(late: tuple[Shell, Client]) -> None:
    shell, client = late
    shell.events(shell.opened[0], put(8), put(9), put(10), put(11))
    assert client.read() == ["#0 @11 put 10 k=v put 11 k=v"]


def test_only_the_watches_concerned_are_held_back(late: tuple[Shell, Client]) -> None:
    shell, client = late
    shell.trunk(9, client, b"other")
    earlier = shell.client()
    earlier.create(start=6)
    assert earlier.read() == ["#0 @9 created"]
    shell.events(shell.opened[0], put(7))
    assert earlier.read() == ["#0 @7 put 7 k=v"]
    assert client.read() == []


def test_the_branches_of_a_cover_hold_watches_back() -> None:
    shell, first = covered(10)
    client = shell.client()
    client.create(b"/s/a")
    shell.read_now(20)
    client.create(b"/s/b")
    shell.read_now(20)
    client.read()
    shell.events(shell.opened[0], put(15, b"/s/a"), put(15, b"/s/b"))
    assert first.read() == ["#0 @15 put 15 /s/a=v"]
    shell.events(shell.opened[0], put(21, b"/s/a"), put(21, b"/s/b"))
    assert client.read() == ["#0 @21 put 21 /s/a=v", "#1 @21 put 21 /s/b=v"]


def test_its_session_gets_no_progress_below_now(late: tuple[Shell, Client]) -> None:
    shell, client = late
    client.progress()
    shell.progressed(8)
    assert client.read() == []
    shell.wait(1)
    shell.progressed(9)
    assert client.read() == ["#-1 @9 progress"]


def test_a_compaction_above_its_trunk_misses_nothing_of_it(late: tuple[Shell, Client]) -> None:
    shell, client = late
    shell.canceled(shell.opened[0], compact_revision=8, at=9)
    again = shell.opened[-1]
    assert again.start_revision == 8
    shell.created(again, 9)
    shell.events(again, put(9))
    assert client.read() == []
    shell.events(again, put(10))
    assert client.read() == ["#0 @10 put 10 k=v"]
