"""
Connections for everything that is not a watch: one to each endpoint, kept up.

For calls of our own (`Pool.unary`) and for the pass-through, which takes a connection (`Pool.pick`) and starts its
call there. Calls go round the endpoints that work; an endpoint that fails is tried again in the background, with
backoff, for ever. Watches do not use these connections: under TLS, large reads would hold them up.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from proto.framing import Status
from proto.http2 import Headers
from upstream.connection import ClientConnection, NotSent, after, connect
from upstream.endpoints import Backoff, Endpoint
from upstream.errors import NO_LEADER_TEXT, CallFailed, Log, Silence, Unreachable
from upstream.settings import CONNECTION_LIMITS, Settings
from upstream.unary import HAS_LEADER, Metadata, NotProcessed, call_unary


class EndpointState(NamedTuple):
    """An endpoint as the pool sees it: `problem` is why there is no connection, empty while none was looked for."""

    endpoint: str
    connected: bool
    problem: str


class _Slot:
    """One endpoint of the pool."""

    __slots__ = ("backoff", "closed", "connection", "endpoint", "failure", "leaving", "settings", "task")

    def __init__(self, endpoint: Endpoint, settings: Settings) -> None:
        self.endpoint = endpoint
        self.backoff = Backoff(settings.backoff_first_s, settings.backoff_max_s)
        self.settings = settings.connection
        # The connection while it is up.
        self.connection: ClientConnection | None = None
        # Why the last attempt failed or the last connection ended; None while it is up or has not been tried.
        self.failure: Unreachable | None = None
        self.closed = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        # The endpoint is configured no more: it serves until one that is works.
        self.leaving = False


class Pool:
    """Keeps a connection to each endpoint and hands them out."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tls: ssl.SSLContext | None = None,
        settings: Settings | None = None,
        log: Log | None = None,
    ) -> None:
        self._settings = settings or Settings()
        self._tls = tls
        self._log = log or Silence()
        self._slots = [_Slot(endpoint, self._settings) for endpoint in endpoints]
        # The slot that `pick` looks at first.
        self._next = 0
        self._listeners: list[Callable[[], None]] = []
        # Connections to endpoints that have left, kept for the calls that were open on them.
        self._retired: list[ClientConnection] = []
        # Connections given up, or not had, because a time was up: by the name of the limit.
        self.timeouts = Counter(dict.fromkeys(CONNECTION_LIMITS, 0))
        # Set and replaced whenever a slot changes.
        self._changed = asyncio.Event()

    def start(self) -> None:
        """Start connecting, in the running event loop."""
        for slot in self._slots:
            self._start(slot)

    def _start(self, slot: _Slot) -> None:
        if slot.task is None:
            slot.task = asyncio.get_running_loop().create_task(self._keep(slot), name=f"pool {slot.endpoint.text}")

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """
        Go by another list, of the same cluster, while calls are made.

        Endpoints that stay keep their connections. Those that leave serve until one that stays or comes works; then
        they get no new calls, and the open ones may end.
        """
        known = {slot.endpoint: slot for slot in self._slots}
        slots = [
            known.pop(endpoint) if endpoint in known else _Slot(endpoint, self._settings) for endpoint in endpoints
        ]
        for slot in slots:
            slot.leaving = False
            self._start(slot)
        for slot in known.values():
            slot.leaving = True
        self._slots = slots + list(known.values())
        self._notify()

    def _dismiss(self) -> None:
        """Let those go that leave, once another one works."""
        leaving = [slot for slot in self._slots if slot.leaving]
        if not leaving or all(slot.leaving or slot.connection is None for slot in self._slots):
            return
        self._slots = [slot for slot in self._slots if not slot.leaving]
        self._retired = [connection for connection in self._retired if connection.open_calls]
        for slot in leaving:
            if slot.task is not None:
                slot.task.cancel()
            if slot.connection is not None:
                slot.connection.on_closed = None
                slot.connection.retire(Unreachable(slot.endpoint.text, "it is no endpoint any more", "try again"))
                self._retired.append(slot.connection)
            self._log.info("upstream_endpoint_left", endpoint=slot.endpoint.text)

    async def stop(self) -> None:
        """Close all connections; calls on them end UNAVAILABLE."""
        tasks = [slot.task for slot in self._slots if slot.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for slot in self._slots:
            slot.task = None
            if slot.connection is not None:
                slot.connection.on_closed = None
                slot.connection.close()
                slot.connection = None
        for connection in self._retired:
            connection.close()
        self._retired.clear()
        self._notify()

    def pick(self) -> ClientConnection | None:
        """Return a connection that takes a call, the next one in turn; None when there is none now."""
        slots = self._slots
        for step in range(len(slots)):
            index = (self._next + step) % len(slots)
            connection = slots[index].connection
            if connection is not None and connection.has_room:
                self._next = index + 1
                return connection
        return None

    def states(self) -> list[EndpointState]:
        """Return each endpoint's state, for people."""
        return [
            EndpointState(slot.endpoint.text, slot.connection is not None, str(slot.failure or ""))
            for slot in self._slots
        ]

    @property
    def down(self) -> Unreachable | None:
        """Why no call can be made; None while an endpoint is up or one has not been tried yet since it was lost."""
        failure: Unreachable | None = None
        for slot in self._slots:
            if slot.connection is not None or slot.failure is None:
                return None
            failure = slot.failure
        return failure

    def when_available(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time a connection comes up and each time an endpoint fails (`pick` and `down` tell)."""
        self._listeners.append(callback)

    async def wait_available(self, timeout_s: float | None = None) -> ClientConnection:
        """
        Return a connection as soon as there is one.

        Raises CallFailed: UNAVAILABLE once every endpoint has failed, DEADLINE_EXCEEDED after `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    connection = self.pick()
                    if connection is not None:
                        return connection
                    if self.down is not None:
                        raise CallFailed(Status.UNAVAILABLE, f"no etcd can be reached: {self.down}")
                    await changed.wait()
        except TimeoutError:
            raise CallFailed(Status.DEADLINE_EXCEEDED, f"no connection to an etcd in {timeout_s:g} s") from None

    async def unary(
        self,
        path: str,
        message: bytes,
        metadata: Metadata = (),
        timeout_s: float = 10.0,
        *,
        has_leader: bool = False,
        idempotent: bool = False,
    ) -> tuple[bytes, Headers]:
        """
        Make a call with one message each way and return the answer's message and trailers.

        What no server has looked at is tried on the next endpoint; with `has_leader` also what a server without a
        leader refused; with `idempotent` also what a server failed to answer. Raises CallFailed with the status of
        the answer, UNAVAILABLE when no endpoint works, DEADLINE_EXCEEDED after `timeout_s` seconds.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        if has_leader:
            metadata = [*metadata, HAS_LEADER]
        tries_left = max(len(self._slots), 2)
        while True:
            connection = await self.wait_available(deadline - loop.time())
            tries_left -= 1
            try:
                return await call_unary(
                    connection,
                    path,
                    message,
                    metadata,
                    max(deadline - loop.time(), 0.001),
                    self._settings.unary_message_bytes_max,
                )
            except NotSent as error:
                if not tries_left:
                    raise CallFailed(Status.UNAVAILABLE, str(error)) from None
            except CallFailed as error:
                again = isinstance(error, NotProcessed) or (
                    error.status == Status.UNAVAILABLE and (idempotent or (has_leader and error.text == NO_LEADER_TEXT))
                )
                if not tries_left or not again:
                    raise

    async def _keep(self, slot: _Slot) -> None:
        """Keep one endpoint connected."""
        loop = asyncio.get_running_loop()
        told = ""
        while True:
            failure = await self._hold(slot)
            if failure.limit:
                self.timeouts[failure.limit] += 1
            delay_s = slot.backoff.failed(loop.time())
            if slot.failure is None and delay_s == 0:
                # The first try after a connection worked: before it, nobody is told that the endpoint is down.
                continue
            slot.failure = failure
            if str(failure) != told:
                told = str(failure)
                self._log.warning("upstream_unreachable", endpoint=slot.endpoint.text, problem=told)
            self._notify()
            await asyncio.sleep(delay_s)

    async def _hold(self, slot: _Slot) -> Unreachable:
        """Connect an endpoint, hold the connection while it takes calls, and return why it does not."""
        slot.closed.clear()
        try:
            connection = await connect(slot.endpoint, self._tls, slot.settings, on_closed=lambda _: slot.closed.set())
        except Unreachable as error:
            return error
        slot.connection = connection
        slot.failure = None
        slot.backoff.succeeded(asyncio.get_running_loop().time())
        self._log.info("upstream_connected", endpoint=slot.endpoint.text)
        self._notify()
        await slot.closed.wait()
        slot.connection = None
        slot.settings = after(connection, slot.settings)
        return connection.failure or Unreachable(slot.endpoint.text, "the connection was closed", "try again")

    def _notify(self) -> None:
        self._dismiss()
        self._changed.set()
        self._changed = asyncio.Event()
        for callback in list(self._listeners):
            callback()
