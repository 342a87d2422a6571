"""Fixtures of the upstream's tests."""

from __future__ import annotations

import pytest

from tests.upstream.certificates import Certificates, make_certificates


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """Certificates in files, made once."""
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(autouse=True)
def _no_answer_is_late(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except in tests of late answers: no call is sent twice because the machine stopped this process for a moment."""
    if not request.node.path.name.startswith("test_hedged"):
        for name in (
            "upstream.hedged.HEDGE_AFTER_S",
            "upstream.hedged.HEDGE_AFTER_S_MAX",
            "upstream.answer_due.ANSWER_DUE_S",
        ):
            monkeypatch.setattr(name, 60.0)
