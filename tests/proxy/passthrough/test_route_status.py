"""Maintenance.Status of a leaf: it is answered by the server that the watches are at, or by none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from proto.etcd_errors import LEARNER
from proto.framing import Status
from proto.http2 import ErrorCode
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.upstream.scripted import STATUS, ScriptedCall, scripted
from tests.waiting import until_async
from upstream.watch_route import WATCH_ROUTE


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (lambda call: call.reset(ErrorCode.REFUSED_STREAM), None),
        (lambda call: call.end(Status.FAILED_PRECONDITION, LEARNER), Status.FAILED_PRECONDITION),
        (lambda call: call.connection.go_away(0), None),
        (lambda call: call.connection.transport.abort(), Status.UNAVAILABLE),
    ],
    ids=["refused stream", "learner", "GOAWAY", "break"],
)
async def test_status_along_a_route_is_sent_to_one_server(
    end: Callable[[ScriptedCall], None], status: int | None
) -> None:
    """`status`: None: the stream is reset."""
    async with scripted() as one, scripted() as other, proxy_for(f"{one.endpoint},{other.endpoint}") as proxy:
        asked: list[ScriptedCall] = []

        def begin(call: ScriptedCall) -> None:
            if WATCH_ROUTE in call.metadata:
                asked.append(call)
                end(call)
            else:
                one.answer_status(call)

        one.on_status = other.on_status = begin
        await until_async(lambda: proxy.upstream.connected, "a server for the watches")
        await until_async(lambda: all(state.connected for state in proxy.pool.states()), "both servers")
        async with await RawClient.connect(proxy.port) as leaf:
            call = leaf.call(STATUS, [(WATCH_ROUTE.decode(), "abc")])
            call.send(b"", end=True)
            ended, _ = await call.end()
            assert (ended, len(asked)) == (status, 1)
