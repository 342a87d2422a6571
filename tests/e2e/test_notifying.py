"""The proxy sends progress_notify at the interval that etcd was started with, on every etcd."""

from __future__ import annotations

import asyncio
import statistics
from contextlib import AsyncExitStack, ExitStack

from proto.pb import rpc_pb2
from tests.e2e.raw_client import HOST, RawClient, WatchStream
from tests.e2e.running import Etcd, direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.store.running import RunningStore
from tests.waiting import until_async
from upstream.store.server import StoreSettings

INTERVAL_S = 1.0
NOPUT = rpc_pb2.WatchCreateRequest.NOPUT


class Listener:
    """Records when and with which revision a watch was notified."""

    def __init__(self, stream: WatchStream) -> None:
        self.stream = stream
        self.at: list[float] = []
        self.revisions: list[int] = []
        self.task = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        while True:
            response = await self.stream.next(60)
            assert not response.events, response
            assert response.watch_id == 0, response
            self.at.append(asyncio.get_running_loop().time())
            self.revisions.append(response.header.revision)

    async def notified(self, times: int) -> None:
        """Wait for so many notifications, at etcd's interval on average, with revisions that never decrease."""
        await until_async(lambda: len(self.at) >= times or self.task.done(), f"{times} notifications", 6 * times)
        assert not self.task.done(), self.task.exception()
        gaps = [later - earlier for earlier, later in zip(self.at, self.at[1:], strict=False)]
        assert statistics.median(gaps) < 1.5 * INTERVAL_S, gaps
        assert self.revisions == sorted(self.revisions)


async def watchers(port: int, endpoint: str) -> None:
    """Open watches without events: of a quiet range, and of one with an event every 50 ms that their filter drops."""
    async with direct(endpoint) as store, await RawClient.connect(port) as client:
        quiet, filtered = client.watch(), client.watch()
        quiet.create(b"quiet", progress_notify=True)
        filtered.create(b"busy", progress_notify=True, filters=[NOPUT])
        for stream in (quiet, filtered):
            await stream.created()
        listeners = [Listener(quiet), Listener(filtered)]
        tasks = [asyncio.create_task(write(store)), *(listener.task for listener in listeners)]
        try:
            for listener in listeners:
                await listener.notified(4)
            await until_async(lambda: min(each.revisions[-1] for each in listeners) > 20, "the revisions of the writes")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def write(store: Etcd) -> None:
    """Write to the busy range."""
    while True:
        await store.put(b"busy", b"")
        pause = asyncio.Event()
        asyncio.get_running_loop().call_later(0.05, pause.set)
        await pause.wait()


async def ask(port: int, endpoint: str) -> None:
    """Request progress on a stream of two quiet watches, after writes elsewhere."""
    async with direct(endpoint) as store, await RawClient.connect(port) as client:
        stream = client.watch()
        for key in (b"quiet", b"k"):
            stream.create(key)
            await stream.created()
        for _ in range(3):
            revision = await store.put(b"elsewhere", b"")
            stream.progress()
            response = await stream.next()
            assert response.watch_id == -1
            assert response.header.revision >= revision


def test_old_etcd_progress_is_answered_within_its_interval() -> None:
    """An old etcd does not order its progress answers with the events, only its notifications."""

    async def scenario(endpoints: list[str]) -> None:
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(proxy_for(endpoint)) for endpoint in endpoints]
            await asyncio.gather(*(ask(proxy.port, each) for proxy, each in zip(proxies, endpoints, strict=True)))

    with ExitStack() as stack:
        old = [binary for binary in etcds() if not binary.ordered_progress]
        run(scenario([stack.enter_context(etcd_with_interval(binary)).endpoint for binary in old]))


def etcd_with_interval(binary: EtcdBinary) -> EtcdServer:
    """An etcd that notifies at the interval."""
    return EtcdServer(binary, [f"--experimental-watch-progress-notify-interval={INTERVAL_S:g}s"])


def test_notifications_come_at_the_interval_of_etcd() -> None:
    """On each etcd, on the bundled store, and through two proxies in a row; all at the same time."""

    async def scenario(endpoints: list[str]) -> None:
        async with AsyncExitStack() as stack:
            proxies = [await stack.enter_async_context(proxy_for(endpoint)) for endpoint in endpoints]
            second = await stack.enter_async_context(proxy_for(f"{HOST}:{proxies[0].port}"))
            fronts = [*zip(proxies, endpoints, strict=True), (second, endpoints[0])]
            await asyncio.gather(*(watchers(proxy.port, endpoint) for proxy, endpoint in fronts))

    with ExitStack() as stack:
        servers = [stack.enter_context(etcd_with_interval(binary)) for binary in etcds()]
        store = stack.enter_context(RunningStore(StoreSettings(progress_notify_interval_s=INTERVAL_S)))
        run(scenario([*(server.endpoint for server in servers), store.endpoint]))
