"""The server of a scenario's clients: etcd itself, or a proxy in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.targets import Target
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

Figures = dict[str, float | str]


@dataclass
class Front:
    """One route to etcd. `root`: the checkout whose proxy is started; None: clients connect to etcd itself."""

    name: str
    root: Path | None = None
    proxy: ProxyProcess | None = None
    """The running proxy; None for direct connections."""

    @contextmanager
    def before(self, endpoints: str, *flags: str, prefix: Sequence[str] = ()) -> Iterator[str]:
        """Yield the address (HOST:PORT[,...]) for clients of an etcd at `endpoints`.

        `flags` are for the proxy; `prefix` is the program that starts it, if it is not started by itself.
        """
        if self.root is None:
            yield endpoints
            return
        proxy = ProxyProcess(endpoints, flags, directory=self.root)
        proxy.prefix = list(prefix)
        with proxy as self.proxy:
            yield proxy.endpoint
        self.proxy = None

    def server(self, etcd: EtcdServer) -> Target:
        """Return the running server of the clients."""
        process = etcd.process if self.proxy is None else self.proxy.process
        assert process is not None, "it runs"
        return Target(self.name, etcd.client_port if self.proxy is None else self.proxy.port, process.pid)


Scenario = Callable[[Front], Figures]
"""Runs a load once and returns its figures by name; names carry their unit."""
