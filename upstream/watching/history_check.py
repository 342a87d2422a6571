"""Checks with each server that its store has the known history; `lineage` decides from the answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proto.scan import Header
from upstream.connection import ClientConnection
from upstream.dial import Server, read_position
from upstream.errors import Logger
from upstream.watching.lineage import HistoryTracker, HistoryVerdict, log_fields


class HistoryCheck:
    """The known history, and the checks before a server is used and while it is."""

    def __init__(
        self,
        pick: Callable[[Server], ClientConnection],
        timeout_s: float,
        log: Logger,
        other_history: Callable[[Header], None],
    ) -> None:
        """`pick` returns a connection for a call to a server; `other_history`: the store was restored or replaced."""
        self._pick = pick
        self._timeout_s = timeout_s
        self._log = log
        self._other_history = other_history
        self._tracker = HistoryTracker()
        self._again: asyncio.Task[None] | None = None

    async def passes(self, server: Server) -> bool:
        """Check a server before it is used. False: the store may be another one, and the server does not answer."""
        tracker, known, now = self._tracker, self._tracker.known, server.position
        if now is None or tracker.check(now) is not HistoryVerdict.SUSPECT or known is None:
            return True
        later = await read_position(self._pick(server), self._timeout_s)
        verdict = tracker.check_again(now, later)
        if verdict is HistoryVerdict.OTHER:
            self._log.warning(
                "etcd has another history: it was restored from a snapshot or replaced; watches are cancelled",
                endpoint=server.target.endpoint.text,
                **log_fields(known, now),
            )
            self._other_history(now.header)
            # Again: `went_back`, which the listener may have caused, does not know this position.
            tracker.went_back(now)
        return verdict is not HistoryVerdict.UNKNOWN

    def look(self, server: Server, newest_revision: int) -> None:
        """Check the server in use once more after its store has passed the known revision, if it had not before."""
        if self._tracker.is_check_due(server.position, newest_revision):
            self.read_again(server)

    def read_again(self, server: Server) -> None:
        """Read the position of the server in use again, and check it; unless it is being read."""
        if self._again is None:
            self._again = asyncio.get_running_loop().create_task(self._repeat(server), name="recognise upstream")

    async def _repeat(self, server: Server) -> None:
        server.position = await read_position(self._pick(server), self._timeout_s)
        await self.passes(server)
        self._again = None

    def went_back(self, server: Server | None) -> None:
        """The store is known to have another history, at the position of the server in use, if there is one."""
        self._tracker.went_back(server.position if server is not None else None)

    def leave(self) -> None:
        """The server is no longer in use."""
        if self._again is not None:
            self._again.cancel()
        self._again = None
