"""Real clients start again when the store under their watches was restored, as they do after a compaction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.clients.restarting import PROGRAMS, starts_again
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
