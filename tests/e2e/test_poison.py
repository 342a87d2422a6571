"""A watch request that ends its stream at etcd is refused as etcd refuses it, without effect on other clients."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any

import pytest

from proto.framing import Status
from tests.e2e.raw_client import RawClient, WatchStream
from tests.e2e.running import direct, proxy_for, served
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

TOO_LARGE = re.compile(r"grpc: received message larger than max \(\d+ vs\. 589824\)")
KEY = b"k" * 600_000
"""More than etcd takes with --max-request-bytes=65536, which is 512 KiB above that; less than the listener takes."""


@pytest.fixture
def narrow() -> Iterator[EtcdServer]:
    """Run an etcd that accepts small requests only."""
    with EtcdServer(extra=["--max-request-bytes=65536"]) as etcd:
        yield etcd


def run(story: Coroutine[Any, Any, None]) -> None:
    """Run a scenario with a time limit."""

    async def bounded() -> None:
        async with asyncio.timeout(40):
            await story

    asyncio.run(bounded())


def has_values(watch: WatchStream, values: list[bytes]) -> bool:
    """Whether a watch has received exactly these."""
    return watch.values == values


@pytest.mark.parametrize("start", [0, 1], ids=["now", "past"])
async def test_a_create_that_is_too_large_for_etcd_ends_as_directly(narrow: EtcdServer, start: int) -> None:
    async with proxy_for(narrow) as proxy, direct(narrow) as store:
        await store.put(b"live", b"0")
        for port in (narrow.client_port, proxy.port):
            async with await RawClient.connect(port) as client, await RawClient.connect(proxy.port) as other:
                live = await other.open_watch(b"live")
                watch = client.watch()
                await watch.create_large(KEY, start)
                status, text = await watch.raw.end()
                assert status == Status.RESOURCE_EXHAUSTED
                assert TOO_LARGE.fullmatch(text)
                assert watch.responses == []
                await store.put(b"live", b"1")
                await until_async(partial(has_values, live, [b"1"]), "the event of the other client")
        assert proxy.engine.stats.upstream_broken == 0


async def test_many_creates_that_are_too_large_cost_others_nothing(narrow: EtcdServer) -> None:
    async with (
        proxy_for(narrow) as proxy,
        direct(narrow) as store,
        await RawClient.connect(proxy.port) as other,
        await RawClient.connect(proxy.port) as client,
    ):
        live = await other.open_watch(b"live")
        trunk_stream = next(iter(proxy.upstream._state.streams()))
        for number in range(20):
            watch = client.watch()
            await watch.create_large(KEY + b"%d" % number, 1)
            await store.put(b"live", b"%d" % number)
            assert (await watch.raw.end())[0] == Status.RESOURCE_EXHAUSTED
        await until_async(lambda: live.values == [b"%d" % number for number in range(20)], "all events")
        # The live watch's stream at etcd has never ended.
        assert list(proxy.upstream._state.streams()) == [trunk_stream]


async def test_a_large_create_that_etcd_takes_is_served(etcd: EtcdServer) -> None:
    key = b"k" * 1_000_000
    async with served(etcd) as (_proxy, store, client):
        watch = client.watch()
        await watch.create_large(key)
        await watch.created()
        await store.put(key, b"1")
        await until_async(lambda: watch.values == [b"1"], "the event")


async def test_the_listener_refuses_tokens_with_control_characters(etcd: EtcdServer) -> None:
    async with served(etcd) as (proxy, store, client):
        live = await client.open_watch(b"live")
        bad = client.watch([("token", "a\x01b")])
        bad.create(b"live")
        await until_async(lambda: bad.raw.over, "the reset")
        # PROTOCOL_ERROR, as etcd resets it.
        assert bad.raw.reset == 1
        await store.put(b"live", b"1")
        await until_async(lambda: live.values == [b"1"], "the event")
        assert proxy.engine.stats.upstream_broken == 0
