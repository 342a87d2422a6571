"""Histories of many clients that write and read the same few keys through several proxies at once."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc.aio

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.linearizability import History, Operation
from tests.waiting import until_async
from upstream.connecting import connect
from upstream.connection import ClientConnection, NotSent
from upstream.endpoints import parse_endpoint
from upstream.errors import CallFailed, Unreachable
from upstream.unary import call_unary

RANGE = "/etcdserverpb.KV/Range"
PUT = "/etcdserverpb.KV/Put"
KEYS = 4
WRITE_SHARE = 0.15
LIMIT_S = 30.0
"""Longer than etcd's own limit of 7 s: the proxy learns from that answer which member is cut off."""


class Recorder:
    """Clients of some proxies, and the history of their operations. Use as an async context manager."""

    def __init__(self, ports: Sequence[int], clients: int, seed: int = 0) -> None:
        self.history = History()
        self.failed = 0
        """Operations that got no answer; they are not in the history, but their writes may be in its truth."""
        self._ports = ports
        self._clients = clients
        self._random = random.Random(seed)
        self._stack = AsyncExitStack()
        self._values = 0
        self._stopped = False

    async def __aenter__(self) -> Recorder:
        self._group = await self._stack.enter_async_context(asyncio.TaskGroup())
        for number in range(self._clients):
            self._group.create_task(self._client(f"client {number}", self._ports[number % len(self._ports)]))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._stopped = True
        await self._stack.aclose()

    @property
    def count(self) -> int:
        """Operations answered."""
        return len(self.history.operations)

    async def more(self, count: int, limit_s: float = 150) -> None:
        """Wait for so many further operations."""
        wanted = self.count + count
        await until_async(lambda: self.count >= wanted, f"{wanted} operations", limit_s)

    async def _client(self, name: str, port: int) -> None:
        connection: ClientConnection | None = None
        while not self._stopped:
            if connection is None or not connection.healthy:
                with contextlib.suppress(Unreachable):
                    connection = await connect(parse_endpoint(f"127.0.0.1:{port}"), None)
            try:
                if connection is not None:
                    self.history.add(await self._operation(name, connection))
            except (CallFailed, NotSent):
                self.failed += 1
                await asyncio.sleep(0.01)
        if connection is not None:
            connection.close()

    async def _operation(self, client: str, connection: ClientConnection) -> Operation:
        key = b"key-%d" % self._random.randrange(KEYS)
        writes = self._random.random() < WRITE_SHARE
        value: bytes | None = None
        if writes:
            self._values += 1
            value = b"%d" % self._values
            message = rpc_pb2.PutRequest(key=key, value=value).SerializeToString()
        else:
            message = rpc_pb2.RangeRequest(key=key).SerializeToString()
        began = time.perf_counter()
        answer, _ = await call_unary(connection, PUT if writes else RANGE, message, timeout_s=LIMIT_S)
        ended = time.perf_counter()
        if writes:
            revision = rpc_pb2.PutResponse.FromString(answer).header.revision
        else:
            found = rpc_pb2.RangeResponse.FromString(answer)
            revision = found.header.revision
            value = found.kvs[0].value if found.kvs else None
        return Operation(began, ended, revision, writes, key, value, client)


async def truth_of(endpoint: str) -> dict[bytes, list[tuple[int, bytes]]]:
    """Return all writes of the keys, as etcd itself reports them."""
    truth: dict[bytes, list[tuple[int, bytes]]] = defaultdict(list)
    async with grpc.aio.insecure_channel(endpoint) as channel:
        now = await rpc_pb2_grpc.KVStub(channel).Range(rpc_pb2.RangeRequest(key=b"x", limit=1))
        watch = rpc_pb2_grpc.WatchStub(channel).Watch()
        create = rpc_pb2.WatchCreateRequest(key=b"key-", range_end=b"key.", start_revision=1)
        await watch.write(rpc_pb2.WatchRequest(create_request=create))
        done = rpc_pb2_grpc.KVStub(channel)
        end = (await done.Put(rpc_pb2.PutRequest(key=b"key-end"))).header.revision
        assert end > now.header.revision
        while True:
            response = await watch.read()
            assert isinstance(response, rpc_pb2.WatchResponse)
            for event in response.events:
                truth[event.kv.key].append((event.kv.mod_revision, event.kv.value))
                if event.kv.mod_revision >= end:
                    watch.cancel()
                    return truth
