"""Two proxies behind one address list, restarted one after the other: real clients fail over and lose no event."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # ships none

from coalesce.guarantees.checkers import Opened, check
from coalesce.limits import CoreLimits
from proto.framing import Status
from proxy.measuring.load.judge import read_truth
from proxy.measuring.load.target import LoadTarget
from proxy.watch.service import DRAIN_SLICE_SESSIONS
from tests.clients.libraries import LIBRARIES, PROGRAMS
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, next_to_etcd, proxy_for
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer
from tests.proxy_process import ProxyProcess
from tests.soak import spool
from tests.soak.watcher import CHANNEL, Habits, Seen, Stream
from tests.waiting import until, until_async

DRAIN = ["--drain=2s", "--log-level=warn"]
STREAMS = 6


@asynccontextmanager
async def grpc_watches(target: str, path: Path, policy: str) -> AsyncIterator[list[Stream]]:
    """Yield watches of grpc's own client on one channel, which resume as clientv3's do."""
    options = (*CHANNEL, ("grpc.lb_policy_name", policy))
    records, seen = spool.Spool(path), Seen()
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        streams = []
        for number in range(STREAMS):
            plan = spool.WatchPlan(PREFIX, PREFIX_END, start_revision=number % 2, prev_kv=number % 3 == 0)
            streams.append(Stream(channel, records, seen, Habits(), lambda plan=plan: plan))  # type: ignore[misc]  # bound
            streams[-1].add()
        tasks = [asyncio.create_task(stream.run()) for stream in streams]
        # One that is created after the last write would wait for an event in vain.
        await until_async(lambda: all(stream.is_created for stream in streams), "all watches")
        yield streams
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    records.close()
    assert not seen.faults


@contextlib.contextmanager
def watching(command: list[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program that watches, with its output in a file."""
    with out.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.DEVNULL, env={**os.environ, "ETCDCTL_API": "3"}
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def etcdctl_watch(binary: EtcdBinary, endpoints: str) -> list[str]:
    """Return the command that watches everything from revision 1 on; it prints three lines for each put."""
    return [str(binary.etcdctl), f"--endpoints={endpoints}", "watch", "--prefix", PREFIX.decode(), "--rev=1"]


def node_watch(endpoints: str) -> list[str]:
    """Do the same with Node's client; it prints one line for each put."""
    (library,) = [library for library in LIBRARIES if library.is_node]
    library.install()
    # Node looks for packages next to the program.
    program = shutil.copy(PROGRAMS / "node_watch.mjs", library.home)
    return ["node", str(program), endpoints, PREFIX.decode()]


async def _judge(streams: list[Stream], path: Path, etcd: EtcdServer, last: int) -> list[str]:
    truth = await read_truth(LoadTarget(address=etcd.endpoint), PREFIX, 1, last)
    lives = list(spool.read(path))
    assert len(lives) == len(streams)
    found = [check(life.log, truth, last, safe_headers=True) for life in lives]
    assert found == [[]] * len(lives)
    opened = [sum(isinstance(record, Opened) for record in life.log.records) for life in lives]
    assert all(number >= 2 for number in opened), "no client had to reconnect"
    return [change.value.decode() for change in truth.changes]


@pytest.mark.parametrize(
    ("policy", "how"),
    [
        ("round_robin", signal.SIGTERM),
        pytest.param("round_robin", signal.SIGKILL, marks=pytest.mark.long),
        pytest.param("pick_first", signal.SIGTERM, marks=pytest.mark.long),
        pytest.param("pick_first", signal.SIGKILL, marks=pytest.mark.long),
    ],
)
async def test_rolling_restart(etcd: EtcdServer, policy: str, how: signal.Signals, tmp_path: Path) -> None:
    """With a drain, and with kill -9: clients of grpc, etcdctl (clientv3) and Node get every event exactly once."""
    by_etcdctl, by_node = tmp_path / "etcdctl", tmp_path / "node"
    binary = etcds()[0]
    with ProxyProcess(etcd.endpoint, DRAIN) as first, ProxyProcess(etcd.endpoint, DRAIN) as second:
        both = f"{first.endpoint},{second.endpoint}"
        writer = Writer(etcd.endpoint, pause_s=0.01)
        await writer.more(20)
        async with grpc_watches(f"ipv4:{both}", tmp_path / "spool", policy) as streams:
            with watching(etcdctl_watch(binary, both), by_etcdctl), watching(node_watch(both), by_node):
                await asyncio.to_thread(until, lambda: by_node.read_text(), "Node to begin")
                for proxy in (first, second):
                    status = await asyncio.to_thread(proxy.stop, how)
                    assert status == (0 if how is signal.SIGTERM else -how)
                    await writer.more(20)
                    await asyncio.to_thread(proxy.start)
                    await writer.more(20)
                last = await writer.stop()
                await _wait_all(streams, last)
                for out, lines in ((by_etcdctl, 3), (by_node, 1)):
                    whole = lines * (last - 1)
                    await asyncio.to_thread(
                        until,
                        lambda o=out, w=whole: len(o.read_text().splitlines()) >= w,
                        f"{out.name} to have all",
                    )
        expected = await _judge(streams, tmp_path / "spool", etcd, last)
        assert by_etcdctl.read_text().splitlines()[2::3] == expected
        assert by_node.read_text().splitlines() == expected


async def _wait_all(streams: list[Stream], last: int) -> None:
    for stream in streams:
        await until_async(lambda s=stream: s.has_all(last), "a stream to have all")  # type: ignore[misc]  # bound


class _Witness(RawClient):
    """Records, when the first watch has ended, the frames received before."""

    def __init__(self) -> None:
        super().__init__()
        self.told: tuple[int, int] | None = None
        """Messages of the health stream, GOAWAYs."""
        self.left = 0
        """Watches still open when the first piece with an end of stream was read."""
        self._rest = b""

    def data_received(self, data: bytes) -> None:
        self._rest += data
        while len(self._rest) >= 9 and len(self._rest) >= (size := 9 + int.from_bytes(self._rest[:3], "big")):
            frame, self._rest = self._rest[:size], self._rest[size:]
            super().data_received(frame)
            self._look()
        if self.told is not None and not self.left:
            self.left = sum(stream.status is None for stream in self.streams.values())

    def _look(self) -> None:
        health, *watches = self.streams.values()
        if self.told is None and any(each.status is not None for each in watches):
            self.told = len(health.messages), len(self.goaways)


async def test_a_drain_is_announced_before_clients_get_goaway(etcd: EtcdServer) -> None:
    with ProxyProcess(etcd.endpoint, DRAIN) as proxy:
        async with await _Witness.connect(proxy.port) as client:
            health = client.call("/grpc.health.v1.Health/Watch")
            health.send(health_pb2.HealthCheckRequest().SerializeToString(), end=True)
            await health.next()
            streams = [client.watch() for _ in range(3 * DRAIN_SLICE_SESSIONS)]
            for stream in streams:
                stream.create(PREFIX, PREFIX_END)
                await stream.created()
            before = len(health.messages)
            assert await asyncio.to_thread(proxy.stop) == 0
            for stream in streams:
                assert (await stream.raw.end())[0] == Status.UNAVAILABLE
            states = [health_pb2.HealthCheckResponse.FromString(message).status for message in health.messages]
            assert states[before:] == [health_pb2.HealthCheckResponse.NOT_SERVING]
            assert client.goaways[0].last_stream_id == 2**31 - 1
            assert client.told == (before + 1, 1)
            assert client.left > DRAIN_SLICE_SESSIONS, "all at once"


async def test_clients_that_are_killed_leave_nothing(etcd: EtcdServer, tmp_path: Path) -> None:
    binary = etcds()[0]
    async with proxy_for(etcd, limits=CoreLimits(linger_s=0.1)) as proxy, direct(etcd) as store:
        command = etcdctl_watch(binary, f"127.0.0.1:{proxy.port}")
        stats = proxy.engine.core.stats
        with contextlib.ExitStack() as stack:
            clients = [stack.enter_context(watching(command, tmp_path / str(number))) for number in range(5)]
            await until_async(lambda: stats.watches == len(clients), "the clients to watch")
            for client in clients[1:]:
                client.kill()
            await until_async(lambda: stats.sessions == 1, "the killed ones to be gone")
            await store.put(PREFIX + b"1", b"still here")
            await until_async(lambda: "still here" in (tmp_path / "0").read_text(), "the event")
        await until_async(lambda: not (stats.sessions or stats.trunks), "the last one to be gone")
        await until_async(lambda: not proxy.listener.connections, "the connections to be gone")
        hub = next_to_etcd(proxy).engine.core.stats
        await until_async(lambda: not hub.trunks, "the watches at etcd to be gone")
        await until_async(lambda: not etcd.watchers(), "etcd to have closed them")
