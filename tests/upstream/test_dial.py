"""The search for an etcd for watches, cancelled at any moment: no connection is left open without an owner."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.upstream.recorder import RecordedLog
from tests.upstream.scripted import scripted
from tests.waiting import until_async
from upstream.dial import Dialer, Server
from upstream.endpoints import parse_endpoints
from upstream.settings import UpstreamSettings


def after_turns(turns: int, task: asyncio.Task[Any]) -> None:
    """Cancel a task after this many turns of the event loop."""
    if turns:
        asyncio.get_running_loop().call_soon(after_turns, turns - 1, task)
    else:
        task.cancel()


@pytest.mark.parametrize("turns", range(8))
def test_cancelled_search_leaves_no_connection(turns: int) -> None:
    async def story() -> None:
        async with scripted() as one, scripted() as other, asyncio.timeout(20):
            endpoints = parse_endpoints([one.endpoint, other.endpoint])
            dialer = Dialer(endpoints, None, UpstreamSettings(stagger_s=0.0), RecordedLog(), lambda: None)

            def accept(_: Server) -> bool:
                after_turns(turns, search)
                return True

            search = asyncio.create_task(dialer.dial(accept))
            (found,) = await asyncio.gather(search, return_exceptions=True)
            if isinstance(found, Server):
                found.connection.close()
            else:
                assert isinstance(found, asyncio.CancelledError)
            await until_async(lambda: not (one.connections or other.connections), "the connections to be closed")

    asyncio.run(story())


@pytest.mark.parametrize("turns", range(8))
def test_cancelled_status_request_leaves_no_connection(turns: int) -> None:
    async def story() -> None:
        async with scripted() as one, scripted() as silent, asyncio.timeout(20):
            silent.on_message = lambda _call, _message: None
            dialer = Dialer([], None, UpstreamSettings(), RecordedLog(), lambda: None)
            question = asyncio.create_task(dialer.cluster_ids(parse_endpoints([one.endpoint, silent.endpoint])))
            await until_async(lambda: bool(one.asked and silent.asked), "both to be asked")
            asyncio.get_running_loop().call_soon(after_turns, turns, question)
            await asyncio.gather(question, return_exceptions=True)
            await until_async(lambda: not (one.connections or silent.connections), "the connections to be closed")

    asyncio.run(story())
