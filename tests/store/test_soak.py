"""A minute of mixed load with kill -9 in between: no acknowledged write is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.store.soak import soak


@pytest.mark.long
def test_nothing_is_lost(tmp_path: Path) -> None:
    assert "nothing lost" in soak(tmp_path, 60, seed=1)
