"""Calls under `--namespace` with compressed, large or unread messages: bounded by size in memory, and in turns."""

from __future__ import annotations

import asyncio
import gzip
import signal
from functools import cache
from typing import Any

import grpc.aio
import pytest

from proto.framing import Status
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.passthrough import translating
from proxy.passthrough.settings import PassthroughSettings
from proxy.passthrough.translating import TranslatingPassthrough
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient, RawStream
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.etcd.server import HOST, EtcdServer
from tests.waiting import until_async

NS = b"/ns/"
KV = "/etcdserverpb.KV/"
GZIP = [("grpc-encoding", "gzip"), ("grpc-accept-encoding", "gzip")]
MIB = 1 << 20


def packed(message: bytes) -> bytes:
    """Return a message framed and compressed."""
    data = gzip.compress(message)
    return b"\1" + len(data).to_bytes(4, "big") + data


@cache
def put(size: int) -> bytes:
    return packed(rpc_pb2.PutRequest(key=b"k", value=bytes(size)).SerializeToString())


async def refused(client: RawClient, size: int) -> tuple[int | None, str]:
    call = client.call(f"{KV}Put", GZIP)
    call.send_raw(put(size), end=True)
    return await call.end()


async def test_requests_are_bounded_as_etcd_bounds_them(etcd: EtcdServer) -> None:
    """A request that would decompress beyond etcd's limit is refused before that, with etcd's status."""
    async with proxy_for(etcd, namespace=NS) as proxy, await RawClient.connect(proxy.port) as client:
        bound = proxy.passthrough.settings.translated_request_bytes_max
        assert bound == 1536 * 1024 + 512 * 1024
        assert (await refused(client, 1_500_000))[0] == Status.OK
        for _ in range(10):
            status, text = await refused(client, 60 * MIB)
            assert status == Status.RESOURCE_EXHAUSTED
            assert text == f"gRPC message larger than the maximum (inflated, more vs. {bound} bytes)"
        stats = proxy.passthrough.stats
        assert stats.refused_at["translated_request_bytes_max"] == 10
        assert stats.partial_bytes == 0


async def test_unread_answers_count_by_their_translated_size(etcd: EtcdServer) -> None:
    """etcd answers with gzip: 20 responses of a megabyte each arrive as 20 KB and wait in the proxy as 20 MB."""
    settings = PassthroughSettings(unread_bytes_per_connection_max=15 * MIB, share_reads=False)
    async with proxy_for(etcd, namespace=NS, passthrough=settings) as proxy, direct(etcd) as store:
        await store.put(NS + b"k", bytes(MIB))
        async with await RawClient.connect(proxy.port, window=1000) as client:
            stats = proxy.passthrough.stats
            calls = [unread(client) for _ in range(10)]
            await until_async(lambda: stats.unread_bytes > 10 * MIB - 200_000, "all to be translated")
            calls += [unread(client) for _ in range(10)]
            await until_async(lambda: stats.refused_at["unread_bytes_per_connection_max"] >= 5, "too much")
            assert stats.unread_bytes <= 15 * MIB
            for call in calls:
                if not call.over:
                    call.cancel()
            await until_async(lambda: stats.unread_bytes == stats.partial_bytes == 0, "all to be released")


def unread(client: RawClient) -> RawStream:
    """Make a call whose response the client does not read."""
    call = client.call(f"{KV}Range", GZIP)
    call.taking = False
    call.send_raw(packed(rpc_pb2.RangeRequest(key=b"k").SerializeToString()), end=True)
    return call


def test_large_response_is_translated_in_turns(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is translated piece by piece, and the loop is free in between."""
    turns: list[int] = []
    turn = TranslatingPassthrough._turn

    def counted(self: TranslatingPassthrough) -> None:
        turn(self)
        turns.append(self.stats.partial_bytes)

    # One step per turn.
    monkeypatch.setattr(translating, "TURN_S", 0.0)
    monkeypatch.setattr(TranslatingPassthrough, "_turn", counted)

    async def scenario() -> None:
        async with proxy_for(etcd, namespace=NS) as proxy, direct(etcd) as store:
            await asyncio.gather(*[store.put(NS + b"%04d" % place, bytes(10_000)) for place in range(1000)])
            options: Any = [("grpc.max_receive_message_length", -1)]
            async with grpc.aio.insecure_channel(f"{HOST}:{proxy.port}", options) as channel:
                everything = rpc_pb2.RangeRequest(key=b"\0", range_end=b"\0")
                answer = await rpc_pb2_grpc.KVStub(channel).Range(everything)
            assert [kv.key for kv in answer.kvs] == [b"%04d" % place for place in range(1000)]
            await until_async(lambda: proxy.passthrough.stats.partial_bytes == 0, "all to be released")

    run(scenario())
    assert len(turns) > 400
    # Both the original message and its translated part are counted meanwhile.
    assert max(turns) > 19_000_000


def test_few_large_messages_are_translated_at_a_time(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many gzip responses that arrive at once, few are decompressed at a time; cancelled calls leave the queue."""
    most = 0
    held = True
    turn = TranslatingPassthrough._turn

    def measured(self: TranslatingPassthrough) -> None:
        nonlocal most
        if held:
            asyncio.get_running_loop().call_later(0.001, self._turn)
            return
        turn(self)
        most = max(most, self.stats.partial_bytes)

    monkeypatch.setattr(translating, "TURN_S", 0.0)
    monkeypatch.setattr(TranslatingPassthrough, "_turn", measured)

    async def scenario() -> None:
        nonlocal held
        async with (
            proxy_for(etcd, namespace=NS, passthrough=PassthroughSettings(share_reads=False)) as proxy,
            direct(etcd) as store,
            await RawClient.connect(proxy.port, window=1000) as client,
        ):
            passthrough = proxy.passthrough
            assert isinstance(passthrough, TranslatingPassthrough)
            await store.put(NS + b"k", bytes(MIB))
            calls = [unread(client) for _ in range(40)]
            await until_async(lambda: len(passthrough._working) == 40, "all to be queued")
            calls[-1].cancel()
            calls[-2].cancel()
            await until_async(lambda: len(passthrough._working) == 38, "the cancelled calls to leave the queue")
            held = False
            await until_async(lambda: passthrough.stats.unread_bytes > 38 * MIB - 200_000, "all to be translated")
            assert not passthrough._large
            assert not passthrough._working
            for call in calls[:-2]:
                call.cancel()
            await until_async(lambda: passthrough.stats.unread_bytes == 0, "all to be released")

    run(scenario())
    # Eight of them twice, and the first bytes of the others.
    assert most < 8 * 2.2 * MIB + 40 * 200_000


async def test_requests_not_accepted_by_etcd_are_counted(etcd: EtcdServer) -> None:
    """Bytes that wait for an etcd that does not read are counted by their size in memory, until their calls end."""
    assert etcd.process is not None
    async with proxy_for(etcd, namespace=NS) as proxy, await RawClient.connect(proxy.port) as client:
        stats = proxy.passthrough.stats
        assert (await refused(client, 1000))[0] == Status.OK
        etcd.process.send_signal(signal.SIGSTOP)
        try:
            calls = [client.call(f"{KV}Put", GZIP) for _ in range(20)]
            for call in calls:
                call.send_raw(put(MIB), end=True)
            await until_async(lambda: waiting(proxy) > 18 * MIB, "all to be changed")
            for call in calls:
                call.cancel()
            await until_async(lambda: waiting(proxy) == 0, "all to be released")
            assert stats.resend_bytes == 0
        finally:
            etcd.process.send_signal(signal.SIGCONT)


def waiting(proxy: Proxy) -> int:
    """Bytes of requests that etcd has not accepted."""
    return proxy.passthrough.stats.partial_bytes


async def test_connection_with_most_unfinished_bytes_loses_its_calls(etcd: EtcdServer) -> None:
    """A client that reaches the total bound does not block the calls of others."""
    half = rpc_pb2.PutRequest(key=b"k", value=bytes(50_000)).SerializeToString()
    settings = PassthroughSettings(partial_bytes_max=200_000)
    async with (
        proxy_for(etcd, namespace=NS, passthrough=settings) as proxy,
        await RawClient.connect(proxy.port) as greedy,
        await RawClient.connect(proxy.port) as other,
    ):
        calls = [greedy.call(f"{KV}Put") for _ in range(3)]
        for call in calls:
            call.send_raw(b"\0" + len(half).to_bytes(4, "big") + half[:-1])
        await until_async(lambda: waiting(proxy) > 150_000, "three halves")
        assert (await other.unary(f"{KV}Put", half)).status == Status.OK
        assert {(await call.end())[0] for call in calls} == {Status.RESOURCE_EXHAUSTED}
        assert proxy.passthrough.stats.partial_refused == 3
        await until_async(lambda: waiting(proxy) == 0, "all to be released")
