"""Bounded waits on conditions, so that no test sleeps for a guessed time."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")
LIMIT_S = 30.0
"""The default limit of a wait: a busy machine may stop a process for seconds; a wait that succeeds ends at once."""

POLL_S = 0.001
POLL_MAX_S = 0.02
_never = threading.Event()


def until(condition: Callable[[], T], what: str, timeout_s: float = LIMIT_S) -> T:
    """Return the first true value of `condition`, polled; fail with `what` after `timeout_s` seconds.

    The pause between two looks begins at POLL_S, since most answers take a millisecond, and grows to POLL_MAX_S.
    """
    pause_s = POLL_S
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last seen: {value!r}")
        _never.wait(pause_s)
        pause_s = min(2 * pause_s, POLL_MAX_S)


async def until_async(condition: Callable[[], T], what: str, timeout_s: float = LIMIT_S) -> T:
    """Do the same as `until` without holding up the event loop."""
    loop = asyncio.get_running_loop()
    pause_s = POLL_S
    deadline = loop.time() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        if loop.time() > deadline:
            raise AssertionError(f"waited {timeout_s} s in vain for {what}; last seen: {value!r}")
        turn = asyncio.Event()
        loop.call_later(pause_s, turn.set)
        await turn.wait()
        pause_s = min(2 * pause_s, POLL_MAX_S)


def run(story: Coroutine[Any, Any, T], timeout_s: float = 2 * LIMIT_S) -> T:
    """Run a coroutine in an event loop of its own, for at most `timeout_s` seconds."""

    async def bounded() -> T:
        async with asyncio.timeout(timeout_s):
            return await story

    return asyncio.run(bounded())
