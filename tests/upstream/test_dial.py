"""The search for an etcd for watches: no connection is left open without an owner, and a found leader is seen."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from tests.upstream.recorder import RecordedLog
from tests.upstream.scripted import scripted
from tests.waiting import until_async
from upstream.connection import ClientConnection
from upstream.dial import Dialer, Server, Target
from upstream.endpoints import parse_endpoints
from upstream.errors import Unreachable
from upstream.problems import EndpointProblems
from upstream.settings import UpstreamSettings
from upstream.watching.choice import EndpointPolicy


def after_turns(turns: int, task: asyncio.Task[Any]) -> None:
    """Cancel a task after this many turns of the event loop."""
    if turns:
        asyncio.get_running_loop().call_soon(after_turns, turns - 1, task)
    else:
        task.cancel()


@pytest.mark.parametrize("turns", range(8))
async def test_cancelled_search_leaves_no_connection(turns: int) -> None:
    async with scripted() as one, scripted() as other, asyncio.timeout(20):
        endpoints = parse_endpoints([one.endpoint, other.endpoint])
        dialer = Dialer(endpoints, None, UpstreamSettings(stagger_s=0.0), EndpointProblems(RecordedLog()))

        def accept(_: Server) -> bool:
            after_turns(turns, search)
            return True

        search = asyncio.create_task(dialer.dial(accept, lambda: None))
        (found,) = await asyncio.gather(search, return_exceptions=True)
        if isinstance(found, Server):
            found.connection.close()
        else:
            assert isinstance(found, asyncio.CancelledError)
        await until_async(lambda: not (one.connections or other.connections), "the connections to be closed")


@pytest.mark.parametrize("turns", range(8))
async def test_cancelled_status_request_leaves_no_connection(turns: int) -> None:
    async with scripted() as one, scripted() as silent, asyncio.timeout(20):
        silent.on_message = lambda _call, _message: None
        dialer = Dialer([], None, UpstreamSettings(), EndpointProblems(RecordedLog()))
        question = asyncio.create_task(
            dialer.examine(parse_endpoints([one.endpoint, silent.endpoint]), 0, are_proxies=False)
        )
        await until_async(lambda: bool(one.asked and silent.asked), "both to be asked")
        asyncio.get_running_loop().call_soon(after_turns, turns, question)
        await asyncio.gather(question, return_exceptions=True)
        await until_async(lambda: not (one.connections or silent.connections), "the connections to be closed")


class NoConnection:
    """A connection without a socket."""

    def close(self) -> None:
        """Close nothing."""


class OneLeader(Dialer):
    """Of two endpoints the first one fails once and then has a leader; the second one has none."""

    # The attempts that wait for their answers.
    asked: dict[Target, asyncio.Future[None]]

    async def attempt(self, target: Target) -> Server:
        """Answer both last attempts in one turn of the loop, that of the first endpoint first."""
        is_first = target is self.targets[0]
        if is_first and not target.tried:
            raise Unreachable(target.endpoint.text, "connection refused", "")
        self.asked[target] = answer = asyncio.get_running_loop().create_future()
        await answer
        server = Server(target, cast("ClientConnection", NoConnection()))
        server.has_leader = is_first
        target.leaderless = not is_first
        return server


async def test_found_leader_counts_while_another_endpoint_has_none() -> None:
    choice, reports = EndpointPolicy(), list[bool]()
    settings = UpstreamSettings(stagger_s=0.0, backoff_first_s=0.001, backoff_max_s=0.001)
    endpoints = parse_endpoints(["127.0.0.1:1", "127.0.0.1:2"])
    dialer = OneLeader(endpoints, None, settings, EndpointProblems(RecordedLog()))
    dialer.asked = {}
    search = asyncio.create_task(
        dialer.dial(
            lambda server: choice.is_acceptable(server.has_leader),
            lambda: reports.append(choice.failed(dialer.targets, False)),
        )
    )
    await until_async(lambda: len(dialer.asked) == 2, "both to be asked")
    for target in dialer.targets:
        dialer.asked[target].set_result(None)
    found = await search
    assert found.target is dialer.targets[0]
    assert reports == [False, False]
