"""Accepting TLS clients.

The event loop's own TLS server reports a connection only after its handshake: until then it is not counted, a thousand
handshakes that never finish go unnoticed, and all use the certificate loaded at startup. Therefore connections are
accepted and counted here, and each handshake gets the newest certificate and a timeout. Handshakes are the only part of
the listener that uses tasks, one for each while it lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Sequence

from proxy import logs
from proxy.listening.connection import ConnectionOwner
from proxy.listening.sockets import show_address
from upstream.errors import BadTls
from upstream.tls import newest

SHUTDOWN_S = 2.0
"""How long a client may take to answer the TLS close_notify."""

ACCEPTS_PER_TURN = 64
"""Connections accepted in one turn of the event loop: a handshake costs a millisecond."""

EXHAUSTED_S = 0.5
"""How long accepting pauses after it failed, usually because the process has no file descriptor left."""

FAILURES_LOG_S = 1.0
"""Minimum time between two log messages about failed handshakes: any peer can cause thousands a second."""

TOO_SLOW = "the handshake timed out"

log = logs.logger("listener")


class Acceptor:
    """Listening sockets whose clients speak TLS."""

    def __init__(
        self,
        listener: ConnectionOwner,
        context: ssl.SSLContext,
        sockets: Sequence[socket.socket],
        connection: Callable[[], asyncio.Protocol],
    ) -> None:
        self._listener = listener
        self._context = context
        self._sockets = list(sockets)
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._logged_at = -FAILURES_LOG_S
        self._logged = 0
        """Failed handshakes at the last message."""
        self._handshakes: set[asyncio.Task[None]] = set()
        for listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    def __len__(self) -> int:
        """Return the number of handshakes in progress."""
        return len(self._handshakes)

    def close(self) -> None:
        """Stop accepting."""
        sockets, self._sockets = self._sockets, []
        for listening in sockets:
            self._loop.remove_reader(listening)
            listening.close()

    async def stop(self) -> None:
        """Stop accepting and cancel the handshakes in progress."""
        self.close()
        for task in self._handshakes:
            task.cancel()
        await asyncio.gather(*self._handshakes, return_exceptions=True)

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                accepted, address = listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                log.error("cannot accept connections", problem=str(error))
                self._loop.remove_reader(listening)
                self._loop.call_later(EXHAUSTED_S, self._resume, listening)
                return
            accepted.setblocking(False)
            self.take(accepted, address)

    def take(self, accepted: socket.socket, address: object) -> None:
        """Begin the handshake of a connection, or refuse it if there are too many."""
        if self._listener.is_full:
            # No GOAWAY: nothing can be sent before the handshake.
            self._listener.refused()
            accepted.close()
            return
        task = self._loop.create_task(self._shake(accepted, show_address(address)))
        self._handshakes.add(task)
        task.add_done_callback(self._handshakes.discard)

    def _resume(self, listening: socket.socket) -> None:
        if listening in self._sockets:
            self._loop.add_reader(listening, self._accept, listening)

    async def _shake(self, accepted: socket.socket, peer: str) -> None:
        listener = self._listener
        try:
            await self._loop.connect_accepted_socket(
                self._connection,
                accepted,
                ssl=newest(self._context, not_renewed),
                ssl_handshake_timeout=listener.settings.first_bytes_timeout_s,
                ssl_shutdown_timeout=SHUTDOWN_S,
            )
        except OSError as error:
            problem = explain(error)
            listener.stats.handshakes_failed += 1
            if problem is TOO_SLOW:
                listener.stats.timed_out["first_bytes_timeout_s"] += 1
            self._log_failure(peer, problem)
            # The loop has closed it already, unless it failed before taking ownership.
            with contextlib.suppress(OSError):
                accepted.close()

    def _log_failure(self, peer: str, problem: str) -> None:
        """Log a failed handshake, at most one in FAILURES_LOG_S, with the number of those since the last message."""
        now, failed = self._loop.time(), self._listener.stats.handshakes_failed
        if now >= self._logged_at + FAILURES_LOG_S:
            count, self._logged_at, self._logged = failed - self._logged, now, failed
            expires_at = getattr(newest(self._context, not_renewed), "expires_at", None)
            report = log.info
            if expires_at is not None and expires_at < time.time():
                # The client says so, if at all, in other words: "bad certificate".
                report, problem = log.error, f"{problem}; the certificate of --cert-file has expired: renew the file"
            report("TLS handshake with a client failed", peer=peer, problem=problem, failed=count)


def explain(error: Exception) -> str:
    """Return the reason why a handshake failed, for the log."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the client's certificate is not trusted ({error.verify_message})"
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
            return "the client sent no certificate, but --trusted-ca-file requires one"
        if "HTTP_REQUEST" in reason or "WRONG_VERSION_NUMBER" in reason or "RECORD_LAYER_FAILURE" in reason:
            return "the client does not speak TLS"
        return reason.lower().replace("_", " ")
    if "taking longer" in str(error):
        return TOO_SLOW
    return str(error) or type(error).__name__


def not_renewed(problem: BadTls) -> None:
    """Log that the renewed files of a certificate cannot be used."""
    log.error("cannot load the renewed certificate files; keeping the old ones", problem=str(problem))
