"""
The one way to write: apply, make durable, show the watchers, answer; in this order.

In memory there is nothing to make durable and a write is done at once. With a journal the writes that arrive in one
turn of the event loop share a commit: they are applied one after the other, committed together, and only then seen by
watchers and answered. Nothing else runs in between, so no read sees what a crash could still take back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, TypeVar

from upstream.store.state import StoreState

Response = TypeVar("Response")


class Journal(Protocol):
    """Where changes become durable."""

    def commit(self) -> None:
        """Make everything recorded so far durable. Raises OSError when it cannot."""


class Writer:
    """Runs writes on a state, in order of arrival."""

    __slots__ = ("_journal", "_queue", "_state")

    def __init__(self, state: StoreState, journal: Journal | None = None) -> None:
        self._state = state
        self._journal = journal
        # Writes of this turn of the loop, each settling its own future: (apply, settle).
        self._queue: list[tuple[Callable[[], None], Callable[[], None]]] = []

    async def write(self, apply: Callable[[], Response]) -> Response:
        """Run one write and return its answer. Raises StoreError when it is refused."""
        if self._journal is None:
            try:
                return apply()
            finally:
                self._state.publish()
        done: asyncio.Future[Response] = asyncio.get_running_loop().create_future()
        outcome: list[Response | Exception] = []

        def run() -> None:
            try:
                outcome.append(apply())
            except Exception as error:
                outcome.append(error)

        def settle() -> None:
            if done.done():
                return
            if isinstance(outcome[0], Exception):
                done.set_exception(outcome[0])
            else:
                done.set_result(outcome[0])

        if not self._queue:
            asyncio.get_running_loop().call_soon(self._drain)
        self._queue.append((run, settle))
        return await done

    def _drain(self) -> None:
        assert self._journal is not None
        queue, self._queue = self._queue, []
        for run, _ in queue:
            run()
        self._journal.commit()
        self._state.publish()
        for _, settle in queue:
            settle()
