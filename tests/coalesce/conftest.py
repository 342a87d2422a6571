"""A shell with the default limits, and its first client."""

from __future__ import annotations

import pytest

from tests.coalesce.shell import Client, Shell


@pytest.fixture
def shell() -> Shell:
    """A core with the default limits, in its shell."""
    return Shell()


@pytest.fixture
def client(shell: Shell) -> Client:
    """Its first client."""
    return shell.client()
