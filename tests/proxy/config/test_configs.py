"""The files in configs/: each one loads, and the commented example has the defaults of the code."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.config.file import merge_settings
from proxy.config.knobs import Settings
from proxy.config.rendering import render_example

CONFIGS = Path(__file__).parents[3] / "configs"
FILES = sorted(CONFIGS.glob("*.toml"))


def test_the_three_configs_exist() -> None:
    assert {path.name for path in FILES} >= {"watchmux.toml", "development.toml", "production.toml"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_loads(path: Path) -> None:
    merge_settings({}, path, [], look_at_files=False)


def test_the_commented_example_has_the_defaults() -> None:
    """Refresh it with `watchmux config > configs/watchmux.toml`."""
    assert (CONFIGS / "watchmux.toml").read_text() == render_example()
    assert merge_settings({}, CONFIGS / "watchmux.toml", [])[0] == Settings()


def test_development_needs_no_etcd_and_production_is_secured() -> None:
    development = merge_settings({}, CONFIGS / "development.toml", [])[0]
    assert not development.upstream.endpoints
    production = merge_settings({}, CONFIGS / "production.toml", [], look_at_files=False)[0]
    assert all(endpoint.startswith("https://") for endpoint in production.upstream.endpoints)
    assert production.listener.cert_file
    assert not production.upstream.insecure_skip_tls_verify
