"""Whether the server in use has a way to etcd, which may change while it is in use (see upstream/watch_route.py).

A proxy keeps its connections to the proxies that use it when it loses its own server, and watches there only become
silent. It may also get other endpoints, and then lead back to this proxy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from proto import etcd_errors
from proto.framing import Status
from upstream.connection import ClientConnection, NotSent
from upstream.dial import Dialer, Server
from upstream.errors import CallFailed
from upstream.watch_route import parse

ALONE: Final = 4
"""A server is checked at every fourth look while no other proxy could replace it: then only a loop matters."""


class RouteCheck:
    """Checks it when asked to, one check at a time."""

    def __init__(self, dialer: Dialer, cut_off: Callable[[], None], give_up: Callable[[Server, str], None]) -> None:
        """`cut_off` is called when the proxy in use has no server, `give_up` when it leads back to this proxy."""
        self._dialer = dialer
        self._cut_off = cut_off
        self._give_up = give_up
        self._task: asyncio.Task[None] | None = None
        self._looks = 0

    def look(self, server: Server, connection: ClientConnection) -> None:
        """Check the server in use if it is time to, unless a check is in progress."""
        self._looks += 1
        if self._task is None and (self._dialer.has_route or self._looks % ALONE == 0):
            check = self._check(server, connection)
            self._task = asyncio.get_running_loop().create_task(check, name="check the route of watches")

    def leave(self) -> None:
        """Stop the check: the server is no longer in use."""
        task, self._task = self._task, None
        self._looks = 0
        if task is not None:
            task.cancel()

    async def _check(self, server: Server, connection: ClientConnection) -> None:
        target = server.target
        failure: CallFailed | None = None
        try:
            await self._dialer.read_status(target, connection)
        except NotSent:
            pass
        except CallFailed as error:
            failure = error
        self._task = None
        # Otherwise it was an etcd that refused the call.
        if failure is None or failure.status == Status.UNIMPLEMENTED:
            return
        if etcd_errors.is_auth_refusal(failure.status, failure.text):
            return
        if (route := parse(failure.text)) and (problem := self._dialer.without_server(target, route)) and target.loop:
            self._give_up(server, problem.what)
        elif self._dialer.has_route:
            self._dialer.problem(target, f"{target.endpoint.text}: its watches have no server ({failure})")
            self._cut_off()
