"""Real client libraries, each in its own process, get the same results from the store as from a real etcd.

Libraries that need the JSON gateway are left out: the store does not have it.
"""

from __future__ import annotations

import pytest

from tests.clients.libraries import LIBRARIES, Library
from tests.clients.test_libraries import tour
from tests.etcd.binaries import current
from tests.etcd.server import EtcdServer
from tests.store.running import RunningStore
from upstream.store.server import StoreSettings

GRPC = [library for library in LIBRARIES if not library.needs_gateway]


@pytest.mark.parametrize("library", GRPC, ids=lambda library: library.name)
def test_libraries_get_from_the_store_what_etcd_gives(library: Library) -> None:
    library.install()
    with EtcdServer(current()) as etcd:
        expected = tour(library, etcd.client_port)
    with RunningStore(StoreSettings(name="m0")) as running:
        assert running.store is not None
        assert tour(library, running.store.port) == expected
    assert len(expected.splitlines()) > 5
