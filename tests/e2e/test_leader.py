"""A cluster that loses its leader: sessions with `hasleader` are ended, the others wait for its return."""

from __future__ import annotations

import asyncio

from proto.framing import Status
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for
from tests.etcd.cluster import cluster
from tests.waiting import until_async

HAS_LEADER = [("hasleader", "true")]
NO_LEADER = (Status.UNAVAILABLE, "etcdserver: no leader")


async def calls_without_a_leader(client: RawClient) -> None:
    """Unary calls, with and without `hasleader`; there is no leader."""
    for path in ("/etcdserverpb.KV/Range", "/etcdserverpb.KV/Put", "/etcdserverpb.Lease/LeaseGrant"):
        refused = await client.unary(path, b"", HAS_LEADER)
        assert (refused.status, refused.text) == NO_LEADER
    # A call without `hasleader` that needs no leader is answered.
    request = rpc_pb2.RangeRequest(key=b"a", serializable=True).SerializeToString()
    answer = await client.unary("/etcdserverpb.KV/Range", request)
    assert rpc_pb2.RangeResponse.FromString(await answer.next()).kvs[0].value == b"1"


async def served_with_a_leader(client: RawClient) -> None:
    """Wait until a watch that needs a leader is served: on a busy machine two members may lose theirs once more."""
    while True:
        stream = client.watch(HAS_LEADER)
        stream.create(b"a")
        await until_async(lambda s=stream: s.raw.messages or s.raw.over, "an answer")  # type: ignore[misc]  # bound
        if not stream.raw.over:
            return
        assert await stream.raw.end() == NO_LEADER


async def test_the_leader_is_lost_and_comes_back() -> None:
    async with (
        cluster(2) as members,
        proxy_for(members.endpoints) as proxy,
        direct(members.members[0]) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        two = members.members[1]
        first = await store.put(b"a", b"1")
        told, patient = client.watch(HAS_LEADER), client.watch()
        for stream in (told, patient):
            stream.create(b"a", start_revision=first)
            await stream.created()
            await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]  # bound
        grant = rpc_pb2.LeaseGrantRequest(TTL=600, ID=7).SerializeToString()
        assert (await client.unary("/etcdserverpb.Lease/LeaseGrant", grant)).status == Status.OK
        # One at each member, in turn.
        kept = [client.call("/etcdserverpb.Lease/LeaseKeepAlive", HAS_LEADER) for _ in range(2)]
        for call in kept:
            call.send(rpc_pb2.LeaseKeepAliveRequest(ID=7).SerializeToString())
            assert rpc_pb2.LeaseKeepAliveResponse.FromString(await call.next()).TTL == 600
        await asyncio.to_thread(two.kill)
        assert await told.raw.end() == NO_LEADER
        assert [await call.end() for call in kept].count(NO_LEADER) == 1
        await calls_without_a_leader(client)
        # A watch without `hasleader` is served without a leader.
        another = client.watch()
        another.create(b"a", start_revision=first)
        another.create(b"a")
        await another.created()
        await until_async(lambda: another.values == [b"1"], "the past")
        await asyncio.to_thread(two.start)
        await until_async(lambda: not proxy.upstream.leaderless, "the leader's return")
        await store.put(b"a", b"2")
        await until_async(lambda: patient.values == [b"1", b"2"], "the next event")
        await until_async(lambda: another.values == [b"1", b"2", b"2"], "the next event, twice")
        await served_with_a_leader(client)
        assert not patient.raw.over
