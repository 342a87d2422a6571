"""One endpoint of the pool: its connections, whether its member serves, and reconnecting."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from proto import etcd_errors
from upstream.connection import ClientConnection
from upstream.connections import Connections, settings_after
from upstream.endpoints import Backoff, Endpoint
from upstream.errors import Logger, Unreachable
from upstream.fitness import Fitness, read_fitness
from upstream.problems import CALLS, EndpointProblems
from upstream.settings import ConnectionSettings, UpstreamSettings
from upstream.watch_route import LoopOfProxies, RouteIds

# Interval at which a member that does not serve is checked again, and the timeout of the check on a new connection.
_LOOK_S: Final = 1.0


class SlotOwner(Protocol):
    """The pool."""

    async def connect(self, endpoint: Endpoint, settings: ConnectionSettings, turn: int) -> ClientConnection:
        """Connect to an endpoint that has failed so often. Raises Unreachable."""

    def changed(self) -> None:
        """Handle that an endpoint has changed or has room again."""

    def find_serving(self) -> None:
        """Update the serving endpoints after a loss, without `changed`: the endpoint is retried once first."""

    def ended(self, connection: ClientConnection, rotated: bool) -> None:
        """Handle that a connection takes no more calls; `rotated`: its server closed it in good order."""


class Slot:
    """See the module. `start` starts connecting."""

    def __init__(
        self,
        endpoint: Endpoint,
        settings: UpstreamSettings,
        owner: SlotOwner,
        log: Logger,
        problems: EndpointProblems,
        ids: RouteIds,
    ) -> None:
        self.endpoint = endpoint
        self.connection_settings = settings.connection
        # While it is up.
        self.connections: Connections | None = None
        # Replaced connections, kept until their open calls end.
        self.retired: list[Connections] = []
        # Why the last attempt failed or the last connection ended; None while it is up or has not been tried.
        self.failure: Unreachable | None = None
        # Whether its member serves, as far as known.
        self.fitness = Fitness.SERVES
        # The endpoint was removed from the configuration: it serves until a configured one works.
        self.leaving = False
        # How often it has failed.
        self._turn = 0
        self._owner = owner
        self._settings = settings
        self._log = log
        self._problems = problems
        self._ids = ids
        self._backoff = Backoff(settings.backoff_first_s, settings.backoff_max_s)
        self._task: asyncio.Task[None] | None = None
        self._look: asyncio.Task[None] | None = None
        # Why its connections ended, once they have.
        self._lost: asyncio.Future[Unreachable] | None = None
        # When the last check of the member started, in loop time.
        self._looked_at = 0.0

    def start(self) -> None:
        """Keep it connected from now on."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._keep(), name=f"pool {self.endpoint.text}")

    def retire(self, reason: Unreachable) -> None:
        """Open no more connections; the open ones close when their calls have ended."""
        self._problems.over(CALLS, self.endpoint.text)
        self._cancel()
        if self.connections is not None:
            self.connections.retire(reason)
            self.retired.append(self.connections)
            self.connections = None

    async def stop(self) -> None:
        """Close all connections."""
        tasks = self._cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connections in (self.connections, *self.retired):
            if connections is not None:
                connections.close()
        self.connections = None
        self.retired.clear()

    def look(self) -> None:
        """Check whether the member serves, repeatedly until it does; at most once per `_LOOK_S`."""
        now = asyncio.get_running_loop().time()
        if self._look is None and self.connections is not None and now >= self._looked_at + _LOOK_S:
            self._looked_at = now
            self._look = asyncio.get_running_loop().create_task(self._look_at(), name=f"look at {self.endpoint.text}")

    def on_suspicious_answer(self, text: str) -> None:
        """Handle an answer of the member which shows that it does not serve, or may not."""
        if text == etcd_errors.LEARNER:
            self._set_fitness(Fitness.LEARNER)
        elif text == etcd_errors.NO_LEADER:
            self._set_fitness(Fitness.NO_LEADER)
        self.look()

    def _cancel(self) -> list[asyncio.Task[None]]:
        tasks = [task for task in (self._task, self._look) if task is not None]
        for task in tasks:
            task.cancel()
        self._task = self._look = None
        return tasks

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            failure = await self._hold()
            delay_s = self._backoff.failed(loop.time())
            self._turn += 1
            if self.failure is None and delay_s == 0:
                # Retry once at once after a working connection: until that fails the endpoint does not count as down.
                continue
            self.failure = failure
            self._problems.met(CALLS, self.endpoint.text, str(failure))
            self._owner.changed()
            await asyncio.sleep(delay_s)

    async def _hold(self) -> Unreachable:
        """Connect, keep the connections, and return why the last one ended or could not be opened."""
        loop = asyncio.get_running_loop()
        try:
            first = await self._open()
        except Unreachable as error:
            # Without the traceback, whose frames keep the connection.
            return error.with_traceback(None)
        lost: asyncio.Future[Unreachable] = loop.create_future()
        self._lost = lost
        self.connections = Connections(
            first,
            self._settings,
            self._log,
            open_another=self._open,
            on_change=self._owner.changed,
            on_ended=self._ended,
            on_lost=lost.set_result,
        )
        self.failure = None
        self._backoff.succeeded(loop.time())
        self._problems.over(CALLS, self.endpoint.text)
        self._log.info("connected to etcd", endpoint=self.endpoint.text)
        if self.fitness is not Fitness.SERVES:
            self.look()
        self._owner.changed()
        failure = await lost
        self.retired = [connections for connections in (*self.retired, self.connections) if connections.open_calls]
        self.connections = None
        self._owner.find_serving()
        return failure

    async def _open(self) -> ClientConnection:
        """Open one connection, and check whether the member serves. Raises Unreachable."""
        connection = await self._owner.connect(self.endpoint, self.connection_settings, self._turn)
        try:
            fitness = await read_fitness(connection, min(_LOOK_S, self._settings.status_timeout_s), self._ids)
        except (asyncio.CancelledError, LoopOfProxies):
            connection.close()
            raise
        if not connection.healthy:
            connection.close()
            self._owner.ended(connection, False)
            raise connection.failure or Unreachable(self.endpoint.text, "it closed the connection", "check its log")
        self._set_fitness(fitness)
        return connection

    def _ended(self, connection: ClientConnection, rotated: bool) -> None:
        self.connection_settings = settings_after(connection, self.connection_settings)
        self._owner.ended(connection, rotated)

    def _set_fitness(self, fitness: Fitness) -> None:
        if fitness is not self.fitness:
            self.fitness = fitness
            if fitness is Fitness.SERVES:
                self._log.info("etcd serves again", endpoint=self.endpoint.text)
            else:
                self._log.warning(
                    "etcd is connected but does not serve", endpoint=self.endpoint.text, problem=fitness.value
                )
            self._owner.changed()
        if fitness is not Fitness.SERVES and self.connections is not None:
            self.look()

    def _leave(self, loop: LoopOfProxies) -> None:
        """Leave the connections, which lead back to this proxy: the endpoint is tried again as after a failure."""
        if self.connections is not None and self._lost is not None and not self._lost.done():
            self.failure = loop
            self.connections.retire(loop)
            self._lost.set_result(loop)

    async def _look_at(self) -> None:
        while True:
            connection = None if self.connections is None else self.connections.pick(own=True)
            if connection is not None:
                try:
                    self._set_fitness(await read_fitness(connection, _LOOK_S, self._ids))
                except LoopOfProxies as loop:
                    self._look = None
                    self._leave(loop)
                    return
            if self.fitness is Fitness.SERVES or self.connections is None:
                self._look = None
                return
            await asyncio.sleep(_LOOK_S)
