"""The pages that etcd's grpc-proxy has on its client port: /proxy/metrics and /proxy/health.

All other HTTP/1 requests are forwarded to etcd. What the pages need is made at the first request, so that a proxy that
is not scraped stays small. Any client may ask, so the metrics are made at most once a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from proxy.admin.http import AdminResponse, HttpConnection, HttpServer, MakePage

METRICS_AGE_S: Final = 1.0
"""For how long the same page of metrics is sent again."""

OwnPages = tuple[Callable[[], Awaitable["AdminResponse"]], "MakePage"]
"""They make the metrics and the health."""


class ClientPages:
    """The pages of one proxy."""

    def __init__(self, make: Callable[[], OwnPages]) -> None:
        """`make` is called at the first request."""
        self._make = make
        self._server: HttpServer | None = None
        self._last: tuple[float, AdminResponse] | None = None
        self._making = asyncio.Lock()

    def __call__(self) -> HttpConnection:
        """Return a protocol for a connection that asks for one of the pages."""
        from proxy.admin.http import HttpConnection, HttpServer  # loads h11

        if self._server is None:
            metrics, health = self._make()
            self._server = HttpServer({"/proxy/metrics": lambda: self._recent(metrics), "/proxy/health": health})
        return HttpConnection(self._server)

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._server.connections) if self._server is not None else 0

    def close(self) -> None:
        """Close all connections."""
        if self._server is not None:
            for connection in tuple(self._server.connections):
                connection.close()

    async def _recent(self, metrics: Callable[[], Awaitable[AdminResponse]]) -> AdminResponse:
        async with self._making:
            now = asyncio.get_running_loop().time()
            if self._last is None or now - self._last[0] > METRICS_AGE_S:
                self._last = now, await metrics()
            return self._last[1]
