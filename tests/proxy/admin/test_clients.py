"""The list of clients, connections by protocol, and the log of failed handshakes."""

from __future__ import annotations

import asyncio
import io
import socket
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from structlog.testing import capture_logs

from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.admin import clients
from proxy.admin.clients import byte_counts
from proxy.admin.monitor import DETAILS_S, Monitor
from proxy.admin.snapshot import SnapshotSource
from proxy.admin.views import ClientView
from proxy.listening import turns
from proxy.listening.handshake import FAILURES_LOG_S
from proxy.measuring.status import render_clients
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.server import EtcdServer
from tests.proxy.admin.test_metrics import scrape, watch
from tests.upstream.certificates import Certificates, make_certificates
from tests.waiting import run, until_async
from upstream.tls import server_context


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("tls"))


async def listed(proxy: Proxy) -> list[ClientView]:
    return (await Monitor(proxy, "").clients()).clients


async def test_a_client_is_listed_with_what_it_does(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        channel, calls = await watch(proxy, 3)
        async with grpc.aio.insecure_channel(
            f"127.0.0.1:{proxy.port}", options=[("grpc.primary_user_agent", "small/1.0")]
        ) as other:
            await rpc_pb2_grpc.KVStub(other).Range(rpc_pb2.RangeRequest(key=b"a"))
            busy, idle = await listed(proxy)
        assert (busy.watches, busy.sessions, busy.streams, busy.lagging, busy.tls) == (3, 3, 3, 0, "")
        assert (idle.watches, idle.sessions) == (0, 0)
        assert busy.peer.startswith("127.0.0.1:")
        assert busy.user_agent.startswith("grpc-python")
        assert idle.user_agent.startswith("small/1.0")
        assert busy.received_bytes is not None
        assert busy.received_bytes > 0
        assert busy.sent_bytes is not None
        shown = io.StringIO()
        Console(file=shown, width=200).print(render_clients(await Monitor(proxy, "").clients()))
        assert busy.peer in shown.getvalue()
        assert len((await Monitor(proxy, "").clients(1)).clients) == 1
        del calls
        await channel.close()


async def test_the_list_is_made_over_several_turns(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that leaves meanwhile is not an error."""
    monkeypatch.setattr(clients, "PART", 2)
    monkeypatch.setattr(clients, "VIEWS_PART", 1)
    async with proxy_for(etcd) as proxy:
        connected = [await RawClient.connect(proxy.port) for _ in range(5)]
        for client in connected:
            for _ in range(3):
                await client.open_watch(b"a")
        turned = 0

        async def count() -> None:
            nonlocal turned
            while True:
                await asyncio.sleep(0)
                turned += 1
                if turned == 8:
                    next(iter(proxy.listener.connections)).abort()

        counting = asyncio.ensure_future(count())
        assert len(await listed(proxy)) in (4, 5)
        counting.cancel()
        # Fifteen streams and five connections in parts of two, then four or five views one by one.
        assert turned >= 10
        for client in connected:
            await client.close()


async def test_a_snapshot_of_many_connections_is_taken_in_parts(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with proxy_for(etcd) as proxy:
        connected = [await RawClient.connect(proxy.port) for _ in range(5)]
        await connected[4].open_watch(b"a")
        await connected[4].open_watch(b"a")
        source = SnapshotSource(proxy, "")
        assert source.take().connection_sessions == 2
        for _ in range(3):
            await connected[0].open_watch(b"a")
        monkeypatch.setattr(turns, "PART", 2)
        # This one is the last that was found; the next has what this one began to find.
        assert source.take().connection_sessions == 2
        await until_async(lambda: not source._looking, "the end of the look")
        assert (source.take().connection_sessions, source.take().connection_streams) == (3, 3)
        for client in connected:
            await client.close()


async def test_a_worker_does_not_list_its_clients_for_each_report(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        monitor = Monitor(proxy, "")
        assert (await monitor.report("worker-1")).details.clients == []
        channel, calls = await watch(proxy, 3)
        report = await monitor.report("worker-1")
        assert (report.snapshot.watches, report.details.clients) == (3, [])
        monitor._details_at -= DETAILS_S
        assert [client.watches for client in (await monitor.report("worker-1")).details.clients] == [3]
        del calls
        await channel.close()


async def test_the_client_that_lags_longest_is_first(etcd: EtcdServer) -> None:
    async with proxy_for(etcd) as proxy:
        await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
        many, many_calls = await watch(proxy, 3)
        # Other arguments, so that it is another connection.
        one = grpc.aio.insecure_channel(f"127.0.0.1:{proxy.port}", [("grpc.primary_user_agent", "other")])
        one_call: Any = rpc_pb2_grpc.WatchStub(one).Watch()
        await one_call.write(rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"a")))
        assert (await one_call.read()).created
        assert [each.watches for each in await listed(proxy)] == [3, 1]
        call = next(each for each in proxy.watches.calls if each.connection.sessions == 1)
        assert call.session is not None
        call.session.lagging_since = asyncio.get_running_loop().time() - 5
        first = (await listed(proxy))[0]
        call.session.lagging_since = None
        assert (first.watches, first.behind_s >= 5) == (1, True)
        del many_calls
        await many.close()
        await one.close()


def test_the_kernel_counts_the_bytes_of_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"x" * 1000)
            assert accepted.recv(1000, socket.MSG_WAITALL)
            assert byte_counts(accepted)[1] == 1000
    left, right = socket.socketpair()
    with left, right:
        assert byte_counts(left) == byte_counts(None) == (None, None)


@pytest.mark.parametrize("tls", [True, False])
def test_connections_are_counted_by_protocol_and_tls(tls: bool, etcd: EtcdServer, files: Certificates) -> None:
    root = grpc.ssl_channel_credentials(Path(files.ca).read_bytes())

    async def scenario() -> dict[tuple[str, str], float]:
        inward = server_context(files.server_cert, files.server_key) if tls else None
        async with proxy_for(etcd, tls=inward) as proxy:
            await until_async(lambda: proxy.health.serving, "the proxy to find etcd")
            address = f"localhost:{proxy.port}"
            channel: Any = grpc.aio.secure_channel(address, root) if tls else grpc.aio.insecure_channel(address)
            async with channel:
                await rpc_pb2_grpc.KVStub(channel).Range(rpc_pb2.RangeRequest(key=b"a"))
                assert (await listed(proxy))[0].tls.startswith("TLSv1.") == tls
                return {
                    (sample.labels["protocol"], sample.labels["tls"]): sample.value
                    for family in text_string_to_metric_families(scrape(Monitor(proxy, "")))
                    for sample in family.samples
                    if sample.name == "watchmux_listener_connections" and sample.value
                }

    assert run(scenario()) == {("http2", str(tls).lower()): 1}


def test_failed_handshakes_are_logged_with_peer_and_reason(etcd: EtcdServer, files: Certificates) -> None:
    async def scenario() -> list[Any]:
        inward = server_context(files.server_cert, files.server_key, files.ca)
        async with proxy_for(etcd, tls=inward) as proxy:
            with capture_logs() as lines:
                for _ in range(20):
                    with socket.create_connection(("127.0.0.1", proxy.port)) as client:
                        client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                        await asyncio.sleep(0)
                await until_async(lambda: proxy.listener.stats.handshakes_failed == 20, "all failures")
            return [line for line in lines if "handshake" in line["event"]]

    lines = run(scenario())
    assert 1 <= len(lines) < 20, f"at most one in {FAILURES_LOG_S} s"
    assert lines[0]["log_level"] == "info"
    assert lines[0]["peer"].startswith("127.0.0.1:")
    assert lines[0]["problem"] == "the client does not speak TLS"
    assert lines[0]["failed"] == 1


def test_failed_handshakes_say_that_the_own_certificate_expired(etcd: EtcdServer, files: Certificates) -> None:
    async def scenario() -> Any:
        inward = server_context(files.server_cert, files.server_key, files.ca)
        async with proxy_for(etcd, tls=inward) as proxy:
            inward.expires_at = 1.0
            with capture_logs() as lines, socket.create_connection(("127.0.0.1", proxy.port)) as client:
                client.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
                await until_async(lambda: proxy.listener.stats.handshakes_failed == 1, "the failure")
            return next(line for line in lines if "handshake" in line["event"])

    line = run(scenario())
    assert line["log_level"] == "error"
    assert line["problem"].endswith("; the certificate of --cert-file has expired: renew the file")
