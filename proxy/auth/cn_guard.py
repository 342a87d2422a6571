"""Guard against a client certificate towards etcd that has a CN while etcd's auth is on.

etcd (with --client-cert-auth) takes the CN of a client's certificate as the user of every call without a token
(server/auth/store.go, AuthInfoFromTLS). Behind a proxy these are the calls of arbitrary clients. So, as long as the
certificate has a CN:

- a call without a token is passed on with an invalid token, which etcd refuses when auth is on and ignores when it is
  off (older releases refuse it in both cases; with these, a call is passed on unchanged while auth is found to be off);
- while auth is found to be on, every call is refused with a text that says what to change.

The certificate's file is read again every LOOK_S seconds, since it may be renewed at any time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from proto.framing import Status
from proto.http2 import Stream
from proxy import logs
from proxy.auth.common_name import common_name
from proxy.auth.reads import INVALID_USER, AuthReader
from proxy.listening.calls import CallRefusal, ConnectionHandle, Handler, HandlerFactory, Headers

TOKEN_NAMES = frozenset({b"token", b"authorization"})
LOOK_S = 1.0

log = logs.logger("guard")


class CommonNameGuard:
    """Prevents etcd from taking the CN of the proxy's certificate as the user of clients' calls."""

    def __init__(self, reader: AuthReader, certificate: str, changed: Callable[[], None]) -> None:
        """`certificate`: its PEM file. `changed` is called when `problem` changes."""
        self.problem = ""
        """Why all calls are refused; "" if they are not."""
        self.name = common_name(certificate)
        self._reader = reader
        # Calls without a token get an invalid one.
        self._marks = True
        self._certificate = certificate
        self._changed = changed
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the periodic check."""
        self._task = asyncio.get_running_loop().create_task(self._run(), name="guard")

    async def stop(self) -> None:
        """Stop the periodic check."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def protect(self, factory: HandlerFactory, *, marks: bool = True) -> HandlerFactory:
        """Return a handler factory that refuses while there is a problem.

        `marks`: calls without a token are passed on with an invalid one where that is needed.
        """

        def protected(
            connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
        ) -> Handler | None:
            if self.problem:
                raise CallRefusal(200, Status.UNAVAILABLE, self.problem)
            if marks and self.name and self._marks and not any(name in TOKEN_NAMES for name, _ in headers):
                headers = [*headers, (b"token", INVALID_USER)]
            return factory(connection, stream, headers, end_stream)

        return protected

    async def _run(self) -> None:
        while True:
            self.name = common_name(self._certificate)
            self._reader.queries.named = bool(self.name)
            auth_on = self._reader.queries.named and await self._reader.requires_users()
            self._note(auth_on)
            self._marks = auth_on or not self._reader.queries.named or await self._reader.takes_any_token()
            await asyncio.sleep(LOOK_S)

    def _note(self, wrong: bool) -> None:
        problem = ""
        if wrong:
            problem = (
                f"watchmux: etcd's auth is on and would take the CN {self.name!r} of the proxy's certificate as the "
                "user of every call without a token; give the proxy a certificate without a CN (--cert)"
            )
        if problem != self.problem:
            self.problem = problem
            if problem:
                log.error("the certificate towards etcd has a common name; not serving", problem=problem)
            self._changed()
