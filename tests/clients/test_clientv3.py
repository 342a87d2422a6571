"""A real clientv3 sees through the proxy what it sees at etcd itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients.clientv3 import Clientv3
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]


@pytest.fixture(params=etcds(), ids=lambda binary: binary.name)
def ways(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Yield an etcd's own endpoint and that of a proxy in front of it."""
    binary: EtcdBinary = request.param
    with EtcdServer(binary) as etcd, ProxyProcess(etcd.endpoint) as proxy:
        yield etcd.endpoint, proxy.endpoint


def test_clientv3_sees_the_same_events(ways: tuple[str, str]) -> None:
    flags = ("--key=load", "--prefix", "--rev=1", "--events=120")
    with Clientv3("load", ways[1], "--workers=4", "--calls=10", "--mode=kubernetes") as load:
        load.wait()
    summary = load.summary()
    assert [summary[kind]["lost"] for kind in ("creates", "updates", "gets")] == [0, 0, 0]
    assert summary["tries_most"] == 1
    with Clientv3("load", ways[1], "--workers=4", "--calls=10") as load:
        load.wait()
    seen = []
    for endpoint in ways:
        with Clientv3("watch", endpoint, *flags) as watch:
            watch.wait()
        seen.append(watch.events())
    assert seen[0] == seen[1] == list(range(2, 122))
