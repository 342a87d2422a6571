"""The test harness: a member can be cut off, suspended and made late."""

from __future__ import annotations

import asyncio

import pytest

from tests.etcd.cluster import cluster
from tests.waiting import until_async


@pytest.mark.long
async def test_members_are_cut_off_and_late() -> None:
    async with cluster() as members:
        leader = await members.leader()
        other = next(member for member in members.members if member is not leader)
        members.cut_off(other)
        await until_async(lambda: not other.has_leader, "the one cut off to notice")
        assert leader.is_leader
        await asyncio.to_thread(leader.ctl, "put", "a", "1")
        read = await asyncio.to_thread(other.ctl, "get", "a", "--consistency=s")
        assert read.stdout == ""
        members.mend()
        await until_async(lambda: other.has_leader, "it to be back")
        members.make_late(other, 0.3)
        await asyncio.to_thread(leader.ctl, "put", "b", "1")
        read = await asyncio.to_thread(other.ctl, "get", "b", "--consistency=s")
        assert read.stdout == ""
        assert other.has_leader
