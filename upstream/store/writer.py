"""The only path for writes: apply, make durable, notify the watchers, answer; in this order.

In memory a write is complete at once. With a journal, writes share a commit: writes that arrive within a few turns of
the event loop, or within the commit interval, are applied one after the other and committed together; only then the
watchers get them and the clients get their answers. Nothing else runs between apply and commit, so no read returns data
that a crash could still lose; this is why the commit blocks the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from upstream.store import errors
from upstream.store.errors import StoreError
from upstream.store.recorder import JournalRecorder, StoreDataError
from upstream.store.state import StoreState

Response = TypeVar("Response")

QUIET_TURNS = 12
"""Turns of the event loop without another write before a commit. A call that has arrived needs some turns to get here,
and a single writer waits no longer than that (microseconds, while a commit takes milliseconds)."""

TURNS_MAX = 400
"""Turns before a commit under a steady stream of writes."""


class StoreWriter:
    """Runs writes on a state in order of arrival."""

    def __init__(
        self, state: StoreState, recorder: JournalRecorder | None = None, commit_interval_s: float = 0.0
    ) -> None:
        """Without a recorder the store is in memory. Writes wait at least `commit_interval_s` to share a commit."""
        self._state = state
        self._recorder = recorder
        self._commit_interval_s = commit_interval_s
        # Writes that wait for their commit: (apply, settle); `settle` completes the write's future.
        self._queue: list[tuple[Callable[[], None], Callable[[StoreError | None], None]]] = []
        # Turns of the event loop since the queue was empty, and since it last grew.
        self._turns = 0
        self._quiet_turns = 0
        # Set when a commit has failed; `failure` has the reason. Memory and file then differ, so the store must stop.
        self.failed = asyncio.Event()
        self.failure: StoreDataError | None = None

    async def write(self, apply: Callable[[], Response]) -> Response:
        """Run one write and return its answer. Raises StoreError when it is refused."""
        if self._recorder is None:
            try:
                return apply()
            finally:
                self._state.publish()
        if self.failure is not None:
            raise StoreError(errors.STOPPED)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Response] = loop.create_future()
        outcome: list[Response | Exception] = []

        def run() -> None:
            try:
                outcome.append(apply())
            except Exception as error:
                outcome.append(error)

        def settle(failure: StoreError | None) -> None:
            if done.done():
                return
            result = failure or outcome[0]
            if isinstance(result, Exception):
                done.set_exception(result)
            else:
                done.set_result(result)

        if not self._queue:
            self._turns = 0
            loop.call_later(self._commit_interval_s, self._turn)
        self._quiet_turns = 0
        self._queue.append((run, settle))
        return await done

    def flush(self) -> None:
        """Run and commit the queued writes now."""
        if self._queue:
            self._drain()

    def _turn(self) -> None:
        """Commit once no more writes arrive; otherwise check again in the next turn of the loop."""
        self._turns += 1
        self._quiet_turns += 1
        if self._quiet_turns < QUIET_TURNS and self._turns < TURNS_MAX:
            asyncio.get_running_loop().call_soon(self._turn)
        else:
            self._drain()

    def _drain(self) -> None:
        assert self._recorder is not None
        queue, self._queue = self._queue, []
        if not queue:
            # Flushed in the meantime.
            return
        if self.failure is not None:
            for _, settle in queue:
                settle(StoreError(errors.STOPPED))
            return
        for run, _ in queue:
            run()
        try:
            self._recorder.commit()
        except StoreDataError as error:
            self.failure = error
            self.failed.set()
            for _, settle in queue:
                settle(StoreError(errors.STOPPED))
            return
        self._state.publish()
        for _, settle in queue:
            settle(None)
