"""The processes of a demo or measurement: a store, a proxy in front of it, and their addresses.

They are real processes, started as a user would start them, so that users get the same results. Processes that the
caller gave are used and left running; those started here are stopped here, by process id.
"""

from __future__ import annotations

from typing import Self

import msgspec

from proxy.measuring.load.prometheus import MetricsPage
from proxy.measuring.load.target import ConnectionFiles, LoadTarget
from proxy.process.child import Child, python_command


class LoadStage:
    """An upstream and a proxy. Use as an async context manager; raises ChildFailed when something does not start."""

    def __init__(
        self,
        upstream: LoadTarget | None = None,
        upstream_metrics: str | None = None,
        proxy: LoadTarget | None = None,
        proxy_metrics: str | None = None,
        cover: bytes | None = None,
    ) -> None:
        """`cover`: of the proxy, if it is started here; None = none."""
        self.upstream = upstream or LoadTarget(address="")
        """The upstream; the bundled store once started."""
        self.proxy = proxy or LoadTarget(address="")
        """The proxy; if none was given, known after `start_proxy`."""
        self.bundled = upstream is None
        self._cover = [] if cover is None else [f"--cover={cover.decode()}"]
        self.children: list[Child] = []
        # An etcd user is not for HTTP.
        access = msgspec.structs.replace(self.upstream.access, user="", password="")
        self.page = MetricsPage(upstream_metrics or self.upstream.url, access)
        self.proxy_page = MetricsPage(proxy_metrics, access) if proxy_metrics else None
        """The proxy's metrics; None if the proxy was not started here and its metrics were not given."""

    async def __aenter__(self) -> Self:
        if self.bundled:
            await self._start_store()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.page.close()
        if self.proxy_page is not None:
            await self.proxy_page.close()
        for child in reversed(self.children):
            await child.stop()
        self.children = []

    async def _start_store(self) -> None:
        child = await Child.start(
            "the bundled store",
            python_command(
                "proxy.cli", "store", "--listen-addr=127.0.0.1:0", "--listen-metrics-urls=http://127.0.0.1:0"
            ),
        )
        self.children.append(child)
        self.upstream = LoadTarget(address=child.ready.address)
        self.page = MetricsPage(f"http://{child.ready.metrics}")

    async def start_proxy(self, endpoints: str | None = None) -> None:
        """Start a proxy in front of the upstream (or of all of `endpoints`) unless one was given."""
        if self.proxy.address:
            return
        child = await Child.start(
            "the proxy",
            python_command(
                "proxy.cli",
                "serve",
                f"--endpoints={endpoints or self.upstream.url}",
                *self.upstream.access.options(),
                *self._cover,
                "--listen-addr=127.0.0.1:0",
                "--metrics-addr=127.0.0.1:0",
                "--drain=1s",
                "--log-level=warn",
            ),
        )
        self.children.append(child)
        # The clients of this proxy need no certificate, but still their user.
        user = ConnectionFiles(user=self.upstream.access.user, password=self.upstream.access.password)
        self.proxy = LoadTarget(address=child.ready.address, access=user)
        self.proxy_page = MetricsPage(f"http://{child.ready.metrics}")

    @property
    def upstream_name(self) -> str:
        """The upstream's name for people."""
        return "the bundled store" if self.bundled else f"etcd at {self.upstream.address}"
