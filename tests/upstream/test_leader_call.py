"""The call that etcd ends when it has lost its leader: when it is open, and what follows its end."""

from __future__ import annotations

from typing import Any

import pytest

from proto.etcd_errors import NO_LEADER
from proto.framing import Status
from tests.waiting import until_async
from upstream.connection import NotSent
from upstream.watching import leader
from upstream.watching.leader import LeaderCall


class Call:
    """A fake call."""

    ended = False
    taken = 0

    def consumed(self, size: int) -> None:
        self.taken += size

    def reset(self) -> None:
        self.ended = True


class Connection:
    """A fake connection with places for some calls."""

    def __init__(self) -> None:
        self.places = 1
        self.calls: list[Call] = []
        self.headers: Any = None

    def request(self, headers: Any, handler: Any) -> Call:
        assert handler is not None
        if len(self.calls) >= self.places:
            raise NotSent("full")
        self.headers = headers
        self.calls.append(Call())
        return self.calls[-1]


@pytest.fixture
def connection(monkeypatch: pytest.MonkeyPatch) -> Connection:
    """The connection of the calls; after the end of a call the next one follows soon."""
    monkeypatch.setattr(leader, "AGAIN_S", 0.02)
    monkeypatch.setattr(leader, "request_headers", lambda _, path, metadata: [(b":path", path), *metadata])
    return Connection()


def call_to(connection: Any, lost: list[None]) -> LeaderCall:
    """A LeaderCall whose reports are recorded."""
    return LeaderCall(lambda: connection, lambda: lost.append(None))


async def test_it_is_open_while_wanted_and_while_there_is_a_leader(connection: Connection) -> None:
    call = call_to(connection, [])
    call.use(True)
    assert connection.calls == []
    call.want()
    call.want()
    assert call.is_open
    assert connection.headers == [(b":path", b"/etcdserverpb.Watch/Watch"), (b"hasleader", b"true")]
    call.on_data(b"xyz", 3)
    assert connection.calls[0].taken == 3
    call.leave()
    assert connection.calls[0].ended
    assert not call.is_open
    connection.places = 2
    call.use(False)
    assert len(connection.calls) == 1
    call.use(True)
    assert len(connection.calls) == 2


async def test_only_no_leader_counts_as_loss_of_the_leader(connection: Connection) -> None:
    lost: list[None] = []
    connection.places = 9
    call = call_to(connection, lost)
    call.use(True)
    call.want()
    for made, (status, text) in enumerate([(Status.UNAVAILABLE, "moved"), (Status.INTERNAL, NO_LEADER)], 2):
        call.on_end(status, text, [])
        assert not call.is_open
        await until_async(lambda made=made: len(connection.calls) == made, "another call")  # type: ignore[misc]  # bound
    assert lost == []
    call.on_end(Status.UNAVAILABLE, NO_LEADER, [])
    assert lost == [None]
    call.leave()
    call.on_end(Status.UNAVAILABLE, NO_LEADER, [])
    assert lost == [None]


async def test_it_waits_for_a_place(connection: Connection) -> None:
    connection.places = 0
    call = call_to(connection, [])
    call.use(True)
    call.want()
    assert not call.is_open
    connection.places = 1
    await until_async(lambda: call.is_open, "a place")
    nowhere = call_to(None, [])
    nowhere.use(True)
    nowhere.want()
    nowhere.leave()
    assert not nowhere.is_open
