"""For all tests: tests that are coroutines, and real etcds on loopback."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import structlog

from tests.e2e.scenario import run
from tests.etcd.binaries import EtcdBinary, current
from tests.etcd.server import EtcdServer


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test that is a coroutine, for nearly as long as its timeout allows (see `run`)."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    arguments = {name: pyfuncitem.funcargs[name] for name in inspect.signature(pyfuncitem.obj).parameters}
    marker = pyfuncitem.get_closest_marker("timeout")
    run(pyfuncitem.obj(**arguments), (marker.args[0] if marker else float(pyfuncitem.config.getini("timeout"))) - 10)
    return True


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
