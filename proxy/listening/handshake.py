"""Accepting clients that speak TLS.

The event loop can do this by itself, but then a connection is nobody's until its handshake is over: it is not counted,
a thousand that never finish are not noticed, and the certificate is the one of the start. So connections are accepted
here, counted, and each gets the newest certificate and a limit of time. A handshake is the one thing of the listener
that has a task, for as long as it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from proxy import logs
from upstream.errors import BadTls
from upstream.tls import newest

if TYPE_CHECKING:
    from proxy.listening.listener import Listener

SHUTDOWN_S = 2.0
"""How long a client may take to answer the end of TLS."""

ACCEPTS_PER_TURN = 64
"""Connections accepted before others have their turn: a handshake costs a millisecond."""

EXHAUSTED_S = 0.5
"""How long nothing is accepted when the process has no file left for it."""

TOO_SLOW = "it was not finished in time"

log = logs.logger("listener")


class Acceptor:
    """Listening sockets whose clients speak TLS."""

    def __init__(
        self,
        listener: Listener,
        context: ssl.SSLContext,
        sockets: Sequence[socket.socket],
        connection: Callable[[], asyncio.Protocol],
    ) -> None:
        self._listener = listener
        self._context = context
        self._sockets = list(sockets)
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._handshakes: set[asyncio.Task[None]] = set()
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def __len__(self) -> int:
        """Return how many handshakes are not over."""
        return len(self._handshakes)

    def close(self) -> None:
        """Accept no more."""
        sockets, self._sockets = self._sockets, []
        for listening in sockets:
            self._loop.remove_reader(listening)
            listening.close()

    async def stop(self) -> None:
        """Accept no more and give the handshakes up that are not over."""
        self.close()
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, _address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("connections cannot be accepted", problem=str(error))
                self._loop.remove_reader(listening)
                self._loop.call_later(EXHAUSTED_S, self._resume, listening)
                return
            if self._listener.is_full:
                # Nothing can be said to a client before its handshake.
                self._listener.refused()
                accepted.close()
                continue
            accepted.setblocking(False)
            task = self._loop.create_task(self._shake(accepted))
            self._handshakes.add(task)
            task.add_done_callback(self._handshakes.discard)

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    async def _shake(self, accepted: socket.socket) -> None:
        listener = self._listener
        try:
            await self._loop.connect_accepted_socket(
                self._connection,
                accepted,
                ssl=newest(self._context, _not_renewed),
                ssl_handshake_timeout=listener.settings.first_bytes_timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except OSError as error:
            problem = explain(error)
            listener.stats.handshakes_failed += 1
            if problem is TOO_SLOW:
                listener.stats.timed_out["first_bytes_timeout_s"] += 1
            log.debug("a client's TLS handshake failed", problem=problem)
            # Closed already unless the loop never came to own it.
            with contextlib.suppress(OSError):
                accepted.close()


def explain(error: Exception) -> str:
    """Say why a handshake failed."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
            return "the client shows no certificate, but --trusted-ca-file asks for one"
        if "HTTP_REQUEST" in reason or "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
            return "the client does not speak TLS"
        return reason.lower().replace("_", " ")
    if "taking longer" in str(error):
        return TOO_SLOW
    return str(error) or type(error).__name__


def _not_renewed(problem: BadTls) -> None:
    log.error("renewed certificate files cannot be used; the old ones stay", problem=str(problem))
