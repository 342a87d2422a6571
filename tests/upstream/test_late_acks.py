"""etcd's bandwidth PINGs that follow each other are acknowledged late; everything else is not."""

from __future__ import annotations

import asyncio

import pytest

import upstream.answer_due
import upstream.connection
from proto.http2.frames import BANDWIDTH_PING, ping, window_update
from tests.upstream.scripted import ScriptedConnection, scripted
from tests.waiting import until_async
from upstream.connecting import connect
from upstream.connection import ClientConnection
from upstream.endpoints import parse_endpoint
from upstream.settings import ConnectionSettings
from upstream.unary import start_unary

KEEP_ALIVE = bytes(8)


@pytest.fixture(autouse=True)
def _no_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on a busy machine: the tests let the timer fire."""
    monkeypatch.setattr("proto.http2.connection.LATE_ACK_GAP_S", 3600.0)
    monkeypatch.setattr(upstream.connection, "LATE_ACK_S_MAX", 3600.0)


def answer(server: ScriptedConnection, payload: bytes) -> None:
    """Send what a grpc-go server sends after a read of DATA."""
    server.http2.append(window_update(0, 100) + ping(payload))
    server.flush()


async def held(connection: ClientConnection) -> asyncio.TimerHandle:
    """Wait for a PING whose acknowledgement is due later; return the timer."""
    await until_async(lambda: connection._late_ack is not None, "a PING that is held")
    assert connection._late_ack is not None
    return connection._late_ack


async def test_bandwidth_pings_of_etcd_are_acknowledged_late() -> None:
    async with scripted() as etcd:
        connection = await connect(parse_endpoint(etcd.endpoint), None, ConnectionSettings())
        server = etcd.connections[0]
        answer(server, BANDWIDTH_PING)
        await until_async(lambda: server.acknowledged == [BANDWIDTH_PING], "the first acknowledgement")
        answer(server, BANDWIDTH_PING)
        timer = await held(connection)
        answer(server, KEEP_ALIVE)
        await until_async(lambda: server.acknowledged[1:] == [KEEP_ALIVE], "the keep-alive's acknowledgement")
        assert 3000 < timer.when() - asyncio.get_running_loop().time() <= 3600
        timer.cancel()
        connection._acknowledge_late()
        await until_async(lambda: server.acknowledged[2:] == [BANDWIDTH_PING], "the late acknowledgement")
        answer(server, BANDWIDTH_PING)
        timer = await held(connection)
        connection.close()
        assert timer.cancelled()


async def test_etcd_that_waits_for_an_acknowledgement_is_not_hung() -> None:
    # It sends no PING for a call that it answers slowly; the time is an argument.
    due_s = upstream.answer_due.ANSWER_DUE_S
    async with scripted() as etcd:
        etcd.on_message = lambda _, __: None
        connection = await connect(parse_endpoint(etcd.endpoint), None, ConnectionSettings())
        server = etcd.connections[0]
        answer(server, BANDWIDTH_PING)
        await until_async(lambda: len(server.acknowledged) == 1, "the first acknowledgement")
        answer(server, BANDWIDTH_PING)
        await held(connection)
        slow = [start_unary(connection, "/test/Slow", b"x", (), 3600.0, 1, lambda _: None)]
        late = asyncio.get_running_loop().time() + due_s
        assert connection.answer_due.is_overdue(late)
        assert not connection.owes_answer(late)
        await until_async(lambda: len(server.acknowledged) == 2, "the acknowledgement for which it waits")
        slow.append(start_unary(connection, "/test/Slow", b"x", (), 3600.0, 1, lambda _: None))
        assert connection.owes_answer(late + due_s)
        for call in slow:
            call.give_up()
        connection.close()
