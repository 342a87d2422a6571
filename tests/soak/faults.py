"""The random faults of a soak: each is injected, held for a while, and ended."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.e2e.churn import History
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, Way
from tests.proxy_process import ProxyProcess
from tests.waiting import until

CALL_S = 20.0
COMPACTED, DEFRAGMENTED = "etcd compacted", "etcd defragmented"
COVERS_CHANGED = "covers changed (SIGHUP)"
COVERS: tuple[list[str], ...] = ([], ["/s/"], ["/s/a/", "/s/c/"], ["", "/s/b/"])
"""Covers of none, all and some of the clients' ranges, and one inside another."""


def write_covers(file: Path, covers: list[str]) -> None:
    """Write a configuration file of the proxy with these covers."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[watch]\ncover = {json.dumps(covers)}\n")


class Faults:
    """The faults, and how often each was injected."""

    def __init__(
        self,
        etcd: EtcdServer,
        proxy: ProxyProcess,
        upstream: Relay,
        clients: Relay,
        history: History,
        config: Path,
        seed: int,
        only: str = "",
        spared: str = "",
    ) -> None:
        """`config`: the proxy's configuration file. `only`: inject only the faults whose name contains this.

        `spared`: with --workers, "hub" or "worker", which is not killed after `restarts` is over; "": without.
        """
        self._etcd = etcd
        self._proxy = proxy
        self._history = history
        self._config = config
        self._covers = COVERS[0]
        self._chance = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.log: list[tuple[float, str]] = []
        """(time of the event loop, what)."""
        self.compactions: list[int] = []
        self.restarts = True
        """The proxy itself may be restarted."""
        away: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
            ("etcd stopped and started", 2, self._stop),
            ("etcd killed and started", 2, self._kill),
            ("etcd held by SIGSTOP", 1.5, self._hold),
            (COVERS_CHANGED, 2, self._change_covers),
        ]
        for name, relay in (("proxy to etcd", upstream), ("clients to proxy", clients)):
            away += [
                (f"{name}: cut", 2, self._relayed(relay, "cut")),
                (f"{name}: delayed", 1, self._relayed(relay, "delay")),
                (f"{name}: half-open", 1.5, self._relayed(relay, "half-open")),
                (f"{name}: broken in the middle", 1.5, self._relayed(relay, "break")),
            ]
        restarting: list[tuple[str, float, Callable[[], Awaitable[None]]]] = [
            ("proxy drained and restarted", 1.5, self._drain),
            ("proxy killed and restarted", 1.5, self._crash),
        ]
        self.killed: set[int] = set()
        """The ids of the processes of --workers that were killed."""
        for kind in ("hub", "worker", "parent") if spared else ():
            away.append((f"{kind} held by SIGSTOP", 1, partial(self._hold_one, kind)))
        for kind in ("hub", "worker") if spared else ():
            (restarting if kind == spared else away).append((f"{kind} killed", 4, partial(self._kill_one, kind)))
        self._only = only
        self._faults = [fault for fault in away if only in fault[0]]
        self._restarting = [fault for fault in restarting if only in fault[0]]

    async def run(self) -> None:
        """Inject one after the other until cancelled; a fault that has begun is ended. The covers change first."""
        if self._only in COVERS_CHANGED:
            self._note(COVERS_CHANGED)
            await self._change_covers()
        while True:
            await asyncio.sleep(self._chance.uniform(0.5, 3.0))
            faults = self._faults + (self._restarting if self.restarts else [])
            if not faults:
                continue
            name, _, fault = self._chance.choices(faults, [weight for _, weight, _ in faults])[0]
            self._note(name)
            mending = asyncio.ensure_future(fault())
            try:
                await asyncio.shield(mending)
            except asyncio.CancelledError:
                await mending
                raise

    async def tend(self) -> None:
        """Compact and defragment now and then, also during faults, until cancelled."""
        async with grpc.aio.insecure_channel(self._etcd.endpoint) as channel:
            kv, maintenance = rpc_pb2_grpc.KVStub(channel), rpc_pb2_grpc.MaintenanceStub(channel)
            while True:
                await asyncio.sleep(self._chance.uniform(1.0, 8.0))
                try:
                    if self._chance.random() < 0.3:
                        if self._only in DEFRAGMENTED:
                            await maintenance.Defragment(rpc_pb2.DefragmentRequest(), timeout=CALL_S)
                            self._note(DEFRAGMENTED)
                    elif self._only in COMPACTED:
                        await self._compact(kv)
                except grpc.aio.AioRpcError:
                    continue

    async def _compact(self, kv: rpc_pb2_grpc.KVAsyncStub) -> None:
        # Only revisions that the recorder has: it must not be compacted itself.
        revision = self._history.next_revision - 1 - self._chance.choice((0, 50, 500, 2000))
        if revision > max(self.compactions, default=1):
            # Recorded first: etcd may compact and be killed before it answers.
            self.compactions.append(revision)
            await kv.Compact(rpc_pb2.CompactionRequest(revision=revision), timeout=CALL_S)
            self._note(COMPACTED)

    def _note(self, name: str) -> None:
        self.done[name] += 1
        self.log.append((asyncio.get_running_loop().time(), name))

    async def _pause(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self._chance.uniform(least_s, most_s))

    async def _stop(self) -> None:
        await asyncio.to_thread(self._etcd.stop)
        await self._pause(0, 2)
        await asyncio.to_thread(self._etcd.start)

    async def _kill(self) -> None:
        await asyncio.to_thread(self._etcd.kill)
        await self._pause(0, 2)
        await asyncio.to_thread(self._etcd.start)

    async def _hold(self) -> None:
        assert self._etcd.process is not None
        self._etcd.process.send_signal(signal.SIGSTOP)
        await self._pause(0.5, 6)
        self._etcd.process.send_signal(signal.SIGCONT)

    async def _drain(self) -> None:
        await asyncio.to_thread(self._proxy.stop)
        await self._pause(0, 1)
        await asyncio.to_thread(self._proxy.start)

    async def _crash(self) -> None:
        await asyncio.to_thread(self._proxy.kill)
        # With --workers, its other processes end a little later: one that is still starting, once it has started.
        await asyncio.to_thread(until, self._proxy.is_gone, "the processes of a killed proxy to end")
        await self._pause(0, 1)
        await asyncio.to_thread(self._proxy.start)

    async def _one(self, kind: str) -> int:
        """Return the id of a process of --workers; 0 while the proxy does not say."""
        if kind == "parent":
            return self._proxy.process.pid if self._proxy.process is not None else 0
        processes = await asyncio.to_thread(self._proxy.processes)
        return self._chance.choice([pid for name, pid in sorted(processes.items()) if kind in name] or [0])

    async def _kill_one(self, kind: str) -> None:
        if pid := await self._one(kind):
            self.killed.add(pid)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def _hold_one(self, kind: str) -> None:
        """Hold a process for less than its parent endures."""
        if pid := await self._one(kind):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
                await self._pause(0.5, 6)
                os.kill(pid, signal.SIGCONT)

    async def _change_covers(self) -> None:
        self._covers = self._chance.choice([covers for covers in COVERS if covers != self._covers])
        write_covers(self._config, self._covers)
        assert self._proxy.process is not None
        self._proxy.process.send_signal(signal.SIGHUP)
        await self._pause(0, 2)

    def _relayed(self, relay: Relay, what: str) -> Callable[[], Awaitable[None]]:
        async def fault() -> None:
            way = self._chance.choice(list(Way))
            if what == "cut":
                relay.cut()
                await self._pause(0, 2)
            elif what == "delay":
                for each in Way:
                    relay.delay(each, self._chance.uniform(0.005, 0.15))
                await self._pause(1, 4)
            elif what == "half-open":
                if self._chance.random() < 0.5:
                    relay.half_open()
                else:
                    relay.pause(way)
                await self._pause(0.5, 9)
            else:
                relay.break_after(way, self._chance.choice((1, 5, 100, 20_000, 500_000)))
                await self._pause(0.5, 2)
            relay.mend()

        return fault
