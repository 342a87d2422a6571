"""Running a test's coroutine on the event loop that the program uses."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Coroutine
from typing import Any, TypeVar
from weakref import WeakSet

import uvloop

from tests.waiting import until_async
from upstream.connection import ClientConnection

T = TypeVar("T")

_CONNECTIONS: WeakSet[ClientConnection] = WeakSet()
_connection_made = ClientConnection.connection_made


def _noted(connection: ClientConnection, transport: asyncio.BaseTransport) -> None:
    _CONNECTIONS.add(connection)
    _connection_made(connection, transport)


ClientConnection.connection_made = _noted  # type: ignore[assignment,method-assign]  # for all tests of a process


def _note(context: dict[str, Any], failures: list[dict[str, Any]]) -> None:
    """Note a failure, except of grpc's poller: all loops share it, and it may deliver an event of a closed one."""
    if "PollerCompletionQueue" not in context["message"]:
        failures.append(context)


def _are_closed() -> bool:
    """Whether no connection to etcd is still closing: with TLS etcd answers first."""
    transports = [connection._transport for connection in _CONNECTIONS]
    return not any(transport is not None and transport.is_closing() for transport in transports)


def run(scenario: Coroutine[Any, Any, T], limit_s: float = 60.0) -> T:
    """Run a scenario on uvloop, as the program does; an exception in any callback of the loop fails it.

    Any resource left open fails it too. uvloop warns of each of these while it closes, and would hang on one whose
    warning had become an exception.
    """
    failures: list[dict[str, Any]] = []
    results: list[T] = []

    async def guarded() -> None:
        # Not returned: the runner resets a signal handler, which formats the whole result, to raise and drop an error.
        asyncio.get_running_loop().set_exception_handler(lambda _, context: _note(context, failures))
        async with asyncio.timeout(limit_s):
            results.append(await scenario)
        await until_async(_are_closed, "connections to etcd to be closed")

    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        runner.run(guarded())
    finally:
        with warnings.catch_warnings(record=True) as left_open:
            warnings.simplefilter("always", ResourceWarning)
            runner.close()
        assert not failures, failures
    assert not left_open, [str(warning.message) for warning in left_open]
    return results[0]
