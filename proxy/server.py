"""The proxy, put together: listener, Watch service, engine, core, and the connections to etcd.

It starts from the far end, so that whoever can connect is served, and stops from the near one. Signals, configuration
and output belong to the command line; this is what it starts, drains and stops.
"""

from __future__ import annotations

import asyncio
import gc
import ssl
from collections.abc import Sequence

from coalesce.core import Coalescer
from coalesce.limits import CoreLimits as CoreLimits
from proxy import logs
from proxy.admin import health
from proxy.admin.self_probe import SelfProbe
from proxy.auth.cn_guard import CommonNameGuard
from proxy.auth.reads import Reader, ReaderSettings
from proxy.listening.http1 import Http1
from proxy.listening.listener import Listener
from proxy.listening.settings import ListenerSettings
from proxy.passthrough.relay import Passthrough
from proxy.passthrough.settings import PassthroughSettings
from proxy.watch import service as watch_service
from proxy.watch.engine import Engine
from upstream.credentials import Credentials
from upstream.endpoints import Endpoint, parse_endpoint, parse_endpoints
from upstream.namespace import Namespace
from upstream.pool import Pool
from upstream.settings import UpstreamSettings as UpstreamSettings
from upstream.tls import FileContext
from upstream.watching.client import WatchClient

GC_THRESHOLDS = (50_000, 20, 50)
"""Allocations before a young collection, and how many of those before an older one. The fan-out makes no cycles, so the
interpreter's own 700 would look for garbage hundreds of times a second in a process that has none to speak of."""

DRAIN_WATCHES_SHARE = 0.5
"""The part of the drain limit over which watches are sent away; the rest is for calls that have an end of their own."""

log = logs.logger("proxy")


class Proxy:
    """One proxy in front of one etcd cluster. `start`, then `drain` or `stop`; not to be started twice.

    After `start` its parts are there for whoever shows or extends them: `listener`, `watches`, `engine`, `reader`,
    `pool`, `upstream`, `health`.
    """

    listener: Listener
    watches: watch_service.WatchService
    engine: Engine
    reader: Reader
    pool: Pool
    upstream: WatchClient

    def __init__(
        self,
        *,
        endpoints: str | Sequence[str],
        host: str = "127.0.0.1",
        port: int = 0,
        path: str = "",
        tls: ssl.SSLContext | None = None,
        upstream_tls: FileContext | None = None,
        upstream: UpstreamSettings | None = None,
        listener: ListenerSettings | None = None,
        watch: watch_service.WatchSettings | None = None,
        passthrough: PassthroughSettings | None = None,
        reader: ReaderSettings | None = None,
        limits: CoreLimits | None = None,
        credentials: Credentials | None = None,
        upstream_cert: str = "",
        http1: str = "",
        namespace: bytes = b"",
        advertised: str = "",
        probe_interval_s: float = 0.0,
        tune_gc: bool = True,
    ) -> None:
        """Take the settings; nothing happens yet.

        `endpoints`: etcd's addresses. `host`, `port`: where to listen, port 0 for any free one; or `path`, a unix
        socket. `tls`: for the listener; `upstream_tls`: towards etcd. `limits`: the core's. `credentials`: the user in
        whose name trunks are watched. `upstream_cert`: the file of the certificate that etcd is shown, to be watched
        for a CN. `http1`: where HTTP/1 connections go, if not to `endpoints`. `namespace`: what clients' keys are
        prefixed with at etcd. `advertised`: the URL under which MemberList shows every member; "": etcd's own.
        `probe_interval_s`: how often it watches through itself, 0 for never. `tune_gc`: set the process's garbage
        collector up for this work.
        Raises BadEndpoint.
        """
        self.endpoints: list[Endpoint] = parse_endpoints(endpoints)
        self.health = health.Health()
        self._address = (host, port)
        self._path = path
        self._tls = tls
        self._upstream_tls = upstream_tls
        self._upstream_settings = upstream or UpstreamSettings()
        self._listener_settings = listener or ListenerSettings()
        self._watch_settings = watch or watch_service.WatchSettings()
        self._passthrough_settings = passthrough or PassthroughSettings()
        self._reader_settings = reader or ReaderSettings()
        self._limits = limits or CoreLimits()
        self._credentials = credentials
        self._upstream_cert = upstream_cert
        self._http1_elsewhere = parse_endpoint(http1) if http1 else None
        self.guard: CommonNameGuard | None = None
        self._namespace = Namespace(namespace) if namespace else None
        self._advertised = advertised
        self._probe_interval_s = probe_interval_s
        self._tune_gc = tune_gc

    async def start(self) -> None:
        """Start: connections to etcd in the background, then the listener. Raises OSError when it cannot listen."""
        settings, tls = self._upstream_settings, self._upstream_tls
        self.pool = Pool(self.endpoints, tls, settings, logs.logger("pool"))
        self.pool.when_available(self._upstream_changed)
        namespace = self._namespace
        self.reader = Reader(self.pool, self._reader_settings, namespace)
        self.engine = Engine(Coalescer(self._limits), self.reader)
        watch_log = logs.logger("upstream")
        self.upstream = WatchClient(self.endpoints, self.engine, settings, tls, watch_log, self._credentials, namespace)
        self.engine.attach(self.upstream)
        self.engine.upstream_changed = self._upstream_changed
        self.watches = watch_service.WatchService(self.engine, self._watch_settings)
        self.engine.failed = self.watches.end_all
        self.passthrough, refusal = self._make_passthrough()
        self.http1 = Http1(self._http1_endpoint, self._upstream_tls, refusal=refusal)
        self.listener = Listener(self._listener_settings)
        self.engine.relieve = self.listener.relieve
        self.engine.gather = self.listener.gather
        self.upstream.around_read = self.engine.reading
        self.upstream.on_problem = self._upstream_changed
        self.probe = SelfProbe(self.listener, self.engine, self.health, self._probe_interval_s)
        if self._upstream_cert:
            self.guard = CommonNameGuard(self.reader, self._upstream_cert, self._upstream_changed)
            self.guard.start()
        self._route()
        self.pool.start()
        self.upstream.start()
        try:
            await self.listener.start(*self._address, self._tls, self._path)
        except OSError:
            await self.stop()
            raise
        if self._probe_interval_s:
            self.probe.start()
        if self._tune_gc:
            tune_gc()

    def _make_passthrough(self) -> tuple[Passthrough, str]:
        """Return who takes the calls that are not watches, and why HTTP/1 is refused, if it is."""
        if self._namespace is None and not self._advertised:
            return Passthrough(self.pool, self._passthrough_settings), ""
        # Messages that nobody else needs here.
        from proxy.passthrough import advertised, namespaced_calls
        from proxy.passthrough.translating import HTTP1_REFUSAL, TranslatingPassthrough

        rules = []
        if self._namespace is not None:
            rules.append(namespaced_calls.rules(self._namespace))
        if self._advertised:
            rules.append(advertised.rules(self._advertised))
        passthrough = TranslatingPassthrough(self.pool, rules, self._passthrough_settings)
        return passthrough, HTTP1_REFUSAL if self._namespace is not None else ""

    def _route(self) -> None:
        routes = self.listener.routes
        routes[watch_service.PATH] = self.watches.open
        for path in (health.CHECK, health.LIST, health.WATCH):
            routes[path] = self.health.open
        self.listener.passthrough = self.passthrough
        if self.guard is not None:
            routes[watch_service.PATH] = self.guard.refuse(self.watches.open)
            self.listener.passthrough = self.guard.protect(self.passthrough)
        self.listener.http1 = self.http1
        self.listener.handed_on = self.http1.descriptors

    async def set_endpoints(self, endpoints: Sequence[str]) -> str:
        """Stand in front of other endpoints of the same cluster from now on; clients notice nothing.

        Returns why not, with nothing changed; "" when it is done. Raises BadEndpoint.
        """
        wanted = parse_endpoints(endpoints)
        foreign = await self.upstream.find_foreign_cluster(
            [endpoint for endpoint in wanted if endpoint not in self.endpoints]
        )
        if foreign is not None:
            return f"{foreign} belongs to another cluster, whose revisions are not those that clients know"
        self.endpoints = wanted
        self.pool.set_endpoints(wanted)
        self.upstream.set_endpoints(wanted)
        return ""

    def _http1_endpoint(self) -> Endpoint:
        """Where the next HTTP/1 connection goes: an endpoint that works, if there is one."""
        if self._http1_elsewhere is not None:
            return self._http1_elsewhere
        connection = self.pool.pick()
        return self.endpoints[0] if connection is None else connection.endpoint

    def _upstream_changed(self) -> None:
        problem = self.guard.problem if self.guard is not None else ""
        problem = problem or self.pool.full or self.upstream.problem
        self.health.set_upstream(self.upstream.connected and self.pool.connected, problem)

    @property
    def port(self) -> int:
        """The port it listens on. Only after `start`."""
        return self.listener.port

    async def drain(self, limit_s: float) -> bool:
        """Send all clients elsewhere, then stop; tell whether every call ended by itself within `limit_s` seconds.

        New connections are refused, GOAWAY goes out on the others, health says NOT_SERVING, watches end UNAVAILABLE
        spread over half of the limit, and calls that were under way may end.
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
        except TimeoutError:
            pass
        gone = await self.listener.wait_gone(max(0.0, deadline - loop.time()))
        await self.stop()
        return gone

    async def stop(self) -> None:
        """Stop now: every connection is closed, on both sides."""
        self.probe.stop()
        await self.listener.stop()
        self.http1.stop()
        if self.guard is not None:
            await self.guard.stop()
        self.engine.stop()
        await self.upstream.stop()
        await self.pool.stop()


def tune_gc() -> None:
    """Set the garbage collector up for a process that lives long and makes next to no cycles.

    What exists now (modules, classes, the proxy itself) is frozen: no collection walks over it again.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
