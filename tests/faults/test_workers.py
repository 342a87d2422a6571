"""Faults around --workers: between its processes, and between it and etcd. Its clients lose no event.

The proxy is a separate program with two workers, etcd is real, and so are the sockets between them. Clients resume as
clientv3's do; the checkers judge the whole history of each watch.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coalesce.ending import OTHER_HISTORY
from coalesce.guarantees.checkers import Opened, check
from proto.pb import rpc_pb2
from proxy.measuring.load.judge import read_truth
from proxy.measuring.load.target import LoadTarget
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.etcd.cluster import cluster
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, Way, relay_to
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept, reached
from tests.faults.test_outages import put_large
from tests.faults.test_rolling import grpc_watches
from tests.proxy_process import ProxyProcess
from tests.soak import spool
from tests.soak.watcher import Stream
from tests.waiting import until, until_async

FLAGS = ("--workers=2", "--drain=1s", "--dial-keepalive-time=1s", "--dial-keepalive-timeout=1s", "--log-level=warn")
PUT = "/etcdserverpb.KV/Put"
HELD_S = 2.5
"""How long a process is held by SIGSTOP: longer than any of the proxy's own calls to the hub waits."""


@asynccontextmanager
async def started(
    endpoints: str, flags: Sequence[str] = FLAGS, prefix: Sequence[str] = ()
) -> AsyncIterator[ProxyProcess]:
    """Yield a proxy, started without holding up the event loop, in which the relay in front of etcd runs."""
    proxy = ProxyProcess(endpoints, flags)
    proxy.prefix = list(prefix)
    try:
        await asyncio.to_thread(proxy.start)
        await asyncio.to_thread(until, lambda: len(proxy.processes()) == 3, "all processes")
        yield proxy
    finally:
        await asyncio.to_thread(proxy.__exit__, sys.exc_info()[1])


async def killed_and_replaced(proxy: ProxyProcess, *names: str) -> None:
    """Kill processes and wait for their successors."""
    before = await asyncio.to_thread(proxy.processes)
    for name in names:
        os.kill(before[name], signal.SIGKILL)

    def replaced() -> bool:
        now = proxy.processes()
        return all(now.get(name) not in (None, before[name]) for name in names)

    await asyncio.to_thread(until, replaced, f"the successors of {names}")


@dataclass
class Scene:
    """A proxy with clients at both workers, under load."""

    etcd: EtcdServer
    way: Relay
    proxy: ProxyProcess
    writer: Writer
    streams: list[Stream] = field(default_factory=list)
    """Resume after a break."""
    clients: list[RawClient] = field(default_factory=list)
    """One at each worker."""

    def pid(self, name: str) -> int:
        """Return the id of a process."""
        return self.proxy.processes()[name]

    async def kill(self, *names: str) -> None:
        """Kill processes and wait for their successors."""
        await killed_and_replaced(self.proxy, *names)

    async def calls_go_on(self) -> None:
        """Put once through each worker that runs."""
        request = rpc_pb2.PutRequest(key=b"call", value=b"1").SerializeToString()
        for client in self.clients:
            if not client.lost:
                assert (await client.unary(PUT, request)).status == 0


Fault = Callable[[Scene], Awaitable[None]]


def held(name: str) -> Fault:
    """Hold a process; all else goes on."""

    async def fault(scene: Scene) -> None:
        assert scene.proxy.process is not None
        pid = scene.proxy.process.pid if name == "parent" else await asyncio.to_thread(scene.pid, name)
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(HELD_S):
                while True:
                    if not name.startswith("worker"):
                        await scene.calls_go_on()
                    await scene.writer.more(20)
        except TimeoutError:
            os.kill(pid, signal.SIGCONT)

    return fault


def killed(*names: str) -> Fault:
    """Kill processes."""
    return lambda scene: scene.kill(*names)


async def killed_in_fragments(scene: Scene) -> None:
    """Kill the hub while revisions of several megabytes pass through it."""
    async with direct(scene.etcd) as store:
        await put_large(store, 4, 300_000)
        await asyncio.gather(scene.kill("hub"), *(put_large(store, 4, 300_000) for _ in range(2)))


def in_creates(inner: Fault) -> Fault:
    """Let each client create 100 watches, half of them from the past, just before a fault; all are created."""

    async def fault(scene: Scene) -> None:
        watches = []
        for client in scene.clients:
            for number in range(100):
                stream = client.watch()
                stream.create(PREFIX + b"%d" % number, b"", number % 2)
                watches.append((client, stream))
        await inner(scene)
        for client, stream in watches:
            if not client.lost:
                await stream.created(30)
                stream.raw.cancel()

    return fault


async def reloaded_without_hub(scene: Scene) -> None:
    """Send SIGHUP to the parent right after the hub was killed, and once more while the next one starts."""
    parent = scene.proxy.process
    assert parent is not None
    before = await asyncio.to_thread(scene.pid, "hub")
    os.kill(before, signal.SIGKILL)
    parent.send_signal(signal.SIGHUP)

    def replaced() -> bool:
        parent.send_signal(signal.SIGHUP)
        return scene.proxy.processes().get("hub") not in (None, before)

    await asyncio.to_thread(until, replaced, "the next hub")
    await scene.calls_go_on()


async def cut(scene: Scene) -> None:
    """Reset all connections to etcd, also new ones, for a while."""
    scene.way.cut()
    await scene.writer.more(30)
    scene.way.mend()


async def half_open(scene: Scene) -> None:
    """Forward nothing, without an error."""
    scene.way.half_open()
    async with asyncio.timeout(20):
        broken = scene.way.accepted
        while scene.way.accepted == broken:
            await scene.writer.more(10)
    scene.way.mend()


async def one_way(scene: Scene) -> None:
    """Forward nothing from etcd."""
    scene.way.pause(Way.BACK)
    await scene.writer.more(50)
    scene.way.mend()


async def broken_inside(scene: Scene) -> None:
    """Reset the connections after some kilobytes, in the middle of a message."""
    for size in (700, 1_097, 5_003):
        accepted = scene.way.accepted
        scene.way.break_after(Way.BACK, size)
        await until_async(lambda a=accepted: scene.way.accepted > a, "another connection")  # type: ignore[misc]
        scene.way.mend()
        await scene.writer.more(10)


async def etcd_killed(scene: Scene) -> None:
    """Kill and restart etcd."""
    await asyncio.to_thread(scene.etcd.kill)
    await asyncio.to_thread(scene.etcd.start)


async def etcd_held(scene: Scene) -> None:
    """Hold etcd for longer than the pings to it wait."""
    assert scene.etcd.process is not None
    scene.etcd.process.send_signal(signal.SIGSTOP)
    accepted = scene.way.accepted
    try:
        await until_async(lambda: scene.way.accepted > accepted, "a ping to be missed")
    finally:
        scene.etcd.process.send_signal(signal.SIGCONT)


FAULTS: dict[str, Fault] = {
    "hub held": held("hub"),
    "hub killed in fragments": killed_in_fragments,
    "worker killed": killed("worker-1"),
    "cut": cut,
    "worker held": held("worker-2"),
    "parent held": held("parent"),
    "hub killed in creates": in_creates(killed("hub")),
    "hub held in creates": in_creates(held("hub")),
    "reloaded without a hub": reloaded_without_hub,
    "hub and a worker killed": killed("hub", "worker-2"),
    "all killed": killed("hub", "worker-1", "worker-2"),
    "half-open": half_open,
    "one way": one_way,
    "broken inside": broken_inside,
    "etcd killed": etcd_killed,
    "etcd held": etcd_held,
}
FEW = ("hub held", "hub killed in fragments", "cut", "worker killed")


@asynccontextmanager
async def scene_at(etcd: EtcdServer, tmp_path: Path) -> AsyncIterator[Scene]:
    """Yield a proxy with clients, under load; at the end each has each event, once and in order."""
    async with AsyncExitStack() as stack:
        way = await stack.enter_async_context(relay_to(etcd.client_port))
        proxy = await stack.enter_async_context(started(way.endpoint))
        scene = Scene(etcd, way, proxy, Writer(etcd.endpoint, 0.005))
        await scene.writer.more(5)
        files = [tmp_path / f"spool-{number}" for number in range(4)]
        async with AsyncExitStack() as watching:
            for file in files:
                watches = grpc_watches(f"ipv4:{proxy.endpoint}", file, "pick_first")
                scene.streams += await watching.enter_async_context(watches)
            for _ in range(2):
                scene.clients.append(await watching.enter_async_context(await RawClient.connect(proxy.port)))
            yield scene
            await scene.writer.more(20, 60)
            last = await scene.writer.stop()
            for stream in scene.streams:
                await until_async(lambda s=stream: s.has_all(last), "a stream to have all", 60)  # type: ignore[misc]
            late = [(await client.open_watch(PREFIX, PREFIX_END, 1), 1) for client in scene.clients if not client.lost]
            await all_kept(late, etcd.endpoint, last, 60)
        truth = await read_truth(LoadTarget(address=etcd.endpoint), PREFIX, 1, last)
        lives = [life for file in files for life in spool.read(file)]
        assert len(lives) == len(scene.streams)
        for life in lives:
            assert any(isinstance(record, Opened) for record in life.log.records)
            assert check(life.log, truth, last, safe_headers=True) == []
        assert await asyncio.to_thread(lambda: len(proxy.processes())) == 3


async def test_faults_of_hub_worker_and_route_lose_nothing(etcd: EtcdServer, tmp_path: Path) -> None:
    async with scene_at(etcd, tmp_path) as scene:
        for name in FEW:
            await scene.writer.more(10)
            await FAULTS[name](scene)


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAULTS)
async def test_each_fault_three_times_loses_nothing(etcd: EtcdServer, tmp_path: Path, name: str) -> None:
    async with scene_at(etcd, tmp_path) as scene:
        for _ in range(3):
            await scene.writer.more(10)
            await FAULTS[name](scene)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", range(2))
async def test_all_faults_in_any_order_lose_nothing(etcd: EtcdServer, tmp_path: Path, seed: int) -> None:
    names = random.Random(seed).sample(list(FAULTS), len(FAULTS))
    async with scene_at(etcd, tmp_path) as scene:
        for name in names:
            await scene.writer.more(10)
            await FAULTS[name](scene)


async def clients_of(proxy: ProxyProcess, stack: AsyncExitStack, count: int = 4) -> list[RawClient]:
    """Return clients at both workers."""
    return [await stack.enter_async_context(await RawClient.connect(proxy.port)) for _ in range(count)]


@pytest.mark.long
async def test_a_restored_store_is_noticed_by_all_workers(etcd: EtcdServer, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(started(etcd.endpoint))
        store = await stack.enter_async_context(direct(etcd))
        await store.put(PREFIX + b"a", b"kept")
        await asyncio.to_thread(etcd.ctl, "snapshot", "save", str(tmp_path / "s"))
        for _ in range(10):
            lost = await store.put(PREFIX + b"a", b"lost")
        clients = await clients_of(proxy, stack)
        streams = [await client.open_watch(PREFIX, PREFIX_END, 2) for client in clients]
        for stream in streams:
            await until_async(lambda s=stream: reached(s, lost), "the past")  # type: ignore[misc]
        await asyncio.to_thread(etcd.stop)
        await asyncio.to_thread(etcd.restore, tmp_path / "s")
        await asyncio.to_thread(etcd.start)
        for stream in streams:
            await until_async(lambda s=stream: s.responses[-1].canceled, "the cancel")  # type: ignore[misc]
            assert stream.responses[-1].cancel_reason == OTHER_HISTORY
        again = [await client.open_watch(PREFIX, PREFIX_END, 3) for client in clients]
        new = await store.put(PREFIX + b"a", b"new")
        assert new < lost
        for stream in again:
            await until_async(lambda s=stream: s.values == [b"new"], "the new event")  # type: ignore[misc]


@pytest.mark.long
@pytest.mark.parametrize("names", [(), ("hub",)], ids=["all run", "the hub is killed"])
async def test_a_compaction_cancels_watches_that_miss_events(etcd: EtcdServer, names: tuple[str, ...]) -> None:
    """Of one range, at both workers; those that miss none go on."""
    async with AsyncExitStack() as stack:
        way = await stack.enter_async_context(relay_to(etcd.client_port))
        proxy = await stack.enter_async_context(started(way.endpoint))
        store = await stack.enter_async_context(direct(etcd))
        first = await store.put(PREFIX + b"a", b"1")
        clients = await clients_of(proxy, stack)
        behind = [await client.open_watch(PREFIX, PREFIX_END, first) for client in clients]
        ahead = [await client.open_watch(PREFIX, PREFIX_END, first + 40) for client in clients]
        for stream in behind:
            await until_async(lambda s=stream: s.values == [b"1"], "the first event")  # type: ignore[misc]
        way.cut()
        for number in range(30):
            compacted = await store.put(PREFIX + b"a", b"%d" % number)
        await store.compact(compacted)
        await killed_and_replaced(proxy, *names)
        way.mend()
        for stream in behind:
            await until_async(lambda s=stream: s.responses[-1].canceled, "the cancel")  # type: ignore[misc]
            assert stream.responses[-1].compact_revision == compacted
        while (last := await store.put(PREFIX + b"a", b"x")) < first + 45:
            pass
        for stream in ahead:
            await until_async(lambda s=stream: reached(s, last), "the newest event")  # type: ignore[misc]
            assert len(stream.values) == last - first - 39


@pytest.mark.long
@pytest.mark.timeout(600)
async def test_changes_of_the_leader_and_of_the_hub_lose_nothing() -> None:
    async with AsyncExitStack() as stack:
        members = await stack.enter_async_context(cluster())
        proxy = await stack.enter_async_context(started(members.endpoints))
        writer = Writer(members.endpoints, 0.005)
        await writer.more(5)
        clients = await clients_of(proxy, stack)
        streams = [(await each.open_watch(PREFIX, PREFIX_END, start), start) for each in clients for start in (0, 1)]
        for _ in range(3):
            leader = await members.leader()
            await asyncio.to_thread(leader.kill)
            await writer.more(30, 60)
            await killed_and_replaced(proxy, "hub")
            await writer.more(30, 60)
            await asyncio.to_thread(leader.start)
        await all_kept(streams, members.members[0].endpoint, await writer.stop(), 60)


@pytest.mark.long
async def test_slow_readers_get_all_after_the_hub_was_killed(etcd: EtcdServer) -> None:
    """They read nothing, so a worker keeps a revision for each; its history is shorter than what they miss."""
    async with AsyncExitStack() as stack:
        proxy = await stack.enter_async_context(started(etcd.endpoint, [*FLAGS, "--history-revisions-max=20"]))
        store = await stack.enter_async_context(direct(etcd))
        clients = await clients_of(proxy, stack)
        streams = [(await client.open_watch(PREFIX, PREFIX_END), 0) for client in clients]
        slow = [client.transport for client in clients[2:] if client.transport is not None]
        for transport in slow:
            transport.pause_reading()
        for _ in range(20):
            await put_large(store, 4, 300_000)
        for number in range(100):
            last = await store.put(PREFIX + b"a", b"%d" % number)
        await killed_and_replaced(proxy, "hub")
        for transport in slow:
            transport.resume_reading()
        await all_kept(streams, etcd.endpoint, last, 60)


NO_FORK = """
import errno, os, signal, sys
fork = os.fork
full = sys.argv[1]
sys.argv = sys.argv[4:]
def failing():
    if os.path.exists(full):
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    forked = fork()
    if not forked and os.path.exists(full + ".stop"):
        os.unlink(full + ".stop")
        os.kill(os.getpid(), signal.SIGTERM)
    return forked
os.fork = failing
from proxy.cli import main
main()
"""
"""`serve`, whose forks fail as long as a file exists, and get SIGTERM at once if another one exists; for
`ProxyProcess.prefix`."""


async def test_a_fork_that_fails_is_tried_again(etcd: EtcdServer, tmp_path: Path) -> None:
    full = tmp_path / "full"
    async with started(etcd.endpoint, FLAGS, [sys.executable, "-c", NO_FORK, str(full)]) as proxy:
        clients = [await RawClient.connect(proxy.port) for _ in range(2)]
        streams = [await client.open_watch(PREFIX, PREFIX_END) for client in clients]
        full.touch()
        os.kill(proxy.processes()["hub"], signal.SIGKILL)
        await until_async(lambda: proxy.log().count("cannot start a process") >= 2, "two attempts")
        stop = full.with_name("full.stop")
        stop.touch()
        full.unlink()
        # SIGTERM that comes right after the fork ends the new process, so there is one more.
        await until_async(lambda: not stop.exists() and proxy.log().count('"process ended"') >= 2, "two ends")
        async with direct(etcd) as calls:
            last = await calls.put(PREFIX + b"1", b"1")
        for stream in streams:
            await until_async(lambda s=stream: reached(s, last), "the event")  # type: ignore[misc]
        for client in clients:
            await client.close()
