"""`--namespace`: calls see the same as at a separate etcd, and no key outside the namespace is reachable."""

from __future__ import annotations

import asyncio
import gzip
import subprocess
from collections.abc import Iterator
from typing import Any, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message

from proto.framing import Status, frame
from proto.pb import (
    rpc_pb2,
    rpc_pb2_grpc,
    v3election_pb2,
    v3election_pb2_grpc,
    v3lock_pb2,
    v3lock_pb2_grpc,
)
from proxy.passthrough.settings import PassthroughSettings
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct, proxy_for, served
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess
from tests.store.both import Client, new_state
from tests.store.pair import Pair
from tests.waiting import until_async

NS = b"/ns\xff"
SEEDS = 60
ALL = rpc_pb2.RangeRequest(key=b"\0", range_end=b"\0")
PUT = "/etcdserverpb.KV/Put"


class NamespacedPair(Pair):
    """A pair that skips transactions which delete a range without an end.

    In a namespace the range gets an end: etcd accepts a transaction that puts a key and deletes all keys from an
    earlier one on, but refuses any other transaction that deletes what it puts.
    """

    def ask(self, request: Message) -> None:
        if not (isinstance(request, rpc_pb2.TxnRequest) and deletes_to_the_end(request)):
            super().ask(request)


def deletes_to_the_end(txn: rpc_pb2.TxnRequest) -> bool:
    """Return whether a transaction has a deletion without an end."""
    return any(
        operation.request_delete_range.range_end == b"\0" or deletes_to_the_end(operation.request_txn)
        for operation in (*txn.success, *txn.failure)
    )


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    """An etcd behind a namespaced proxy, and the store, in place of an etcd that contains only the namespace."""
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint, ["--namespace=/ns/"]) as proxy:
        outside, inside, state = Client(etcd.endpoint), Client(proxy.endpoint), new_state()
        for key in (b"/ns", b"/ns0"):
            outside.ask(rpc_pb2.PutRequest(key=key, value=b"outside"))
        state.put(rpc_pb2.PutRequest(key=b"a"))
        state.delete_range(rpc_pb2.DeleteRangeRequest(key=b"a"))
        yield NamespacedPair(inside, state)
        for key in (b"/ns", b"/ns0"):
            (kv,) = outside.kv.Range(rpc_pb2.RangeRequest(key=key)).kvs
            assert (kv.value, kv.version) == (b"outside", 1)
        outside.close()
        inside.close()


@pytest.mark.parametrize("first", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in range(100, 1000, 100))])
def test_random_requests_are_answered_as_without_a_namespace(pair: Pair, first: int) -> None:
    for seed in range(first, first + (SEEDS if first == 0 else 100)):
        pair.run(seed)


async def test_keys_outside_the_namespace_are_unreachable(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, namespace=NS) as proxy, direct(etcd) as store:
        # Before, at, just after and far after the namespace.
        outside = [b"/", b"/ns\xfe", b"/ns", NS, b"/nt", b"zzz", b"\xff"]
        for key in outside:
            await store.put(key, b"outside")
        await store.put(NS + b"a", b"inside")
        async with grpc.aio.insecure_channel(f"{HOST}:{proxy.port}") as channel:
            kv, lease = rpc_pb2_grpc.KVStub(channel), rpc_pb2_grpc.LeaseStub(channel)
            everything = await kv.Range(ALL)
            assert [(each.key, each.value) for each in everything.kvs] == [(b"a", b"inside")]
            for key in outside:
                assert not (await kv.Range(rpc_pb2.RangeRequest(key=key))).kvs
            await lease.LeaseGrant(rpc_pb2.LeaseGrantRequest(ID=7, TTL=1000))
            await store.kv.Put(rpc_pb2.PutRequest(key=b"zzz", lease=7))
            await kv.Put(rpc_pb2.PutRequest(key=b"b", lease=7))
            leased = await lease.LeaseTimeToLive(rpc_pb2.LeaseTimeToLiveRequest(ID=7, keys=True))
            assert list(leased.keys) == [b"b"]
            deleted = await kv.DeleteRange(rpc_pb2.DeleteRangeRequest(key=b"\0", range_end=b"\0", prev_kv=True))
            assert [each.key for each in deleted.prev_kvs] == [b"a", b"b"]
        left = await store.kv.Range(ALL)
        assert [each.key for each in left.kvs] == sorted(outside)


async def test_watches_see_the_namespace_alone(etcd: EtcdServer) -> None:
    async with served(etcd, namespace=NS) as (_, store, client):
        streams = [client.watch() for _ in range(3)]
        for stream in streams:
            stream.create(b"", b"\0", prev_kv=True)
            await stream.created()
        assert etcd.watchers() == 1
        for key in (b"/", NS, b"/nt", NS + b"a"):
            await store.put(key, b"1")
        await store.put(NS + b"a", b"2")
        await store.delete(NS + b"a")
        for stream in streams:
            await until_async(lambda stream=stream: len(stream.values) == 3, "the events")  # type: ignore[misc]
            events = [event for response in stream.responses for event in response.events]
            assert [event.kv.key for event in events] == [b"a"] * 3
            assert [event.prev_kv.value for event in events] == [b"", b"1", b"2"]
            assert [event.prev_kv.key for event in events] == [b"", b"a", b"a"]


async def test_locks_and_elections_work_in_a_namespace(etcd: EtcdServer) -> None:
    async with (
        proxy_for(etcd, namespace=NS) as proxy,
        direct(etcd) as store,
        grpc.aio.insecure_channel(f"{HOST}:{proxy.port}") as channel,
    ):
        lease = await rpc_pb2_grpc.LeaseStub(channel).LeaseGrant(rpc_pb2.LeaseGrantRequest(ID=0x10, TTL=1000))
        locks, elections = v3lock_pb2_grpc.LockStub(channel), v3election_pb2_grpc.ElectionStub(channel)

        async def keys() -> list[bytes]:
            return [kv.key for kv in (await store.kv.Range(ALL)).kvs]

        held = await locks.Lock(v3lock_pb2.LockRequest(name=b"l", lease=lease.ID))
        assert held.key == b"l/10"
        assert await keys() == [NS + b"l/10"]
        await locks.Unlock(v3lock_pb2.UnlockRequest(key=held.key))
        assert await keys() == []
        campaign = v3election_pb2.CampaignRequest(name=b"e", lease=lease.ID, value=b"me")
        leader = (await elections.Campaign(campaign)).leader
        assert (leader.name, leader.key) == (b"e", b"e/10")
        observed = elections.Observe(v3election_pb2.LeaderRequest(name=b"e"))
        assert cast(v3election_pb2.LeaderResponse, await observed.read()).kv.key == b"e/10"
        await elections.Proclaim(v3election_pb2.ProclaimRequest(leader=leader, value=b"still me"))
        assert cast(v3election_pb2.LeaderResponse, await observed.read()).kv.value == b"still me"
        observed.cancel()
        known = (await elections.Leader(v3election_pb2.LeaderRequest(name=b"e"))).kv
        assert (known.key, known.value) == (b"e/10", b"still me")
        assert await keys() == [NS + b"e/10"]
        await elections.Resign(v3election_pb2.ResignRequest(leader=leader))
        assert await keys() == []


async def call(client: RawClient, path: str, body: bytes, *metadata: tuple[str, str]) -> tuple[int | None, str]:
    """Make a call with these bytes and return how it ends."""
    stream = client.call(path, list(metadata))
    stream.send_raw(body, end=True)
    return await stream.end()


async def test_messages_that_cannot_be_translated_are_refused(etcd: EtcdServer) -> None:
    message = rpc_pb2.PutRequest(key=b"a", value=b"v").SerializeToString()
    packed = frame(gzip.compress(message), compressed=True)
    gzipped = ("grpc-encoding", "gzip")
    async with served(etcd, namespace=NS) as (proxy, store, client):
        assert await call(client, PUT, packed, gzipped) == (Status.OK, "")
        kvs = (await store.kv.Range(ALL)).kvs
        assert [(kv.key, kv.value) for kv in kvs] == [(NS + b"a", b"v")]
        for body, metadata, status, text in (
            (packed, (), Status.INTERNAL, "compressed in a call without grpc-encoding"),
            (packed, (("grpc-encoding", "snappy"),), Status.UNIMPLEMENTED, "use identity or gzip"),
            (frame(b"no gzip", compressed=True), (gzipped,), Status.INTERNAL, "broken gzip data"),
            (frame(b"\xff\xff"), (), Status.INTERNAL, "a message as PutRequest, which --namespace requires"),
            (frame(message)[:-1], (), Status.INTERNAL, "the request ended inside a message"),
            (b"\0\xff\xff\xff\xff", (), Status.RESOURCE_EXHAUSTED, "larger than the maximum"),
        ):
            ended = await call(client, PUT, body, *metadata)
            assert ended[0] == status, ended
            assert text in ended[1]
        for path in ("/etcdserverpb.KV/RangeStream", "/etcdserverpb.Lease/Other", "/v3lockpb.Lock/TryLock"):
            assert await call(client, path, frame(message)) == (
                Status.UNIMPLEMENTED,
                f"unknown method {path} under --namespace",
            )
        assert await call(client, "/etcdserverpb.KV/Compact", frame(b"")) == (Status.OK, "")
        assert (await store.kv.Range(ALL)).kvs == kvs
        assert proxy.passthrough.stats.partial_bytes == 0


async def test_unfinished_messages_have_a_bound(etcd: EtcdServer) -> None:
    bound = 50_000
    value = bytes(20_000)
    half = frame(rpc_pb2.PutRequest(key=b"a", value=value).SerializeToString())
    async with proxy_for(etcd, namespace=NS) as proxy:
        proxy.passthrough.settings = PassthroughSettings(partial_bytes_max=bound)
        async with await RawClient.connect(proxy.port) as client:
            stats = proxy.passthrough.stats
            waiting = [client.call(PUT) for _ in range(2)]
            for stream in waiting:
                stream.send_raw(half[:-1])
            await until_async(lambda: stats.partial_bytes == 2 * len(half) - 2, "both to wait")
            third = client.call(PUT)
            third.send_raw(half[: bound - stats.partial_bytes])
            await until_async(lambda: stats.partial_bytes == bound, "the bound to be reached")
            fourth = client.call(PUT)
            fourth.send_raw(half[:1])
            status, text = await fourth.end()
            assert (status, stats.partial_refused) == (Status.RESOURCE_EXHAUSTED, 1)
            assert text == f"watchmux: too many bytes of unfinished messages under --namespace ({bound})"
            third.cancel()
            waiting[0].cancel()
            # While a message is translated it is held twice.
            waiting[1].send_raw(half[-1:], end=True)
            assert await waiting[1].end() == (Status.OK, "")
            await until_async(lambda: stats.partial_bytes == 0, "nothing to be kept")


async def test_large_messages_go_through_small_windows(etcd: EtcdServer) -> None:
    value = bytes(1_400_000)
    options = [("grpc.max_receive_message_length", -1)]
    async with (
        proxy_for(etcd, namespace=NS) as proxy,
        grpc.aio.insecure_channel(f"{HOST}:{proxy.port}", options) as channel,
    ):
        kv = rpc_pb2_grpc.KVStub(channel)
        puts = [kv.Put(rpc_pb2.PutRequest(key=b"%02d" % number, value=value)) for number in range(10)]
        await asyncio.gather(*puts)
        answer = await kv.Range(ALL)
        assert [each.key for each in answer.kvs] == [b"%02d" % number for number in range(10)]
        assert all(each.value == value for each in answer.kvs)
        too_large = rpc_pb2.PutRequest(key=b"a", value=bytes(3_000_000))
        with pytest.raises(grpc.aio.AioRpcError) as refusal:
            await kv.Put(too_large)
        assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert proxy.passthrough.stats.partial_bytes == 0


async def test_http1_is_refused(etcd: EtcdServer) -> None:
    async with proxy_for(etcd, namespace=NS) as proxy:
        reader, writer = await asyncio.open_connection(HOST, proxy.port)
        writer.write(b"POST /v3/kv/range HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 501 Not Implemented\r\n")
        assert b"not served under --namespace" in answer
        writer.close()


async def test_rights_are_those_of_the_keys_at_etcd(etcd: EtcdServer) -> None:
    for arguments in (
        *(("user", "add", "root:root"), ("user", "grant-role", "root", "root")),
        *(("role", "add", "app"), ("role", "grant-permission", "app", "readwrite", "/ns/", "/ns0")),
        *(("user", "add", "ann:ann"), ("user", "grant-role", "ann", "app"), ("auth", "enable")),
    ):
        etcd.ctl(*arguments)
    for namespace, allowed in ((b"/ns/", True), (b"/other/", False)):
        async with proxy_for(etcd, namespace=namespace) as proxy:
            await _as_ann(proxy.port, allowed)


async def _as_ann(port: int, allowed: bool) -> None:
    async with grpc.aio.insecure_channel(f"{HOST}:{port}") as channel:
        login = rpc_pb2.AuthenticateRequest(name="ann", password="ann")
        token = (await rpc_pb2_grpc.AuthStub(channel).Authenticate(login)).token
        metadata: Any = (("token", token),)
        async with await RawClient.connect(port) as client:
            stream = client.watch([("token", token)])
            stream.create(b"a")
            if not allowed:
                assert "permission denied" in (await stream.next()).cancel_reason
                return
            await stream.created()
            await rpc_pb2_grpc.KVStub(channel).Put(rpc_pb2.PutRequest(key=b"a", value=b"1"), metadata=metadata)
            await until_async(lambda: stream.values == [b"1"], "the event")


def test_etcdctl_through_serve(etcd: EtcdServer) -> None:
    with ProxyProcess(etcd.endpoint, ["--namespace=app/"]) as proxy:
        assert etcd.ctl("put", "a", "1", endpoint=proxy.endpoint).stdout == "OK\n"
        assert etcd.ctl("get", "--prefix", "", "--keys-only", endpoint=proxy.endpoint).stdout == "a\n\n"
        assert etcd.ctl("get", "--prefix", "", "--keys-only").stdout == "app/a\n\n"
        command = [str(etcd.binary.etcdctl), f"--endpoints={proxy.endpoint}", "watch", "", "--prefix", "--rev=1"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            assert [watching.stdout.readline() for _ in range(3)] == ["PUT\n", "a\n", "1\n"]
            watching.terminate()
