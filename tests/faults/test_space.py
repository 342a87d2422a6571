"""An etcd whose quota is exhausted: writes are refused with etcd's own error, watches go on, and it recovers.

An etcd whose disk is full exits, in the middle of a write. Also compaction and defragmentation, the remedies for both,
under load.
"""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Iterator

import grpc
import grpc.aio
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.passthrough.settings import PassthroughSettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import Etcd, direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.waiting import until_async

QUOTA_BYTES = 2 << 20


@pytest.fixture
def small(etcd_binary: object) -> Iterator[EtcdServer]:
    """An etcd with a small quota."""
    del etcd_binary
    with EtcdServer(extra=[f"--quota-backend-bytes={QUOTA_BYTES}"]) as server:
        yield server


async def _refusal(store: Etcd) -> tuple[object, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await store.put(PREFIX + b"more", b"x" * 1000)
    return caught.value.code(), caught.value.details()


async def _fill(store: Etcd) -> int:
    """Put until etcd refuses; return the last revision."""
    revision = 0
    for number in range(100):
        try:
            revision = await store.put(PREFIX + b"%d" % (number % 3), b"x" * 200_000)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return revision
    raise AssertionError("etcd has taken everything")


async def test_writes_are_refused_as_by_etcd_and_watches_go_on(small: EtcdServer) -> None:
    async with (
        proxy_for(small) as proxy,
        direct(small) as store,
        direct(f"127.0.0.1:{proxy.port}") as through,
        await RawClient.connect(proxy.port) as client,
    ):
        early = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        full = await _fill(through)
        refused = await _refusal(store)
        assert await _refusal(through) == refused
        assert refused == (grpc.StatusCode.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded")
        assert proxy.health.serving
        late = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1, full)]
        # Deletes are allowed during the alarm, and are delivered.
        gone = await through.delete(PREFIX + b"0")
        await all_kept(early + late, small.endpoint, gone)
        await through.compact(gone)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
            maintenance = rpc_pb2_grpc.MaintenanceStub(channel)
            alarms = (await maintenance.Alarm(rpc_pb2.AlarmRequest())).alarms
            assert [alarm.alarm for alarm in alarms] == [rpc_pb2.NOSPACE]
            await maintenance.Defragment(rpc_pb2.DefragmentRequest())
            off = rpc_pb2.AlarmRequest.DEACTIVATE
            for alarm in alarms:
                request = rpc_pb2.AlarmRequest(action=off, memberID=alarm.memberID, alarm=alarm.alarm)
                await maintenance.Alarm(request)
        again = await through.put(PREFIX + b"0", b"room")
        for stream, _ in early + late:
            while (await stream.next()).header.revision < again:
                pass
            assert stream.values[-1] == b"room"


async def test_the_disk_is_full_under_load(etcd: EtcdServer) -> None:
    """No file of etcd may grow any more, nor be written beyond the limit: neither its log nor its database."""
    assert etcd.process is not None
    waits = PassthroughSettings(call_wait_s=0.5)
    async with proxy_for(etcd, passthrough=waits) as proxy, await RawClient.connect(proxy.port) as client:
        through = f"127.0.0.1:{proxy.port}"
        writer = Writer(through)
        await writer.more(20)
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
        await writer.more(20)
        resource.prlimit(etcd.process.pid, resource.RLIMIT_FSIZE, (1, 1))
        await until_async(lambda: etcd.process is None or etcd.process.poll() is not None, "etcd to give up")
        await until_async(lambda: not proxy.health.serving, "the proxy to say so")
        async with direct(through) as store:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await store.put(PREFIX, b"")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        etcd.kill()
        await asyncio.to_thread(etcd.start)
        await writer.more(20)
        # No watch has ended, and every put acknowledged before has arrived.
        await all_kept(streams, etcd.endpoint, await writer.stop())


async def test_compaction_and_defragmentation_under_load(etcd: EtcdServer) -> None:
    async with (
        proxy_for(etcd) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
        grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel,
    ):
        first = await store.put(PREFIX + b"0", b"before")
        writer = Writer(etcd.endpoint)
        streams = [await client.open_watch(PREFIX, PREFIX_END, first) for _ in range(10)]
        # Until etcd's watch is in step, a compaction cancels it.
        await until_async(lambda: all(stream.values for stream in streams), "the first event")
        got: list[list[int]] = []
        maintenance = rpc_pb2_grpc.MaintenanceStub(channel)
        for _ in range(4):
            await writer.more(50)
            compacting = asyncio.create_task(store.compact(writer.last - 10))
            await maintenance.Defragment(rpc_pb2.DefragmentRequest())
            await compacting
        await writer.more(20)
        last = await writer.stop()
        for stream in streams:
            revisions: list[int] = []
            while not revisions or revisions[-1] < last:
                response = await stream.next()
                assert not response.canceled
                revisions += [event.kv.mod_revision for event in response.events]
            got.append(revisions)
        # Each put is one revision: none is missing, none came twice.
        assert got == [list(range(first, last + 1))] * len(streams)
