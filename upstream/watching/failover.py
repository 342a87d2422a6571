"""The server that carries the watches: found, used until it is lost or a better one answers, and replaced.

One task does this. A server is used only after three checks: it answers (`Dialer`), it is acceptable (`choice`), and
its store has the known history (`history_check`). While it is in use it is checked again from time to time. When it is
left, all watches wait for the next one. Connections that it closes in good order are replaced without leaving it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any

from proto import etcd_errors
from upstream.connection import ClientConnection
from upstream.connections import Connections, settings_after
from upstream.credentials import Credentials
from upstream.dial import Dialer, Server, any_of
from upstream.errors import Logger, Unreachable
from upstream.interfaces import Cork
from upstream.settings import UpstreamSettings
from upstream.watching.choice import EndpointPolicy, SearchGoal
from upstream.watching.history_check import HistoryCheck
from upstream.watching.leader import LeaderCall
from upstream.watching.listener import WatchListener
from upstream.watching.route_check import RouteCheck
from upstream.watching.state import WatchState
from upstream.watching.stream_calls import StreamCalls

_NO_POSITION = "its store may have been restored, and it did not return its status again"


class Failover:
    """See the module. `start` begins the search."""

    def __init__(
        self,
        dialer: Dialer,
        state: WatchState,
        listener: WatchListener[Any],
        settings: UpstreamSettings,
        log: Logger,
        credentials: Credentials | None,
        cork: Cork | None,
        on_problem: Callable[[], None],
        cluster_id: int,
    ) -> None:
        """The arguments are those of `WatchClient`, or made from them."""
        self._dialer = dialer
        self._state = state
        self._listener = listener
        self._settings = settings
        self._log = log
        # The calls of the watches at the server in use.
        self.calls = StreamCalls(state, dialer, listener, settings, log, credentials, self._give_up)
        self._places = places = self.calls.places
        self.policy = EndpointPolicy()
        self.history = HistoryCheck(places.own, settings.status_timeout_s, log, listener.other_history)
        self._route = RouteCheck(dialer, self._cut_off, self._give_up)
        self.leader_call = LeaderCall(places.pick, self._leader_lost)
        # Of the watched cluster; 0 while no server has returned it.
        self.cluster_id = cluster_id
        # Connections lost while watches were open, since the start.
        self.breaks = 0
        # Connections that the server closed in good order, since the start.
        self.rotated = 0
        self._cork = cork
        self._report_problem = on_problem
        # Set when the server in use must be left.
        self._lost = asyncio.Event()
        # Set when another server may be better than the one in use.
        self._reconsider = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        # The next call of `_look_again`.
        self._look: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start the search, in the running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="upstream watches")

    async def stop(self) -> None:
        """Leave the server in use. The listener is not notified."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._drop_server()

    def reconsider(self) -> None:
        """Decide again which server is wanted: the endpoints have changed."""
        self._reconsider.set()

    async def _run(self) -> None:
        while True:
            server = await self._dialer.dial(self._is_acceptable, self._attempt_failed)
            if not await self.history.passes(server):
                self._reject(server)
                continue
            await self.calls.own_user.log_in(server)
            self._use(server)
            while not self._lost.is_set():
                self._reconsider.clear()
                wanted = self.policy.wanted(server.target in self._dialer.targets)
                if wanted is SearchGoal.NOTHING:
                    await any_of(self._lost, self._reconsider)
                    continue
                better = await self._dialer.dial_unless(
                    partial(self._is_better, wanted), self._attempt_failed, self._lost, self._reconsider
                )
                if better is not None and not await self.history.passes(better):
                    self._reject(better)
                elif better is not None:
                    await self.calls.own_user.log_in(better)
                    self._leave()
                    self._use(better)
                    server = better
            self._leave()
            self.breaks += 1
            self._listener.broken()

    # The search.

    def _is_acceptable(self, server: Server) -> bool:
        return self.policy.is_acceptable(server.has_leader)

    def _is_better(self, wanted: SearchGoal, server: Server) -> bool:
        return self.policy.is_better(wanted, server.has_leader)

    def _attempt_failed(self) -> None:
        """Decide, after a failed attempt, whether to continue without a leader."""
        self._report_problem()
        targets = self._dialer.targets
        if self.policy.failed(targets, self._places.server is not None):
            self._log.warning(
                "no etcd has a leader; streams that require one are ended",
                endpoints=[target.endpoint.text for target in targets],
            )
            self._listener.no_leader()

    def _reject(self, server: Server) -> None:
        """Reject a server that was just found, and retry it later."""
        self._dialer.problem(server.target, f"{server.target.endpoint.text}: {_NO_POSITION}")
        server.target.failed(asyncio.get_running_loop().time())
        server.connection.close()

    # The server in use.

    def _use(self, server: Server) -> None:
        """Use a server that answered: register all watches on its connection."""
        self.policy.used(server.has_leader)
        self._lost.clear()
        target = server.target
        target.backoff.succeeded(asyncio.get_running_loop().time())
        self._dialer.works(target)
        self._prepare(server)
        connections = Connections(
            server.connection,
            self._settings,
            self._log,
            open_another=partial(self._open_another, server),
            on_change=self._places_changed,
            on_ended=partial(self._connection_ended, server),
            on_lost=partial(self._connections_lost, server),
        )
        self.calls.use(server, connections, needs_leader=not self.policy.leaderless)
        self._log.info("upstream watches are at this etcd", endpoint=target.endpoint.text, version=server.version)
        revision = 0
        if server.header is not None:
            revision = server.header.revision
            self.cluster_id = server.header.cluster_id
            self._listener.header_seen(server.header)
        self.calls.apply(self._state.connect(server.ordered_progress, revision))
        self.leader_call.use(not self.policy.leaderless)
        self._look_later()
        self._listener.resumed()

    def _give_up(self, server: Server, problem: str) -> None:
        """Stop using this server, although it can be reached."""
        self._dialer.problem(server.target, f"{server.target.endpoint.text}: {problem}")
        self._lost.set()

    def _leave(self) -> None:
        """Leave the server in use; all watches wait for the next one."""
        if (server := self._places.server) is not None:
            server.target.failed(asyncio.get_running_loop().time())
        self._drop_server()

    def _drop_server(self) -> None:
        server = self._places.server
        self.history.leave()
        self._route.leave()
        self.leader_call.leave()
        self.calls.leave()
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if server is not None:
            server.connection.close()

    def other_history(self) -> None:
        """Note that the store has another history, and leave a proxy: its connection outlives the restore.

        So what is in flight there may be of the old history, and the position that it had when connected is. It is used
        again once it has a server itself (proxy/passthrough/route_status.py), whose history it has checked.
        """
        server = self._places.server
        if server is None or not server.target.is_proxy:
            self.history.went_back(server)
            return
        self.history.went_back(None)
        # At once; the connection is closed by the task, since this may be called from its protocol.
        self.calls.close()
        self._lost.set()

    # Checks of the server in use.

    def check_history(self) -> None:
        """Compare the position of the store in use with the known one, now."""
        if (server := self._places.server) is not None:
            self.history.read_again(server)

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(self._settings.create_timeout_s / 4, self._look_again)

    def _look_again(self) -> None:
        """Check the server in use from time to time: its history, its route, and whether it answers creates."""
        self._look_later()
        if (server := self._places.server) is not None:
            self.history.look(server, self._state.newest_revision)
            if not self.policy.cut_off:
                self._route.look(server, self._places.own(server))
        if self.calls.look_at_creates():
            self._report_problem()

    def _cut_off(self) -> None:
        """Look for another proxy: the one in use has no server for its own watches."""
        self.policy.cut_off = True
        self._reconsider.set()

    def _leader_lost(self) -> None:
        server = self._places.server
        assert server is not None, "only a server in use has this call"
        server.target.leaderless = True
        self._give_up(server, etcd_errors.NO_LEADER)

    # Its connections.

    def _prepare(self, server: Server) -> None:
        server.connection.cork = self._cork
        if not server.ordered_progress:
            self._places.unordered.add(server.connection)

    async def _open_another(self, server: Server) -> ClientConnection:
        """Open another connection to the server in use. Raises Unreachable.

        Behind a load balancer it may lead to another member, so it is checked in the same way as the first one.
        """
        other = await self._dialer.attempt(server.target)
        where = server.target.endpoint.text
        try:
            if not self._is_acceptable(other):
                raise Unreachable(where, "it has no leader", "check the other members of the cluster")
            if not await self.history.passes(other):
                raise Unreachable(where, _NO_POSITION, "check its log")
        except BaseException:
            other.connection.close()
            raise
        only = self._places.connection_count == 0
        server.position = other.position
        server.version = other.version
        self._state.ordered_progress = other.ordered_progress and (only or self._state.ordered_progress)
        if other.header is not None:
            self._state.note_revision(other.header.revision)
            self._listener.header_seen(other.header)
        self._listener.resumed()
        self._prepare(other)
        return other.connection

    def _places_changed(self) -> None:
        self._places.begin_waiting()
        self._report_problem()

    def _connection_ended(self, server: Server, connection: ClientConnection, rotated: bool) -> None:
        self.rotated += rotated
        self._places.unordered.discard(connection)
        server.target.settings = settings_after(connection, server.target.settings)
        if connection.failure is not None:
            self._dialer.count(connection.failure)

    def _connections_lost(self, server: Server, failure: Unreachable) -> None:
        self._dialer.problem(server.target, str(failure))
        self._lost.set()
