"""The bundled store as a server: gRPC on one address, HTTP on another.

The program and the tests start a `Store`; `serve` runs one until cancelled. The server is grpc.aio in one event loop,
so it needs no locks: every call runs from start to end without interleaving, except where it waits for a commit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import socket
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, time_ns
from typing import Any

import grpc
from aiohttp import web
from grpc_health.v1 import health, health_pb2, health_pb2_grpc  # type: ignore[import-untyped]  # its stubs are too old
from grpc_reflection.v1alpha import reflection

from proto.pb import rpc_pb2, v3election_pb2, v3lock_pb2
from upstream.store import loops
from upstream.store.auth_service import AuthService
from upstream.store.calls import Calls
from upstream.store.cluster_service import ClusterService
from upstream.store.election_service import ElectionService
from upstream.store.http import make_application
from upstream.store.journal import Journal
from upstream.store.kv_service import KVService
from upstream.store.lease_service import LeaseService
from upstream.store.lock_service import LockService
from upstream.store.maintenance_service import MaintenanceService
from upstream.store.recorder import StoreDataError
from upstream.store.state import StoreIdentity, StoreState
from upstream.store.watch_service import PROGRESS_NOTIFY_INTERVAL_S, StoreWatchService
from upstream.store.writer import StoreWriter

GRPC_RECEIVE_BYTES_MAX = 64 * 1024 * 1024
"""gRPC's own limit of a message. Above etcd's limit, so that too large messages are refused with etcd's text."""

STREAMS_PER_CONNECTION_MAX = 2**31 - 1
"""No limit, like etcd's default of --max-concurrent-streams."""

STOP_GRACE_S = 1.0
"""How long running calls may take to finish at a stop; watch streams never finish by themselves."""

_UINT63_MAX = 2**63 - 1


class StoreListenError(OSError):
    """The store cannot listen on an address; the text has the address, the problem and the remedy."""


@dataclass(slots=True, frozen=True)
class StoreSettings:
    """The settings of a store."""

    # HOST:PORT for clients; port 0 = any free one.
    listen_addr: str = "127.0.0.1:0"
    # HOST:PORT for /health, /version and /metrics; None = not served.
    metrics_addr: str | None = None
    # Seconds between progress notifications of a watch that asked for them.
    progress_notify_interval_s: float = PROGRESS_NOTIFY_INTERVAL_S
    name: str = "watchmux"
    # Directory of the data file; None = in memory only.
    data_dir: Path | None = None
    # Seconds that durable writes wait for others to share a commit with; 0 = only writes that arrive together share.
    commit_interval_s: float = 0.0


class Store:
    """A running store. `port` and `metrics_port` are set once `start` has returned."""

    def __init__(self, settings: StoreSettings | None = None) -> None:
        """Make a store, in memory or from its data directory, which this reads. Raises StoreDataError."""
        self.settings = settings or StoreSettings()
        self.port = 0
        self.metrics_port: int | None = None
        self._recorder, self.state = _open(self.settings)
        self._calls = Calls(self.state.auth)
        self._writer = StoreWriter(self.state, self._recorder, self.settings.commit_interval_s)
        self._compactor = loops.Compactor(self.state.mvcc, self._writer)
        self._health = health.aio.HealthServicer()
        self._server: grpc.aio.Server | None = None
        self._runner: web.AppRunner | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def endpoint(self) -> str:
        """The address for clients, as HOST:PORT."""
        return join_address(parse_address(self.settings.listen_addr, "--listen-addr")[0], self.port)

    async def start(self) -> None:
        """Listen and serve. Raises StoreListenError, after cleaning up."""
        try:
            await self._start_grpc()
            await self._start_http()
        except BaseException:
            await self.stop(grace_s=0)
            raise
        watchable = self.state.watchable
        self._compactor.start()
        self._spawn("sync watchers", loops.sync_watchers(watchable))
        self._spawn("retry victims", loops.retry_victims(watchable))
        self._spawn("expire leases", loops.expire_leases(self.state, self._writer))
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)

    async def stop(self, grace_s: float = STOP_GRACE_S) -> None:
        """Stop serving: refuse new calls, wait up to `grace_s` seconds for running ones, then close everything."""
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(grace_s)
            self._server = None
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        await self._compactor.stop()
        if self._recorder is not None:
            self._writer.flush()
            recorder, self._recorder = self._recorder, None
            recorder.close()

    async def failure(self) -> StoreDataError:
        """Wait for a fatal error of the store and return it."""
        await self._writer.failed.wait()
        assert self._writer.failure is not None
        return self._writer.failure

    def _spawn(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        self._tasks.append(asyncio.create_task(work, name=f"store: {name}"))

    async def _start_grpc(self) -> None:
        host, port = parse_address(self.settings.listen_addr, "--listen-addr")
        _check_free(host, port, "--listen-addr")
        server = grpc.aio.server(
            options=[
                # A port in use must be an error; with SO_REUSEPORT two servers would share the connections.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", GRPC_RECEIVE_BYTES_MAX),
                ("grpc.max_send_message_length", -1),
                ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION_MAX),
                # No limit on the client's pings, with or without calls (etcd allows one in 5 s).
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 1000),
                ("grpc.http2.max_ping_strikes", 0),
            ]
        )
        cluster = ClusterService(self.state, self._calls)
        server.add_generic_rpc_handlers(
            (
                KVService(self.state, self._writer, self._compactor, self._calls).handlers(),
                StoreWatchService(self.state, self._calls, self.settings.progress_notify_interval_s).handlers(),
                LeaseService(self.state, self._writer, self._calls).handlers(),
                cluster.handlers(),
                MaintenanceService(self.state, self._writer, self._calls).handlers(),
                AuthService(self.state, self._writer, self._calls).handlers(),
                LockService(self.state, self._writer, self._calls).handlers(),
                ElectionService(self.state, self._writer, self._calls).handlers(),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
        try:
            self.port = server.add_insecure_port(join_address(host, port))
        except RuntimeError:
            raise StoreListenError(_listen_text("--listen-addr", host, port, "it is in use")) from None
        self._server = server
        cluster.client_urls = (f"http://{join_address(host, self.port)}",)
        await server.start()

    async def _start_http(self) -> None:
        if self.settings.metrics_addr is None:
            return
        host, port = parse_address(self.settings.metrics_addr, "--listen-metrics-urls")
        self._runner = web.AppRunner(make_application(self.state, self._calls.traffic), access_log=None)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, reuse_port=False)
        try:
            await site.start()
        except OSError as error:
            text = _listen_text("--listen-metrics-urls", host, port, _reason(error))
            raise StoreListenError(text) from None
        self.metrics_port = self._runner.addresses[0][1]


_SERVICES = tuple(
    service.full_name
    for file in (rpc_pb2.DESCRIPTOR, v3lock_pb2.DESCRIPTOR, v3election_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
)


async def serve(settings: StoreSettings | None = None) -> None:
    """Run a store until cancelled. Raises StoreListenError, StoreDataError."""
    store = Store(settings)
    await store.start()
    try:
        raise await store.failure()
    finally:
        await store.stop()


def _open(settings: StoreSettings) -> tuple[Journal | None, StoreState]:
    """Make the state, with its journal where there is a data directory. Raises StoreDataError."""

    def random_id() -> int:
        return random.randint(1, _UINT63_MAX)

    if settings.data_dir is None:
        return None, StoreState(StoreIdentity(random_id(), random_id(), settings.name), random_id)
    journal = Journal(settings.data_dir, random_id(), random_id())
    stored = journal.take_stored()
    state = StoreState(StoreIdentity(stored.cluster_id, stored.member_id, settings.name), random_id, journal)
    state.load(stored, monotonic())
    # The raft index must exceed any that was reported before the restart, including for writes without a revision (see
    # lineage). The time in microseconds does.
    state.raft_index += time_ns() // 1000
    return journal, state


def parse_address(text: str, flag: str) -> tuple[str, int]:
    """Split HOST:PORT; an IPv6 host is in brackets. Raises StoreListenError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (colon and host and port.isdecimal() and int(port) < 2**16):
        raise StoreListenError(f"{flag}={text}: not an address; write HOST:PORT, such as 127.0.0.1:2379 (port 0: any)")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """Return HOST:PORT, with an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _check_free(host: str, port: int, flag: str) -> None:
    """Try to listen on a plain socket first: gRPC does not report why it cannot. Raises StoreListenError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise StoreListenError(_listen_text(flag, host, port, _reason(error))) from None


def _reason(error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return "it is in use"
    return os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)


def _listen_text(flag: str, host: str, port: int, reason: str) -> str:
    return (
        f"the store cannot listen on {join_address(host, port)}: {reason}; "
        f"stop the program that uses it or choose another {flag} (port 0: any free port)"
    )
