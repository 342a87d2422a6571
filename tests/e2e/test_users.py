"""Features that etcd's own grpc-proxy lacks, each used as clients use etcd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from coalesce.limits import CoreLimits
from proto.framing import frame
from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for, served
from tests.e2e.scenario import run
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

LEASES = 50
LARGE_BYTES = 5 * 1024 * 1024
PODS, PODS_END = b"/registry/pods/", b"/registry/pods0"


@asynccontextmanager
async def channel_to(port: int) -> AsyncIterator[grpc.aio.Channel]:
    """Yield a gRPC channel to a proxy."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


async def test_a_proxy_without_watches_opens_none_at_etcd(etcd: EtcdServer) -> None:
    """Unlike etcd's grpc-proxy, which keeps two watches of its own."""
    base = etcd.watchers()
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        assert etcd.watchers() == base
        await client.open_watch(b"k")
        assert etcd.watchers() == base + 1


async def test_requests_above_4_mib_are_left_to_etcd() -> None:
    with EtcdServer(extra=["--max-request-bytes=8388608"]) as etcd:
        async with proxy_for(etcd) as proxy, channel_to(proxy.port) as channel:
            await rpc_pb2_grpc.KVStub(channel).Put(rpc_pb2.PutRequest(key=b"large", value=bytes(LARGE_BYTES)))


async def test_keep_alives_are_prompt_and_report_a_lost_lease(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, channel_to(proxy.port) as channel:
        stub = rpc_pb2_grpc.LeaseStub(channel)
        ids = [(await stub.LeaseGrant(rpc_pb2.LeaseGrantRequest(TTL=60))).ID for _ in range(LEASES)]
        streams = [stub.LeaseKeepAlive() for _ in ids]
        for _ in range(3):
            for stream, lease_id in zip(streams, ids, strict=True):
                await stream.write(rpc_pb2.LeaseKeepAliveRequest(ID=lease_id))
            for stream, lease_id in zip(streams, ids, strict=True):
                answer = await stream.read()
                assert isinstance(answer, rpc_pb2.LeaseKeepAliveResponse)
                assert (lease_id, 60) == (answer.ID, answer.TTL)
        await stub.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=ids[0]))
        await streams[0].write(rpc_pb2.LeaseKeepAliveRequest(ID=ids[0]))
        lost = await streams[0].read()
        assert isinstance(lost, rpc_pb2.LeaseKeepAliveResponse)
        assert lost.TTL == 0
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.LeaseRevoke(rpc_pb2.LeaseRevokeRequest(ID=ids[0]))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        for stream in streams:
            stream.cancel()


async def test_one_stream_keeps_two_thousand_leases_alive(etcd: EtcdServer) -> None:
    """All keep-alives at once: each is answered in order, also the one of a lost lease; the stream goes on."""
    count, lost = 2_000, 700
    async with proxy_for(etcd) as proxy, channel_to(proxy.port) as channel:
        stub = rpc_pb2_grpc.LeaseStub(channel)
        grants = [rpc_pb2.LeaseGrantRequest(ID=number, TTL=600) for number in range(1, LEASES + 1)]
        await asyncio.gather(*(stub.LeaseGrant(grant) for grant in grants))
        asked = [1 + number % LEASES for number in range(count)]
        asked[lost] = 10**9
        async with await RawClient.connect(proxy.port) as client:
            call = client.call("/etcdserverpb.Lease/LeaseKeepAlive")
            requests = [rpc_pb2.LeaseKeepAliveRequest(ID=lease).SerializeToString() for lease in asked]
            call.send_raw(b"".join(map(frame, requests)))
            await until_async(lambda: len(call.messages) == count, "every answer")
            answers = [rpc_pb2.LeaseKeepAliveResponse.FromString(answer) for answer in call.messages]
            assert [answer.ID for answer in answers] == asked
            assert [answer.TTL for answer in answers] == [600] * lost + [0] + [600] * (count - lost - 1)
            assert not call.over


async def test_kubernetes_lists_watches_and_reads_consistently(etcd: EtcdServer) -> None:
    """The requests of its API server.

    It lists, watches from the list's revision on with prev_kv and progress, compares and puts; before a consistent read
    from its cache it requests progress until the watch has reached the store's revision.
    """
    async with (
        proxy_for(etcd) as proxy,
        channel_to(proxy.port) as channel,
        await RawClient.connect(proxy.port) as client,
    ):
        kv = rpc_pb2_grpc.KVStub(channel)
        for number in range(3):
            await kv.Put(rpc_pb2.PutRequest(key=PODS + b"%d" % number, value=b"0"))
        listed = await kv.Range(rpc_pb2.RangeRequest(key=PODS, range_end=PODS_END, limit=500))
        assert len(listed.kvs) == 3
        stream = await client.open_watch(
            PODS,
            PODS_END,
            listed.header.revision + 1,
            prev_kv=True,
            progress_notify=True,
            metadata=[("hasleader", "true")],
        )
        for number in range(5):
            pod = listed.kvs[0].key
            before = (await kv.Range(rpc_pb2.RangeRequest(key=pod))).kvs[0]
            wanted = rpc_pb2.Compare(key=pod, target=rpc_pb2.Compare.MOD, mod_revision=before.mod_revision)
            change = rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=pod, value=b"%d" % number))
            assert (await kv.Txn(rpc_pb2.TxnRequest(compare=[wanted], success=[change]))).succeeded
            # A write elsewhere, so that only progress shows that the pods are complete.
            await kv.Put(rpc_pb2.PutRequest(key=b"/registry/leases/x", value=b"x"))
            newest = await kv.Range(rpc_pb2.RangeRequest(key=PODS, range_end=PODS_END, limit=1))
            stream.progress()
            await until_async(
                lambda revision=newest.header.revision: any(  # type: ignore[misc]
                    each.watch_id == -1 and each.header.revision >= revision for each in stream.responses
                ),
                "progress as far as the store was",
            )
            assert stream.values[-1] == b"%d" % number
        old = [event.prev_kv.value for response in stream.responses for event in response.events]
        assert old == [b"0", b"0", b"1", b"2", b"3"]
        await kv.Compact(rpc_pb2.CompactionRequest(revision=newest.header.revision))
        late = client.watch()
        late.create(PODS, PODS_END, 2)
        await until_async(lambda: len(late.responses) >= 2, "an answer about what is compacted")
        # Then it lists again; the watch has missed nothing and continues.
        await kv.Put(rpc_pb2.PutRequest(key=PODS + b"9", value=b"last"))
        await until_async(lambda: stream.values[-1] == b"last", "the event after the compaction")


def test_the_size_of_joined_revisions_is_a_setting(etcd: EtcdServer) -> None:
    async def scenario(bytes_max: int) -> list[int]:
        async with served(etcd, limits=CoreLimits(response_bytes_max=bytes_max)) as (_proxy, store, client):
            first = await store.put(b"k", bytes(1000))
            for _ in range(19):
                await store.put(b"k", bytes(1000))
            stream = client.watch()
            stream.create(b"k", start_revision=first)
            await until_async(lambda: len(stream.values) == 20, "all events")
            return [response.ByteSize() for response in stream.responses if response.events]

    small = run(scenario(4 * 1024))
    assert max(small) <= 4 * 1024 + 100
    assert len(small) >= 5
    assert max(run(scenario(1024 * 1024))) > 4 * 1024 + 100


async def test_a_later_watch_may_add_prev_kv_to_a_running_trunk(etcd: EtcdServer) -> None:
    """A running trunk is upgraded at a boundary between revisions: no watch misses or repeats an event."""
    async with served(etcd) as (_proxy, store, client):
        base = etcd.watchers()
        written = [b"0"]
        await store.put(b"k", b"0")
        without, wanting = client.watch(), client.watch()
        without.create(b"k")
        await without.created()
        for number in range(1, 40):
            if number == 10:
                wanting.create(b"k", prev_kv=True)
                await wanting.created()
            written.append(b"%d" % number)
            await store.put(b"k", written[-1])
        for stream, first in ((without, 1), (wanting, 10)):
            await until_async(lambda s=stream: s.values[-1:] == written[-1:], "the last event")  # type: ignore[misc]
            assert stream.values == written[first:]
        events = [event for response in wanting.responses for event in response.events]
        assert [event.prev_kv.value for event in events] == written[9:-1]
        assert not any(event.HasField("prev_kv") for each in without.responses for event in each.events)
        await until_async(lambda: etcd.watchers() == base + 1, "one upstream watch")
