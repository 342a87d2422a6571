"""`measure`, `--observe`, `demo` and `status` with TLS and users; they notice an etcd that is not the proxy's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
from aiohttp import web

from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.cli.group import run
from proxy.measuring.load.prometheus import MetricsReading, NoMetrics
from proxy.measuring.measure import Measurement, others_of
from proxy.measuring.observe import Observation, check_members
from tests.etcd.secure import SecureEtcdServer, secure_options
from tests.etcd.server import EtcdServer, free_port
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import make_certificates
from tests.waiting import until
from upstream.tls import server_context

SMALL = ("--watches=8", "--ranges=2", "--streams=2", "--seconds=0.2")


def test_tls_and_a_client_certificate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = make_certificates(tmp_path)
    with SecureEtcdServer(files) as etcd:
        options = secure_options(files)
        assert run(["demo", *SMALL, "--json", f"--endpoints=https://{etcd.endpoint}", *options]) == 0
        # Without a scheme, certificates mean TLS, as everywhere.
        assert run(["measure", *SMALL, "--json", f"--upstream={etcd.endpoint}", *options]) == 0
        capsys.readouterr()
        wrong = [f"--upstream=https://{etcd.endpoint}", f"--cacert={files.other_ca}"]
        # A process of its own: gRPC's library writes to its standard error.
        failed = subprocess.run(
            [sys.executable, "-m", "proxy.cli", "measure", *SMALL, *wrong], capture_output=True, text=True
        )
        assert failed.returncode == 1
        assert failed.stderr.count("\n") == 1
        assert "its certificate is not trusted (" in failed.stderr
        with ProxyProcess(etcd.url, options) as proxy:
            pages = [f"--upstream={etcd.url}", f"--proxy-metrics=127.0.0.1:{proxy.metrics_port}"]
            until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "etcd")
            assert run(["measure", "--observe", "--json", "--seconds=0.1", *pages, *options]) == 0
            seen = msgspec.json.decode(capsys.readouterr().out, type=Observation)
    assert seen.members.startswith("1 of 1 members (")
    assert seen.warnings == []


def test_tls_to_an_etcd_without_it(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["measure", *SMALL, f"--upstream=https://{etcd.endpoint}"]) == 1
    assert f"{etcd.endpoint}: TLS failed: " in (text := capsys.readouterr().err)
    assert "use http:// if it does not use TLS" in text


def test_an_etcd_with_users(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (
        "user add root:secret",
        "user grant-role root root",
        "user add load:word",
        "role add load",
        "role grant-permission load --prefix=true readwrite /watchmux-load/",
        "user grant-role load load",
        "auth enable",
    ):
        etcd.ctl(*arguments.split())
    upstream = f"--upstream={etcd.endpoint}"
    assert run(["measure", *SMALL, "--json", upstream, "--user=load:word"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Measurement)
    assert found.faultless
    assert found.proxied.watchers == 2
    assert run(["measure", *SMALL, upstream]) == 1
    assert "the server demands a user: give --user" in capsys.readouterr().err
    assert run(["measure", *SMALL, upstream, "--user=load:wrong"]) == 1
    assert f"cannot log in at {etcd.endpoint} as load" in capsys.readouterr().err


async def test_status_through_a_tls_server_with_a_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, port = make_certificates(tmp_path), free_port()
    expected = "Basic b3BzOndvcmQ="  # ops:word

    async def answer(request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != expected:
            return web.Response(status=401)
        return web.json_response({"version": "1.2.3", "serving": True, "watches": 4711})

    application = web.Application()
    application.router.add_get("/v1/status", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    context = server_context(files.server_cert, files.server_key, protocols=("http/1.1",))
    await web.TCPSite(runner, "127.0.0.1", port, ssl_context=context).start()
    try:
        url, ca = f"https://127.0.0.1:{port}", f"--cacert={files.ca}"
        assert await asyncio.to_thread(run, ["status", url, ca, "--user=ops:word"]) == 0
        assert "4,711" in capsys.readouterr().out
        assert await asyncio.to_thread(run, ["status", url, ca]) == 1
        assert "demands a user" in capsys.readouterr().err
        assert await asyncio.to_thread(run, ["status", url]) == 1
        assert "its certificate is not trusted" in capsys.readouterr().err
    finally:
        await runner.cleanup()


def test_observing_an_etcd_that_is_not_the_proxys(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    with EtcdServer(extra=["--initial-cluster-token=other"]) as other, ProxyProcess(etcd.endpoint) as proxy:
        until(lambda: proxy.metric("watchmux_upstream_reachable") == 1, "etcd")
        metrics = f"--proxy-metrics=127.0.0.1:{proxy.metrics_port}"
        assert run(["measure", "--observe", "--seconds=0.1", f"--upstream={other.endpoint}", metrics]) == 1
        assert "is another cluster" in capsys.readouterr().err
        assert run(["measure", *SMALL, f"--upstream={other.endpoint}", f"--proxy={proxy.endpoint}"]) == 1
        assert f"the proxy at {proxy.endpoint} is in front of another etcd" in capsys.readouterr().err
        assert run(["measure", *SMALL, f"--upstream={other.endpoint}", f"--proxy={other.endpoint}"]) == 1
        assert f"--proxy and --upstream are both {other.endpoint}; give the proxy's" in capsys.readouterr().err


def page(server: str, *peers: str) -> MetricsReading:
    return MetricsReading(sums={}, server_ids=frozenset({server}), peer_ids=frozenset(peers))


def test_members_that_were_not_read_are_named() -> None:
    members, warnings = check_members([page("a", "b", "c"), page("b", "a", "c")], page("c"), "here")
    assert members == "2 of 3 members (a, b)"
    assert "are at member c, which was not read" in warnings[0]
    assert "1 of the cluster's 3 members were not read" in warnings[1]
    every = [page("a", "b", "c"), page("b", "a", "c"), page("c", "a", "b")]
    assert check_members(every, page("c"), "here") == ("3 of 3 members (a, b, c)", [])
    with pytest.raises(NoMetrics, match="are at etcd member z, but here is another cluster"):
        check_members(every, page("z"), "here")


def test_traffic_of_other_clients_is_reported(etcd: EtcdServer, capsys: pytest.CaptureFixture[str]) -> None:
    # Fewer watches than streams: as many streams as watches.
    few = ["--watches=3", "--ranges=2", "--streams=200", "--seconds=1"]
    with another_client(etcd):
        assert run(["measure", *few, "--json", f"--upstream={etcd.endpoint}"]) == 0
    found = msgspec.json.decode(capsys.readouterr().out, type=Measurement)
    assert found.direct.watch_streams == 3
    assert found.direct.other_watchers == 1
    assert found.direct.other_writes > 0
    assert "the traffic of other clients of this etcd: 1 watcher, " in others_of(found.direct)
    assert found.proxied.proxy_cpu_s
    assert found.proxied.proxy_memory_bytes


@contextmanager
def another_client(etcd: EtcdServer) -> Iterator[None]:
    """Watch and write in a thread of its own."""
    over = threading.Event()
    with grpc.insecure_channel(etcd.endpoint) as channel:
        request = rpc_pb2.WatchRequest(create_request=rpc_pb2.WatchCreateRequest(key=b"other"))
        watch: Any = rpc_pb2_grpc.WatchStub(channel).Watch(iter([request]))
        next(watch)
        kv = rpc_pb2_grpc.KVStub(channel)

        def write() -> None:
            while not over.wait(0.01):
                kv.Put(rpc_pb2.PutRequest(key=b"other", value=b"x"))

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            watch.cancel()
