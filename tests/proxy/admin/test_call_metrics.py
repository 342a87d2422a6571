"""Calls by method and code, under the names of go-grpc-prometheus."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # the package has no type stubs
from prometheus_client.parser import text_string_to_metric_families

from proto.framing import Status
from proto.http2 import ErrorCode, Stream
from proto.pb import rpc_pb2, rpc_pb2_grpc, v3election_pb2, v3lock_pb2
from proxy.admin.monitor import Monitor
from proxy.listening.call_metrics import CODES, METHODS, UNKNOWN, MethodCalls
from proxy.server import Proxy
from tests.e2e.running import proxy_for
from tests.etcd.server import EtcdServer
from tests.proxy.admin.test_metrics import faults, scrape, watch
from tests.waiting import until_async


def handled(proxy: Proxy) -> dict[tuple[str, str], int]:
    """Return the ended calls by method and code."""
    text = scrape(Monitor(proxy, ""))
    assert not faults(text_string_to_metric_families(text))
    return {
        (sample.labels["grpc_method"], sample.labels["grpc_code"]): int(sample.value)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == "grpc_server_handled_total"
    }


@asynccontextmanager
async def proxy_and_channel(etcd: EtcdServer) -> AsyncIterator[tuple[Proxy, grpc.aio.Channel]]:
    """Yield a proxy that has found etcd, and a channel to it."""
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        async with grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}") as channel:
            yield proxy, channel


async def test_calls_are_counted_by_method_and_code(etcd: EtcdServer) -> None:
    async with proxy_and_channel(etcd) as (proxy, channel):
        kv = rpc_pb2_grpc.KVStub(channel)
        for _ in range(3):
            await kv.Range(rpc_pb2.RangeRequest(key=b"a"))
        with pytest.raises(grpc.aio.AioRpcError):
            await kv.Put(rpc_pb2.PutRequest(key=b"a", lease=12345))
        assert handled(proxy) == {("Range", "OK"): 3, ("Put", "NotFound"): 1}
        methods = proxy.listener.calls.methods
        assert methods[b"/etcdserverpb.KV/Range"].started == sum(methods[b"/etcdserverpb.KV/Range"].buckets) == 3
        assert 0 < methods[b"/etcdserverpb.KV/Range"].seconds < 60


async def test_a_client_that_leaves_is_a_canceled_call(etcd: EtcdServer) -> None:
    async with proxy_and_channel(etcd) as (proxy, _channel):
        leaving, calls = await watch(proxy, 2)
        assert proxy.listener.calls.methods[b"/etcdserverpb.Watch/Watch"].started == 2
        assert handled(proxy) == {}
        calls[0].cancel()
        await until_async(lambda: handled(proxy) == {("Watch", "Canceled"): 1}, "the cancelled call")
        await leaving.close()
        await until_async(lambda: handled(proxy) == {("Watch", "Canceled"): 2}, "the lost connection")


async def test_methods_that_clients_make_up_share_one_label(etcd: EtcdServer) -> None:
    async with proxy_and_channel(etcd) as (proxy, channel):
        for number in range(50):
            call: Any = channel.unary_unary(f"/made.Up/Method{number}")
            with pytest.raises(grpc.aio.AioRpcError):
                await call(b"")
        assert list(proxy.listener.calls.methods) == [UNKNOWN]
        assert handled(proxy) == {("unknown", "Unimplemented"): 50}


async def test_the_self_probe_is_not_a_call_of_a_client(etcd: EtcdServer) -> None:
    async with proxy_and_channel(etcd) as (proxy, _channel):
        await until_async(lambda: proxy.engine.core.header is not None, "a header")
        proxy.probe.attempt()
        await until_async(lambda: proxy.probe._run is not None and proxy.probe._run.answered, "the answer")
        assert proxy.listener.calls.methods == {}


def test_a_call_is_counted_once_however_it_ends() -> None:
    counts = MethodCalls(lambda: 7.0)
    stream = Stream(1, 0, 0)
    stream.observer, stream.opened_at = counts, 4.0
    stream.report_end([(b"grpc-status", b"5")])
    stream.report_reset(ErrorCode.CANCEL)
    stream.report_end(())
    assert sum(counts.codes) == counts.codes[Status.NOT_FOUND] == 1
    assert counts.seconds == 3.0
    for text in (b"", b"17", b"-1", b"9" * 5000, "²".encode()):
        stream.observer = counts
        stream.report_end([(b"grpc-status", text)])
    assert counts.codes[Status.UNKNOWN] == 5


def methods_of(file: FileDescriptor) -> dict[bytes, tuple[bool, bool]]:
    return {
        f"/{service.full_name}/{method.name}".encode(): (method.client_streaming, method.server_streaming)
        for service in file.services_by_name.values()
        for method in service.methods
    }


def test_every_method_of_etcd_has_its_type() -> None:
    known: dict[bytes, Any] = {}
    for module in (rpc_pb2, v3lock_pb2, v3election_pb2, health_pb2):
        known |= methods_of(module.DESCRIPTOR)
    types = {(False, False): "unary", (False, True): "server_stream", (True, True): "bidi_stream"}
    assert {path: types[streaming] for path, streaming in known.items()} == {
        path: kind for path, kind in METHODS.items() if path != UNKNOWN
    }
    assert len(CODES) == len(Status)
