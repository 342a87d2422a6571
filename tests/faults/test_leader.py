"""Streams with `hasleader` and without watches: they end when the leader is lost, as at etcd."""

from __future__ import annotations

import asyncio

import pytest

from proto.framing import Status
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.cluster import Cluster, Member, cluster
from tests.waiting import until_async

HASLEADER = [("hasleader", "true")]
NO_LEADER = (Status.UNAVAILABLE, "etcdserver: no leader")


async def lose_quorum(members: Cluster, left: Member) -> None:
    """Suspend all members but one, until that one has noticed."""
    for member in members.members:
        if member is not left:
            member.hold_still()
    await until_async(lambda: not left.has_leader, "the leader to be lost")


@pytest.mark.parametrize(
    "binary",
    [pytest.param(binary, id=binary.name, marks=[pytest.mark.long] if n else []) for n, binary in enumerate(etcds())],
)
async def test_streams_without_a_watch_end_with_the_leader(binary: EtcdBinary) -> None:
    """Streams open when it is lost, and streams opened before the proxy knows; no watch is needed."""
    async with cluster(binary=binary) as members:
        left = members.members[0]
        async with (
            proxy_for(left.endpoint) as proxy,
            proxy_for(left.endpoint) as unasked,
            await RawClient.connect(proxy.port) as client,
            await RawClient.connect(unasked.port) as late,
        ):
            await until_async(lambda: proxy.upstream.connected and unasked.upstream.connected, "etcd")
            bare, patient = client.watch(HASLEADER), client.watch()
            await until_async(lambda: proxy.upstream.stream_count == 1, "the stream that asks for a leader")
            assert await asyncio.to_thread(left.watchers) == 0
            await lose_quorum(members, left)
            assert await bare.raw.end(30) == NO_LEADER
            assert await client.watch(HASLEADER).raw.end(10) == NO_LEADER
            # This proxy does not know yet.
            assert await late.watch(HASLEADER).raw.end(30) == NO_LEADER
            for member in members.members:
                member.go_on()
            await until_async(lambda: left.has_leader, "the leader to be back")
            for each, port_client in ((proxy, client), (unasked, late)):
                await until_async(lambda each=each: not each.upstream.leaderless, "the proxy to notice")  # type: ignore[misc]  # bound
                await port_client.open_watch(b"a", metadata=HASLEADER)
            assert not patient.raw.over
