"""The admin port: a status page, its JSON, Prometheus metrics and health checks over HTTP.

It runs on the same event loop as the watches, so a proxy that hangs does not answer its probes. It is read-only and
shows neither values nor credentials. It does show the watched ranges, without which a busy proxy cannot be understood:
restrict the port to operators.

`/proxy/metrics` and `/proxy/health` are the paths of etcd's grpc-proxy, so its scrapers need no change.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from proxy.admin.client_port import ClientPages
from proxy.admin.http import OK, UNAVAILABLE, AdminResponse, HttpServer, MakePage
from proxy.admin.monitor import Monitor, limits_by_default
from proxy.config.values import Address

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from proxy.admin.snapshot import Snapshot
    from proxy.admin.views import Clients, Overview
    from proxy.server import Proxy

PAGES = {
    "/": ("status.html", "text/html"),
    "/status.css": ("status.css", "text/css"),
    "/status.js": ("status.js", "text/javascript"),
}
"""Path: file in proxy/admin/pages and its content type."""

HEADERS = {
    # The page loads, runs and fetches only from this server, because it shows keys, which are untrusted text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Exposition:
    """The metrics and the health of one proxy as pages."""

    def __init__(
        self,
        proxy: Proxy,
        proxy_address: str,
        limits: Callable[[], Mapping[str, float]] = limits_by_default,
        monitor: Monitor | None = None,
    ) -> None:
        self.monitor = monitor or Monitor(proxy, proxy_address, limits)
        self._registry: CollectorRegistry | None = None
        self._loading = asyncio.Lock()

    async def metrics(self) -> AdminResponse:
        """Make the page for Prometheus."""
        async with self._loading:
            if self._registry is None:
                await asyncio.get_running_loop().run_in_executor(
                    None, _load_metrics, os.getpid() if self.monitor.whole is None else os.getppid()
                )
                from proxy.admin.metrics import registry_of

                self._registry = registry_of(self.monitor)
        from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

        return AdminResponse(generate_latest(self._registry), CONTENT_TYPE_PLAIN_0_0_4)

    def health(self) -> AdminResponse:
        """Answer in the format of etcd's /health, so that its probes work unchanged: whether it serves, or why not."""
        serving, reason = self.monitor.serving()
        body = {"health": str(serving).lower(), "reason": reason}
        status = OK if serving else UNAVAILABLE
        return AdminResponse(_encoded(body), "application/json", status)


def _load_metrics(pid: int) -> None:
    """Load what makes the page for Prometheus, in another thread: it takes the event loop's time of 30 to 50 ms.

    At the first scrape, since the client library takes 4.3 MiB, most of it for HTTP, mail and HTML. `pid`: of the
    process whose start the page shows.
    """
    from proxy.admin.metrics import start_time_s

    start_time_s(pid)


class Admin:
    """The admin HTTP server of one proxy."""

    def __init__(
        self,
        proxy: Proxy,
        listen: Address,
        proxy_address: str,
        limits: Callable[[], Mapping[str, float]] = limits_by_default,
        monitor: Monitor | None = None,
        sockets: Sequence[socket.socket] = (),
    ) -> None:
        """`monitor`: one that has started. `sockets`: sockets that listen already."""
        shown = Exposition(proxy, proxy_address, limits, monitor)
        # The same pages on the client port: only one monitor may measure the delays.
        proxy.http1.own = ClientPages(lambda: (shown.metrics, shown.health))
        self.monitor = shown.monitor
        self._starts_monitor = monitor is None
        self._sockets = sockets
        self._listen = listen
        pages: dict[str, MakePage] = {
            "/metrics": shown.metrics,
            "/proxy/metrics": shown.metrics,
            "/health": shown.health,
            "/proxy/health": shown.health,
            "/readyz": shown.health,
            "/livez": self._live,
            "/v1/status": lambda: _json(self.monitor.take()),
            "/v1/clients": self._clients,
            "/v1/overview": self._overview,
            **{path: partial(_file, *page) for path, page in PAGES.items()},
        }
        self._server = HttpServer(pages)
        self._port = 0

    @property
    def address(self) -> Address:
        """The listen address; valid only after `start`."""
        return Address(self._listen.host, self._port)

    async def start(self) -> None:
        """Start the server. Raises OSError if it cannot listen."""
        self._port = await self._server.start(self._listen.host, self._listen.port, self._sockets)
        if self._starts_monitor:
            self.monitor.start()

    async def stop(self) -> None:
        """Close the server and its connections."""
        self.monitor.stop()
        await self._server.stop()

    async def _clients(self) -> AdminResponse:
        return _json(await self.monitor.clients())

    async def _overview(self) -> AdminResponse:
        return _json(await self.monitor.overview())

    def _live(self) -> AdminResponse:
        """Report whether the proxy works, according to its self-probe; a blocked event loop does not answer at all.

        An unreachable etcd does not count, because restarting the proxy would not help.
        """
        hung = self.monitor.hung
        status = UNAVAILABLE if hung else OK
        return AdminResponse(f"{hung or 'ok'}\n".encode(), status=status)


def _json(value: Snapshot | Clients | Overview) -> AdminResponse:
    return AdminResponse(_encoded(value), "application/json", headers=HEADERS)


def _encoded(value: object) -> bytes:
    return json.dumps(value, default=vars, separators=(",", ":")).encode()


def _file(name: str, kind: str) -> AdminResponse:
    """Return a file of proxy/admin/pages."""
    with open(os.path.join(os.path.dirname(__file__), "pages", name), "rb") as file:
        return AdminResponse(file.read(), f"{kind}; charset=utf-8", headers=HEADERS)
