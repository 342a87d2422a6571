"""Real client libraries, each in a separate process, see the same through the proxy as against etcd itself."""

from __future__ import annotations

import subprocess

import pytest

from tests.clients.libraries import LIBRARIES, Library
from tests.etcd.binaries import EtcdBinary, etcds
from tests.etcd.server import HOST, EtcdServer
from tests.proxy_process import ProxyProcess

CURRENT, *OLDER = etcds()


def tour(library: Library, port: int) -> str:
    """Run a library's tour and return what it printed."""
    done = subprocess.run(library.command(HOST, port), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{library.name} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
@pytest.mark.parametrize(
    "binary",
    [CURRENT, *(pytest.param(older, marks=pytest.mark.long) for older in OLDER)],
    ids=lambda binary: binary.name,
)
def test_libraries_see_the_same_through_the_proxy(library: Library, binary: EtcdBinary) -> None:
    library.install()
    with EtcdServer(binary) as direct:
        expected = tour(library, direct.client_port)
    with EtcdServer(binary) as behind, ProxyProcess(behind.endpoint) as proxy:
        assert tour(library, proxy.port) == expected
    assert len(expected.splitlines()) > 5
