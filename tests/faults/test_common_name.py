"""A certificate towards etcd with a CN: etcd would treat clients without a token as the user of that name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import trustme

from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.auth.common_name import common_name
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.e2e.test_auth import with_users
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.secure import SecureEtcdServer
from tests.upstream.certificates import Certificates
from tests.waiting import until_async
from upstream.tls import client_context

RANGE = "/etcdserverpb.KV/Range"


@pytest.fixture
def files(tmp_path: Path) -> Certificates:
    """Certificates; the client certificate has the CN root."""
    authority = trustme.CA()
    names = ("ca.pem", "server.pem", "server.key", "client.pem", "client.key", "ca.pem")
    ca, cert, key, client_cert, client_key, other = (str(tmp_path / name) for name in names)
    authority.cert_pem.write_to_path(ca)
    server = authority.issue_cert("127.0.0.1", "localhost")
    server.private_key_pem.write_to_path(key)
    server.cert_chain_pems[0].write_to_path(cert)
    client = authority.issue_cert("client.example", common_name="root")
    client.private_key_pem.write_to_path(client_key)
    client.cert_chain_pems[0].write_to_path(client_cert)
    return Certificates(ca, cert, key, client_cert, client_key, other)


def test_the_name_in_a_file(files: Certificates, tmp_path: Path) -> None:
    assert common_name(files.client_cert) == "root"
    assert common_name(files.server_cert) == ""
    assert common_name(files.client_key) == ""
    assert common_name(str(tmp_path / "none")) == ""
    (tmp_path / "broken.pem").write_text("-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n")
    assert common_name(str(tmp_path / "broken.pem")) == ""
    for name in ("x", "a name of more than one hundred and twenty-eight bytes".ljust(64, "-"), "Zoë"):
        trustme.CA().issue_cert("a", common_name=name).cert_chain_pems[0].write_to_path(str(tmp_path / "c.pem"))
        assert common_name(str(tmp_path / "c.pem")) == name


def marks_wrongly(proxy: Proxy) -> bool:
    """Return whether a release that refuses tokens while auth is off is not yet known as one."""
    guard = proxy.guard
    assert guard is not None
    return guard._marks and (proxy.upstream.server or ("", ""))[1] < "3.5.30"


@pytest.mark.parametrize(
    "binary",
    [pytest.param(binary, id=binary.name, marks=[pytest.mark.long] if n else []) for n, binary in enumerate(etcds())],
)
async def test_it_is_refused_while_auth_is_on(binary: EtcdBinary, files: Certificates) -> None:
    with SecureEtcdServer(files, binary) as etcd:
        tls = client_context(files.client_cert, files.client_key, files.ca)
        message = rpc_pb2.RangeRequest(key=b"a").SerializeToString()
        async with (
            proxy_for(f"https://{etcd.endpoint}", upstream_tls=tls, upstream_cert=files.client_cert) as proxy,
            await RawClient.connect(proxy.port) as client,
        ):
            await until_async(lambda: proxy.health.serving and not marks_wrongly(proxy), "the proxy to serve")
            # With auth off, etcd does not use the CN.
            assert (await client.unary(RANGE, message)).status == Status.OK
            await client.open_watch(b"a")
            await asyncio.to_thread(with_users, etcd)
            # From the start a client without a token is unauthenticated, where etcd allows it; soon it gets the reason.
            texts = set()
            while proxy.guard is not None and not proxy.guard.problem:
                call = await client.unary(RANGE, message)
                texts.add(call.text)
            if binary.ordered_progress:
                assert texts <= {"etcdserver: invalid auth token"}
            refused = await client.unary(RANGE, message)
            assert refused.status == Status.UNAVAILABLE
            assert "CN 'root' of the proxy's certificate" in refused.text
            status, text = await client.watch().raw.end()
            assert (status, text) == (Status.UNAVAILABLE, refused.text)
            assert not proxy.health.serving
            assert "without a CN (--cert)" in proxy.health.reason
