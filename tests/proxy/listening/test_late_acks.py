"""A Go client's bandwidth pings that follow each other are acknowledged late; everything else is not."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from time import monotonic

import pytest

from proto.http2 import Connection, Role
from proto.http2.frames import BANDWIDTH_PING, ping, window_update
from proxy.listening import late_acks
from tests.e2e.raw_client import RawClient
from tests.proxy.listening.echo import ECHO, Rig, rig_of
from tests.waiting import until_async


def answer(client: RawClient, payload: bytes) -> None:
    """Send what grpc-go sends after a read of DATA."""
    assert client.transport is not None
    client.transport.write(window_update(0, 100) + ping(payload))


async def narrow(rig: Rig) -> None:
    """Make the windows of two clients as small as grpc-go's, once both have opened them wide."""

    def wide() -> int:
        return sum(connection.h2.send_window > 65_535 for connection in rig.listener.connections)

    await until_async(lambda: wide() == 2, "both connections")
    for connection in rig.listener.connections:
        connection.h2.send_window = 65_535


@pytest.fixture
def no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no time run out on a busy machine; the tests let the timer fire."""
    monkeypatch.setattr(late_acks, "LATE_ACK_S_MAX", 3600.0)
    monkeypatch.setattr("proto.http2.connection.LATE_ACK_GAP_S", 3600.0)


async def hold(rig: Rig, *clients: RawClient) -> None:
    """Let each client send two bandwidth pings, of which the first is acknowledged at once."""
    for client in clients:
        answer(client, BANDWIDTH_PING)
        await until_async(lambda: client.pings == [BANDWIDTH_PING], "an acknowledgement")  # noqa: B023  # called at once
        answer(client, BANDWIDTH_PING)
    await until_async(lambda: len(rig.listener.late._since) == len(clients), "the second pings")


def fire(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the timer fire, now that the acknowledgements are due."""
    timer = rig.listener.late._timer
    assert timer is not None
    assert 3000 < timer.when() - asyncio.get_running_loop().time() <= 3600
    monkeypatch.setattr(late_acks, "LATE_ACK_S_MAX", 0.0)
    rig.listener.late._timer_fired()
    assert rig.listener.late._timer is None
    assert not rig.listener.late._since


@pytest.mark.usefixtures("no_hurry")
async def test_bandwidth_pings_are_acknowledged_late(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig_of() as rig, await rig.connect() as quick, await rig.connect() as slow:
        call = quick.call(ECHO)
        # A WINDOW_UPDATE might have the acknowledgement sent.
        call.taking = False
        await narrow(rig)
        await hold(rig, quick, slow)
        call.send(b"an event")
        assert await call.next() == b"an event"
        answer(quick, b"liveness")
        await until_async(lambda: quick.pings[1:] == [b"liveness"], "the keep-alive's acknowledgement")
        fire(rig, monkeypatch)
        for client in (quick, slow):
            await until_async(lambda: client.pings[1:][-1:] == [BANDWIDTH_PING], "the late one")  # noqa: B023  # at once
        assert [len(client.pings) for client in (quick, slow)] == [3, 2]


@pytest.mark.usefixtures("no_hurry")
async def test_a_connection_that_closes_first_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    async with rig_of() as rig, await rig.connect() as leaving, await rig.connect() as staying:
        await narrow(rig)
        await hold(rig, leaving, staying)
        await leaving.close()
        await until_async(lambda: len(rig.listener.connections) == 1, "the close")
        fire(rig, monkeypatch)
        await until_async(lambda: len(staying.pings) == 2, "the late acknowledgement")


class Owing:
    """A connection that owes an acknowledgement."""

    def __init__(self, acknowledged: list[Owing]) -> None:
        self.h2 = Connection(Role.SERVER)
        self.acknowledged = acknowledged

    def schedule_flush(self) -> None:
        """Count it."""
        self.acknowledged.append(self)


async def test_many_late_acknowledgements_take_several_turns() -> None:
    """An event does not wait for all of them."""
    late = late_acks.LateAcknowledgements()
    acknowledged: list[Owing] = []
    for _ in range(4 * late_acks.PER_TURN):
        late.add(Owing(acknowledged), monotonic() - 10)
    assert late._timer is not None
    late._timer.cancel()
    late._timer_fired()
    counts = [0, len(acknowledged)]
    while len(acknowledged) < 4 * late_acks.PER_TURN:
        await asyncio.sleep(0)
        counts.append(len(acknowledged))
    assert max(after - before for before, after in pairwise(counts)) <= 2 * late_acks.PER_TURN
