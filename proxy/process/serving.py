"""The life cycle of `watchmux serve`: build the proxy from the settings, start it, drain it on a signal.

Separate from the flags (proxy/cli/serve.py) and from the proxy itself (proxy/server.py), which handles neither files
nor signals. The proxy starts even if etcd is unreachable: after a power cut, clients may be up first.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from proxy import logs
from proxy.admin.client_port import ClientPages, OwnPages
from proxy.admin.health import BUNDLED_STORE
from proxy.config.applied import (
    core_limits,
    credentials,
    listener_settings,
    passthrough_settings,
    upstream_settings,
    watch_settings,
)
from proxy.config.knobs import Settings, limits
from proxy.config.values import Address, client_url, parse_listen_address, parse_metrics_address
from proxy.errors import FAILURE, WRONG_REQUEST, Failed
from proxy.process import descriptors
from proxy.process.addresses import cannot_listen
from proxy.process.child import Child, ChildFailed, ChildReady, Parent, on_signals, python_command
from proxy.process.endpoints import EndpointLists, EndpointsDecision, Examination, ExaminationResult
from proxy.process.reloading import Reloading, hangups_come
from proxy.process.service_manager import ServiceManager
from proxy.server import Proxy, ProxySettings
from proxy.version import process_identity
from upstream.endpoints import parse_endpoint
from upstream.errors import UpstreamError
from upstream.watch_route import new_id

if TYPE_CHECKING:
    from proxy.admin.monitor import Monitor
    from proxy.admin.port import Admin
    from proxy.process.member import ProcessPlace, ReportingProcess
    from upstream.tls import FileContext

log = logs.logger("serve")


def within_descriptors(settings: Settings, opened: int) -> Settings:
    """Return the settings with `connections_max` reduced to the file descriptors that the process has.

    `opened`: descriptors in use before any client connects. Raises the soft limit; logs a reduction.
    """
    wanted = settings.listener.connections_max
    endpoints = len(settings.upstream.endpoints) + len(settings.upstream.watch_endpoints)
    shared = descriptors.share(descriptors.raise_limit(), wanted, endpoints, opened)
    if shared.connections_max < wanted:
        log.warning(
            "connections_max is lowered to what the limit of open files (RLIMIT_NOFILE) allows; raise that limit",
            connections_max=shared.connections_max,
            wanted=wanted,
            descriptors=shared.limit,
            reserved=shared.reserved,
        )
    return replace(settings, listener=replace(settings.listener, connections_max=shared.connections_max))


def _tls(settings: Settings) -> tuple[FileContext | None, FileContext | None]:
    """Return the TLS contexts of the listener and of connections to etcd; None where TLS is not configured."""
    listener, upstream = settings.listener, settings.upstream
    servers = (*upstream.endpoints, *upstream.watch_endpoints)
    secured = any(endpoint.startswith(("https://", "unixs:")) for endpoint in servers)
    wanted = upstream.cert or upstream.cacert or upstream.insecure_skip_tls_verify or secured
    if not wanted and not listener.cert_file:
        return None, None
    from upstream.tls import client_context, server_context

    inward: FileContext | None = None
    outward: FileContext | None = None
    if listener.cert_file:
        inward = server_context(
            listener.cert_file,
            listener.key_file,
            listener.trusted_ca_file or None,
            min_version=listener.tls_min_version,
        )
    if wanted:
        outward = client_context(
            upstream.cert or None, upstream.key or None, upstream.cacert or None, upstream.insecure_skip_tls_verify
        )
    return inward, outward


def proxy_of(settings: Settings, endpoints: list[str], http1: str = "", place: ProcessPlace | None = None) -> Proxy:
    """Build the proxy from the settings, in front of `endpoints`. Raises UpstreamError.

    `place`: of a process of several, with sockets that listen already, instead of --listen-addr.
    `http1`: the target of HTTP/1 connections, if not `endpoints`: the bundled store has a separate port for them.
    """
    address = parse_listen_address(settings.listener.listen_addr)
    inward, outward = _tls(settings)
    is_worker = place is not None and bool(place.hub)
    return Proxy(
        ProxySettings(
            endpoints=endpoints,
            watch_endpoints=settings.upstream.watch_endpoints,
            host=address.host,
            port=address.port,
            path=address.path,
            listening=None if place is None else place.listening,
            tls=inward,
            upstream_tls=outward,
            upstream=upstream_settings(settings, is_hub=place is not None and not is_worker),
            listener=listener_settings(settings),
            watch=watch_settings(settings),
            passthrough=passthrough_settings(settings),
            limits=core_limits(settings),
            credentials=credentials(settings),
            upstream_cert=settings.upstream.cert,
            http1=http1,
            namespace=settings.upstream.namespace.encode(errors="surrogateescape"),
            advertised=client_url(settings.listener.advertise_client_url, secure=bool(settings.listener.cert_file)),
            whole_id="" if place is None else place.whole_id,
            own_id=new_id() if is_worker else "",
            cluster_id=0 if place is None else place.cluster_id,
            probe_interval_s=settings.admin.probe_interval_s,
        )
    )


ReadAgain = Callable[[], tuple[Settings, list[str]]]
"""Reads the settings again, for SIGHUP. Raises Failed."""


async def serve(
    settings: Settings,
    notes: list[str],
    parent_fd: int | None,
    read_again: ReadAgain | None = None,
    place: ProcessPlace | None = None,
) -> int:
    """Run the proxy until a signal or the exit of the parent process; return the exit code.

    `place`: of a process of several. Raises Failed.
    """
    logs.configure(settings.log.log_level, settings.log.log_format)
    for note in notes:
        log.warning(note)
    leaving = asyncio.Event()
    signals = _Signals(leaving)
    on_signals(signals.came)
    member: ReportingProcess | None = None
    if place is not None:
        from proxy.process.member import ReportingProcess

        member = ReportingProcess(place)
    parent = await Parent.join(parent_fd, member.came if member else lambda _line: None, leaving.set)
    opened = descriptors.in_use()
    found = within_descriptors(await discovered(settings), opened)
    store = await _start_store() if not found.upstream.endpoints else None
    proxy: Proxy | None = None
    admin: Admin | None = None
    manager: ServiceManager | None = None
    try:
        endpoints = [store.ready.address] if store else found.upstream.endpoints
        address, proxy = await _start(found, endpoints, store.ready.metrics if store else "", member)
        advertised = settings.listener.advertise_client_url or str(address)
        applying = _SettingsApplier(proxy, found, opened, decides=place is None)
        monitor = None if member is None else member.record(proxy, advertised, applying.limits)
        admin = await _start_admin(proxy, settings, advertised, applying.limits, monitor, place)
        reloading = Reloading(settings, applying.apply)
        if read_again is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reloading.reload_in_thread, read_again)
            hangups_come()
        parent.write_line(ChildReady(address=str(address), metrics=str(admin.address) if admin else ""))
        if store:
            log.warning(BUNDLED_STORE, data="in memory only, lost when this process stops", to_do="set --endpoints")
        if member is not None and monitor is not None:
            member.start(proxy, parent, reloading, monitor)
        metrics = {"metrics": f"http://{admin.address}/metrics"} if admin else {}
        log.info("serving", **process_identity(), address=advertised, endpoints=endpoints, **metrics)
        served = proxy
        manager = ServiceManager(lambda: served.health.hung, os.environ if place is None else {})
        manager.start()
        code = await _until_stopped(leaving, store)
        reloading.stop()
        applying.stop()
        manager.stopping()
        await signals.or_again(proxy.drain(reloading.settings.listener.drain_s if code == 0 else 0))
    finally:
        if admin is not None:
            await admin.stop()
        if proxy is not None:
            await proxy.stop()
        if store is not None:
            await store.stop()
        if manager is not None:
            manager.stop()
        if member is not None:
            member.stop()
        await parent.leave()
    log.info("stopped")
    return code


async def discovered(settings: Settings) -> Settings:
    """Return the settings with the endpoints from DNS, if --discovery-srv is set. Raises Failed."""
    upstream = settings.upstream
    if not upstream.discovery_srv:
        return settings
    from upstream.discovery import discover  # only if it is used

    try:
        endpoints = await discover(upstream.discovery_srv, upstream.discovery_srv_name, upstream.insecure_discovery)
    except UpstreamError as error:
        raise Failed(str(error)) from None
    if upstream.endpoints:
        log.warning("--endpoints ignored: --discovery-srv takes precedence", endpoints=upstream.endpoints)
    return replace(settings, upstream=replace(upstream, endpoints=endpoints))


class _SettingsApplier:
    """Applies changed settings to a running proxy, for those that are `reloaded`."""

    def __init__(self, proxy: Proxy, settings: Settings, opened: int, *, decides: bool) -> None:
        """`decides`: it examines new endpoints; otherwise its parent has had them examined."""
        self._proxy = proxy
        self._decides = decides
        # Descriptors in use before any client connected.
        self._opened = opened
        # In force; fewer connections than configured if there are too few descriptors.
        self.settings = settings
        self._configured = settings
        self._decision = EndpointsDecision(_endpoints(settings))
        self._examining: asyncio.Task[None] | None = None

    def limits(self) -> Mapping[str, float]:
        """Return the limits in force, by setting."""
        return limits(self.settings)

    def apply(self, settings: Settings) -> None:
        """Apply the settings; new endpoints are checked first, and applied asynchronously."""
        logs.configure(settings.log.log_level, settings.log.log_format)
        self._configured = settings
        self._use()
        self.stop()
        self._decision.want(wanted_endpoints(settings, self._decision.in_force))
        if (pending := self._decision.pending) is not None and self._decides:
            self._examining = asyncio.get_running_loop().create_task(self._examine(pending))
        elif pending is not None:
            self._decide(ExaminationResult(pending.number, ""))

    def stop(self) -> None:
        """Cancel a pending change of endpoints."""
        if self._examining is not None:
            self._examining.cancel()
            self._examining = None

    def _use(self) -> None:
        """Use the settings that are configured, with the endpoints in force: some limits depend on them."""
        calls, watches = self._decision.in_force
        upstream = replace(self._configured.upstream, endpoints=calls, watch_endpoints=watches)
        self.settings = settings = within_descriptors(replace(self._configured, upstream=upstream), self._opened)
        proxy = self._proxy
        proxy.engine.set_limits(core_limits(settings))
        proxy.listener.settings = listener_settings(settings)
        proxy.watches.settings = watch_settings(settings)
        proxy.passthrough.configure(passthrough_settings(settings))

    async def _examine(self, pending: Examination) -> None:
        problem = await self._proxy.examine_endpoints(*pending.endpoints)
        self._decide(ExaminationResult(pending.number, problem))

    def _decide(self, result: ExaminationResult) -> None:
        endpoints = self._decision.examined(result)
        if endpoints is not None:
            if not result.problem:
                self._proxy.set_endpoints(*endpoints)
                self._use()
            if self._decides:
                report_endpoints(endpoints, result.problem)


def report_endpoints(endpoints: EndpointLists, problem: str) -> None:
    """Log what became of new endpoints."""
    fields = {"endpoints": endpoints.calls, "watch_endpoints": endpoints.watches}
    if problem:
        log.error("new endpoints rejected; keeping the old ones", **fields, problem=problem)
    else:
        log.info("endpoints updated", **fields)


def wanted_endpoints(settings: Settings, in_force: EndpointLists) -> EndpointLists:
    """Return the endpoints that are configured; those from DNS do not change."""
    wanted = _endpoints(settings)
    return wanted._replace(calls=in_force.calls) if settings.upstream.discovery_srv else wanted


def _endpoints(settings: Settings) -> EndpointLists:
    return EndpointLists(settings.upstream.endpoints, settings.upstream.watch_endpoints)


class _Signals:
    """The first signal starts a drain, the second one stops the process at once."""

    def __init__(self, leaving: asyncio.Event) -> None:
        self._leaving = leaving
        self._again = asyncio.Event()

    def came(self) -> None:
        (self._again if self._leaving.is_set() else self._leaving).set()

    async def or_again(self, work: Coroutine[Any, Any, object]) -> None:
        """Run `work`, but cancel it at the second signal."""
        task = asyncio.ensure_future(work)
        again = asyncio.ensure_future(self._again.wait())
        await asyncio.wait([task, again], return_when=asyncio.FIRST_COMPLETED)
        again.cancel()
        if task.done():
            task.result()
        else:
            log.warning("second signal: stopping at once")
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _start(
    settings: Settings, endpoints: list[str], http1: str, member: ReportingProcess | None
) -> tuple[Address, Proxy]:
    """Start the proxy; return its listen address and the proxy. Raises Failed."""
    address = parse_listen_address(settings.listener.listen_addr)
    try:
        proxy = proxy_of(settings, endpoints, http1, None if member is None else member.place)
        await proxy.start()
    except UpstreamError as error:
        raise Failed(str(error), WRONG_REQUEST) from None
    except OSError as error:
        raise cannot_listen(address, "--listen-addr", error) from None
    return address._replace(port=proxy.port), proxy


async def _start_admin(
    proxy: Proxy,
    settings: Settings,
    advertised: str,
    limits_in_force: Callable[[], Mapping[str, float]],
    monitor: Monitor | None,
    place: ProcessPlace | None,
) -> Admin | None:
    if place is not None and place.hub:
        proxy.http1.hub = parse_endpoint(place.hub)
        return None
    if not settings.admin.metrics_addr:
        proxy.http1.own = ClientPages(lambda: _client_pages(proxy, advertised, limits_in_force, monitor))
        return None
    from proxy.admin.port import Admin  # loads the web server, so only if it is used

    address = parse_metrics_address(settings.admin.metrics_addr)
    inherited = None if place is None else place.metrics
    admin = Admin(proxy, address, advertised, limits_in_force, monitor, inherited.sockets if inherited else ())
    try:
        await admin.start()
    except OSError as error:
        raise cannot_listen(address, "--metrics-addr", error) from None
    return admin


def _client_pages(
    proxy: Proxy, advertised: str, limits_in_force: Callable[[], Mapping[str, float]], monitor: Monitor | None
) -> OwnPages:
    from proxy.admin.port import Exposition

    exposition = Exposition(proxy, advertised, limits_in_force, monitor=monitor)
    return exposition.metrics, exposition.health


async def _start_store() -> Child:
    anywhere = ("--listen-addr=127.0.0.1:0", "--listen-metrics-urls=http://127.0.0.1:0")
    try:
        return await Child.start("the bundled store", python_command("proxy.cli", "store", *anywhere))
    except ChildFailed as error:
        raise Failed(str(error)) from None


async def _until_stopped(leaving: asyncio.Event, store: Child | None) -> int:
    """Wait for a signal, the exit of the parent or of the bundled store; return the exit code."""
    stopping = asyncio.ensure_future(leaving.wait())
    waits: list[asyncio.Future[Any]] = [stopping]
    if store is not None:
        waits.append(asyncio.ensure_future(store.process.wait()))
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    if stopping.done() and not stopping.cancelled():
        return 0
    log.error("the bundled store ended", reason=store.last_words() if store else "")
    return FAILURE
