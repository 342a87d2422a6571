"""Fixtures of the fault tests."""

from __future__ import annotations

import pytest

from tests.e2e import running


@pytest.fixture
def covers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The covers of each proxy of the test, see `scene.also_with_a_cover`."""
    monkeypatch.setattr(running, "COVERS", request.param)
