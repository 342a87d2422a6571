"""Clients that cancel thousands of calls at once, after deadlines or on their own, stay connected.

Flood limits count only the frames that a client's unanswered calls do not explain (proto/http2/limits.py).
"""

from __future__ import annotations

import asyncio
import subprocess
from collections import Counter
from collections.abc import Awaitable
from typing import Any

import grpc
import grpc.aio
import pytest

from proto.pb import rpc_pb2, rpc_pb2_grpc
from tests.clients.clientv3 import Clientv3
from tests.clients.libraries import LIBRARIES
from tests.e2e.held import held
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import LIMIT_S

CALLS = 3_000
KEY = b"mine"


def assert_not_cut_off(proxy: ProxyProcess) -> None:
    """Check that no connection was closed for a client's fault; an event shows that the watch on it goes on."""
    assert proxy.metric("watchmux_connections_failed_total") == 0


async def code_of(call: Awaitable[Any]) -> grpc.StatusCode:
    """Wait for a call and return its status."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    except asyncio.CancelledError:
        return grpc.StatusCode.CANCELLED
    return grpc.StatusCode.OK


@pytest.mark.parametrize("pattern", ["one deadline", "short deadlines", "cancelled at once", "cancelled later"])
async def test_calls_given_up_at_once_keep_the_connection(pattern: str) -> None:
    """gRPC's C core, which Python, Ruby, C++ and others share."""
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        async with grpc.aio.insecure_channel(proxy.endpoint) as channel:
            kv = rpc_pb2_grpc.KVStub(channel)
            watch: Any = rpc_pb2_grpc.WatchStub(channel).Watch()
            await watch.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=KEY)))
            await watch.read()
            with held(etcd):
                timeout_s = {"one deadline": 1.5, "short deadlines": 0.03}.get(pattern, 30.0)
                calls = [kv.Range(rpc_pb2.RangeRequest(key=KEY), timeout=timeout_s) for _ in range(CALLS)]
                ends = [asyncio.ensure_future(code_of(call)) for call in calls]
                if pattern == "cancelled later":
                    # All of them have been sent.
                    await asyncio.wait(ends, timeout=0.5)
                if pattern.startswith("cancelled"):
                    for call in calls:
                        call.cancel()
                codes = Counter(await asyncio.gather(*ends))
            wanted = grpc.StatusCode.CANCELLED if "cancelled" in pattern else grpc.StatusCode.DEADLINE_EXCEEDED
            assert codes == {wanted: CALLS}
            await kv.Put(rpc_pb2.PutRequest(key=KEY, value=b"1"), timeout=30)
            assert len((await asyncio.wait_for(watch.read(), LIMIT_S)).events) == 1
            watch.cancel()
        assert_not_cut_off(proxy)


def test_node_gives_up_calls_and_keeps_its_connection() -> None:
    library = next(each for each in LIBRARIES if each.name == "node-etcd3")
    library.install()
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        command = library.command(HOST, proxy.port, program="node_calls.mjs")
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as node:
            assert node.stdin is not None
            assert node.stdout is not None
            assert node.stdout.readline() == "watching\n"
            with held(etcd):
                node.stdin.write("1500\n")
                node.stdin.flush()
                assert node.stdout.readline() == f"{CALLS} ended by their deadline\n"
            with grpc.insecure_channel(etcd.endpoint) as channel:
                rpc_pb2_grpc.KVStub(channel).Put(rpc_pb2.PutRequest(key=KEY, value=b"1"), timeout=10)
            assert node.stdout.readline() == "event\n"
            assert_not_cut_off(proxy)
            node.stdin.close()
            assert node.wait(20) == 0


@pytest.mark.long
def test_clientv3_gives_up_calls_and_keeps_its_connection() -> None:
    with EtcdServer() as etcd, ProxyProcess(etcd.endpoint) as proxy:
        with Clientv3("watch", proxy.endpoint, "--key=mine") as watch:
            watch.until(lambda line: line.get("created"), "the watch", 60)
            with held(etcd), Clientv3("load", proxy.endpoint, f"--workers={CALLS}", "--calls=2", "--timeout=1") as load:
                load.wait(60)
            with grpc.insecure_channel(etcd.endpoint) as channel:
                rpc_pb2_grpc.KVStub(channel).Put(rpc_pb2.PutRequest(key=KEY, value=b"1"), timeout=10)
            watch.until(lambda line: line.get("events"), "the event")
        assert_not_cut_off(proxy)
