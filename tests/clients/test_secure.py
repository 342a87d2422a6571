"""Real clients see the same through the proxy, with mutual TLS on both of its sides, as without it."""

from __future__ import annotations

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.etcdctl_tour import TOUR, Player
from tests.clients.libraries import LIBRARIES, Library
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.secure import SecureEtcdServer, secure_options
from tests.etcd.server import HOST
from tests.proxy_process import ProxyProcess
from tests.upstream.certificates import Certificates, make_certificates

CURRENT, *OLDER = etcds()
QUICK = ("watches",)
QUICK_LIBRARIES = ("node-etcd3", "python-etcd3gw")
"""One gRPC and one JSON library; test_libraries.py runs all of them without TLS."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def secure_proxy(etcd: SecureEtcdServer, files: Certificates) -> ProxyProcess:
    """Make a proxy that requires certificates, in front of an etcd that does."""
    listening = [f"--cert-file={files.server_cert}", f"--key-file={files.server_key}", f"--trusted-ca-file={files.ca}"]
    return ProxyProcess(etcd.url, [*listening, *secure_options(files), "--linger=50ms", "--history-linger=0s"])


@pytest.mark.parametrize(
    "part", [part if part in QUICK else pytest.param(part, marks=pytest.mark.long) for part in TOUR]
)
@pytest.mark.parametrize(
    "client",
    [CURRENT, *(pytest.param(older, marks=pytest.mark.long) for older in OLDER)],
    ids=lambda client: client.name,
)
def test_etcdctl_prints_the_same(client: EtcdBinary, part: str, files: Certificates, tmp_path: Path) -> None:
    with (
        SecureEtcdServer(files) as direct,
        SecureEtcdServer(files) as behind,
        secure_proxy(behind, files) as proxy,
    ):
        players = []
        for name, endpoint, etcd in (("direct", direct.endpoint, direct), ("proxy", proxy.endpoint, behind)):
            (tmp_path / name).mkdir()
            player = Player(client.etcdctl, f"https://{endpoint}", etcd.watchers, tmp_path / name)
            player.options = tuple(secure_options(files))
            players.append(player)
        with ThreadPoolExecutor(2) as pool:
            expected, got = pool.map(lambda player: player.play(TOUR[part]), players)
    assert got == expected


@pytest.mark.parametrize(
    "library",
    [
        pytest.param(one, id=one.name, marks=() if one.name in QUICK_LIBRARIES else pytest.mark.long)
        for one in LIBRARIES
        if one.speaks_tls
    ],
)
def test_a_library_sees_the_same(library: Library, files: Certificates) -> None:
    library.install()

    def tour(port: int) -> str:
        command = library.command(HOST, port, (files.ca, files.client_cert, files.client_key))
        environment = {name: value for name, value in os.environ.items() if not name.endswith("_CA_BUNDLE")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
        assert done.returncode == 0, f"{library.name} ended with {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    with SecureEtcdServer(files) as direct, SecureEtcdServer(files) as behind, secure_proxy(behind, files) as proxy:
        expected = tour(direct.client_port)
        assert tour(proxy.port) == expected
    assert len(expected.splitlines()) > 5
