"""Connections for everything except watches: to each endpoint as many as needed (`connections`), kept open.

They carry the proxy's own calls (`Pool.unary`) and the pass-through, which takes a connection (`Pool.pick`) and starts
its call there. Calls are distributed round-robin over the endpoints that work; an endpoint that fails is retried in the
background, with backoff, without end. A member that does not serve (a learner, or one without a leader) gets calls only
while no other member is connected. Watches do not use these connections: under TLS, large reads would delay them.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from proto.framing import Status
from upstream.connecting import connect
from upstream.connection import ClientConnection
from upstream.connections import full_text
from upstream.endpoints import Endpoint
from upstream.errors import CallFailed, Logger, NullLogger, Unreachable
from upstream.fitness import Fitness, is_refused_unserved, is_suspicious
from upstream.hedged import HedgedCall, Hedging, Request
from upstream.interfaces import Cork
from upstream.problems import EndpointProblems
from upstream.settings import CONNECTION_LIMITS, ConnectionSettings, UpstreamSettings
from upstream.slot import Slot
from upstream.unary import HAS_LEADER, Answer, Metadata, settle
from upstream.watch_route import LoopOfProxies, Route, RouteIds


class EndpointState(NamedTuple):
    """State of an endpoint in the pool. `problem`: why it is not connected or does not serve; "" if unknown."""

    endpoint: str
    connected: bool
    problem: str


class Pool:
    """Keeps connections to each endpoint and hands them out."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        tls: ssl.SSLContext | None = None,
        settings: UpstreamSettings | None = None,
        log: Logger | None = None,
        ids: RouteIds | None = None,
        problems: EndpointProblems | None = None,
    ) -> None:
        """`ids`: of the proxy that it belongs to. `problems`: shared with its watch client."""
        self._ids = ids or RouteIds()
        self._settings = settings or UpstreamSettings()
        self._tls = tls
        self._log = log or NullLogger()
        self._problems = problems or EndpointProblems(self._log)
        self._slots = [self._slot(endpoint) for endpoint in endpoints]
        # The slots that get calls, as of the last change.
        self._serving: list[Slot] = []
        # The index at which `pick` starts, and that at which `own_endpoints` starts.
        self._next = 0
        self._next_own = 0
        self._hedging = Hedging()
        # The proxy's own calls that wait for a connection.
        self._starting: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        # Removed endpoints, kept until their open calls end.
        self._retired: list[Slot] = []
        # Connections, and attempts to connect, that ended at a limit: by its name.
        self.timeouts = Counter(dict.fromkeys(CONNECTION_LIMITS, 0))
        # Connections that servers closed in good order, since the start.
        self.rotated = 0
        # Held while a read is dispatched, see `ClientConnection.cork`; to be set before `start`.
        self.cork: Cork | None = None
        # Set and replaced whenever a slot changes.
        self._changed = asyncio.Event()

    def _slot(self, endpoint: Endpoint) -> Slot:
        return Slot(endpoint, self._settings, self, self._log, self._problems, self._ids)

    def start(self) -> None:
        """Start connecting, in the running event loop."""
        for slot in self._slots:
            slot.start()

    def set_endpoints(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace the list of endpoints by another one of the same cluster, during operation.

        Endpoints that stay keep their connections. Removed endpoints serve until one that stays or is new works; then
        they get no new calls, and their open calls continue until they end.
        """
        known = {slot.endpoint: slot for slot in self._slots}
        slots = [known.pop(endpoint) if endpoint in known else self._slot(endpoint) for endpoint in endpoints]
        for slot in slots:
            slot.leaving = False
            slot.start()
        for slot in known.values():
            slot.leaving = True
        self._slots = slots + list(known.values())
        self.changed()

    def _retire_removed(self) -> None:
        """Retire the removed endpoints once another one works."""
        leaving = [slot for slot in self._slots if slot.leaving]
        if not leaving or all(slot.leaving or slot.connections is None for slot in self._slots):
            return
        self._slots = [slot for slot in self._slots if not slot.leaving]
        self._retired = [slot for slot in self._retired if any(each.open_calls for each in slot.retired)]
        for slot in leaving:
            slot.retire(Unreachable(slot.endpoint.text, "it was removed from the configuration", "try again"))
            self._retired.append(slot)
            self._log.info("endpoint removed", endpoint=slot.endpoint.text)

    async def stop(self) -> None:
        """Close all connections; calls on them end UNAVAILABLE."""
        for waiting in self._starting:
            waiting.cancel()
        await asyncio.gather(*(slot.stop() for slot in (*self._slots, *self._retired)))
        self._retired.clear()
        self.changed()

    def pick(self, own: bool = False) -> ClientConnection | None:
        """Return a connection that takes a call, of the next endpoint in turn; None when there is none now.

        An endpoint that owes an answer is used only when all of them do: its etcd may hang. `own`: the call is one of
        the proxy's own, for which some places are reserved.
        """
        slots = self._serving
        count = len(slots)
        now = asyncio.get_running_loop().time() if count > 1 else 0.0
        for hanging in (False, True):
            for step in range(count):
                index = (self._next + step) % count
                connections = slots[index].connections
                if connections is None or (count > 1 and connections.owes_answer(now) is not hanging):
                    continue
                if (connection := connections.pick(own)) is not None:
                    self._next = index + 1
                    return connection
            if count < 2:
                return None
        return None

    def own_endpoints(self) -> list[str]:
        """Return the endpoints for one of the proxy's own calls, in the order of attempts.

        Serving endpoints come first, round-robin; then those that owe an answer, then those that do not serve.
        """
        now = asyncio.get_running_loop().time()
        serving = self._serving
        first = self._next_own % len(serving) if serving else 0
        self._next_own = first + 1
        serving = serving[first:] + serving[:first]
        hangs = {slot: slot.connections is not None and slot.connections.owes_answer(now) for slot in serving}
        serving.sort(key=lambda slot: hangs[slot])
        others = [slot for slot in self._slots if slot not in hangs]
        return [slot.endpoint.text for slot in (*serving, *others) if slot.connections is not None]

    def pick_at(self, endpoint: str) -> ClientConnection | None:
        """Return a connection to this endpoint that takes one of the proxy's own calls; None when there is none now."""
        for slot in self._slots:
            if slot.endpoint.text == endpoint and slot.connections is not None:
                return slot.connections.pick(own=True)
        return None

    def answered(self, connection: ClientConnection, status: int, text: str) -> bool:
        """Take the status of an answer other than OK: it may show that its member does not serve.

        Return whether to send the call again: its member refused it unprocessed, and another member serves.
        """
        if not is_suspicious(status, text):
            return False
        for slot in self._slots:
            if slot.endpoint == connection.endpoint:
                slot.on_suspicious_answer(text)
        return is_refused_unserved(text) and any(slot.fitness is Fitness.SERVES for slot in self._serving)

    def look_at(self, endpoints: Sequence[str]) -> None:
        """Check whether calls on the connections to these endpoints reach an etcd."""
        for slot in self._slots if endpoints else ():
            if slot.endpoint.text in endpoints:
                slot.look()

    def states(self) -> list[EndpointState]:
        """Return each endpoint's state, for display."""
        return [
            EndpointState(slot.endpoint.text, slot.connections is not None, str(slot.failure or slot.fitness.value))
            for slot in self._slots
        ]

    @property
    def hedged(self) -> int:
        """The number of attempts of the proxy's own calls made because an answer was late."""
        return self._hedging.hedged

    @property
    def down(self) -> Unreachable | None:
        """Why no call can be made; None while an endpoint is up, or has not been retried since it was lost."""
        failure: Unreachable | None = None
        for slot in self._slots:
            if slot.connections is not None or slot.failure is None:
                return None
            failure = slot.failure
        return failure

    @property
    def loop(self) -> LoopOfProxies | None:
        """The loop that calls would get into, if no endpoint is connected because of it."""
        loops = [slot.failure for slot in self._slots if isinstance(slot.failure, LoopOfProxies)]
        return loops[0] if loops and not self.connected else None

    @property
    def onward(self) -> Route:
        """The address that leads into a loop, and the route from there."""
        return () if (loop := self.loop) is None else (loop.where, *loop.route)

    @property
    def connected(self) -> bool:
        """An endpoint is connected, even if it has no room for a call now."""
        return any(slot.connections is not None for slot in self._slots)

    @property
    def full(self) -> str:
        """Why calls wait although endpoints are connected; "" when they do not wait, or not for long."""
        up = [slot for slot in self._slots if slot.connections is not None]
        if not up or not all(slot.connections is not None and slot.connections.full for slot in up):
            return ""
        return full_text("calls", self.connection_count)

    @property
    def connection_count(self) -> int:
        """The number of connections that take calls."""
        return sum(slot.connections.count for slot in self._slots if slot.connections is not None)

    def when_available(self, callback: Callable[[], None]) -> None:
        """Call `callback` each time a connection opens or has room again, and each time an endpoint fails; see `pick`
        and `down`."""
        self._listeners.append(callback)

    async def wait_available(self, timeout_s: float | None = None, own: bool = False) -> ClientConnection:
        """Return a connection as soon as there is one.

        Raises CallFailed: UNAVAILABLE once every endpoint has failed, DEADLINE_EXCEEDED after `timeout_s` seconds.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    changed = self._changed
                    connection = self.pick(own)
                    if connection is not None:
                        return connection
                    if self.down is not None:
                        raise CallFailed(Status.UNAVAILABLE, f"no etcd can be reached: {self.down}")
                    await changed.wait()
        except TimeoutError:
            raise CallFailed(Status.DEADLINE_EXCEEDED, f"no connection to an etcd in {timeout_s:g} s") from None

    def ask(
        self,
        path: str,
        message: bytes,
        metadata: Metadata,
        timeout_s: float,
        callback: Callable[[Answer | CallFailed], None],
        *,
        has_leader: bool = False,
    ) -> HedgedCall:
        """Make an idempotent call with one message each way; `callback` is called with the outcome, except after
        `cancel`.

        Each working endpoint gets the call at most once, by name: the next one when an answer is late or is a failure
        that the request itself did not cause (see `upstream.hedged`). If an endpoint is connected, the first one gets
        the call before this returns. With `has_leader` a server without a leader refuses it at once. The call fails
        with the status of an answer, with UNAVAILABLE when no endpoint works ("no leader" only if every endpoint
        returned it), and with DEADLINE_EXCEEDED after `timeout_s` seconds.
        """
        if has_leader:
            metadata = [*metadata, HAS_LEADER]
        request = Request(path, message, metadata, self._settings.unary_message_bytes_max)
        call = HedgedCall(self, self._hedging, request, asyncio.get_running_loop().time() + timeout_s, callback)
        call.start()
        return call

    def start_later(self, call: HedgedCall) -> None:
        """Start a call as soon as an endpoint takes it."""
        waiting = asyncio.get_running_loop().create_task(self._start_later(call))
        self._starting.add(waiting)
        waiting.add_done_callback(self._starting.discard)

    async def _start_later(self, call: HedgedCall) -> None:
        try:
            await self.wait_available(call.deadline - asyncio.get_running_loop().time(), own=True)
        except CallFailed as failed:
            call.finish(failed)
        else:
            call.start()

    async def unary(
        self,
        path: str,
        message: bytes,
        metadata: Metadata = (),
        timeout_s: float = 10.0,
        *,
        has_leader: bool = False,
    ) -> Answer:
        """Make a call as `ask` does, and return the answer's message and trailers. Raises CallFailed."""
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        call = self.ask(path, message, metadata, timeout_s, partial(settle, done), has_leader=has_leader)
        try:
            return await done
        finally:
            call.cancel()

    # For the slots.

    async def connect(self, endpoint: Endpoint, settings: ConnectionSettings, turn: int) -> ClientConnection:
        """Connect to an endpoint that has failed so often. Raises Unreachable."""
        try:
            connection = await connect(endpoint, self._tls, settings, turn=turn)
        except Unreachable as error:
            self._count(error)
            raise
        connection.cork = self.cork
        return connection

    def ended(self, connection: ClientConnection, rotated: bool) -> None:
        """Count a connection that takes no more calls; `rotated`: its server closed it in good order."""
        self.rotated += rotated
        if connection.failure is not None:
            self._count(connection.failure)

    def _count(self, failure: Unreachable) -> None:
        if failure.limit:
            self.timeouts[failure.limit] += 1

    def find_serving(self) -> None:
        """Select the endpoints that get calls: those whose members serve; if there are none, all connected ones."""
        up = [slot for slot in self._slots if slot.connections is not None]
        self._serving = [slot for slot in up if slot.fitness is Fitness.SERVES] or up

    def changed(self) -> None:
        """Notify callers that an endpoint has changed or has room again."""
        self._retire_removed()
        self.find_serving()
        self._changed.set()
        self._changed = asyncio.Event()
        for callback in list(self._listeners):
            callback()
