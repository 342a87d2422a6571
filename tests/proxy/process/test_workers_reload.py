"""SIGHUP with --workers: all processes apply the same settings, with real processes, TLS clients and etcds."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import shutil
import signal
import ssl
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trustme

from proto.pb import rpc_pb2
from tests.e2e.raw_client import RawClient
from tests.e2e.running import direct
from tests.etcd.secure import SecureEtcdServer, secure_options
from tests.etcd.server import HOST, EtcdServer
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.proxy.listening.test_tls import RANGE, renew, shown
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import Certificates, make_certificates
from tests.upstream.test_discovery import PLAIN, name_server
from tests.waiting import until, until_async
from upstream.tls import client_context

PROCESSES = 3
"""Of --workers=2, without the parent."""


class Settings:
    """A configuration file and the proxy that reads it."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.proxy: ProxyProcess | None = None

    def write(self, endpoints: str, rest: str = "") -> None:
        """Write the file."""
        self.file.write_text(f'[upstream]\nendpoints = ["{endpoints}"]\n{rest}')

    def count(self, message: str) -> int:
        """Return how many lines of the log have a message."""
        assert self.proxy is not None
        return sum(f'"msg": "{message}"' in line for line in self.proxy.log().splitlines())

    async def reload(self, message: str, processes: int = PROCESSES) -> None:
        """Send SIGHUP; wait until so many processes have logged a message."""
        before = self.count(message)
        assert self.proxy is not None
        assert self.proxy.process is not None
        self.proxy.process.send_signal(signal.SIGHUP)
        await until_async(lambda: self.count(message) == before + processes, message, 20)


@pytest.fixture
def settings(etcd: EtcdServer, tmp_path: Path) -> Iterator[Settings]:
    """A proxy with two workers and a configuration file."""
    made = Settings(tmp_path / "watchmux.toml")
    made.write(etcd.endpoint)
    with ProxyProcess("", ["--workers=2", "--drain=1s", f"--config={made.file}"]) as made.proxy:
        until(lambda: len(running(made).processes()) == PROCESSES, "all processes", 20)
        yield made


def running(settings: Settings) -> ProxyProcess:
    """Return the proxy."""
    assert settings.proxy is not None
    return settings.proxy


async def restarted(proxy: ProxyProcess, name: str) -> None:
    """Kill a process and wait for its successor."""
    before = proxy.processes()[name]
    os.kill(before, signal.SIGKILL)
    await until_async(lambda: proxy.processes().get(name) not in (None, before), "its successor", 20)


async def test_endpoints_covers_and_limits_change_for_all(etcd: EtcdServer, settings: Settings) -> None:
    proxy = running(settings)
    writer = Writer(etcd.endpoint, 0.005)
    async with await RawClient.connect(proxy.port) as one, await RawClient.connect(proxy.port) as two:
        streams = [(await client.open_watch(PREFIX, PREFIX_END, 1), 1) for client in (one, two)]
        other = f"localhost:{etcd.client_port}"
        settings.write(other, '[watch]\ncover = ["/p/"]\nwatches_max = 100\n')
        await settings.reload("endpoints updated")
        await until_async(lambda: proxy.overview()["limits"]["watches_max"] == 100, "the limit of the whole")
        keys = [await client.open_watch(PREFIX + b"%d" % number) for number, client in enumerate((one, two))]
        await until_async(lambda: etcd.watchers() == 1, "one watch of the cover", 20)
        await writer.more(10)
        await until_async(lambda: all(key.values for key in keys), "events of the keys")
        settings.file.write_text("[watch\n")
        await settings.reload("invalid settings; nothing changed", 1)
        # A process that starts later uses the endpoints of now, also the hub.
        await restarted(proxy, "hub")
        await until_async(
            lambda: [each["endpoint"] for each in proxy.overview()["endpoints"]] == [other], "its endpoint", 20
        )
        await writer.more(10)
        await all_kept(streams, etcd.endpoint, await writer.stop())


async def test_a_hub_restarts_with_the_endpoints_in_force(etcd: EtcdServer, settings: Settings) -> None:
    """Not with those of another cluster, which all processes have refused."""
    proxy = running(settings)
    with EtcdServer(etcd.binary, ["--initial-cluster-token=another"]) as foreign:
        async with await RawClient.connect(proxy.port) as client:
            stream = await client.open_watch(PREFIX, PREFIX_END)
            settings.write(foreign.endpoint)
            await settings.reload("new endpoints rejected; keeping the old ones")
            await restarted(proxy, "hub")
            async with direct(etcd) as calls:
                await calls.put(PREFIX + b"1", b"1")
            await until_async(lambda: stream.values == [b"1"], "the event", 20)
            await until_async(
                lambda: settings.count("new endpoints rejected; keeping the old ones") == PROCESSES + 1,
                "the new hub to refuse them too",
                20,
            )
            assert foreign.watchers() == 0


def test_a_sighup_to_all_processes_ends_none(settings: Settings) -> None:
    """As `pkill -HUP watchmux` sends it."""
    proxy = running(settings)
    before = proxy.processes()
    assert proxy.process is not None
    for pid in (*before.values(), proxy.process.pid):
        os.kill(pid, signal.SIGHUP)
    until(lambda: settings.count("settings reloaded"), "the parent to reload")
    assert proxy.processes() == before
    assert settings.count("process restarted") == 0


def new_client(files: Certificates, authority: trustme.CA) -> None:
    """Write a new client certificate of an authority."""
    ours = authority.issue_cert("client.example")
    ours.private_key_pem.write_to_path(files.client_key)
    ours.cert_chain_pems[0].write_to_path(files.client_cert)


async def test_renewed_certificates_are_used_by_all_processes(tmp_path: Path) -> None:
    """The server's, the authority of clients', and the client's towards etcd; none serves plain text."""
    (tmp_path / "in").mkdir()
    inward, outward = make_certificates(tmp_path / "in"), make_certificates(tmp_path)
    server = [f"--cert-file={inward.server_cert}", f"--key-file={inward.server_key}", f"--trusted-ca-file={inward.ca}"]
    flags = ["--workers=2", "--drain=1s", *server, *secure_options(outward)]
    get = rpc_pb2.RangeRequest(key=b"a").SerializeToString()
    with SecureEtcdServer(outward) as etcd, ProxyProcess(etcd.url, flags) as proxy:
        until(lambda: len(proxy.processes()) == PROCESSES, "all processes", 20)
        old = client_context(inward.client_cert, inward.client_key, inward.ca)
        async with contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(await RawClient.connect(proxy.port, tls=old)) for _ in range(4)]
            streams = [await client.open_watch(b"a") for client in clients]
            # Half of a renewal: each process keeps what it has.
            first = await shown(proxy.port, old)
            with pytest.raises((OSError, http.client.HTTPException)):
                await asyncio.to_thread(urllib.request.urlopen, f"http://{proxy.endpoint}/version", timeout=20)
            shutil.copy(inward.client_cert, inward.server_cert)
            assert [await shown(proxy.port, old) for _ in range(4)] == [first] * 4
            authority = trustme.CA()
            new = renew(inward, authority, HOST)
            new_client(inward, authority)
            assert proxy.process is not None
            proxy.process.send_signal(signal.SIGHUP)
            assert [await shown(proxy.port, old.newest()) for _ in range(4)] == [new] * 4
            for _ in range(4):
                with pytest.raises(ssl.SSLCertVerificationError):
                    await shown(proxy.port, old)
            # etcd trusts another authority now: each process shows it the new certificate.
            authority = trustme.CA()
            renew(outward, authority, HOST)
            new_client(outward, authority)
            etcd.tls = client_context(outward.client_cert, outward.client_key, outward.ca, protocols=("http/1.1",))
            await asyncio.to_thread(etcd.stop)
            await asyncio.to_thread(etcd.start)
            for client in clients:
                assert (await client.unary(RANGE, get)).status == 0
            await asyncio.to_thread(etcd.ctl, "put", "a", "1")
            for stream in streams:
                await until_async(lambda s=stream: s.values == [b"1"], "the event", 20)  # type: ignore[misc]
        refused = [line for line in proxy.log().splitlines() if "cannot load the renewed certificate files" in line]
        assert sorted(str(msgspec.json.decode(line)["process"]) for line in refused) == ["worker-1", "worker-2"]


RESOLVER = """
import sys
import dns.asyncresolver as dns
dns.default_resolver = dns.Resolver(configure=False)
dns.default_resolver.nameservers, dns.default_resolver.port = ["127.0.0.1"], int(sys.argv[1])
sys.argv = sys.argv[4:]
from proxy.cli import main
main()
"""


@pytest.mark.long
async def test_all_processes_use_one_answer_of_dns(etcd: EtcdServer) -> None:
    """Also those that are restarted after the records have changed, or while DNS does not answer."""
    async with name_server({PLAIN: [f"0 0 {etcd.client_port} localhost."]}) as (server, resolver):
        proxy = ProxyProcess("", ["--workers=2", "--discovery-srv=example.com", "--insecure-discovery"])
        proxy.prefix = [sys.executable, "-c", RESOLVER, str(resolver.port)]
        with contextlib.ExitStack() as stack:
            await asyncio.to_thread(stack.enter_context, proxy)
            await until_async(lambda: len(proxy.processes()) == PROCESSES, "all processes", 20)
            assert server.asked.count(PLAIN) == 1
            server.zone = {}
            for name in ("hub", "worker-1"):
                await restarted(proxy, name)
            assert proxy.process is not None
            proxy.process.send_signal(signal.SIGHUP)
            async with await RawClient.connect(proxy.port) as one, await RawClient.connect(proxy.port) as two:
                streams = [await client.open_watch(PREFIX, PREFIX_END) for client in (one, two)]
                async with direct(etcd) as calls:
                    await calls.put(PREFIX + b"1", b"1")
                for stream in streams:
                    await until_async(lambda s=stream: s.values == [b"1"], "the event", 20)  # type: ignore[misc]
            assert server.asked.count(PLAIN) == 1
            await asyncio.to_thread(proxy.stop)
