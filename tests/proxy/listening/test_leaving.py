"""Connections that close with many streams: their handlers are notified over several turns of the event loop."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest

from proxy.listening.settings import ListenerSettings
from tests.proxy.listening.echo import ECHO, Rig, rig_of
from tests.waiting import until_async


async def closed_by_turn(rig: Rig) -> list[int]:
    """Return the number of handlers notified so far, turn by turn of the loop, until the last connection is gone."""
    closed = [sum(bool(handler.closed_with) for handler in rig.handlers)]
    while rig.listener.connections:
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
        closed.append(sum(bool(handler.closed_with) for handler in rig.handlers))
    return closed


@pytest.mark.parametrize("connections", [1, 3])
async def test_streams_closed_at_once_are_reaped_in_turns(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = 81
    async with rig_of(ListenerSettings(leaving_per_turn=20)) as rig, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await rig.connect()) for _ in range(connections)]
        for number in range(streams):
            clients[number % connections].call(ECHO)
        await until_async(lambda: len(rig.handlers) == streams, "all to be there")
        # One handler fails: the others are still notified.
        monkeypatch.setattr(rig.handlers[7], "closed", None)
        for connection in tuple(rig.listener.connections):
            connection.abort()
        closed = await closed_by_turn(rig)
        assert [handler.closed_with for handler in rig.handlers].count([None]) == streams - 1
        # Two turns pass between two counts.
        assert max(after - before for before, after in pairwise(closed)) <= 2 * 20


async def test_stop_waits_until_all_streams_are_reaped() -> None:
    streams = 81
    async with rig_of(ListenerSettings(leaving_per_turn=20)) as rig, await rig.connect() as client:
        for number in range(streams):
            client.call(ECHO, [("grpc-timeout", "1m")] if number % 2 else [])
        await until_async(lambda: len(rig.handlers) == streams, "all to be there")
        await rig.listener.stop()
        assert [handler.closed_with for handler in rig.handlers] == [[None]] * streams
        assert all(handler.call.timer is None for handler in rig.handlers)
