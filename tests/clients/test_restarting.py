"""Real clients restart their watches after the store was restored, as they do after a compaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.clients.clientv3 import Clientv3
from tests.clients.restarting import PROGRAMS, starts_again
from tests.etcd.server import EtcdServer
from tests.proxy_process import ProxyProcess


@contextmanager
def through_a_proxy(endpoint: str) -> Iterator[str]:
    """Yield the address of a proxy in front of an etcd."""
    with ProxyProcess(endpoint) as proxy:
        yield proxy.endpoint


@pytest.mark.parametrize("library", PROGRAMS)
def test_clients_start_again_after_a_restore(library: str) -> None:
    again, lines = starts_again(library, through_a_proxy)
    assert again, lines


@pytest.mark.long  # It needs Go, which is fetched and takes minutes to build.
@pytest.mark.timeout(600)
def test_clientv3_returns_that_it_was_compacted(tmp_path: Path) -> None:
    """Without a proxy it resumes by itself from a revision that the restored store lacks, and waits for it."""
    snapshot = tmp_path / "snapshot"
    with EtcdServer() as etcd, through_a_proxy(etcd.endpoint) as endpoint:
        etcd.ctl("put", "w/a", "kept")
        etcd.ctl("snapshot", "save", str(snapshot))
        with Clientv3("watch", endpoint, "--key=w/", "--prefix") as watch:
            watch.until(lambda line: line.get("created"), "the watch")
            for number in range(5):
                etcd.ctl("put", "w/a", f"lost {number}")
            watch.until(lambda _: len(watch.events()) == 5, "what is lost later")
            etcd.stop()
            etcd.restore(snapshot)
            etcd.start()
            watch.wait()
    last = watch.lines("response")[-1]
    assert (last["compact_revision"], last["canceled"]) == (last["revision"], True)
    assert last["error"] == "etcdserver: mvcc: required revision has been compacted"
    assert watch.lines()[-1]["kind"] == "closed"
