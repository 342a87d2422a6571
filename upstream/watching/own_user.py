"""The login of the proxy's own user (`--user`) at the server that carries the watches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from upstream.connection import ClientConnection
from upstream.credentials import Credentials, log_in
from upstream.dial import Server
from upstream.errors import Logger
from upstream.watching.effects import WatchEffect
from upstream.watching.state import WatchState


class OwnUserLogin:
    """Gets a token for each server in use, and another one when that server refuses it.

    A new token for each server, since the old one may not be valid there.
    """

    def __init__(
        self,
        credentials: Credentials | None,
        state: WatchState,
        apply: Callable[[list[WatchEffect]], None],
        pick: Callable[[Server], ClientConnection],
        timeout_s: float,
        log: Logger,
    ) -> None:
        """`credentials`: None if the proxy has no user of its own. `apply` carries out effects of `state`; `pick`
        returns a connection for a call to a server.
        """
        self._credentials = credentials
        self._state = state
        self._apply = apply
        self._pick = pick
        self._timeout_s = timeout_s
        self._log = log
        self._renewal: asyncio.Task[None] | None = None

    async def log_in(self, server: Server) -> None:
        """Get a token before any watch registers; the old one stays without a leader, as etcd then refuses a login."""
        if self._credentials is not None and server.has_leader:
            self._state.own_token = await self._token(server, self._credentials)

    def refused(self, token: bytes | None, server: Server | None) -> None:
        """Get another token after the server in use refused this one: trunks wait for it."""
        if self._state.own_token == token:
            self._state.own_token = None
        if server is not None and self._renewal is None and self._credentials is not None:
            renewal = self._renew(server, self._credentials)
            self._renewal = asyncio.get_running_loop().create_task(renewal, name="login upstream")

    async def _renew(self, server: Server, credentials: Credentials) -> None:
        token = await self._token(server, credentials)
        self._renewal = None
        self._apply(self._state.logged_in(token))

    async def _token(self, server: Server, credentials: Credentials) -> bytes | None:
        """Return a token; None, with the reason logged, when etcd does not give one."""
        return await log_in(self._pick(server), credentials, self._timeout_s, self._log)

    def leave(self) -> None:
        """The server is no longer in use."""
        if self._renewal is not None:
            self._renewal.cancel()
        self._renewal = None
