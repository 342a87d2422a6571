"""etcdctl prints the same with the store as with a real etcd, and the reason for unimplemented calls."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.clients.etcdctl_tour import TOUR, Player
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.running import RunningStore
from upstream.store.cluster_service import NO_CLUSTER
from upstream.store.maintenance_service import NO_LEADER_TO_MOVE, NO_SNAPSHOT
from upstream.store.server import StoreSettings

LONG = ("users", "leases")
"""Parts of the tour whose calls other tests compare with etcd too."""

NOT_THERE = {
    "snapshot save FILE": NO_SNAPSHOT,
    "move-leader 1": NO_LEADER_TO_MOVE,
    "member remove 1": NO_CLUSTER,
}


def split(records: list[str]) -> tuple[list[str], dict[str, str]]:
    """Separate the records that must be the same from those of unimplemented calls."""
    missing = {name: record for record in records for name in NOT_THERE if record.startswith(f"$ {name}\n")}
    return [record for record in records if record not in missing.values()], missing


@pytest.mark.parametrize(
    "part", [pytest.param(part, marks=pytest.mark.long) if part in LONG else part for part in TOUR]
)
def test_output_matches_etcd(part: str, tmp_path: Path) -> None:
    binary = current()
    settings = StoreSettings(metrics_addr="127.0.0.1:0", name="m0")
    with EtcdServer(binary) as etcd, RunningStore(settings) as running:
        store = running.store
        assert store is not None
        players = []
        for name, endpoint, watchers in (
            ("etcd", etcd.endpoint, etcd.watchers),
            ("store", running.endpoint, lambda: store.state.watchable.stats.watchers),
        ):
            (tmp_path / name).mkdir()
            players.append(Player(binary.etcdctl, endpoint, watchers, tmp_path / name))
        with ThreadPoolExecutor(2) as pool:
            expected, got = pool.map(lambda player: player.play(TOUR[part]), players)
    (expected, _), (got, missing) = split(expected), split(got)
    assert got == expected
    for name, record in missing.items():
        assert NOT_THERE[name] in record
