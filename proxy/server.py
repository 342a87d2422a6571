"""The assembled proxy: listener, Watch service, engine, core, and the connections to etcd.

It starts with the connections to etcd and listens last, so that a client that can connect is served; it stops in the
opposite order. Signals, configuration and output belong to the command line, which starts, drains and stops a `Proxy`.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from coalesce.core import Coalescer
from coalesce.limits import CoreLimits as CoreLimits
from proxy import logs
from proxy.admin import health
from proxy.admin.self_probe import SelfProbe
from proxy.auth.reads import AuthReader, ReaderSettings
from proxy.listening.http1 import Http1
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from proxy.listening.sockets import Listening
from proxy.listening.turns import in_parts
from proxy.passthrough import shared_reads
from proxy.passthrough.endless import end_endless
from proxy.passthrough.relay import Passthrough
from proxy.passthrough.route_status import RouteStatus
from proxy.passthrough.settings import PassthroughSettings
from proxy.watch import service as watch_service
from proxy.watch.engine import Engine
from proxy.watch.settings import WatchSettings
from upstream.credentials import Credentials
from upstream.endpoints import Endpoint, parse_endpoint, parse_endpoints
from upstream.fitness import STATUS_PATH
from upstream.namespace import Namespace
from upstream.pool import Pool
from upstream.problems import EndpointProblems
from upstream.settings import UpstreamSettings as UpstreamSettings
from upstream.watch_route import RouteIds, new_id
from upstream.watching.client import WatchClient

if TYPE_CHECKING:
    from proxy.auth.cn_guard import CommonNameGuard
    from upstream.tls import FileContext

GC_THRESHOLDS = (1_000, 1, 20_000)
"""Allocations before a young collection, such before one of the middle generation, and such before one of all objects.
The fan-out creates no cycles: a collection frees almost nothing, and the loop stands still meanwhile. Each new object
is examined twice with any of these numbers, but at most 3,000 at once: for 0.1 to 0.3 ms."""

DRAIN_WATCHES_SHARE = 0.5
"""Share of the drain limit over which watches are ended; the rest is left for other calls to complete."""

log = logs.logger("proxy")


@dataclass(frozen=True, kw_only=True)
class ProxySettings:
    """What a proxy is started with."""

    endpoints: str | Sequence[str]
    """etcd's addresses."""
    watch_endpoints: str | Sequence[str] = ()
    """The addresses of proxies that watches are taken from, instead of from `endpoints`."""
    host: str = "127.0.0.1"
    port: int = 0
    """Where to listen; 0: any free port."""
    path: str = ""
    """A unix socket to listen on, instead of host and port."""
    listening: Listening | None = None
    """Sockets that listen already, instead of an address."""
    tls: FileContext | None = None
    """For the listener."""
    upstream_tls: FileContext | None = None
    """Towards etcd."""
    upstream: UpstreamSettings = field(default_factory=UpstreamSettings)
    listener: ListenerSettings = field(default_factory=ListenerSettings)
    watch: WatchSettings = field(default_factory=WatchSettings)
    passthrough: PassthroughSettings = field(default_factory=PassthroughSettings)
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    limits: CoreLimits = field(default_factory=CoreLimits)
    """The core's."""
    credentials: Credentials | None = None
    """The user for watches at etcd."""
    upstream_cert: str = ""
    """The file of the client certificate for etcd, to be checked for a CN."""
    http1: str = ""
    """The endpoint for HTTP/1 connections, if not one of `endpoints`."""
    namespace: bytes = b""
    """The prefix that clients' keys have at etcd."""
    advertised: str = ""
    """The URL that MemberList shows for every member; "": etcd's own."""
    whole_id: str = ""
    """The id that all processes of --workers share; "": there is one process."""
    own_id: str = ""
    """That of its watches, of a worker; "": that of the whole."""
    cluster_id: int = 0
    """The etcd cluster that its clients know; 0: any."""
    probe_interval_s: float = 0.0
    """The interval of the self-probe, 0 for never."""
    tune_gc: bool = True
    """Tune the process's garbage collector for this work."""


class Proxy:
    """One proxy in front of one etcd cluster. Call `start` once, then `drain` or `stop`.

    After `start` its parts are public, to be shown or extended: `listener`, `watches`, `engine`, `reader`,
    `pool`, `upstream`, `health`.
    """

    listener: Listener
    watches: watch_service.WatchService
    engine: Engine
    reader: AuthReader
    pool: Pool
    upstream: WatchClient

    def __init__(self, settings: ProxySettings) -> None:
        """Nothing is started yet. Raises BadEndpoint."""
        self._settings = settings
        self.endpoints: list[Endpoint] = parse_endpoints(settings.endpoints)
        self.watch_endpoints = parse_endpoints(settings.watch_endpoints) if settings.watch_endpoints else []
        self.health = health.Health()
        self._http1_elsewhere = parse_endpoint(settings.http1) if settings.http1 else None
        self.bundled_store = bool(settings.http1)
        """It serves the bundled store, which loses its data, and not an etcd."""
        self.guard: CommonNameGuard | None = None
        self._namespace = Namespace(settings.namespace) if settings.namespace else None
        # The check that watches and calls go to the same cluster.
        self._comparing: asyncio.Task[None] | None = None
        # There is a connection for calls.
        self._reaches_etcd = False
        # Why watches are not served: they would come from another cluster.
        self._foreign = ""
        # To find a loop of proxies.
        whole_id = settings.whole_id or new_id()
        self._ids = RouteIds(settings.own_id or whole_id, whole_id)

    async def start(self) -> None:
        """Start: connections to etcd in the background, then the listener. Raises OSError when it cannot listen."""
        settings, tls = self._settings, self._settings.upstream_tls
        problems = EndpointProblems(logs.logger("upstream"))
        self.pool = Pool(self.endpoints, tls, settings.upstream, logs.logger("pool"), self._ids, problems)
        self.pool.when_available(self._upstream_changed)
        namespace = self._namespace
        self.reader = AuthReader(self.pool, settings.reader, namespace)
        self.listener = Listener(settings.listener)
        self.engine = Engine(Coalescer(settings.limits), self.reader, self.listener.output)
        watch_log = logs.logger("upstream")
        self.upstream = WatchClient(
            self.watch_endpoints or self.endpoints,
            self.engine,
            settings.upstream,
            tls,
            watch_log,
            settings.credentials,
            namespace,
            self._ids,
            are_proxies=bool(self.watch_endpoints),
            problems=problems,
            cork=self.listener.output,
            on_problem=self._upstream_changed,
            cluster_id=settings.cluster_id,
        )
        self.pool.cork = self.listener.output
        self.engine.attach(self.upstream)
        self.engine.upstream_changed = self._watches_changed
        self.watches = watch_service.WatchService(self.engine, settings.watch)
        self.engine.failed = self.watches.end_all
        self.passthrough, refusal = self._make_passthrough()
        self.http1 = Http1(self._http1_endpoint, tls, refusal=refusal)
        self.probe = SelfProbe(self.listener, self.engine, self.health, settings.probe_interval_s)
        if settings.upstream_cert:
            from proxy.auth.cn_guard import CommonNameGuard

            self.guard = CommonNameGuard(self.reader, settings.upstream_cert, self._upstream_changed)
            self.guard.start()
        self._route()
        self.pool.start()
        self.upstream.start()
        try:
            await self.listener.start(settings.host, settings.port, settings.tls, settings.path, settings.listening)
        except OSError:
            await self.stop()
            raise
        if settings.probe_interval_s:
            self.probe.start()
        if settings.tune_gc:
            tune_gc()

    def _make_passthrough(self) -> tuple[Passthrough, str]:
        """Return the handler of all calls but Watch, and the reason why HTTP/1 is refused ("" if it is not)."""
        if self._namespace is None and not self._settings.advertised:
            return Passthrough(self.pool, self._settings.passthrough), ""
        # Imported only here: without a namespace or an advertised URL these modules are not needed.
        from proxy.passthrough import advertised, namespaced_calls
        from proxy.passthrough.translating import HTTP1_REFUSAL, TranslatingPassthrough

        rules = []
        if self._namespace is not None:
            rules.append(namespaced_calls.rules(self._namespace))
        if self._settings.advertised:
            rules.append(advertised.rules(self._settings.advertised))
        passthrough = TranslatingPassthrough(self.pool, rules, self._settings.passthrough)
        return passthrough, HTTP1_REFUSAL if self._namespace is not None else ""

    def _route(self) -> None:
        routes = self.listener.routes
        routes[watch_service.PATH] = self.watches.open
        for path in (health.CHECK, health.LIST, health.WATCH):
            routes[path] = self.health.open
        self.listener.passthrough = self.passthrough
        routes[STATUS_PATH.encode()] = status = RouteStatus(self.passthrough, self.upstream, self.pool, self._ids)
        routes[shared_reads.RANGE] = reads = shared_reads.SharedReads(self.passthrough, self.pool)
        if self.guard is not None:
            routes[watch_service.PATH] = self.guard.protect(self.watches.open, marks=False)
            self.listener.passthrough = self.guard.protect(self.passthrough)
            routes[shared_reads.RANGE] = self.guard.protect(reads)
            routes[STATUS_PATH.encode()] = self.guard.protect(status)
        self.listener.http1 = self.http1
        self.listener.handed_on = self.http1.descriptors

    async def examine_endpoints(self, endpoints: Sequence[str], watch_endpoints: Sequence[str] = ()) -> str:
        """Return why the proxy must not use these endpoints from now on; "" if it may. Raises BadEndpoint.

        It must not if one of them leads back to this proxy, or belongs to another cluster. Those in use are examined
        too: they may have changed. One that does not answer may be used: the old ones serve until a new one works.
        """
        calls, sources = parse_endpoints(endpoints), parse_endpoints(watch_endpoints) if watch_endpoints else []
        examine = self.upstream.examine
        found = await asyncio.gather(examine(calls), examine(sources, are_proxies=True))
        if loop := next((each.loop for each in found if each.loop), ""):
            return loop
        foreign = next((each.foreign for each in found if each.foreign), "")
        text = "belongs to another cluster, whose revisions do not match those that clients have"
        return foreign and f"{foreign} {text}"

    def set_endpoints(self, endpoints: Sequence[str], watch_endpoints: Sequence[str] = ()) -> None:
        """Switch to other endpoints, which have been examined; clients notice nothing. Raises BadEndpoint."""
        self.endpoints = parse_endpoints(endpoints)
        self.watch_endpoints = parse_endpoints(watch_endpoints) if watch_endpoints else []
        self.pool.set_endpoints(self.endpoints)
        sources = self.watch_endpoints or self.endpoints
        self.upstream.set_endpoints(sources, are_proxies=bool(self.watch_endpoints))

    def _http1_endpoint(self) -> Endpoint:
        """Choose the endpoint for the next HTTP/1 connection: one that is connected, if there is one."""
        if self._http1_elsewhere is not None:
            return self._http1_elsewhere
        connection = self.pool.pick()
        return self.endpoints[0] if connection is None else connection.endpoint

    def _watches_changed(self) -> None:
        self._upstream_changed()
        if self.watch_endpoints and self.upstream.connected and self._comparing is None:
            self._comparing = asyncio.get_running_loop().create_task(self._compare_clusters(), name="compare clusters")

    async def _compare_clusters(self) -> None:
        """Serve no watches while they would come from another cluster than the one that calls go to."""
        foreign = (await self.upstream.examine(self.endpoints)).foreign
        problem = ""
        if foreign:
            problem = f"watchmux: {foreign} belongs to another cluster than the watches of --watch-endpoints"
            log.error(
                "the watches come from another cluster than the calls go to; not serving watches", problem=problem
            )
        self._foreign, self._comparing = problem, None
        self._upstream_changed()

    def _upstream_changed(self) -> None:
        self.pool.look_at(self.upstream.looping)
        self.watches.problem = self.upstream.loop or self._foreign
        problem = self.guard.problem if self.guard is not None else ""
        loop = self.pool.loop
        problem = problem or self.watches.problem or (str(loop) if loop else self.pool.full or self.upstream.problem)
        reached, self._reaches_etcd = self._reaches_etcd, self.pool.connected
        if self._reaches_etcd and not reached and self.watch_endpoints:
            self.engine.calls_resumed()
        self.health.set_upstream(self.upstream.connected and self._reaches_etcd, problem)

    @property
    def port(self) -> int:
        """The port that it listens on. Only after `start`."""
        return self.listener.port

    def certificates(self) -> dict[str, float]:
        """Return when each certificate in use expires, in seconds since the epoch, by use: listener, upstream.

        Renewed files count, as they do for the next connection.
        """
        found = {}
        for use, context in (("listener", self._settings.tls), ("upstream", self._settings.upstream_tls)):
            if context is not None:
                from proxy.listening.handshake import not_renewed

                found[use] = context.newest(not_renewed).expires_at
        return {use: expires_at for use, expires_at in found.items() if expires_at is not None}

    async def drain(self, limit_s: float) -> bool:
        """Close all client connections gracefully, then stop; True if every call ended within `limit_s` seconds.

        New connections are refused, the others get GOAWAY, health reports NOT_SERVING, watches end UNAVAILABLE, spread
        over half of the limit, then keep-alive streams as well, and calls in progress may complete.
        """
        self.probe.stop()
        log.info("draining", connections=len(self.listener.connections), watches=len(self.watches.calls))
        self.health.set_draining()
        self.listener.go_away()
        loop = asyncio.get_running_loop()
        deadline = loop.time() + limit_s
        try:
            async with asyncio.timeout(limit_s):
                await self.watches.drain(limit_s * DRAIN_WATCHES_SHARE)
            self.health.leave_all()
            in_parts(self.listener.connections, partial(end_endless, text=watch_service.DRAIN_TEXT))
        except TimeoutError:
            pass
        gone = await self.listener.wait_gone(max(0.0, deadline - loop.time()))
        await self.stop()
        return gone

    async def stop(self) -> None:
        """Stop at once: close every connection, to clients and to etcd."""
        self.probe.stop()
        await self.listener.stop()
        self.http1.stop()
        if self.guard is not None:
            await self.guard.stop()
        self.engine.stop()
        if self._comparing is not None:
            self._comparing.cancel()
            await asyncio.gather(self._comparing, return_exceptions=True)
        await self.upstream.stop()
        await self.pool.stop()


def tune_gc() -> None:
    """Tune the garbage collector for a long-lived process that creates almost no cycles.

    All objects that exist now (modules, classes, the proxy itself) are frozen: no later collection traverses them.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
