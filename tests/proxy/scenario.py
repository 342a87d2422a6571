"""Running a test's coroutine on the event loop that the program uses."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def run(scenario: Coroutine[Any, Any, T], limit_s: float = 60.0) -> T:
    """Run a scenario on uvloop, as the program does; an exception in any callback of the loop fails it."""
    failures: list[dict[str, Any]] = []

    async def guarded() -> T:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        async with asyncio.timeout(limit_s):
            return await scenario

    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(guarded())
    finally:
        assert not failures, failures
