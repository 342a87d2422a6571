"""etcd's error texts: statuses in the form of grpc-go, and what counts as a refused user."""

from __future__ import annotations

import pytest

from proto.etcd_errors import NO_LEADER, OLD_AUTH_REVISION, USER_EMPTY, is_auth_refusal, read_reason, reason_of
from proto.framing import Status


@pytest.mark.parametrize("status", Status)
def test_a_reason_is_read_as_it_was_written(status: Status) -> None:
    assert read_reason(reason_of(status, "a\nb")) == (status, "a\nb")


@pytest.mark.parametrize(
    ("status", "name"), [(1, "Canceled"), (7, "PermissionDenied"), (8, "ResourceExhausted"), (99, "Unknown")]
)
def test_names_of_codes_are_those_of_grpc_go(status: int, name: str) -> None:
    assert reason_of(status, "x") == f"rpc error: code = {name} desc = x"


@pytest.mark.parametrize(
    ("status", "text", "refused"),
    [(7, "x", True), (16, "x", True), (3, USER_EMPTY, True), (3, OLD_AUTH_REVISION, True), (14, NO_LEADER, False)],
)
def test_refused_users_are_recognized(status: int, text: str, refused: bool) -> None:
    assert is_auth_refusal(status, text) is refused
