"""The test harness: each etcd starts, keeps its data over a crash, and counts its watchers correctly."""

from __future__ import annotations

import pytest

from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer


def test_current_etcd_orders_progress(etcd_binary: EtcdBinary) -> None:
    """Without a current etcd the real semantics cannot be tested."""
    assert etcd_binary.ordered_progress


@pytest.mark.parametrize("binary", etcds(), ids=lambda binary: binary.name)
def test_keeps_its_data_over_kill(binary: EtcdBinary) -> None:
    with EtcdServer(binary) as server:
        server.ctl("put", "a", "1")
        assert server.watchers() == 0
        server.kill()
        server.start()
        assert server.ctl("get", "a").stdout == "a\n1\n"
