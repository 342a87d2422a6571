"""SRV discovery against a small DNS server on loopback."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest

from proxy.cli.group import run as watchmux
from proxy.config.knobs import Settings, UpstreamTable
from proxy.process.serving import discovered
from tests.e2e.running import proxy_for
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import serve_here
from tests.waiting import until_async
from upstream.discovery import NotDiscovered, discover

SECURE, PLAIN = "_etcd-client-ssl._tcp.example.com.", "_etcd-client._tcp.example.com."
Zone = Mapping[str, Sequence[str]]
"""By name: the records as in a zone file, `priority weight port target`."""


class NameServer(asyncio.DatagramProtocol):
    """A name server for one zone: NXDOMAIN for names not in it, NOERROR without records for an empty list."""

    def __init__(self, zone: Zone) -> None:
        self.zone = zone
        self.asked: list[str] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.DatagramTransport) or hasattr(transport, "sendto")
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        name = query.question[0].name.to_text()
        self.asked.append(name)
        records = self.zone.get(name)
        if records is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        elif records:
            answer.answer.append(dns.rrset.from_text(name, 60, "IN", "SRV", *records))
        self.transport.sendto(answer.to_wire(), addr)


@asynccontextmanager
async def name_server(zone: Zone) -> AsyncIterator[tuple[NameServer, dns.asyncresolver.Resolver]]:
    """Yield a name server and a resolver that queries only this server."""
    server = NameServer(zone)
    transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(lambda: server, local_addr=(HOST, 0))
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [HOST]
    resolver.port = transport.get_extra_info("sockname")[1]
    try:
        yield server, resolver
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("zone", "service_name", "insecure", "endpoints"),
    [
        ({SECURE: ["0 0 2379 a.example.com."]}, "", False, ["https://a.example.com:2379"]),
        # By priority.
        (
            {SECURE: ["20 0 2379 c.", "5 0 2379 a.", "10 0 2380 b."]},
            "",
            False,
            ["https://a:2379", "https://b:2380", "https://c:2379"],
        ),
        # Without TLS only on request, and after those with TLS.
        ({SECURE: ["0 0 1 a."], PLAIN: ["0 0 2 b."]}, "", False, ["https://a:1"]),
        ({SECURE: ["0 0 1 a."], PLAIN: ["0 0 2 b."]}, "", True, ["https://a:1", "http://b:2"]),
        ({PLAIN: ["0 0 2 b."], SECURE: []}, "", True, ["http://b:2"]),
        # Of one service among several.
        (
            {SECURE: ["0 0 1 a."], "_etcd-client-ssl-prod._tcp.example.com.": ["0 0 3 p."]},
            "prod",
            False,
            ["https://p:3"],
        ),
        ({"_etcd-client-prod._tcp.example.com.": ["0 0 4 q."]}, "prod", True, ["http://q:4"]),
        # The root as target ("not available") is not a member.
        ({SECURE: ["0 0 0 .", "1 0 1 a."]}, "", False, ["https://a:1"]),
    ],
)
async def test_records_become_endpoints(zone: Zone, service_name: str, insecure: bool, endpoints: list[str]) -> None:
    async with name_server(zone) as (server, resolver):
        assert await discover("example.com", service_name, insecure, resolver) == endpoints
        suffix = f"-{service_name}" if service_name else ""
        names = [f"_etcd-client-ssl{suffix}._tcp.example.com.", f"_etcd-client{suffix}._tcp.example.com."]
        assert server.asked == names


@pytest.mark.parametrize(
    ("zone", "problem"),
    [
        (
            {},
            "there is no SRV record _etcd-client-ssl._tcp.example.com or _etcd-client._tcp.example.com",
        ),
        ({SECURE: [], PLAIN: []}, "there is no SRV record"),
        ({SECURE: ["0 0 0 ."]}, "there is no SRV record"),
        ({PLAIN: ["0 0 2379 b."]}, "it names only members without TLS (b:2379); name members with TLS there, or take"),
    ],
)
async def test_discovery_failures_are_explained(zone: Zone, problem: str) -> None:
    async with name_server(zone) as (_, resolver):
        with pytest.raises(NotDiscovered) as error:
            await discover("example.com", resolver=resolver)
        assert str(error.value).startswith("--discovery-srv=example.com: ")
        assert problem in str(error.value)


async def test_a_name_server_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("upstream.discovery.TIMEOUT_S", 0.2)
    with socket.socket(type=socket.SOCK_DGRAM) as silent:
        silent.bind((HOST, 0))
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers = [HOST]
        resolver.port = silent.getsockname()[1]
        with pytest.raises(NotDiscovered, match=r"_etcd-client-ssl\._tcp\.example\.com cannot be looked up"):
            await discover("example.com", resolver=resolver)


async def test_settings_with_discovery_get_its_endpoints(etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch) -> None:
    given = Settings(
        upstream=UpstreamTable(endpoints=["10.0.0.1:1"], discovery_srv="example.com", insecure_discovery=True)
    )
    async with name_server({PLAIN: [f"0 0 {etcd.client_port} localhost."]}) as (_, resolver):
        monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
        found = (await discovered(given)).upstream
        assert found == replace(given.upstream, endpoints=[f"http://localhost:{etcd.client_port}"])
        async with proxy_for(found.endpoints[0]) as proxy:
            await until_async(lambda: proxy.health.upstream_reachable, "etcd to be reached")


def test_serve_reports_in_one_line_that_discovery_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as closed:
        closed.bind((HOST, 0))
        port = closed.getsockname()[1]
    resolver = dns.asyncresolver.Resolver(configure=False)
    resolver.nameservers = [HOST]
    resolver.port = port
    monkeypatch.setattr(dns.asyncresolver, "default_resolver", resolver)
    monkeypatch.setattr("upstream.discovery.TIMEOUT_S", 0.2)
    assert (
        watchmux(["serve", "--discovery-srv=example.com", "--listen-addr=127.0.0.1:0", "--log-level=fatal"], serve_here)
        == 1
    )
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "watchmux: --discovery-srv=example.com: _etcd-client-ssl._tcp.example.com cannot be looked up"
    )
    assert line.endswith("; check the name server")
