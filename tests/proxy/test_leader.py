"""A cluster that loses its leader: sessions that asked to be told are, the others wait for its return."""

from __future__ import annotations

import asyncio

from proto.framing import Status
from tests.proxy.raw_client import RawClient
from tests.proxy.running import direct, proxy_for
from tests.proxy.scenario import run
from tests.upstream.test_watch_etcd import Member
from tests.waiting import until_async


def test_the_leader_is_lost_and_comes_back() -> None:
    one, two = Member(), Member()
    one.members = two.members = (one, two)

    async def scenario() -> None:
        await asyncio.gather(asyncio.to_thread(one.start), asyncio.to_thread(two.start))
        async with (
            proxy_for(f"{one.endpoint},{two.endpoint}") as proxy,
            direct(one) as store,
            await RawClient.connect(proxy.port) as client,
        ):
            first = await store.put(b"a", b"1")
            told, patient = client.watch([("hasleader", "true")]), client.watch()
            for stream in (told, patient):
                stream.create(b"a", start_revision=first)
                await stream.created()
                await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]  # bound
            await asyncio.to_thread(two.kill)
            assert await told.raw.end(20) == (Status.UNAVAILABLE, "etcdserver: no leader")
            # A watch needs no leader: what is there can be watched.
            another = client.watch()
            another.create(b"a", start_revision=first)
            another.create(b"a")
            await another.created(20)
            await until_async(lambda: another.values == [b"1"], "the past")
            await asyncio.to_thread(two.start)
            await until_async(lambda: not proxy.upstream.leaderless, "the leader's return", 20)
            await store.put(b"a", b"2")
            await until_async(lambda: patient.values == [b"1", b"2"], "the next event")
            await until_async(lambda: another.values == [b"1", b"2", b"2"], "the next event, twice")
            again = client.watch([("hasleader", "true")])
            again.create(b"a")
            await again.created()
            assert not patient.raw.over

    try:
        run(scenario())
    finally:
        one.__exit__(None, None, None)
        two.__exit__(None, None, None)
