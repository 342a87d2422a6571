"""The admin port: a status page, its JSON, Prometheus metrics and health checks over HTTP.

It runs on the same event loop as the watches, so a proxy that hangs does not answer its probes. It is read-only and
shows neither values nor credentials. It does show the watched ranges, without which a busy proxy cannot be understood:
restrict the port to operators.

`/proxy/metrics` and `/proxy/health` are the paths of etcd's grpc-proxy, so its scrapers need no change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from proxy.admin.metrics import ProxyCollector
from proxy.admin.monitor import Monitor, limits_by_default
from proxy.config.values import Address

if TYPE_CHECKING:
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

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """The admin HTTP server of one proxy."""

    def __init__(
        self,
        proxy: Proxy,
        listen: Address,
        proxy_address: str,
        limits: Callable[[], Mapping[str, float]] = limits_by_default,
    ) -> None:
        self.monitor = Monitor(proxy, proxy_address, limits)
        self._listen = listen
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(ProxyCollector(self.monitor))
        ProcessCollector(registry=self._registry)
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> Address:
        """The listen address; valid only after `start`."""
        assert self._runner is not None
        return Address(self._listen.host, self._runner.addresses[0][1])

    async def start(self) -> None:
        """Start the server. Raises OSError if it cannot listen."""
        application = web.Application()
        answers: dict[str, Answer] = {
            "/metrics": self._metrics,
            "/proxy/metrics": self._metrics,
            "/health": self._health,
            "/proxy/health": self._health,
            "/readyz": self._health,
            "/livez": self._live,
            "/v1/status": self._status,
            "/v1/overview": self._overview,
            **{path: _page(*page) for path, page in PAGES.items()},
        }
        application.add_routes([web.get(path, answer) for path, answer in answers.items()])
        self._runner = web.AppRunner(application, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._listen.host, self._listen.port).start()
        except OSError:
            await self.stop()
            raise
        self.monitor.start()

    async def stop(self) -> None:
        """Close the server and its connections."""
        self.monitor.stop()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def _health(self, _request: web.Request) -> web.Response:
        """Answer in the format of etcd's /health, so that its probes work unchanged: whether it serves, or why not."""
        snapshot = self.monitor.take()
        body = msgspec.json.encode({"health": str(snapshot.serving).lower(), "reason": snapshot.reason})
        return web.Response(body=body, status=200 if snapshot.serving else 503, content_type="application/json")

    async def _live(self, _request: web.Request) -> web.Response:
        """Report whether the proxy works, according to its self-probe; a blocked event loop does not answer at all.

        An unreachable etcd does not count, because restarting the proxy would not help.
        """
        hung = self.monitor.hung
        return web.Response(text=f"{hung or 'ok'}\n", status=503 if hung else 200)

    async def _status(self, _request: web.Request) -> web.Response:
        return _json(self.monitor.take())

    async def _overview(self, _request: web.Request) -> web.Response:
        return _json(self.monitor.overview())


def _json(value: msgspec.Struct) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type="application/json", headers=HEADERS)


def _page(name: str, kind: str) -> Answer:
    """Return a handler for a file of proxy/admin/pages, which is read once."""
    body = resources.files("proxy.admin").joinpath("pages", name).read_bytes()

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    return answer
