"""Fixtures that every test may use: real etcds on loopback."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import structlog

from tests.etcd.binaries import EtcdBinary, current
from tests.etcd.server import EtcdServer


@pytest.fixture(autouse=True)
def _default_logging() -> Iterator[None]:
    """What a test configures for the log does not reach the next one."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def etcd_binary() -> EtcdBinary:
    """The newest etcd there is."""
    return current()


@pytest.fixture
def etcd(etcd_binary: EtcdBinary) -> Iterator[EtcdServer]:
    """A current etcd, running, with nothing in it."""
    with EtcdServer(etcd_binary) as server:
        yield server
