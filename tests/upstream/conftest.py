"""Fixtures of the upstream's tests."""

from __future__ import annotations

import pytest

from tests.upstream.certificates import Certificates, make_certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates in files, made once."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))
