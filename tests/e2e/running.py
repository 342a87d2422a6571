"""A proxy inside the test's own event loop, in front of a real etcd, and etcd calls that do not go through it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Final
from weakref import WeakKeyDictionary

import grpc.aio

from coalesce import invariants
from coalesce.limits import CoreLimits
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.server import Proxy, ProxySettings
from tests.e2e.raw_client import RawClient
from tests.etcd.server import EtcdServer
from tests.waiting import until_async


@asynccontextmanager
async def proxy_for(etcd: EtcdServer | str, failures: int = 0, **settings: Any) -> AsyncIterator[Proxy]:
    """Yield a running proxy in front of `etcd` (or of an endpoint), on a free port.

    Its core must keep its invariants, and fail (on purpose) exactly as often as given.
    """
    endpoint = etcd if isinstance(etcd, str) else etcd.endpoint
    if COVERS:
        settings["limits"] = replace(settings.get("limits") or CoreLimits(), covers=COVERS)
    if TIERS == 2 and "watch_endpoints" not in settings:
        async with two_tiers(etcd, failures, **settings) as proxy:
            yield proxy
        return
    proxy = Proxy(ProxySettings(endpoints=endpoint, tune_gc=False, **settings))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
        invariants.check(proxy.engine.core)
        assert proxy.engine.stats.failures == failures


async def change_endpoints(proxy: Proxy, endpoints: Sequence[str], watch_endpoints: Sequence[str] = ()) -> str:
    """Switch to other endpoints unless there is a reason against them, which is returned."""
    problem = await proxy.examine_endpoints(endpoints, watch_endpoints)
    if not problem:
        proxy.set_endpoints(endpoints, watch_endpoints)
    return problem


TIERS: Final = int(os.environ.get("TIERS", "1"))
"""TIERS=2: each proxy of the tests takes its watches from another one that stands in front of the same etcd."""

_HUBS: Final[WeakKeyDictionary[Proxy, Proxy]] = WeakKeyDictionary()


def next_to_etcd(proxy: Proxy) -> Proxy:
    """Return the proxy whose watches are at etcd: the given one, or its hub if there are two tiers."""
    return _HUBS.get(proxy, proxy)


COVERS: tuple[bytes, ...] = (os.environb[b"COVER"],) if b"COVER" in os.environb else ()
"""COVER=PREFIX: each proxy of the tests has this cover; COVER= covers all keys. Some tests count upstream watches."""

HUB_SETTINGS: Final = ("upstream", "upstream_tls", "limits", "credentials", "upstream_cert", "reader")
"""Settings that both tiers have."""


def _has_tried(proxy: Proxy) -> bool:
    return proxy.upstream.connected or any(target.turn for target in proxy.upstream.dialer.targets)


@asynccontextmanager
async def two_tiers(etcd: EtcdServer | str, failures: int = 0, **settings: Any) -> AsyncIterator[Proxy]:
    """Yield a proxy that takes its watches from another one, its hub; calls go to `etcd`."""
    endpoint = etcd if isinstance(etcd, str) else etcd.endpoint
    ours = {name: value for name, value in settings.items() if name in HUB_SETTINGS}
    if limits := ours.get("limits"):
        # The leaf watches all its ranges on one stream.
        ours["limits"] = replace(limits, watches_per_session_max=CoreLimits().watches_per_session_max)
    with tempfile.TemporaryDirectory(prefix="watchmux-hub-") as directory:
        path = f"{directory}/hub"
        hub = Proxy(ProxySettings(endpoints=endpoint, tune_gc=False, path=path, **ours))
        await hub.start()
        try:
            # Before, it would refuse the leaf, which would then pause before it tries again.
            await until_async(lambda: _has_tried(hub), "the hub to find its etcd, or to fail")
            async with proxy_for(endpoint, failures, watch_endpoints=f"http+unix://{path}", **settings) as proxy:
                _HUBS[proxy] = hub
                yield proxy
                del _HUBS[proxy]
        finally:
            await hub.stop()
            invariants.check(hub.engine.core)
            assert not hub.engine.stats.failures


class Etcd:
    """Unary calls direct to etcd."""

    def __init__(self, endpoint: str) -> None:
        self._channel = grpc.aio.insecure_channel(endpoint)
        self.kv = rpc_pb2_grpc.KVStub(self._channel)

    async def put(self, key: bytes, value: bytes = b"v") -> int:
        """Put and return the revision."""
        answer = await self.kv.Put(rpc_pb2.PutRequest(key=key, value=value))
        return int(answer.header.revision)

    async def put_many(self, keys: Sequence[bytes], value: bytes = b"v") -> int:
        """Put several keys in one revision and return it."""
        puts = [rpc_pb2.RequestOp(request_put=rpc_pb2.PutRequest(key=key, value=value)) for key in keys]
        answer = await self.kv.Txn(rpc_pb2.TxnRequest(success=puts))
        return int(answer.header.revision)

    async def delete(self, key: bytes, range_end: bytes = b"") -> int:
        """Delete and return the revision."""
        answer = await self.kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=key, range_end=range_end))
        return int(answer.header.revision)

    async def compact(self, revision: int) -> None:
        """Compact at a revision."""
        await self.kv.Compact(rpc_pb2.CompactionRequest(revision=revision, physical=True))

    async def revision(self) -> int:
        """The store's revision."""
        answer = await self.kv.Range(rpc_pb2.RangeRequest(key=b"\0", limit=1, keys_only=True))
        return int(answer.header.revision)


@asynccontextmanager
async def direct(etcd: EtcdServer | str) -> AsyncIterator[Etcd]:
    """Yield calls direct to `etcd` (or an endpoint)."""
    client = Etcd(etcd if isinstance(etcd, str) else etcd.endpoint)
    try:
        yield client
    finally:
        await client._channel.close()


@asynccontextmanager
async def served(etcd: EtcdServer, failures: int = 0, **settings: Any) -> AsyncIterator[tuple[Proxy, Etcd, RawClient]]:
    """Yield a proxy as `proxy_for` does, calls straight to `etcd`, and a client of the proxy."""
    async with (
        proxy_for(etcd, failures, **settings) as proxy,
        direct(etcd) as store,
        await RawClient.connect(proxy.port) as client,
    ):
        yield proxy, store, client
