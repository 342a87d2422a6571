"""The port for operators: a status page for people, its JSON for programs, metrics for Prometheus, health for probes.

It is served from the same event loop as the watches, so a proxy that hangs does not answer its probes. It is
read-only, and shows no value and no credential; the ranges that are watched are shown, because nothing about a busy
proxy can be understood without them: keep the port to those who operate it.

`/proxy/metrics` and `/proxy/health` are where etcd's grpc-proxy has its own; scrapers of it need no change.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

from proxy.admin.metrics import ProxyCollector
from proxy.admin.monitor import Monitor
from proxy.config.values import Address

if TYPE_CHECKING:
    from proxy.server import Proxy

PAGES = {
    "/": ("status.html", "text/html"),
    "/status.css": ("status.css", "text/css"),
    "/status.js": ("status.js", "text/javascript"),
}
"""Path: file in proxy/pages and its type."""

HEADERS = {
    # Nothing but what comes from here is loaded, run or asked; keys on the page are other people's text.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Admin:
    """The operators' HTTP server of one proxy."""

    def __init__(self, proxy: Proxy, listen: Address, proxy_address: str) -> None:
        self.monitor = Monitor(proxy, proxy_address)
        self._listen = listen
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(ProxyCollector(self.monitor))
        ProcessCollector(registry=self._registry)
        self._runner: web.AppRunner | None = None

    @property
    def address(self) -> Address:
        """Where it serves. Only after `start`."""
        assert self._runner is not None
        return Address(self._listen.host, self._runner.addresses[0][1])

    async def start(self) -> None:
        """Serve. Raises OSError when it cannot listen."""
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
        """Answer as etcd's /health does, so that its probes can be kept: fit to get clients, or why not."""
        snapshot = self.monitor.take()
        body = msgspec.json.encode({"health": str(snapshot.serving).lower(), "reason": snapshot.reason})
        return web.Response(body=body, status=200 if snapshot.serving else 503, content_type="application/json")

    async def _live(self, _request: web.Request) -> web.Response:
        """Answer whether the proxy works, as its watch through itself tells; a loop that does not turn answers nothing.

        An etcd that is away is no reason to restart the proxy in front of it.
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
    """Return what answers with a file of proxy/pages, read once."""
    body = resources.files("proxy.admin").joinpath("pages", name).read_bytes()

    async def answer(_request: web.Request) -> web.StreamResponse:
        return web.Response(body=body, content_type=kind, charset="utf-8", headers=HEADERS)

    return answer
