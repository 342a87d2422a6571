"""Helpers of the fault tests: a proxy whose calls and watches take different routes to etcd, and a check of streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest

from coalesce import report
from proxy.server import Proxy
from tests.e2e import running
from tests.e2e.judging import assert_kept
from tests.e2e.raw_client import WatchStream
from tests.e2e.running import Etcd, proxy_for
from tests.waiting import LIMIT_S, until_async

PREFIX, PREFIX_END = b"/p/", b"/p0"


def also_with_a_cover(*marks: pytest.MarkDecorator) -> list[pytest.MarkDecorator]:
    """Return a module's marks: its tests run without a cover, and, marked so, with one of all keys."""
    ways = [pytest.param(running.COVERS, id="trunks"), pytest.param((b"",), id="a cover", marks=marks)]
    return [pytest.mark.usefixtures("covers"), pytest.mark.parametrize("covers", ways, indirect=True)]


@asynccontextmanager
async def split_proxy(calls: str, watches: str, **settings: Any) -> AsyncIterator[Proxy]:
    """Yield a proxy that sends calls to the endpoints `calls` and watches at the endpoints `watches`."""
    async with proxy_for(calls, watch_endpoints=watches, **settings) as proxy:
        yield proxy


def bookmark(proxy: Proxy, key: bytes) -> int:
    """Return the revision that the trunk of a key is complete through."""
    (trunk,) = [trunk for trunk in report.trunks(proxy.engine.core, 100) if trunk.key == key]
    return trunk.next_revision - 1


def reached(stream: WatchStream, revision: int) -> bool:
    """Return whether a stream has received the event of a revision."""
    return any(event.kv.mod_revision >= revision for response in stream.responses for event in response.events)


async def all_kept(
    streams: Sequence[tuple[WatchStream, int]], endpoint: str, last: int, limit_s: float = LIMIT_S
) -> None:
    """Wait until every stream, given with its start revision, has the event `last`; then check them all."""
    for stream, _ in streams:
        await until_async(
            lambda s=stream: reached(s, last) or s.raw.over,  # type: ignore[misc]  # bound
            f"the event of revision {last}",
            limit_s,
        )
        assert not stream.raw.over, (stream.raw.status, stream.raw.text)
    await assert_kept(list(streams), endpoint, PREFIX, PREFIX_END, last)


class Writer:
    """Puts one key after the other at any endpoint that accepts it, through all faults, until stopped."""

    def __init__(self, endpoints: str, pause_s: float = 0.0) -> None:
        """`pause_s`: the pause between two puts, where their number does not matter."""
        self._stores = [Etcd(endpoint) for endpoint in endpoints.split(",")]
        self._pause_s = pause_s
        self.stopping = False
        self.done = 0
        self.last = 0
        """The revision of the newest put that was acknowledged."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        number = turn = 0
        while not self.stopping:
            number += 1
            store = self._stores[turn % len(self._stores)]
            try:
                async with asyncio.timeout(1):
                    self.last = await store.put(PREFIX + b"%d" % (number % 5), b"%d" % number)
                self.done += 1
                await asyncio.sleep(self._pause_s)
            except (grpc.aio.AioRpcError, TimeoutError):
                turn += 1
                await asyncio.sleep(0.01)

    async def more(self, count: int, limit_s: float = 30) -> None:
        """Wait until so many more puts have succeeded."""
        goal = self.done + count
        await until_async(lambda: self.done >= goal, f"{count} more puts", limit_s)

    async def stop(self) -> int:
        """Stop; return the revision of the last put."""
        self.stopping = True
        await self._task
        for store in self._stores:
            await store._channel.close()
        return self.last
