"""Fixtures for all tests: real etcds on loopback."""

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
    """The newest etcd available."""
    return current()


@pytest.fixture
def etcd(etcd_binary: EtcdBinary) -> Iterator[EtcdServer]:
    """A running current etcd without any keys."""
    with EtcdServer(etcd_binary) as server:
        yield server
