"""The endpoints change while clients are connected: watches move, calls go on, and another cluster is refused."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from grpc_health.v1 import health_pb2  # type: ignore[import-untyped]  # the package has no type stubs

from proxy.admin.health import WATCH
from tests.e2e.raw_client import RawClient
from tests.e2e.running import change_endpoints, proxy_for
from tests.etcd.binaries import EtcdBinary
from tests.etcd.cluster import cluster
from tests.etcd.server import EtcdServer, free_port
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.proxy.admin.test_health import SERVING, status_of
from tests.proxy.cli.test_cli_serve import served
from tests.waiting import until, until_async

RANGE = "/etcdserverpb.KV/Range"


async def test_watches_move_to_other_members_unnoticed() -> None:
    async with (
        cluster() as members,
        proxy_for(members.members[0].endpoint) as proxy,
        await RawClient.connect(proxy.port) as client,
    ):
        first, *others = members.members
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        health = client.call(WATCH.decode())
        health.send(health_pb2.HealthCheckRequest().SerializeToString())
        writer = Writer(members.endpoints)
        streams = [(await client.open_watch(PREFIX, PREFIX_END, start, []), start) for start in (0, 1)]
        await writer.more(30)
        assert await change_endpoints(proxy, [member.endpoint for member in others]) == ""
        addresses = {member.endpoint for member in others}
        await until_async(
            lambda: proxy.upstream.server is not None and proxy.upstream.server[0] in addresses, "watches to move"
        )
        await until_async(
            lambda: {state.endpoint for state in proxy.pool.states()} == addresses, "calls to go elsewhere"
        )
        # The member that was removed from the endpoints may stop.
        await asyncio.to_thread(first.stop)
        await writer.more(30)
        await all_kept(streams, others[0].endpoint, await writer.stop())
        assert [status_of(message) for message in health.messages] == [SERVING]
        assert proxy.engine.stats.upstream_broken == 0
        assert proxy.engine.core.stats.sessions == len(streams)


async def test_endpoints_of_another_cluster_are_refused(etcd: EtcdServer, etcd_binary: EtcdBinary) -> None:
    with EtcdServer(etcd_binary, ["--initial-cluster-token=another"]) as other:
        async with proxy_for(etcd) as proxy:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            problem = await change_endpoints(proxy, [etcd.endpoint, other.endpoint])
            assert problem.startswith(f"{other.endpoint} belongs to another cluster")
            assert [state.endpoint for state in proxy.pool.states()] == [etcd.endpoint]
            assert [endpoint.text for endpoint in proxy.endpoints] == [etcd.endpoint]


async def test_unreachable_new_endpoints_do_not_replace_the_old(etcd: EtcdServer) -> None:
    """The old endpoints stay in use, and the list may be corrected at any time, even while no endpoint works."""
    nowhere = f"127.0.0.1:{free_port()}"
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        for _ in range(2):
            assert await change_endpoints(proxy, [nowhere]) == ""
        stream = client.watch()
        stream.create(b"e")
        assert (await stream.next()).created
        assert (await client.unary(RANGE, b"")).status is not None
        assert {state.endpoint for state in proxy.pool.states()} == {nowhere, etcd.endpoint}
        assert proxy.health.serving
        await asyncio.to_thread(etcd.stop)
        await until_async(lambda: not proxy.health.serving, "the proxy to notice")
        await asyncio.to_thread(etcd.start)
        assert await change_endpoints(proxy, [f"localhost:{etcd.endpoint.rpartition(':')[2]}"]) == ""
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd again")
        await asyncio.to_thread(etcd.ctl, "put", "e", "1")
        assert [event.kv.value for event in (await stream.next()).events] == [b"1"]


def test_sighup_replaces_the_endpoints(tmp_path: Path, etcd: EtcdServer) -> None:
    file = tmp_path / "watchmux.toml"
    file.write_text(f'[upstream]\nendpoints = ["{etcd.endpoint}"]\n')
    address = f"localhost:{etcd.endpoint.rpartition(':')[2]}"
    with served(tmp_path, f"--config={file}") as proxy:
        until(lambda: proxy.get("/readyz")[0] == 200, "the proxy to find etcd")
        file.write_text(f'[upstream]\nendpoints = ["{address}"]\n')
        proxy.process.send_signal(signal.SIGHUP)
        until(lambda: [line for line in proxy.lines() if line["msg"] == "endpoints updated"], "the new ones")
        until(lambda: f'endpoint="{address}"}} 1.0' in proxy.get("/metrics")[1], "the connection")
        until(lambda: f'endpoint="{etcd.endpoint}"' not in proxy.get("/metrics")[1], "the old one to leave")
        file.write_text("[upstream]\n")
        proxy.process.send_signal(signal.SIGHUP)
        refusal = until(
            lambda: [line for line in proxy.lines() if line["msg"] == "some changes need a restart"], "the refusal"
        )
        assert refusal[0]["settings"] == ["upstream.endpoints"]
        assert f'endpoint="{address}"}} 1.0' in proxy.get("/metrics")[1]
        assert proxy.end() == 0
