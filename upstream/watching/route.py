"""Whether the proxy that watches are taken from has a server for its own watches (see WATCH_ROUTE).

It keeps its connections to the proxies that use it when it loses its own server, and watches there only become silent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proto import etcd_errors
from proto.framing import Status
from upstream.connection import ClientConnection, NotSent
from upstream.dial import Dialer, Server
from upstream.errors import CallFailed


class RouteCheck:
    """Checks it when asked to, one check at a time."""

    def __init__(self, dialer: Dialer, cut_off: Callable[[], None]) -> None:
        """`cut_off` is called when the proxy has no server."""
        self._dialer = dialer
        self._cut_off = cut_off
        self._task: asyncio.Task[None] | None = None

    def look(self, server: Server, connection: ClientConnection) -> None:
        """Check the server in use, unless a check is in progress."""
        if self._task is None:
            check = self._check(server, connection)
            self._task = asyncio.get_running_loop().create_task(check, name="check the route of watches")

    def leave(self) -> None:
        """Stop the check: the server is no longer in use."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()

    async def _check(self, server: Server, connection: ClientConnection) -> None:
        problem = ""
        try:
            await self._dialer.read_status(connection)
        except NotSent:
            pass
        except CallFailed as error:
            # Then it was an etcd that refused the call.
            of_etcd = error.status == Status.UNIMPLEMENTED or etcd_errors.is_auth_refusal(error.status, error.text)
            problem = "" if of_etcd else f"its watches have no server ({error})"
        self._task = None
        if problem:
            self._dialer.problem(server.target, f"{server.target.endpoint.text}: {problem}")
            self._cut_off()
