"""Which creates are answered before etcd has answered that of their trunk, and which must wait."""

from __future__ import annotations

from typing import Any

import pytest

from coalesce import (
    CheckPermission,
    Coalescer,
    CoreLimits,
    CreateRequest,
    Identity,
    OpenUpstream,
    ReadRevision,
    UpstreamLost,
)
from tests.coalesce.shell import Shell, put


@pytest.mark.parametrize(
    ("is_first", "start", "more"),
    [
        (True, 6, {}),
        (True, 3, {}),
        (False, 6, {}),
        (False, 5, {"prev_kv": False}),
    ],
)
def test_an_answer_that_etcd_cannot_change_is_sent_at_once(is_first: bool, start: int, more: dict[str, Any]) -> None:
    shell = Shell()
    shell.trunk(5, shell.client(), b"other")
    if not is_first:
        shell.client().create(start=5)
    client = shell.client()
    client.create(start=start, **more)
    trunk = shell.opened[-1]
    assert (trunk.key, trunk.created) == (b"k", False)
    assert client.read() == ["#0 @5 created"]
    shell.created(trunk, 5)
    shell.events(trunk, put(6))
    assert client.read() == ["#0 @6 put 6 k=v"]


@pytest.mark.parametrize(
    ("token", "first", "start", "key", "more"),
    [
        (b"a token", None, 6, b"k", {}),
        (None, None, None, b"k", {}),
        (None, None, 6, b"k" * 4096, {}),
        (None, {"start": None}, 6, b"k", {}),
        (None, {"start": 6}, 5, b"k", {}),
        (None, {"start": 6}, 6, b"k", {"prev_kv": True}),
        (None, {"start": 6}, None, b"k", {}),
    ],
)
def test_an_answer_that_etcd_may_change_waits(
    token: bytes | None, first: dict[str, Any] | None, start: int | None, key: bytes, more: dict[str, Any]
) -> None:
    """Etcd may refuse a token or a large create; it sets where "now" is; and a watch may need a second source."""
    shell = Shell()
    shell.trunk(5, shell.client(), b"other")
    if first is not None:
        shell.client().create(key, **first)
    client = shell.client(token)
    client.create(key, start=start, **more)
    while shell.reads:
        shell.read_now(5)
    assert client.read() == []
    shell.created(next(upstream for upstream in shell.opened if upstream.key == key), 5)
    assert client.read() == ["#0 @5 created"]


def test_a_create_that_another_proxy_may_refuse_waits() -> None:
    """It is refused alone: a refusal after `created` would end the stream, with all its watches."""
    shell = Shell(CoreLimits(upstream_has_limits=True))
    shell.trunk(5, shell.client(), b"other")
    client = shell.client()
    client.create(start=6)
    assert client.read() == []
    shell.do(shell.core.upstream_lost, shell.opened[-1], UpstreamLost(2, "watchmux: the limit is reached"))
    assert client.read() == ["#-1 @5 created canceled (watchmux: the limit is reached)"]
    assert client.ended is None


def test_the_read_of_now_is_sent_before_the_trunk_opens() -> None:
    """It takes etcd longer than the create."""
    core = Coalescer()
    session = core.open_session(object(), Identity(None, False), 1.0)
    (check,) = core.create(session, CreateRequest(b"k", b"", None), 1.0)
    assert isinstance(check, CheckPermission)
    assert [type(effect) for effect in core.permission(check.check, None, 1.0)] == [ReadRevision, OpenUpstream]
