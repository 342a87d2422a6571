"""A proxy in front of three real members, some of which are cut off, suspended, late, or learners."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, next_to_etcd, proxy_for
from tests.etcd.cluster import Cluster, Member, cluster
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept, split_proxy
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

HASLEADER = [("hasleader", "true")]
NO_LEADER = (Status.UNAVAILABLE, "etcdserver: no leader")


def others(members: Cluster, one: Member) -> list[Member]:
    """Return the other members."""
    return [member for member in members.members if member is not one]


async def _through_a_bad_member(members: Cluster, fault: str) -> None:
    """Under load, the member that serves the proxy's watches fails; no client loses an event or notices."""
    async with proxy_for(members.endpoints) as proxy, await RawClient.connect(proxy.port) as client:
        writer = Writer(members.endpoints)
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start, HASLEADER), start) for start in (0, 1, 0, 2)]
        await writer.more(50)
        assert proxy.upstream.server is not None
        bad = next(member for member in members.members if member.endpoint == proxy.upstream.server[0])
        broken = proxy.engine.stats.upstream_broken
        if fault == "cut off":
            members.cut_off(bad)
        else:
            bad.hold_still()
        await until_async(lambda: proxy.engine.stats.upstream_broken > broken, "the proxy to leave it", 40)
        await writer.more(50)
        streams.append((await client.open_watch(PREFIX, PREFIX_END, 1, HASLEADER), 1))
        streams.append((await client.open_watch(PREFIX, PREFIX_END, 0, HASLEADER), 0))
        await writer.more(10)
        last = await writer.stop()
        good = others(members, bad)
        await all_kept(streams, good[0].endpoint, last)
        bad.go_on()
        members.mend()
        writer = Writer(members.endpoints)
        await writer.more(20)
        await all_kept(streams, good[1].endpoint, await writer.stop())
        assert proxy.engine.core.stats.sessions == len(streams)
        assert proxy.engine.stats.went_back == 0


@pytest.mark.long
@pytest.mark.parametrize("fault", ["cut off", "held still"])
async def test_the_member_in_use_goes_bad_under_load(fault: str) -> None:
    async with cluster() as members:
        await _through_a_bad_member(members, fault)


@pytest.mark.long
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_members_restart_one_after_the_other_under_load(how: str) -> None:
    async with (
        cluster() as members,
        proxy_for(members.endpoints) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        writer = Writer(members.endpoints)
        streams = [
            (await client.open_watch(PREFIX, PREFIX_END, start, metadata), start)
            for start in (0, 1)
            for metadata in ([], HASLEADER)
        ]
        for member in members.members:
            await writer.more(30)
            await asyncio.to_thread(member.stop if how == "stop" else member.kill)
            await writer.more(10)
            streams.append((await client.open_watch(PREFIX, PREFIX_END, 1), 1))
            await asyncio.to_thread(member.start)
        await writer.more(30)
        last = await writer.stop()
        await all_kept(streams, members.members[0].endpoint, last)
        assert proxy.engine.stats.upstream_broken >= 1
        assert proxy.engine.stats.went_back == 0


async def test_a_lagging_member_is_not_a_restored_store() -> None:
    """Watches are at a member that lags, calls go to the leader: "now" is the leader's, and no event is lost."""
    async with cluster() as members:
        leader = await members.leader()
        late = others(members, leader)[0]
        async with (
            # The second endpoint in order is not tried while the first one is there, however late that is.
            split_proxy(
                leader.endpoint, f"{leader.endpoint},{late.endpoint}", upstream=UpstreamSettings(stagger_s=3600)
            ) as proxy,
            direct(leader) as store,
            await RawClient.connect(proxy.port) as client,
        ):
            await until_async(lambda: proxy.upstream.connected, "the watches' connection")
            server = proxy.upstream._calls.places.server
            assert server is not None
            assert server.target.endpoint.text == leader.endpoint
            streams = [(await client.open_watch(PREFIX, PREFIX_END, start), start) for start in (0, 1)]
            await store.put(PREFIX + b"a", b"0")
            # The connection moves to the member that lags, which has not applied the last puts yet.
            members.make_late(late, 0.3)
            for number in range(20):
                last = await store.put(PREFIX + b"a", b"%d" % number)
            await until_async(lambda: len(streams[0][0].values) == 21, "all events")
            proxy.upstream.dialer.prefer(next(t for t in proxy.upstream.dialer.targets if t is not server.target))
            server.connection.close()
            await until_async(
                lambda: (next_to_etcd(proxy).upstream.server or ())[:2] == (late.endpoint, server.version),
                "the late member",
            )
            created = []
            for number in range(20, 30):
                last = await store.put(PREFIX + b"a", b"%d" % number)
                stream = client.watch()
                stream.create(PREFIX, PREFIX_END)
                streams.append((stream, 0))
                created.append((stream, last))
            for stream, acknowledged in created:
                assert (await stream.created()).header.revision >= acknowledged
            last = await store.put(PREFIX + b"a", b"last")
            await all_kept(streams, leader.endpoint, last)
            assert proxy.engine.stats.went_back == 0


async def _lose_quorum(members: Cluster) -> Member:
    """Suspend all members but one; return that one, when it has noticed."""
    left = members.members[0]
    for member in others(members, left):
        member.hold_still()
    await until_async(lambda: not left.has_leader, "the leader to be lost")
    return left


async def test_quorum_is_lost_and_comes_back() -> None:
    """With hasleader: ended, and refused meanwhile. Without: open, silent, and complete afterwards."""
    async with cluster() as members:
        left = members.members[0]
        async with proxy_for(left.endpoint) as proxy, await RawClient.connect(proxy.port) as client:
            told = await client.open_watch(PREFIX, PREFIX_END, 0, HASLEADER)
            quiet = await client.open_watch(PREFIX, PREFIX_END)
            elsewhere = await client.open_watch(b"/q")
            writer = Writer(left.endpoint)
            await writer.more(20)
            await writer.stop()
            await _lose_quorum(members)
            assert await told.raw.end(30) == NO_LEADER
            again = client.watch(HASLEADER)
            again.create(PREFIX, PREFIX_END)
            assert await again.raw.end(5) == NO_LEADER
            # A watch needs no quorum, also in a range without watches; "now" is the member's revision.
            joined = await client.open_watch(PREFIX, PREFIX_END)
            alone = await client.open_watch(b"/r")
            for member in others(members, left):
                member.go_on()
            await until_async(lambda: left.has_leader, "the leader to be back")
            writer = Writer(left.endpoint)
            await writer.more(20)
            last = await writer.stop()
            await all_kept([(quiet, 0), (joined, 0)], left.endpoint, last)
            await until_async(lambda: not proxy.upstream.leaderless, "the proxy to notice")
            back = await client.open_watch(PREFIX, PREFIX_END, 1, HASLEADER)
            await all_kept([(back, 1)], left.endpoint, last)
            assert not elsewhere.raw.over
            assert not alone.raw.over


async def test_a_learner_serves_no_watches_and_does_no_harm() -> None:
    async with cluster(1) as members:
        (voter,) = members.members
        learner = Member("learner")
        await learner.relay.start()
        known = f"{voter.name}={voter.peer_url},learner={learner.peer_url}"
        await asyncio.to_thread(voter.ctl, "member", "add", "learner", "--learner", f"--peer-urls={learner.peer_url}")
        learner.flags = voter.flags | {
            "--name": "learner",
            "--initial-advertise-peer-urls": learner.peer_url,
            "--initial-cluster": known,
            "--initial-cluster-state": "existing",
        }
        members.members.append(learner)
        await asyncio.to_thread(learner.start)
        async with (
            proxy_for(f"{learner.endpoint},{voter.endpoint}") as proxy,
            direct(voter) as store,
            await RawClient.connect(proxy.port) as client,
        ):
            streams = [(await client.open_watch(PREFIX, PREFIX_END, start, HASLEADER), start) for start in (0, 1)]
            for number in range(10):
                last = await store.put(PREFIX + b"a", b"%d" % number)
            await all_kept(streams, voter.endpoint, last)
            server = next_to_etcd(proxy).upstream.server
            assert server is not None
            assert server[0] == voter.endpoint
            await until_async(lambda: all(state.connected for state in proxy.pool.states()), "both members")
            for _ in range(50):
                call = client.call("/etcdserverpb.KV/Put")
                call.send(rpc_pb2.PutRequest(key=b"other").SerializeToString(), end=True)
                assert await call.end() == (0, "")
            # Once promoted, it serves.
            (found,) = [member for member in await members_of(voter) if member["name"] == "learner"]
            await asyncio.to_thread(voter.ctl, "member", "promote", f"{found['ID']:x}")
            await until_async(lambda: not any(state.problem for state in proxy.pool.states()), "the new voter")


async def members_of(member: Member) -> list[dict[str, Any]]:
    """Return a member's list of the cluster's members."""
    answer = await asyncio.to_thread(member.ctl, "member", "list", "--write-out=json")
    members: list[dict[str, Any]] = json.loads(answer.stdout)["members"]
    return members
