"""etcd stops under load and returns: no client loses an event, gets one twice, or is disconnected."""

from __future__ import annotations

import asyncio
import contextlib

import grpc
import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import Etcd, direct, next_to_etcd, proxy_for, served
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

PREFIX, PREFIX_END = b"/p/", b"/p0"


class Writer:
    """Puts one key after the other, through any failure of etcd, until stopped."""

    def __init__(self, store: Etcd) -> None:
        self.store = store
        self.stopping = False
        self.done = 0
        self.failed = 0
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        number = 0
        while not self.stopping:
            number += 1
            try:
                await self.store.put(b"/p/%d" % (number % 5), b"%d" % number)
                self.done += 1
            except grpc.aio.AioRpcError:
                self.failed += 1
                await asyncio.sleep(0.01)

    async def more(self, count: int) -> None:
        """Wait until so many more puts have succeeded."""
        goal = self.done + count
        await until_async(lambda: self.done >= goal, f"{count} more puts")

    async def stop(self) -> int:
        """Stop, and return the store's revision then."""
        self.stopping = True
        await self.task
        return await self.store.revision()


def has_reached(stream: WatchStream, revision: int) -> bool:
    """Whether the stream has received an event of this revision or a later one."""
    return bool(stream.raw.messages) and stream.responses[-1].header.revision >= revision


async def _through(etcd: EtcdServer, breaks: int, how: str) -> None:
    async with (
        proxy_for(etcd) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
        await RawClient.connect(proxy.port) as other,
    ):
        streams: list[tuple[WatchStream, int]] = []
        for number in range(20):
            stream = (client, other)[number % 2].watch()
            stream.create(PREFIX, PREFIX_END, start_revision=number % 3)
            await stream.created()
            streams.append((stream, number % 3))
        writer = Writer(store)
        for _ in range(breaks):
            await writer.more(50)
            await asyncio.to_thread(etcd.kill if how == "kill" else etcd.stop)
            stream = client.watch()
            stream.create(PREFIX, PREFIX_END, start_revision=2)
            streams.append((stream, 2))
            await asyncio.to_thread(etcd.start)
        await writer.more(50)
        last = await writer.stop()
        for stream, _ in streams:
            await until_async(lambda s=stream: has_reached(s, last), "the last event")  # type: ignore[misc]  # bound
            assert not stream.raw.over
        await assert_kept(streams, etcd.endpoint, PREFIX, PREFIX_END, last)
        assert next_to_etcd(proxy).engine.stats.upstream_broken >= 1


@pytest.mark.parametrize("how", ["stop", "kill"])
def test_etcd_restarts_under_load(etcd: EtcdServer, how: str) -> None:
    run(_through(etcd, 1, how))


@pytest.mark.long
@pytest.mark.parametrize("how", ["stop", "kill"])
def test_etcd_restarts_under_load_again_and_again(etcd: EtcdServer, how: str) -> None:
    run(_through(etcd, 8, how), 110)


async def test_a_proxy_that_starts_before_its_etcd(etcd: EtcdServer) -> None:
    await asyncio.to_thread(etcd.stop)
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        assert not proxy.health.serving
        stream = client.watch()
        stream.create(b"a")
        await asyncio.to_thread(etcd.start)
        await stream.created()
        assert proxy.health.serving


async def test_health_follows_etcd(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving, "the proxy to serve")
        await asyncio.to_thread(etcd.stop)
        await until_async(lambda: not proxy.health.serving, "the proxy to notice")
        await asyncio.to_thread(etcd.start)
        await until_async(lambda: proxy.health.serving, "the proxy to serve again")


async def test_a_drain_ends_all_streams_of_all_clients(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        clients = [await RawClient.connect(proxy.port) for _ in range(3)]
        streams = [client.watch() for client in clients for _ in range(5)]
        for stream in streams:
            stream.create(b"a")
            await stream.created()
        await store.put(b"a", b"1")
        for stream in streams:
            await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]
        assert await proxy.drain(5)
        for stream in streams:
            status, text = await stream.raw.end()
            assert status == Status.UNAVAILABLE
            assert "shutting down" in text
        for client in clients:
            await until_async(lambda c=client: c.lost, "the connection to close")  # type: ignore[misc]
            assert [goaway.error_code for goaway in client.goaways] == [0, 0]
        with contextlib.suppress(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
            pytest.fail("a drained proxy accepts connections")


async def test_a_drain_does_not_wait_for_keep_alive_streams(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        grant = rpc_pb2.LeaseGrantRequest(TTL=60).SerializeToString()
        granted = await client.unary("/etcdserverpb.Lease/LeaseGrant", grant)
        lease = rpc_pb2.LeaseGrantResponse.FromString(granted.messages[0]).ID
        alive = client.call("/etcdserverpb.Lease/LeaseKeepAlive")
        for _ in range(2):
            alive.send(rpc_pb2.LeaseKeepAliveRequest(ID=lease).SerializeToString())
            answer = rpc_pb2.LeaseKeepAliveResponse.FromString(await alive.next())
            assert (lease, 60) == (answer.ID, answer.TTL)
        observed = client.call("/v3electionpb.Election/Observe")
        observed.send(b"", end=True)
        await until_async(lambda: len(proxy.pool.pick().http2.streams) == 2, "both at etcd")  # type: ignore[union-attr]
        assert await proxy.drain(20)
        for call in (alive, observed):
            status, text = await call.end()
            assert status == Status.UNAVAILABLE
            assert "shutting down" in text


async def test_a_drain_ends_within_its_timeout(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        await client.open_watch(b"a")
        assert client.transport is not None
        client.transport.pause_reading()
        assert not await proxy.drain(0.5)
        client.transport.resume_reading()
        await until_async(lambda: client.lost, "the connection to close")


async def test_reconnecting_clients_miss_nothing_after_a_core_failure(etcd: EtcdServer) -> None:
    async with served(etcd, failures=1) as (proxy, store, client):
        base = etcd.watchers()
        streams = [client.watch() for _ in range(10)]
        for stream in streams:
            stream.create(b"a")
            await stream.created()
        first = await store.put(b"a", b"1")
        await until_async(lambda: streams[0].values == [b"1"], "the event")
        proxy.engine._input(proxy.engine.core.drained)
        for stream in streams:
            assert (await stream.raw.end())[0] == Status.UNAVAILABLE
        again = await client.open_watch(b"a", start_revision=first + 1)
        await store.put(b"a", b"2")
        await until_async(lambda: again.values == [b"2"], "the next event")
        await until_async(lambda: etcd.watchers() == base + 1, "the old watcher to be gone")
