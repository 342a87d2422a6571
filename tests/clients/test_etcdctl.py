"""etcdctl prints the same through the proxy as against etcd itself."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from _pytest.mark.structures import ParameterSet

from tests.clients.etcdctl_tour import TOUR, Player
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

CURRENT, *OLDER = etcds()
PAIRS = [(CURRENT, CURRENT), *((CURRENT, older) for older in OLDER), *((older, older) for older in OLDER)]

EMPTY = "code = InvalidArgument desc = etcdserver: user name is empty"
LACK = "code = PermissionDenied desc = etcdserver: permission denied"


def _rows() -> Iterator[ParameterSet]:
    """All parts with all pairs; older releases are marked long, except for the watches of the oldest etcdctl."""
    oldest = min((CURRENT, *OLDER), key=lambda binary: binary.version)
    for server, client in PAIRS:
        for part in TOUR:
            quick = client is CURRENT or (server is CURRENT and client is oldest and part == "watches")
            name = f"etcd-{server.name}-etcdctl-{client.name}-{part}"
            yield pytest.param(server, client, part, id=name, marks=() if quick else pytest.mark.long)


@pytest.mark.parametrize(("server", "client", "part"), list(_rows()))
def test_etcdctl_prints_the_same_through_the_proxy(
    server: EtcdBinary, client: EtcdBinary, part: str, tmp_path: Path
) -> None:
    with (
        EtcdServer(server) as direct,
        EtcdServer(server) as behind,
        ProxyProcess(behind.endpoint, ["--linger=50ms", "--history-linger=0s"]) as proxy,
    ):
        players = []
        for name, endpoint, etcd in (("direct", direct.endpoint, direct), ("proxy", proxy.endpoint, behind)):
            (tmp_path / name).mkdir()
            players.append(Player(client.etcdctl, endpoint, etcd.watchers, tmp_path / name))
        with ThreadPoolExecutor(2) as pool:
            expected, got = pool.map(lambda player: player.play(TOUR[part]), players)
    if server is not CURRENT:
        # There, every refusal of a watch is reported as a lack of permission (docs/guarantees.md).
        expected = [step.replace(LACK, EMPTY) if step.startswith("$ watch pub1\n") else step for step in expected]
    assert got == expected
