"""The etcds of a run, and the three routes on which a program is run at the same time:

- `direct`: against etcd;
- `cold`: through a proxy without other clients, with unary calls through the proxy too;
- `crowded`: through a proxy on which other clients already watch every range of the program, with and without prev_kv,
  so that each of its watches joins a running trunk (except for `lonely` programs); unary calls go directly to etcd.

Each route has a separate etcd, used only by the program. Etcds are kept from program to program: revisions are
relative, keys are deleted, and each program gets new proxies.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Self

from coalesce.limits import CoreLimits
from proxy.config.applied import REQUEST_OVERHEAD_BYTES
from proxy.passthrough.settings import PassthroughSettings
from tests.differential.player import LIMIT_S, Player
from tests.differential.recording import Recording
from tests.differential.steps import Program
from tests.differential.target import Target
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for, two_tiers
from tests.etcd.binaries import EtcdBinary
from tests.etcd.cluster import ELECTION_MS
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess

DIRECT, COLD, CROWDED = "direct", "cold", "crowded"
WAYS = (DIRECT, COLD, CROWDED)

SETUP: tuple[tuple[str, ...], ...] = (
    ("user", "add", "root:root"),
    ("user", "grant-role", "root", "root"),
    ("role", "add", "reader"),
    ("role", "grant-permission", "reader", "read", "a/", "a0"),
    ("role", "grant-permission", "reader", "readwrite", "k"),
    ("role", "add", "fence"),
    ("role", "grant-permission", "fence", "read", "\x7ffence"),
    ("user", "add", "alice:alice"),
    ("user", "grant-role", "alice", "reader"),
    ("user", "grant-role", "alice", "fence"),
    ("user", "add", "bob:bob"),
    ("user", "grant-role", "bob", "fence"),
    ("auth", "enable"),
)
"""alice may read a/... and k; bob only what the player itself needs."""


class Stage:
    """The etcds of one kind, one set for each route. Use as a context manager."""

    def __init__(
        self,
        binary: EtcdBinary,
        flags: Sequence[str] = (),
        members: int = 1,
        auth: bool = False,
        namespace: bytes = b"",
        tiers: int = 1,
        workers: int = 0,
    ) -> None:
        """`namespace`: of the proxies; then all calls go through them, since the keys have other names at etcd.

        `tiers`: 2 = each proxy takes its watches from another one. `workers`: of --workers; 0 = the proxy runs in the
        process of the test.
        """
        self.auth = auth
        self.namespace = namespace
        self._proxy = proxy_for if tiers == 1 else two_tiers
        self._workers = workers
        self.sets = {way: _members(binary, flags, members) for way in WAYS}

    def __enter__(self) -> Self:
        servers = [server for servers in self.sets.values() for server in servers]
        with ThreadPoolExecutor(len(servers)) as pool:
            list(pool.map(EtcdServer.start, servers))
            if self.auth:
                list(pool.map(_add_users, (servers[0] for servers in self.sets.values())))
        return self

    def __exit__(self, *error: object) -> None:
        for servers in self.sets.values():
            for server in servers:
                server.__exit__(*error)

    async def run(
        self, program: Program, limit_s: float = LIMIT_S, covers: tuple[bytes, ...] = ()
    ) -> dict[str, Recording]:
        """Run a program on all routes at the same time; each wait takes up to `limit_s` seconds."""
        plays = {way: asyncio.create_task(self._play(program, way, limit_s, covers)) for way in WAYS}
        # Not cancelled when one fails: each closes its proxy and its connections gracefully.
        await asyncio.wait(plays.values())
        return {way: play.result() for way, play in plays.items()}

    async def _play(self, program: Program, way: str, limit_s: float, covers: tuple[bytes, ...]) -> Recording:
        etcds = self.sets[way]
        direct = etcds[0].client_port
        try:
            if way == DIRECT:
                return await Player(program, Target(direct, direct, False, etcds), limit_s).play()
            async with self._front(etcds[0], program, covers) as port, _crowd(program, port, way):
                calls = direct if way == CROWDED and not self.namespace else port
                return await Player(program, Target(port, calls, True, etcds), limit_s).play()
        finally:
            Target(0, 0, False, etcds).go_on()

    @asynccontextmanager
    async def _front(self, etcd: EtcdServer, program: Program, covers: tuple[bytes, ...]) -> AsyncIterator[int]:
        """Yield the port of a new proxy."""
        if self._workers:
            request = f"--max-request-bytes={program.request_bytes_max - REQUEST_OVERHEAD_BYTES}"
            processes = ProxyProcess(etcd.endpoint, [f"--workers={self._workers}", request])
            try:
                await asyncio.to_thread(processes.start)
                yield processes.port
            finally:
                processes.__exit__(None, None, None)
            return
        limits = CoreLimits(covers=covers, fragment_bytes=program.request_bytes_max)
        passthrough = PassthroughSettings(translated_request_bytes_max=program.request_bytes_max)
        async with self._proxy(etcd, limits=limits, passthrough=passthrough, namespace=self.namespace) as proxy:
            yield proxy.port


@asynccontextmanager
async def _crowd(program: Program, port: int, way: str) -> AsyncIterator[None]:
    """Have other clients watch the ranges of a program."""
    if way != CROWDED or program.auth or program.lonely:
        yield
        return
    async with await RawClient.connect(port) as client:
        for (key, end), prev_kv in program.ranges().items():
            for wants_prev_kv in {False, prev_kv}:
                stream = client.watch()
                stream.create(key, end, prev_kv=wants_prev_kv)
                await stream.next()
        yield


def _members(binary: EtcdBinary, flags: Sequence[str], count: int) -> list[EtcdServer]:
    servers = [EtcdServer(binary, flags) for _ in range(count)]
    if count > 1:
        cluster = ",".join(f"m{number}=http://{HOST}:{each.peer_port}" for number, each in enumerate(servers))
        for number, server in enumerate(servers):
            # Longer than a single etcd's: a leader that waits for a processor must not lose its leadership.
            election = f"--election-timeout={ELECTION_MS}"
            server.extra += [f"--name=m{number}", f"--initial-cluster={cluster}", election]
    return servers


def _add_users(server: EtcdServer) -> None:
    for arguments in SETUP:
        server.ctl(*arguments)
