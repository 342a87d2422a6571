"""How one watch affects the stream that it shares with others, at a real etcd."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from proto.framing import Status
from tests.e2e.running import direct
from tests.etcd.server import EtcdServer
from tests.upstream.recorder import Recorder, watching
from tests.upstream.stories import Opened
from tests.waiting import until_async

TOO_LARGE = re.compile(r"grpc: received message larger than max \(\d+ vs\. 589824\)")
KEY = b"k" * 600_000
"""More than etcd accepts with --max-request-bytes=65536: its limit is 512 KiB above that."""


@pytest.mark.parametrize("backfill", [False, True], ids=["trunk", "backfill"])
async def test_create_that_is_too_large_is_lost_alone(backfill: bool) -> None:
    with EtcdServer(extra=["--max-request-bytes=65536"]) as etcd:
        async with direct(etcd) as writer:
            seen = Recorder()
            live = Opened(b"live")
            async with watching(etcd.endpoint, seen) as client:
                await seen.open(client, live)
                large = [Opened(KEY + b"%d" % number, start_revision=1, is_backfill=backfill) for number in range(3)]
                for each in large:
                    client.open(each)
                put = [await writer.put(b"live") for _ in range(10)]
                await until_async(lambda: len(seen.losses) == len(large), "the losses")
                assert {id(watch) for watch, _, _ in seen.losses} == set(map(id, large))
                assert {status for _, status, _ in seen.losses} == {Status.RESOURCE_EXHAUSTED}
                assert all(TOO_LARGE.fullmatch(text) for _, _, text in seen.losses)
                await until_async(lambda: seen.revisions(live) == put, "the events")
                assert (seen.breaks, client.stream_count, client.watch_count) == (0, 1, 1)


async def test_a_stream_that_one_token_breaks_is_lost_alone(etcd: EtcdServer) -> None:
    """The listener refuses such a token; this test shows the effect of one that still reaches etcd."""
    async with direct(etcd) as writer:
        seen = Recorder()
        live, other, bad = Opened(b"live"), Opened(b"other", token=b"good"), Opened(b"live", token=b"a\x01b")
        async with watching(etcd.endpoint, seen) as client:
            for watch in (live, other, bad):
                client.open(watch)
            await until_async(lambda: seen.losses, "the loss")
            [(lost, status, text)] = seen.losses
            assert (lost, status) == (bad, Status.UNAUTHENTICATED)
            assert "PROTOCOL_ERROR" in text
            put = [await writer.put(b"live"), await writer.put(b"other")]
            await until_async(lambda: [*seen.revisions(live), *seen.revisions(other)] == put, "the events")
            assert seen.breaks == 0


async def test_a_large_delete_comes_whole_and_others_overtake_it(etcd: EtcdServer) -> None:
    """20,000 events of one revision are one message of etcd, read in pieces."""
    async with direct(etcd) as writer:
        seen = Recorder()
        many, other = Opened(b"many/", b"many0"), Opened(b"other")
        keys = [b"many/%06d" % number for number in range(20_000)]
        async with watching(etcd.endpoint, seen) as client:
            for first in range(0, len(keys), 100):
                await writer.put_many(keys[first : first + 100])
            await seen.open(client, many, other)
            deleted = await writer.delete(b"many/", b"many0")
            last = await writer.put(b"other")
            await until_async(lambda: seen.revisions(other) == [last], "the event of the other watch")
            await until_async(lambda: seen.revisions(many), "the deletes")
            [response] = [response for response in seen.of(many) if response.events]
            assert seen.revisions(many) == [deleted] * len(keys)
            assert not response.fragment


async def test_a_catch_up_of_many_revisions_is_a_run_of_whole_ones(etcd: EtcdServer) -> None:
    async with direct(etcd) as writer:
        seen = Recorder()
        puts = [await writer.put_many([b"k%d" % number for number in range(50)], bytes(100)) for _ in range(100)]
        past = Opened(b"k", b"l", start_revision=2)
        async with watching(etcd.endpoint, seen) as client:
            client.open(past)
            await until_async(lambda: len(seen.revisions(past)) == 5000, "the events")
            assert seen.revisions(past) == [revision for revision in puts for _ in range(50)]
            run = [response for response in seen.of(past) if response.events]
            assert len(run) > 1
            assert [response.fragment for response in run] == [True] * (len(run) - 1) + [False]
            for before, after in pairwise(run):
                assert before.events[-1].revision < after.events[0].revision
