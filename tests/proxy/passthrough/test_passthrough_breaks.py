"""Pass-through over connections that break at every stage of a call: reads are resent, writes happen at most once."""

from __future__ import annotations

import asyncio

import grpc
import grpc.aio
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.e2e.running import direct
from tests.etcd.server import EtcdServer
from tests.faults.relay import Way, relay_to
from tests.proxy.passthrough.test_passthrough import passing
from tests.waiting import LIMIT_S, until_async
from upstream.settings import UpstreamSettings

QUICK = UpstreamSettings(backoff_max_s=0.02)
STAGES = [*range(0, 220, 9), 400]
"""Numbers of bytes after which the connection breaks: from none of the call's bytes to more than all of them."""


@pytest.mark.parametrize("way", Way)
async def test_writes_happen_once_or_fail(etcd: EtcdServer, way: Way) -> None:
    async with (
        relay_to(etcd.client_port) as relay,
        passing(relay.endpoint, settings=QUICK) as running,
        direct(etcd) as store,
    ):
        kv = rpc_pb2_grpc.KVStub(running.channel)
        outcomes = set()
        for stage in STAGES:
            key = b"key-%d" % stage
            await until_async(running.pool.pick, "a connection")
            await asyncio.wait_for(kv.Range(rpc_pb2.RangeRequest(key=key)), LIMIT_S)
            relay.break_after(way, stage)
            try:
                await kv.Put(rpc_pb2.PutRequest(key=key, value=b"x"), timeout=10)
                outcome = "OK"
            except grpc.aio.AioRpcError as error:
                outcome = error.code().name
            relay.mend()
            found = await store.kv.Range(rpc_pb2.RangeRequest(key=key))
            version = found.kvs[0].version if found.kvs else 0
            assert version <= 1, f"written {version} times"
            assert version == 1 or outcome != "OK"
            outcomes.add((outcome, version))
        assert {outcome for outcome, _ in outcomes} == {"OK", "UNAVAILABLE"}, outcomes
        if way is Way.BACK:
            assert ("UNAVAILABLE", 1) in outcomes, "no break came between the write and its answer"


@pytest.mark.parametrize("way", Way)
async def test_reads_go_on_at_another_endpoint(etcd: EtcdServer, way: Way) -> None:
    async with (
        relay_to(etcd.client_port) as relay,
        passing(f"{relay.endpoint},{etcd.endpoint}", settings=QUICK) as running,
        direct(etcd) as store,
    ):
        await store.put(b"key", b"value")
        kv = rpc_pb2_grpc.KVStub(running.channel)
        half_answered = 0
        for stage in STAGES:
            await until_async(lambda: all(state.connected for state in running.pool.states()), "both connections")
            relay.break_after(way, stage)
            calls = [kv.Range(rpc_pb2.RangeRequest(key=b"key"), timeout=10) for _ in range(4)]
            for answer in await asyncio.gather(*calls, return_exceptions=True):
                if isinstance(answer, grpc.aio.AioRpcError):
                    assert answer.code() is grpc.StatusCode.UNAVAILABLE
                    half_answered += 1
                else:
                    assert isinstance(answer, rpc_pb2.RangeResponse)
                    assert answer.kvs[0].value == b"value"
            relay.mend()
        # A response that has begun to arrive cannot be resent; few of the breaks are in it.
        assert half_answered <= (0 if way is Way.THERE else len(STAGES))
        assert running.passthrough.stats.resent > 0
        assert running.passthrough.stats.resend_bytes == 0


async def test_2000_lease_keep_alives_do_not_wait_for_each_other(etcd: EtcdServer) -> None:
    """etcd's grpc-proxy delays them, 199 in a minute: this test would take ten minutes."""
    async with passing(etcd.endpoint) as running:
        lease = rpc_pb2_grpc.LeaseStub(running.channel)
        granted = [await lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=100)) for _ in range(20)]
        call = lease.LeaseKeepAlive()

        async def ask() -> None:
            for number in range(2000):
                await call.write(rpc_pb2.LeaseKeepAliveRequest(ID=granted[number % 20].ID))
            await call.done_writing()

        asking = asyncio.create_task(ask())
        answers = [answer async for answer in call]
        await asking
        assert [answer.ID for answer in answers] == [granted[number % 20].ID for number in range(2000)]
        assert {answer.TTL for answer in answers} == {100}
        lost = lease.LeaseKeepAlive()
        await lease.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=granted[0].ID))
        await lost.write(rpc_pb2.LeaseKeepAliveRequest(ID=granted[0].ID))
        answer = await lost.read()
        assert isinstance(answer, rpc_pb2.LeaseKeepAliveResponse)
        assert (answer.ID, answer.TTL) == (granted[0].ID, 0)
        lost.cancel()


async def test_member_list_and_status_are_etcds(etcd: EtcdServer) -> None:
    async with passing(etcd.endpoint) as running, grpc.aio.insecure_channel(etcd.endpoint) as channel:
        both = (running.channel, channel)
        members = [await rpc_pb2_grpc.ClusterStub(one).MemberList(rpc_pb2.MemberListRequest()) for one in both]
        assert members[0] == members[1]
        # Read before and after: the database file of a newly started etcd grows by itself.
        around = (channel, running.channel, channel)
        status = [await rpc_pb2_grpc.MaintenanceStub(one).Status(rpc_pb2.StatusRequest()) for one in around]
        assert status[1] in (status[0], status[2])


@pytest.mark.long
async def test_a_snapshot_of_100_mb(etcd: EtcdServer) -> None:
    """It arrives complete, at the pace of its reader, and hardly any of it waits in the proxy."""
    async with passing(etcd.endpoint) as running, direct(etcd) as store:
        for number in range(100):
            await store.put(b"%d" % number, bytes([number]) * (1 << 20))
        maintenance = rpc_pb2_grpc.MaintenanceStub(running.channel)
        size, most, left = 0, 0, 0
        async for part in maintenance.Snapshot(rpc_pb2.SnapshotRequest()):
            size += len(part.blob)
            left = part.remaining_bytes
            most = max(most, running.unsent_bytes)
            assert await running.call("/etcdserverpb.Maintenance/Status")(b"")
        assert left == 0
        assert size > 100 << 20
        assert most <= 2 << 20
