"""etcdctl prints the same through the proxy as against etcd itself."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.etcdctl_tour import TOUR, Player
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

CURRENT, *OLDER = etcds()
PAIRS = [
    pytest.param(CURRENT, client, id=f"etcd-{CURRENT.name}-etcdctl-{client.name}") for client in (CURRENT, *OLDER)
] + [
    pytest.param(server, server, id=f"etcd-{server.name}-etcdctl-{server.name}", marks=pytest.mark.long)
    for server in OLDER
]


@pytest.mark.parametrize("part", TOUR)
@pytest.mark.parametrize(("server", "client"), PAIRS)
def test_prints_the_same(server: EtcdBinary, client: EtcdBinary, part: str, tmp_path: Path) -> None:
    with (
        EtcdServer(server) as direct,
        EtcdServer(server) as behind,
        ProxyProcess(behind.endpoint, ["--linger=50ms"]) as proxy,
    ):
        players = []
        for name, endpoint, etcd in (("direct", direct.endpoint, direct), ("proxy", proxy.endpoint, behind)):
            (tmp_path / name).mkdir()
            players.append(Player(client.etcdctl, endpoint, etcd.watchers, tmp_path / name))
        with ThreadPoolExecutor(2) as pool:
            expected, got = pool.map(lambda player: player.play(TOUR[part]), players)
    assert got == expected
