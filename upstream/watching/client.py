"""The watch client: the counterpart of clientv3's Watcher, for one listener that opens and closes watches.

It has connections of its own, separate from the pool's, to one endpoint (see `connections`). Each message that arrives
there passes through scanner and state to the listener within the same call, without a task, a future or decoding. After
a break all watches register again; the listener sees neither a gap nor a repeated event. A connection that is closed in
good order is not a break: its streams continue until they end, and their watches register again on another connection.

Calls to the listener are synchronous and come from the event loop. The listener may call the client from inside them.

All decisions are made without I/O: `state` (the position of each watch), `choice` (which server, and what to do when a
stream ends), `lineage` (whether the store still has the same history). The simulator drives all three. `StreamCalls`
carries out the effects of the state, `Failover` finds and replaces the server in use.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from upstream.connection import ClientConnection
from upstream.credentials import Credentials
from upstream.dial import Dialer, Examined, ServerInUse
from upstream.endpoints import Endpoint
from upstream.errors import Logger, NullLogger
from upstream.interfaces import Cork
from upstream.namespace import Namespace
from upstream.problems import EndpointProblems
from upstream.settings import UpstreamSettings
from upstream.watch_route import Route, RouteIds
from upstream.watching import effects as watch_effects
from upstream.watching.call import UpstreamWatchCall
from upstream.watching.failover import Failover
from upstream.watching.listener import WatchListener
from upstream.watching.state import WatchState
from upstream.watching.stream import OpenedWatch


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
        cork: Cork | None = None,
        on_problem: Callable[[], None] | None = None,
        cluster_id: int = 0,
    ) -> None:
        """`credentials`: the proxy's own user, whose token trunks are watched with; without it each watch uses its own.
        `namespace`: the prefix of the watches' keys at etcd. `ids`, `are_proxies`, `problems`: see `Dialer`.
        `cork` is held while the listener is notified of what a read brought, unless that is a single DATA frame.
        `on_problem` is called when `problem` has changed. `cluster_id`: of the cluster that clients know; 0: any.
        """
        settings, log = settings or UpstreamSettings(), log or NullLogger()
        self._state = WatchState(namespace, settings.watch_message_bytes_max)
        self._state.late_progress = are_proxies
        problems = problems or EndpointProblems(log)
        self.dialer = Dialer(endpoints, tls, settings, problems, ids, are_proxies=are_proxies)
        self._failover = Failover(
            self.dialer,
            self._state,
            listener,
            settings,
            log,
            credentials,
            cork,
            on_problem or (lambda: None),
            cluster_id,
        )
        self._calls = self._failover.calls

    # What it is doing.

    @property
    def ordered_progress(self) -> bool:
        """The server answers manual progress requests in order with events. False before the first connection."""
        return self._state.ordered_progress

    @property
    def leaderless(self) -> bool:
        """No endpoint has a leader: watches are opened without `hasleader`."""
        return self._failover.policy.leaderless

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
    def cluster_id(self) -> int:
        """The id of the watched cluster; 0 while no server has returned it."""
        return self._failover.cluster_id

    @property
    def server(self) -> ServerInUse | None:
        """The server in use; None while there is none."""
        server = self._calls.places.server
        return server.in_use if server is not None else None

    @property
    def watch_count(self) -> int:
        """The number of open watches."""
        return len(self._state)

    @property
    def stream_count(self) -> int:
        """The number of Watch calls open upstream."""
        return sum(1 for _ in self._state.streams()) + self._failover.leader_call.is_open

    @property
    def streams_waiting(self) -> int:
        """The number of Watch calls that wait for a place at etcd."""
        return self._calls.places.waiting

    @property
    def connection_count(self) -> int:
        """The number of connections that take calls."""
        return self._calls.places.connection_count

    @property
    def breaks(self) -> int:
        """Connections lost while watches were open, since the start."""
        return self._failover.breaks

    @property
    def rotated(self) -> int:
        """Connections that the server closed in good order, since the start."""
        return self._failover.rotated

    @property
    def received_bytes(self) -> int:
        """DATA of watch streams read since the start, in bytes."""
        return self._calls.received_bytes

    @property
    def timeouts(self) -> Counter[str]:
        """Attempts, connections and creates that ended at a limit, since the start: by its name."""
        return self.dialer.timeouts

    @property
    def problem(self) -> str:
        """Why watches wait although etcd is connected; "" when they do not wait, or not for long."""
        return self.loop or self._calls.problem

    @property
    def loop(self) -> str:
        """The problem of proxies that take their watches from each other; "" when there is none."""
        return "" if self._calls.places.server is not None else self.dialer.loop

    @property
    def looping(self) -> list[str]:
        """The endpoints at which calls lead back to this proxy, as far as the search for a server has found them."""
        return self.dialer.looping

    @property
    def onward(self) -> Route:
        """See `Dialer`."""
        return self.dialer.onward

    # For its owner.

    def start(self) -> None:
        """Start connecting, in the running event loop."""
        self._failover.start()

    async def stop(self) -> None:
        """Close the connections. The listener is not notified."""
        await self._failover.stop()

    async def examine(self, endpoints: Sequence[Endpoint], *, are_proxies: bool = False) -> Examined:
        """Try each endpoint once, and compare their cluster with the watched one."""
        return await self.dialer.examine(endpoints, self.cluster_id, are_proxies=are_proxies)

    def set_endpoints(self, endpoints: Sequence[Endpoint], *, are_proxies: bool = False) -> None:
        """Replace the list of endpoints by another one of the same cluster; watches stay at the server in use until one
        of the new endpoints serves.

        The listener only gets `resumed`.
        """
        # Not reset: streams at a proxy may live on.
        self._state.late_progress |= are_proxies
        self.dialer.set_endpoints(endpoints, are_proxies)
        self._failover.reconsider()

    def free_connection(self) -> ClientConnection | None:
        """Return a connection to the server in use with a place for a client's call; None while there is none."""
        return self._calls.places.pick()

    # For its listener.

    def open(self, watch: OpenedWatch) -> None:
        """Open a watch; it registers as soon as there is a connection. Raises ValueError if it is open already."""
        effects = self._state.open(watch)
        self._calls.apply(effects)
        for effect in effects if watch.start_revision is None else ():
            # Send the create now: the client may send a put right after its own create, on another connection to etcd.
            if isinstance(effect, watch_effects.WriteMessage) and isinstance(effect.stream.shell, UpstreamWatchCall):
                effect.stream.shell.flush_now()

    def close(self, watch: OpenedWatch) -> None:
        """Cancel a watch; the listener gets no more notifications of it. A watch that has ended is ignored."""
        self._calls.apply(self._state.close(watch))

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
        self._calls.apply(self._state.request_progress(number, watches))

    def watch_leader(self) -> None:
        """From now on report a lost leader to the listener even while no watch is open."""
        self._failover.leader_call.want()

    def revision_regressed(self, revision: int) -> None:
        """Accept that the store is at `revision`, below what was seen before (restored from a snapshot)."""
        self._state.newest_revision = revision
        self._failover.other_history()

    def check_history(self) -> None:
        """Check the history of the store in use again, since the connection to its server may outlive a restore."""
        self._failover.check_history()
