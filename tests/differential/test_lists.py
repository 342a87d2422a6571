"""Clients that work like kube-apiservers, directly and through the proxy: list in pages, watch, crash, come back.

Three of them do the same at the same time, so that their lists share reads. Each byte of the answers is compared.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from proto.framing import Status
from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient, RawStream, WatchStream
from tests.e2e.running import Etcd, direct, proxy_for
from tests.etcd.server import EtcdServer
from tests.waiting import until_async

RANGE = "/etcdserverpb.KV/Range"
PREFIX, END = b"/registry/pods/", b"/registry/pods0"
PODS = 120
PAGE = 50
CLIENTS = 3


@dataclass
class ApiServer:
    """One client: all that it was answered, in order."""

    port: int
    client: RawClient | None = None
    answers: list[object] = field(default_factory=list)
    watch: WatchStream | None = None
    seen: int = 0
    """Events of all watches."""

    async def start(self) -> None:
        """Connect."""
        self.client = await RawClient.connect(self.port)

    async def crash(self) -> None:
        """Lose the connection in the middle of a list and of a watch."""
        assert self.client is not None
        self._list(PREFIX, 0)
        await self.client.close()

    def _list(self, key: bytes, revision: int, *, serializable: bool = False, count_only: bool = False) -> RawStream:
        assert self.client is not None
        call = self.client.call(RANGE)
        request = rpc_pb2.RangeRequest(
            key=key, range_end=END, limit=PAGE, revision=revision, serializable=serializable, count_only=count_only
        )
        call.send(request.SerializeToString(), end=True)
        return call

    async def page(self, key: bytes, revision: int, **options: bool) -> rpc_pb2.RangeResponse | None:
        """Read and record one page; None: it was refused."""
        call = self._list(key, revision, **options)
        status, text = await call.end()
        self.answers.append((status, text, call.headers, call.trailers, tuple(call.messages)))
        return rpc_pb2.RangeResponse.FromString(call.messages[0]) if status == Status.OK else None

    async def list_all(self) -> int:
        """List in pages of one revision, as client-go's reflector; return the revision."""
        page = await self.page(PREFIX, 0)
        assert page is not None
        revision = page.header.revision
        while page.more:
            page = await self.page(page.kvs[-1].key + b"\0", revision)
            assert page is not None
        await self.page(PREFIX, 0, count_only=True)
        await self.page(PREFIX, revision, serializable=True)
        return revision

    async def watch_from(self, revision: int) -> None:
        """Watch from a revision on."""
        assert self.client is not None
        self.watch = self.client.watch()
        self.watch.create(PREFIX, END, revision, prev_kv=True, progress_notify=True)
        await self.watch.created()

    async def events(self, count: int) -> None:
        """Wait for so many events of the watch, and record them."""
        watch = self.watch
        assert watch is not None
        await until_async(lambda: sum(len(one.events) for one in watch.responses) >= count, f"{count} events")
        found = [event.SerializeToString() for one in watch.responses for event in one.events]
        assert len(found) == count
        self.answers.append(found)
        self.seen += count


async def _write(store: Etcd, first: int) -> int:
    """Change some pods; return the number of events."""
    for number in range(first, first + 10):
        await store.put(PREFIX + b"pod-%04d" % (number * 7 % PODS), b"changed %d" % number)
    await store.delete(PREFIX + b"pod-%04d" % first)
    return 11


async def _live(servers: list[ApiServer], store: Etcd) -> None:
    for _ in range(2):
        await asyncio.gather(*(server.start() for server in servers))
        revisions = await asyncio.gather(*(server.list_all() for server in servers))
        await asyncio.gather(
            *(server.watch_from(revision + 1) for server, revision in zip(servers, revisions, strict=True))
        )
        count = await _write(store, len(servers[0].answers))
        await asyncio.gather(*(server.events(count) for server in servers))
        await asyncio.gather(*(server.crash() for server in servers))
        await _write(store, 3)
    # After a compaction, what was listed before is refused, and the servers list again.
    await asyncio.gather(*(server.start() for server in servers))
    await store.compact(await store.revision())
    await asyncio.gather(*(server.page(PREFIX + b"pod-0050", revisions[0]) for server in servers))
    await asyncio.gather(*(server.page(PREFIX, 10**9) for server in servers))
    await asyncio.gather(*(server.list_all() for server in servers))
    for server in servers:
        assert server.client is not None
        await server.client.close()


async def test_kubernetes_lists_and_watches_are_equal(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy, direct(etcd) as store:
        for number in range(PODS):
            await store.put(PREFIX + b"pod-%04d" % number, b"%d" % number * 20)
        servers = [ApiServer(port) for port in (etcd.client_port, proxy.port) for _ in range(CLIENTS)]
        await _live(servers, store)
        plain, *others = servers
        assert plain.seen == 22
        for server in others:
            assert server.answers == plain.answers
        stats = proxy.passthrough.stats
        assert stats.range_calls_upstream < stats.range_calls, "lists shared reads"
