"""The processes of a demo or measurement: a store, a proxy in front of it, and their addresses.

They are real processes, started as a user would start them, so that users get the same results. Processes that the
caller gave are used and left running; those started here are stopped here, by process id.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from proxy.measuring.load.prometheus import MetricsPage
from proxy.process.child import Child, python_command


class Stage:
    """An upstream and a proxy. Use as an async context manager; raises ChildFailed when something does not start."""

    def __init__(
        self, upstream: str | None = None, upstream_metrics: str | None = None, proxy: str | None = None
    ) -> None:
        self.upstream = upstream or ""
        """HOST:PORT of the upstream; that of the bundled store once started."""
        self.proxy = proxy or ""
        """HOST:PORT of the proxy; if none was given, known after `start_proxy`."""
        self.proxy_admin = ""
        """HOST:PORT of the proxy's metrics and status; empty when the proxy was not started here."""
        self.bundled = not upstream
        self.children: list[Child] = []
        self.page = MetricsPage(upstream_metrics or f"http://{self.upstream}")

    async def __aenter__(self) -> Self:
        if self.bundled:
            await self._start_store()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.page.close()
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
        self.upstream = child.ready.address
        self.page = MetricsPage(f"http://{child.ready.metrics}")

    async def start_proxy(self, endpoints: str | None = None) -> None:
        """Start a proxy in front of the upstream (or of all of `endpoints`) unless one was given."""
        if self.proxy:
            return
        child = await Child.start(
            "the proxy",
            python_command(
                "proxy.cli",
                "serve",
                f"--endpoints={endpoints or self.upstream}",
                "--listen-addr=127.0.0.1:0",
                "--metrics-addr=127.0.0.1:0",
                "--drain=1s",
                "--log-level=warn",
            ),
        )
        self.children.append(child)
        self.proxy = child.ready.address
        self.proxy_admin = child.ready.metrics

    @property
    def upstream_name(self) -> str:
        """The upstream's name for people."""
        return "the bundled store" if self.bundled else f"etcd at {self.upstream}"
