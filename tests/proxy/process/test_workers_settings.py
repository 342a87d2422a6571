"""What single settings mean is the same with --workers: users, namespace, addresses; with real processes and etcds."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import AsyncExitStack

import pytest

from tests.e2e.raw_client import RawClient
from tests.e2e.test_auth import DENIED, put, token_of, with_users
from tests.etcd.server import LOOPBACK, EtcdServer
from tests.proxy_process import ProxyProcess
from tests.waiting import until, until_async

FLAGS = ("--workers=2", "--drain=1s")


def all_run(proxy: ProxyProcess) -> None:
    """Wait until all processes run."""
    until(lambda: len(proxy.processes()) == 3, "all processes")


@pytest.mark.long
async def test_users_and_tokens_hold_at_each_worker(etcd: EtcdServer) -> None:
    with_users(etcd)
    with ProxyProcess(etcd.endpoint, FLAGS) as proxy:
        all_run(proxy)
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await RawClient.connect(proxy.port)) for _ in range(4)]
            token = [("token", await token_of(clients[0], "u1"))]
            base = etcd.watchers()
            streams = [await client.open_watch(b"a/", b"a0", 0, token) for client in clients]
            assert etcd.watchers() == base + 1
            for client in clients:
                other = client.watch(token)
                other.create(b"b")
                assert (await other.next()).cancel_reason == DENIED
            # The hub has no token of its own: the workers' watches bring theirs.
            os.kill(proxy.processes()["hub"], signal.SIGKILL)
            await put(etcd, "a/k", "1")
            for stream in streams:
                await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]
            await asyncio.to_thread(etcd.ctl, "--user=root:r", "role", "revoke-permission", "reader", "a/", "a0")
            for client in clients:
                late = client.watch(token)
                late.create(b"a/", b"a0")
                assert (await late.next()).cancel_reason == DENIED


@pytest.mark.long
def test_namespace_and_addresses_hold_at_each_worker(etcd: EtcdServer) -> None:
    """It listens on all addresses, IPv6 too if there is any; clients learn the advertised one."""
    proxy = ProxyProcess(etcd.endpoint, [*FLAGS, "--namespace=team/", "--advertise-client-url=http://proxy.example:1"])
    proxy.extra.append(f"--listen-addr=:{proxy.port}")
    with proxy:
        all_run(proxy)
        for number in range(4):
            endpoint = f"[::1]:{proxy.port}" if "::1" in LOOPBACK else proxy.endpoint
            etcd.ctl("put", f"key{number}", "v", endpoint=endpoint)
            assert etcd.ctl("get", f"team/key{number}", "--print-value-only").stdout == "v\n"
            assert "http://proxy.example:1" in etcd.ctl("member", "list", endpoint=endpoint).stdout
