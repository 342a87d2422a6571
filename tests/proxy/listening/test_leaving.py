"""Connections that end with many streams: their handlers are told in turns of the event loop."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from itertools import pairwise

import pytest

from proxy.listening.settings import ListenerSettings
from tests.e2e.scenario import run
from tests.proxy.listening.echo import ECHO, Rig, rig_of
from tests.waiting import until_async


async def told_by_turn(rig: Rig) -> list[int]:
    """How many streams are known to be gone, turn by turn of the loop, until the last connection is."""
    told = [sum(bool(handler.closed_with) for handler in rig.handlers)]
    while rig.listener.connections:
        turn = asyncio.Event()
        asyncio.get_running_loop().call_soon(turn.set)
        await turn.wait()
        told.append(sum(bool(handler.closed_with) for handler in rig.handlers))
    return told


@pytest.mark.parametrize("connections", [1, 3])
def test_streams_closed_at_once_are_reaped_in_turns(connections: int, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = 81

    async def scenario() -> None:
        async with rig_of(ListenerSettings(leaving_per_turn=20)) as rig, AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await rig.connect()) for _ in range(connections)]
            for number in range(streams):
                clients[number % connections].call(ECHO)
            await until_async(lambda: len(rig.handlers) == streams, "all to be there")
            # One handler fails: the others are told all the same.
            monkeypatch.setattr(rig.handlers[7], "closed", None)
            for connection in tuple(rig.listener.connections):
                connection.abort()
            told = await told_by_turn(rig)
            assert [handler.closed_with for handler in rig.handlers].count([None]) == streams - 1
            # From look to look, here, two turns go by.
            assert max(after - before for before, after in pairwise(told)) <= 2 * 20

    run(scenario())


def test_stop_waits_until_all_streams_are_reaped() -> None:
    streams = 81

    async def scenario() -> None:
        async with rig_of(ListenerSettings(leaving_per_turn=20)) as rig, await rig.connect() as client:
            for number in range(streams):
                client.call(ECHO, [("grpc-timeout", "1m")] if number % 2 else [])
            await until_async(lambda: len(rig.handlers) == streams, "all to be there")
            await rig.listener.stop()
            assert [handler.closed_with for handler in rig.handlers] == [[None]] * streams
            assert all(handler.call.timer is None for handler in rig.handlers)

    run(scenario())
