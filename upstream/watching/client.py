"""The watch client: the counterpart of clientv3's Watcher, for one listener that opens and closes watches.

A thin shell around `WatchState`. It has connections of its own, separate from the pool's, to one endpoint (see
`connections`). Each message that arrives there passes through scanner and state to the listener within the same call,
without a task, a future or decoding. One task maintains the connection: it finds an etcd that serves (`Dialer`), waits
until it is lost, and finds the next one. After a break all watches register again; the listener sees neither a gap nor
a repeated event. A connection that is closed in good order is not a break: its streams continue until they end, and
their watches register again on another connection.

Calls to the listener are synchronous and come from the event loop. The listener may call the client from inside them.

All decisions are made elsewhere, without I/O: `state` (the position of each watch), `choice` (which server, and what to
do when a stream ends), `lineage` (whether the store still has the same history; `history_check` asks the servers). The
simulator drives all three.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from proto import etcd_errors
from proto.framing import Status
from proto.scan import WatchResponse, scan_watch_response
from upstream.connection import ClientConnection
from upstream.connections import Connections, settings_after
from upstream.credentials import Credentials
from upstream.dial import Dialer, Examined, Server, ServerInUse, any_of
from upstream.endpoints import Endpoint
from upstream.errors import CallFailed, Logger, NullLogger, Unreachable
from upstream.namespace import Namespace
from upstream.problems import EndpointProblems
from upstream.settings import UpstreamSettings
from upstream.transport import Cork
from upstream.unary import HAS_LEADER, Metadata
from upstream.watch_route import Route, RouteIds
from upstream.watching import effects as watch_effects
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.choice import EndpointPolicy, SearchGoal, on_stream_end
from upstream.watching.history_check import HistoryCheck
from upstream.watching.leader import LeaderCall
from upstream.watching.listener import WatchListener
from upstream.watching.own_user import OwnUserLogin
from upstream.watching.places import StreamPlaces
from upstream.watching.route import RouteCheck
from upstream.watching.state import WatchState
from upstream.watching.stream import OpenedWatch, StreamEndAction, WatchStream
from upstream.watching.unanswered import UnansweredCreates


class WatchClient:
    """Watches at one of several endpoints. Use from one event loop."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        listener: WatchListener[Any],
        settings: UpstreamSettings | None = None,
        tls: ssl.SSLContext | None = None,
        log: Logger | None = None,
        credentials: Credentials | None = None,
        namespace: Namespace | None = None,
        ids: RouteIds | None = None,
        *,
        are_proxies: bool = False,
        problems: EndpointProblems | None = None,
    ) -> None:
        """`credentials`: the proxy's own user, whose token trunks are watched with; without it each watch uses its own.
        `namespace`: the prefix of the watches' keys at etcd. `ids`, `are_proxies`, `problems`: see `Dialer`.
        """
        self._settings = settings or UpstreamSettings()
        self._listener = listener
        self._log = log or NullLogger()
        self._state = WatchState(namespace, self._settings.watch_message_bytes_max)
        self._state.late_progress = are_proxies
        # Reads a response; with a namespace, all watches are in it.
        self.scan = scan_watch_response if namespace is None else namespace.scan
        problems = problems or EndpointProblems(self._log)
        self._dialer = Dialer(
            endpoints, tls, self._settings, problems, self._attempt_failed, ids, are_proxies=are_proxies
        )
        # The server in use; None while there is none.
        self._server: Server | None = None
        # The connections to it, and the streams that wait for a place there.
        self._places = StreamPlaces(self._metadata)
        self._leader_call = LeaderCall(self._places.pick, self._leader_lost)
        # Set when the server in use must be left.
        self._lost = asyncio.Event()
        # Set when the endpoints change.
        self._moved = asyncio.Event()
        # The id of the watched cluster; 0 while no server has returned it.
        self.cluster_id = 0
        status_s = self._settings.status_timeout_s
        self._history = HistoryCheck(self._own, status_s, self._log, listener.other_history)
        self._own_user = OwnUserLogin(credentials, self._own, status_s, self._log, self._logged_in)
        self._choice = EndpointPolicy()
        self._route = RouteCheck(self._dialer, self._cut_off, self._give_up)
        self._task: asyncio.Task[None] | None = None
        # The next call of `_look_again`.
        self._look: asyncio.TimerHandle | None = None
        # A pending registration of watches whose stream ended.
        self._register_timer: asyncio.TimerHandle | None = None
        # What exceeded a step of the state is to be done in the next turn of the loop.
        self._goes_on = False
        # Connections lost while watches were open, since the start.
        self.breaks = 0
        # Held while the listener is notified of what a read brought, unless that is a single DATA frame.
        self.cork: Cork | None = None
        # Called when `problem` has changed.
        self.on_problem: Callable[[], None] | None = None
        self._unanswered = UnansweredCreates(self._settings.create_timeout_s)
        # Connections that the server closed in good order, since the start.
        self.rotated = 0
        # DATA of watch streams read since the start, in bytes.
        self.received_bytes = 0
        # Attempts, connections and creates that ended at a limit, since the start: by its name.
        self.timeouts = self._dialer.timeouts

    # For the listener.

    @property
    def ordered_progress(self) -> bool:
        """The server answers manual progress requests in order with events. False before the first connection."""
        return self._state.ordered_progress

    @property
    def leaderless(self) -> bool:
        """No endpoint has a leader: watches are opened without `hasleader`."""
        return self._choice.leaderless

    @property
    def connected(self) -> bool:
        """There is a connection on which watches are registered."""
        return self._state.connected

    @property
    def newest_revision(self) -> int:
        """The highest revision seen in any header; 0 before the first."""
        return self._state.newest_revision

    @property
    def own_token(self) -> bytes | None:
        """The token of the proxy's own user; None while there is none."""
        return self._state.own_token

    @property
    def server(self) -> ServerInUse | None:
        """The server in use; None while there is none."""
        return self._server.in_use if self._server is not None else None

    @property
    def stream_count(self) -> int:
        """The number of Watch calls open upstream."""
        return sum(1 for _ in self._state.streams()) + self._leader_call.is_open

    @property
    def streams_waiting(self) -> int:
        """The number of Watch calls that wait for a place at etcd."""
        return self._places.waiting

    @property
    def connection_count(self) -> int:
        """The number of connections that take calls."""
        return self._places.connection_count

    @property
    def problem(self) -> str:
        """Why watches wait although etcd is connected; "" when they do not wait, or not for long."""
        return self.loop or self._unanswered.problem or self._places.full

    @property
    def loop(self) -> str:
        """The problem of proxies that take their watches from each other; "" when there is none."""
        found = None if self._server else next((target for target in self._dialer.targets if target.loop), None)
        if found is None:
            return ""
        flag = "--watch-endpoints" if found.is_proxy else "--endpoints"
        return f"watchmux: watches lead back to this proxy, in a loop: {found.loop}; check {flag}"

    @property
    def looping(self) -> list[str]:
        """The endpoints at which calls lead back to this proxy, as far as the search for a server has found them."""
        return [each.endpoint.text for each in self._dialer.targets if each.loop and not each.is_proxy]

    @property
    def onward(self) -> Route:
        """See `Dialer`."""
        return self._dialer.onward

    @property
    def watch_count(self) -> int:
        """The number of open watches."""
        return len(self._state)

    def free_connection(self) -> ClientConnection | None:
        """Return a connection to the server in use with a place for a client's call; None while there is none."""
        return self._places.pick()

    def start(self) -> None:
        """Start connecting, in the running event loop."""
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="upstream watches")

    async def stop(self) -> None:
        """Close the connections. The listener is not notified."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._drop_server()

    def open(self, watch: OpenedWatch) -> None:
        """Open a watch; it registers as soon as there is a connection. Raises ValueError if it is open already."""
        effects = self._state.open(watch)
        self._apply(effects)
        for effect in effects if watch.start_revision is None else ():
            # Send the create now: the client may send a put right after its own create, on another connection to etcd.
            if isinstance(effect, watch_effects.WriteMessage) and isinstance(effect.stream.shell, UpstreamWatchCall):
                effect.stream.shell.flush_now()

    def close(self, watch: OpenedWatch) -> None:
        """Cancel a watch; the listener gets no more notifications of it. A watch that has ended is ignored."""
        self._apply(self._state.close(watch))

    def pause(self, watch: OpenedWatch) -> None:
        """Stop reading a backfill; data in flight fills at most one stream window. Raises ValueError for a trunk."""
        self._state.pause(watch)

    def resume(self, watch: OpenedWatch) -> None:
        """Read a paused backfill again."""
        stream = self._state.resume(watch)
        if stream is not None and isinstance(stream.shell, UpstreamWatchCall):
            # Not at once: the listener would get events inside its own call.
            asyncio.get_running_loop().call_soon(stream.shell.resume)

    def request_progress(self, number: int, watches: Iterable[OpenedWatch] | None = None) -> None:
        """Request progress of watches from etcd; see `WatchState.request_progress`."""
        self._apply(self._state.request_progress(number, watches))

    def watch_leader(self) -> None:
        """From now on report a lost leader to the listener even while no watch is open."""
        self._leader_call.want()

    def revision_regressed(self, revision: int) -> None:
        """Accept that the store is at `revision`, below what was seen before (restored from a snapshot)."""
        self._state.newest_revision = revision
        self._history.went_back(self._server)

    async def examine(self, endpoints: Sequence[Endpoint], *, are_proxies: bool = False) -> Examined:
        """Try each endpoint once, and compare their cluster with the watched one."""
        return await self._dialer.examine(endpoints, self.cluster_id, are_proxies=are_proxies)

    def set_endpoints(self, endpoints: Sequence[Endpoint], *, are_proxies: bool = False) -> None:
        """Replace the list of endpoints by another one of the same cluster; watches stay at the server in use until one
        of the new endpoints serves.

        The listener only gets `resumed`.
        """
        # Not reset: streams at a proxy may live on.
        self._state.late_progress |= are_proxies
        self._dialer.set_endpoints(endpoints, are_proxies)
        self._moved.set()

    # Streams.

    def _apply(self, effects: list[watch_effects.WatchEffect]) -> None:
        listener = self._listener
        for effect in effects:
            match effect:
                case watch_effects.WatchReceived():
                    listener.received(effect.watch, effect.response)
                case watch_effects.WriteMessage():
                    shell = effect.stream.shell
                    if isinstance(shell, UpstreamWatchCall):
                        shell.write(effect.message)
                case watch_effects.Progressed():
                    listener.progressed(effect.watches, effect.header, effect.number)
                case watch_effects.HeaderSeen():
                    listener.header_seen(effect.header)
                case watch_effects.OpenStream():
                    self._open_stream(effect.stream)
                case watch_effects.CloseStream():
                    self._places.forget(effect.stream)
                    shell = effect.stream.shell
                    if isinstance(shell, UpstreamWatchCall):
                        shell.leave()
                case watch_effects.WatchLost():
                    listener.lost(effect.watch, effect.status, effect.text)
                case watch_effects.TokenRefused():
                    self._token_refused(effect.token)
        if self._state.goes_on and not self._goes_on:
            self._goes_on = True
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        self._goes_on = False
        self._apply(self._state.go_on())

    def take(self, stream: WatchStream, response: WatchResponse) -> None:
        """Handle a response that arrived on a stream."""
        watch = self._state.received_events(stream, response)
        if watch is not None:
            self._listener.received(watch, response)
        else:
            self._apply(self._state.received(stream, response))

    def _open_stream(self, stream: WatchStream) -> None:
        stream.shell = call = UpstreamWatchCall(self, stream, self._settings)
        self._places.open(stream, call)

    def _metadata(self, stream: WatchStream) -> Metadata:
        metadata: list[tuple[bytes, bytes]] = []
        if not self.leaderless:
            metadata.append(HAS_LEADER)
        if stream.token is not None:
            metadata.append((b"token", stream.token))
        return metadata

    def stream_ended(self, stream: WatchStream, status: int, text: str) -> None:
        """Handle a stream that the server ended: decide whether to retry it here, elsewhere, or not at all."""
        server = self._server
        if server is None or stream not in self._state.streams():
            return
        shell = stream.shell
        follows = on_stream_end(
            stream,
            status,
            text,
            server.target,
            self._dialer.targets,
            moved=isinstance(shell, UpstreamWatchCall) and shell.moved,
            healthy=self._places.alive,
            works=self._state.works,
        )
        self._apply(self._state.over(stream, follows, status, text))
        if follows is StreamEndAction.MOVED:
            asyncio.get_running_loop().call_soon(self._register_moved)
        elif follows is StreamEndAction.HERE:
            self._register_later(server)
        elif follows is StreamEndAction.APART and self._register_timer is None:
            # Without a delay: each create is retried a bounded number of times.
            self._register_timer = asyncio.get_running_loop().call_later(0, self._register)
        elif follows is StreamEndAction.ELSEWHERE:
            self._give_up(server, f"it ended the watch stream: {CallFailed(status, text)}")

    def _register_moved(self) -> None:
        if self._server is not None and self._register_timer is None:
            self._apply(self._state.register())

    def _register_later(self, server: Server) -> None:
        """Register watches without a stream again, at this server: at once the first time, then with backoff."""
        if self._register_timer is None:
            loop = asyncio.get_running_loop()
            server.target.failed(loop.time())
            self._register_timer = loop.call_at(server.target.not_before, self._register)

    def _register(self) -> None:
        self._register_timer = None
        if self._server is not None:
            self._server.target.backoff.succeeded(asyncio.get_running_loop().time())
            self._apply(self._state.register())

    def _look_later(self) -> None:
        self._look = asyncio.get_running_loop().call_later(self._settings.create_timeout_s / 4, self._look_again)

    def _look_again(self) -> None:
        """Check the server in use from time to time: its history, its route, and whether it answers creates."""
        self._look_later()
        if self._server is not None:
            self._history.look(self._server, self._state.newest_revision)
            if not self._choice.cut_off:
                self._route.look(self._server, self._own(self._server))
        self._look_at_creates()

    def _look_at_creates(self) -> None:
        """Report creates that stay unanswered, and give up the streams of those that have a token."""
        before = self._unanswered.problem
        given_up, reported = self._unanswered.look(self._state.streams(), asyncio.get_running_loop().time())
        for _ in range(reported):
            self._dialer.timeouts["create_timeout_s"] += 1
            self._log.warning("etcd does not answer requests for watches", waited_s=self._settings.create_timeout_s)
        for stream in given_up:
            if isinstance(stream.shell, UpstreamWatchCall):
                stream.shell.leave()
            self._apply(self._state.refused(stream, Status.UNAUTHENTICATED, etcd_errors.INVALID_TOKEN))
        if before != self._unanswered.problem:
            self._report_problem()

    def _report_problem(self) -> None:
        if self.on_problem is not None:
            self.on_problem()

    # The connection.

    def _leader_lost(self) -> None:
        server = self._server
        assert server is not None, "there is no such call without"
        server.target.leaderless = True
        self._give_up(server, etcd_errors.NO_LEADER)

    def _give_up(self, server: Server, problem: str) -> None:
        """Stop using this server, although it can be reached."""
        self._dialer.problem(server.target, f"{server.target.endpoint.text}: {problem}")
        self._lost.set()

    async def _run(self) -> None:
        while True:
            server = await self._dialer.dial(self._acceptable)
            if not await self._history.passes(server):
                self._reject(server)
                continue
            await self._log_in(server)
            self._use(server)
            while not self._lost.is_set():
                self._moved.clear()
                wanted = self._choice.wanted(server.target in self._dialer.targets)
                if wanted is SearchGoal.NOTHING:
                    await any_of(self._lost, self._moved)
                    continue
                better = await self._dialer.dial_unless(partial(self._is_better, wanted), self._lost, self._moved)
                if better is not None and not await self._history.passes(better):
                    self._reject(better)
                elif better is not None:
                    await self._log_in(better)
                    self._leave()
                    self._use(better)
                    server = better
            self._leave()
            self.breaks += 1
            self._listener.broken()

    def _reject(self, server: Server) -> None:
        """Reject a server that was just found, and retry it later."""
        problem = "its store may have been restored, and it did not return its status again"
        self._dialer.problem(server.target, f"{server.target.endpoint.text}: {problem}")
        server.target.failed(asyncio.get_running_loop().time())
        server.connection.close()

    def _cut_off(self) -> None:
        """Look for another proxy: the one in use has no server for its own watches."""
        self._choice.cut_off = True
        self._moved.set()

    async def _log_in(self, server: Server) -> None:
        """Get a token of the proxy's own user before any watch registers. Without a leader the old one stays."""
        if self._own_user.is_possible(server):
            self._state.own_token = await self._own_user.token(server)

    def _token_refused(self, refused: bytes | None) -> None:
        """Get a new token after the server refused that of the proxy's own user: trunks wait for it."""
        if self._state.own_token == refused:
            self._state.own_token = None
        if self._server is not None:
            self._own_user.renew(self._server)

    def _logged_in(self, token: bytes | None) -> None:
        self._apply(self._state.logged_in(token))

    def _is_better(self, wanted: SearchGoal, server: Server) -> bool:
        return self._choice.is_better(wanted, server.has_leader)

    def _acceptable(self, server: Server) -> bool:
        return self._choice.is_acceptable(server.has_leader)

    def _attempt_failed(self) -> None:
        """Decide, after a failed attempt, whether to continue without a leader."""
        self._report_problem()
        targets = self._dialer.targets
        if self._choice.failed(targets, self._server is not None):
            self._log.warning(
                "no etcd has a leader; streams that require one are ended",
                endpoints=[target.endpoint.text for target in targets],
            )
            self._listener.no_leader()

    def _use(self, server: Server) -> None:
        """Use a server that answered: register all watches on its connection."""
        self._choice.used(server.has_leader)
        self._server = server
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
            on_ended=self._connection_ended,
            on_lost=self._connections_lost,
        )
        self._places.use(connections)
        self._log.info("upstream watches are at this etcd", endpoint=target.endpoint.text, version=server.version)
        revision = 0
        if server.header is not None:
            revision = server.header.revision
            self.cluster_id = server.header.cluster_id
            self._listener.header_seen(server.header)
        self._apply(self._state.connect(server.ordered_progress, revision))
        self._leader_call.use(not self.leaderless)
        self._look_later()
        self._listener.resumed()

    def _own(self, server: Server) -> ClientConnection:
        """Return a connection for one of the proxy's own calls to a server, with a reserved place if it is in use."""
        connection = self._places.own() if server is self._server else None
        return connection or server.connection

    def _prepare(self, server: Server) -> None:
        server.connection.cork = self.cork
        if not server.ordered_progress:
            self._places.unordered.add(server.connection)

    async def _open_another(self, server: Server) -> ClientConnection:
        """Open another connection to the server in use. Raises Unreachable.

        Behind a load balancer it may lead to another member, so it is checked in the same way as the first one.
        """
        other = await self._dialer.attempt(server.target)
        where = server.target.endpoint.text
        try:
            if not self._acceptable(other):
                raise Unreachable(where, "it has no leader", "check the other members of the cluster")
            if not await self._history.passes(other):
                raise Unreachable(
                    where, "its store may have been restored, and it did not return its status again", "check its log"
                )
        except BaseException:
            other.connection.close()
            raise
        only = self.connection_count == 0
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

    def _connection_ended(self, connection: ClientConnection, rotated: bool) -> None:
        self.rotated += rotated
        self._places.unordered.discard(connection)
        if (server := self._server) is not None:
            server.target.settings = settings_after(connection, server.target.settings)
        if connection.failure is not None:
            self._dialer.count(connection.failure)

    def _connections_lost(self, failure: Unreachable) -> None:
        if self._server is not None:
            self._dialer.problem(self._server.target, str(failure))
        self._lost.set()

    def _leave(self) -> None:
        """Leave the server in use; all watches wait for the next one."""
        if (server := self._server) is not None:
            server.target.failed(asyncio.get_running_loop().time())
        self._drop_server()

    def _drop_server(self) -> None:
        server, self._server = self._server, None
        self._own_user.leave()
        self._history.leave()
        self._route.leave()
        self._state.disconnect()
        self._leader_call.leave()
        self._places.leave()
        for timer in (self._register_timer, self._look):
            if timer is not None:
                timer.cancel()
        self._register_timer = self._look = None
        self._unanswered.streams = 0
        if server is not None:
            server.connection.close()
