"""The login of the proxy's own user (`--user`) at the server that carries the watches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from upstream.connection import ClientConnection
from upstream.credentials import Credentials, log_in
from upstream.dial import Server
from upstream.errors import Logger


class OwnUserLogin:
    """Gets a token for each server in use, and another one when that server refuses it.

    A new token for each server, since the old one may not be valid there.
    """

    def __init__(
        self,
        credentials: Credentials | None,
        pick: Callable[[Server], ClientConnection],
        timeout_s: float,
        log: Logger,
        renewed: Callable[[bytes | None], None],
    ) -> None:
        """`pick` returns a connection for a call to a server; `renewed` gets the token that follows a refused one."""
        self._credentials = credentials
        self._pick = pick
        self._timeout_s = timeout_s
        self._log = log
        self._renewed = renewed
        self._renewal: asyncio.Task[None] | None = None

    def is_possible(self, server: Server) -> bool:
        """Whether there is a user, and a leader, without which etcd refuses a login."""
        return self._credentials is not None and server.has_leader

    async def token(self, server: Server) -> bytes | None:
        """Get a token; None, with the reason logged, when there is no user or etcd does not give one."""
        if self._credentials is None:
            return None
        return await log_in(self._pick(server), self._credentials, self._timeout_s, self._log)

    def renew(self, server: Server) -> None:
        """Get another token for the server in use; `renewed` gets it."""
        if self._renewal is None and self._credentials is not None:
            self._renewal = asyncio.get_running_loop().create_task(self._renew(server), name="login upstream")

    async def _renew(self, server: Server) -> None:
        token = await self.token(server)
        self._renewal = None
        self._renewed(token)

    def leave(self) -> None:
        """The server is no longer in use."""
        if self._renewal is not None:
            self._renewal.cancel()
        self._renewal = None
