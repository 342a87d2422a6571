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


def test_catch_up_headers_are_those_of_its_events(ways: tuple[str, str]) -> None:
    """At etcd they are the store's: one response, with the revision of a key outside of the range."""
    with Clientv3("load", ways[0], "--calls=10", "--key=a", "--value-bytes=1000000") as load:
        load.wait()
    with Clientv3("load", ways[0], "--calls=1", "--key=z") as load:
        load.wait()
    seen = []
    for endpoint in ways:
        with Clientv3("watch", endpoint, "--key=a", "--prefix", "--rev=2", "--events=10") as watch:
            watch.wait()
        assert watch.events() == list(range(2, 12))
        seen.append([(line["revision"], line["revisions"][-1]) for line in watch.lines("response") if line["events"]])
    assert seen[0] == [(12, 11)]
    assert len(seen[1]) > 1
    assert all(header == last for header, last in seen[1])


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
