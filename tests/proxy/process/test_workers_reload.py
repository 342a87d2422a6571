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
from tests.faults.relay import relay_to
from tests.faults.scene import PREFIX, PREFIX_END, Writer, all_kept
from tests.faults.test_workers import started
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
        """Return how often the parent has logged a message."""
        assert self.proxy is not None
        lines = self.proxy.log().splitlines()
        return sum(f'"msg": "{message}"' in line and '"process": "parent"' in line for line in lines)

    async def reload(self, message: str, times: int = 1) -> None:
        """Send SIGHUP; wait until the parent has logged a message so often."""
        before = self.count(message)
        assert self.proxy is not None
        assert self.proxy.process is not None
        self.proxy.process.send_signal(signal.SIGHUP)
        await until_async(lambda: self.count(message) >= before + times, message)


HANGUPS = """
import os, signal, sys
from proxy.cli import apart, main
next_file = sys.argv[1]
sys.argv = sys.argv[4:]
read, read_again = apart._read_by_a_fork, apart._read_again
def starting(arguments):
    found = read(arguments)
    os.kill(os.getpid(), signal.SIGHUP)
    return found
def reloading(arguments):
    found = read_again(arguments)
    if os.path.exists(next_file):
        os.replace(next_file, next_file.removesuffix(".next"))
        os.kill(os.getpid(), signal.SIGHUP)
    return found
apart._read_by_a_fork, apart._read_again = starting, reloading
main()
"""
"""`serve`, to which SIGHUP comes during its start, and during a reload if there is a next version of its file."""


@pytest.fixture
def settings(etcd: EtcdServer, tmp_path: Path) -> Iterator[Settings]:
    """A proxy with two workers and a configuration file."""
    made = Settings(tmp_path / "watchmux.toml")
    made.write(etcd.endpoint)
    made.proxy = ProxyProcess("", ["--workers=2", "--drain=1s", f"--config={made.file}"])
    made.proxy.prefix = [sys.executable, "-c", HANGUPS, f"{made.file}.next"]
    with made.proxy:
        until(lambda: len(running(made).processes()) == PROCESSES, "all processes")
        yield made


def running(settings: Settings) -> ProxyProcess:
    """Return the proxy."""
    assert settings.proxy is not None
    return settings.proxy


async def restarted(proxy: ProxyProcess, name: str) -> None:
    """Kill a process and wait for its successor."""
    before = proxy.processes()[name]
    os.kill(before, signal.SIGKILL)
    await until_async(lambda: proxy.processes().get(name) not in (None, before), "its successor")


async def test_endpoints_covers_and_limits_change_for_all(etcd: EtcdServer, settings: Settings) -> None:
    proxy = running(settings)
    assert settings.count("settings reloaded") == 1, "that of the SIGHUP during the start"
    writer = Writer(etcd.endpoint, 0.005)
    async with await RawClient.connect(proxy.port) as one, await RawClient.connect(proxy.port) as two:
        streams = [(await client.open_watch(PREFIX, PREFIX_END, 1), 1) for client in (one, two)]
        other = f"localhost:{etcd.client_port}"
        # To all processes, as `pkill -HUP watchmux` sends it: only the parent's counts, and none ends.
        before = await asyncio.to_thread(proxy.processes)
        for pid in before.values():
            os.kill(pid, signal.SIGHUP)
        settings.write(other, '[watch]\ncover = ["/p/"]\nwatches_max = 100\n')
        await settings.reload("endpoints updated")
        assert await asyncio.to_thread(proxy.processes) == before
        await until_async(lambda: proxy.overview()["limits"]["watches_max"] == 100, "the limit of the whole")
        keys = [await client.open_watch(PREFIX + b"%d" % number) for number, client in enumerate((one, two))]
        await until_async(lambda: etcd.watchers() == 1, "one watch of the cover")
        await writer.more(10)
        await until_async(lambda: all(key.values for key in keys), "events of the keys")
        settings.file.write_text("[watch\n")
        await settings.reload("invalid settings; nothing changed")
        # The file changes again while it is read: the newest one counts.
        settings.write(other, "[watch]\nwatches_max = 200\n")
        settings.file.rename(f"{settings.file}.next")
        settings.write(other, "[watch]\nwatches_max = 300\n")
        await settings.reload("settings reloaded", 2)
        await until_async(lambda: proxy.overview()["limits"]["watches_max"] == 200, "the newest limit")
        # A process that starts later uses the endpoints of now, also the hub.
        await restarted(proxy, "hub")
        await until_async(
            lambda: [each["endpoint"] for each in proxy.overview()["endpoints"]] == [other], "its endpoint"
        )
        await writer.more(10)
        await all_kept(streams, etcd.endpoint, await writer.stop())


async def test_refused_endpoints_are_used_by_no_process(etcd: EtcdServer, settings: Settings) -> None:
    """Those of another cluster, also by a hub that is restarted; and the address of its own workers."""
    proxy = running(settings)
    with EtcdServer(etcd.binary, ["--initial-cluster-token=another"]) as foreign:
        async with await RawClient.connect(proxy.port) as client:
            stream = await client.open_watch(PREFIX, PREFIX_END)
            settings.write(foreign.endpoint)
            await settings.reload("new endpoints rejected; keeping the old ones")
            await restarted(proxy, "hub")
            async with direct(etcd) as calls:
                await calls.put(PREFIX + b"1", b"1")
            await until_async(lambda: stream.values == [b"1"], "the event")
            # The new hub knows the cluster of the last one.
            await settings.reload("new endpoints rejected; keeping the old ones")
            assert foreign.watchers() == 0
            for rest in ("", f'watch_endpoints = ["{proxy.endpoint}"]\n'):
                settings.write(etcd.endpoint if rest else proxy.endpoint, rest)
                await settings.reload("new endpoints rejected; keeping the old ones")
                assert f"lead back to this proxy, in a loop: {proxy.endpoint};" in proxy.log()
                settings.write(etcd.endpoint)
                await settings.reload("settings reloaded")
            async with direct(etcd) as calls:
                await calls.put(PREFIX + b"1", b"2")
            await until_async(lambda: stream.values == [b"1", b"2"], "the next event")


async def test_a_hub_that_dies_during_a_change(etcd: EtcdServer, tmp_path: Path) -> None:
    """After its answer, then before it. The old endpoints are dead: its successor and the workers use the new ones."""
    settings = Settings(tmp_path / "watchmux.toml")
    async with contextlib.AsyncExitStack() as stack:
        first, second, third = [await stack.enter_async_context(relay_to(etcd.client_port)) for _ in range(3)]
        settings.write(first.endpoint)
        flags = ["--workers=2", "--drain=1s", f"--config={settings.file}"]
        settings.proxy = proxy = await stack.enter_async_context(started("", flags))
        client = await stack.enter_async_context(await RawClient.connect(proxy.port))
        calls = await stack.enter_async_context(direct(etcd))
        stream = await client.open_watch(PREFIX, PREFIX_END)
        third.half_open()
        # The second time the hub has not answered yet.
        changes = ((first, second, "endpoints updated"), (second, third, "settings reloaded"))
        for count, (old, new, logged) in enumerate(changes, 1):
            hub = await asyncio.to_thread(until, lambda: proxy.processes().get("hub"), "its process id")
            old.cut()
            settings.write(new.endpoint)
            await settings.reload(logged)
            assert hub is not None
            os.kill(hub, signal.SIGKILL)
            new.mend()
            await until_async(lambda n=count: settings.count("endpoints updated") == n, "an answer")  # type: ignore[misc]
            await calls.put(PREFIX + b"1", b"1")
            await until_async(lambda n=count: len(stream.values) == n, "the event")  # type: ignore[misc]
        assert settings.count("process restarted") == 2


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
        until(lambda: len(proxy.processes()) == PROCESSES, "all processes")
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
                await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]
        refused = [line for line in proxy.log().splitlines() if "cannot load the renewed certificate files" in line]
        # A look may fall between the files of a whole renewal, too: then a process has a second line.
        assert {msgspec.json.decode(line)["process"] for line in refused} == {"worker-1", "worker-2"}


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
            await until_async(lambda: len(proxy.processes()) == PROCESSES, "all processes")
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
                    await until_async(lambda s=stream: s.values == [b"1"], "the event")  # type: ignore[misc]
            assert server.asked.count(PLAIN) == 1
            await asyncio.to_thread(proxy.stop)
