"""The engine drives a scripted core: order of inputs and effects, reads, the timer, a core that failed."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from coalesce.core import Coalescer
from coalesce.effects import (
    CheckPermission,
    CloseUpstream,
    EndSession,
    OpenUpstream,
    PauseUpstream,
    ReadRevision,
    RequestProgress,
    ResumeUpstream,
    TakeRequests,
)
from coalesce.ending import OTHER_HISTORY
from coalesce.inputs import CreateRefusal, CreateRequest, Granted, Identity
from coalesce.limits import CoreLimits
from coalesce.model import PendingCreate, PendingRead
from proto.scan import Header, WatchResponse
from tests.proxy.watch.engine_rig import HEADER, TRUNK, FakeOutlet, Rig, watch_of
from tests.waiting import until_async


async def test_inputs_never_nest() -> None:
    rig = Rig()
    check: Any = watch_of(FakeOutlet(9))
    check.key, check.range_end = b"k", b""
    read: Any = SimpleNamespace(waiting=[check])
    rig.script("create", CheckPermission(check), ReadRevision(read), OpenUpstream("trunk"))  # type: ignore[arg-type]
    rig.engine.create(check.session, CreateRequest(b"k"))
    # The answers arrived inside the effects, and waited until all effects were carried out.
    assert rig.core.names() == ["create", "permission", "revision_read"]
    assert rig.upstream.told == [("open", "trunk")]
    assert isinstance(rig.core.inputs[1][2], Granted)
    assert rig.core.inputs[2][1:3] == (read, HEADER)


async def test_a_create_needs_no_check_while_auth_is_off() -> None:
    rig = Rig()
    rig.reader.auth_off = HEADER
    check = watch_of(FakeOutlet(9))
    rig.engine.create(check.session, CreateRequest(b"k"))
    assert rig.core.names() == ["create_admitted"]
    assert rig.core.inputs[0][3] == HEADER


async def test_session_whose_token_is_refused_is_ended() -> None:
    rig = Rig()
    outlets = [FakeOutlet(9) for _ in range(3)]
    creates = [watch_of(outlet) for outlet in outlets]
    for create, token in zip(creates, (None, b"old", b"good"), strict=True):
        create.key, create.range_end = b"k", b""
        create.session.identity = Identity(token)
    read: Any = SimpleNamespace(waiting=creates)
    rig.reader.queries.auth_on = True
    rig.reader.refuses = {None, b"old"}
    # As the core does at `close`.
    outlets[1].on_end = lambda: setattr(creates[1].session, "ended", True)
    rig.script("create", ReadRevision(read))
    rig.engine.create(creates[0].session, CreateRequest(b"k"))
    assert [asked[0] for asked in rig.reader.reads] == [b"old", b"good"]
    assert [len(outlet.ends) for outlet in outlets] == [0, 1, 0]
    assert rig.core.names() == ["create", "close", "revision_read"]
    # A create that is refused already needs no permission, only a header.
    creates[2].refusal = "no"
    creates[0].session.ended = True
    rig.script("create", ReadRevision(read))
    rig.engine.create(creates[0].session, CreateRequest(b"k"))
    assert rig.reader.reads[-1] == (None,)


async def test_a_read_without_waiting_clients_makes_no_call() -> None:
    rig = Rig()
    create = watch_of(FakeOutlet(9))
    create.session.ended = True
    rig.script("create", ReadRevision(SimpleNamespace(waiting=[create])))  # type: ignore[arg-type]
    rig.engine.create(create.session, CreateRequest(b"k"))
    assert rig.reader.reads == []
    assert rig.core.inputs[1][2].revision == 0


async def test_effects_reach_the_upstream_in_order() -> None:
    rig = Rig()
    rig.script(
        "cancel",
        OpenUpstream("a"),  # type: ignore[arg-type]
        PauseUpstream("a"),  # type: ignore[arg-type]
        RequestProgress((), 1),
        ResumeUpstream("a"),  # type: ignore[arg-type]
        CloseUpstream("a"),  # type: ignore[arg-type]
    )
    rig.engine.cancel(None, 1)  # type: ignore[arg-type]
    assert [name for name, _ in rig.upstream.told] == ["open", "pause", "progress", "resume", "close"]


async def test_a_session_is_read_again_once_its_queue_has_room() -> None:
    rig = Rig()
    outlet = FakeOutlet(9)
    rig.script("cancel", TakeRequests(watch_of(outlet).session))
    rig.engine.cancel(None, 1)  # type: ignore[arg-type]
    assert outlet.asked_on == 1


async def test_a_session_is_ended() -> None:
    rig = Rig()
    outlet = FakeOutlet(0)
    rig.script("no_leader", EndSession(watch_of(outlet).session, 14, "etcdserver: no leader"))
    rig.engine.no_leader()
    assert outlet.ends == [(14, "etcdserver: no leader")]


async def test_the_timer_fires_only_at_the_deadline() -> None:
    loop = asyncio.get_running_loop()
    rig = Rig()
    rig.core.deadline = loop.time() + 3600
    rig.engine.cancel(None, 1)  # type: ignore[arg-type]
    rig.core.deadline = due = loop.time() + 0.05
    rig.engine.cancel(None, 2)  # type: ignore[arg-type]
    await until_async(lambda: "expire" in rig.core.names(), "the deadline")
    assert rig.core.inputs[2][1] >= due
    rig.core.deadline = None
    count = len(rig.core.inputs)
    rig.engine.cancel(None, 3)  # type: ignore[arg-type]
    rig.engine.stop()
    rig.engine.cancel(None, 4)  # type: ignore[arg-type]
    assert len(rig.core.inputs) <= count + 2


@pytest.mark.parametrize(("revision", "linearizable", "back"), [(8, True, True), (8, False, False), (9, True, False)])
async def test_only_a_linearizable_read_detects_a_restore(revision: int, linearizable: bool, back: bool) -> None:
    rig = Rig()
    rig.script("cancel", OpenUpstream(TRUNK))
    rig.engine.cancel(None, 1)  # type: ignore[arg-type]
    rig.upstream.newest_revision = 9
    rig.reader.header, rig.reader.linearizable = Header.make(1, 2, revision, 4), linearizable
    rig.engine.resumed()
    assert rig.reader.reads == [(b"t", b"k", b"l")]
    assert ("other_history" in rig.core.names()) is back
    assert (("went back", 8) in rig.upstream.told) is back
    assert rig.engine.stats.went_back == back


async def test_a_restore_that_another_proxy_reports_counts_once() -> None:
    """The core closes all watches at the first report; the others are still reported, one by one."""
    rig = Rig()
    response = WatchResponse(HEADER, 0, canceled=True, compact_revision=9, cancel_reason=OTHER_HISTORY)
    for closed in (False, True, True):
        rig.engine.received(SimpleNamespace(closed=closed), response)  # type: ignore[arg-type]
    assert rig.core.names() == ["other_history", "upstream_response", "upstream_response", "upstream_response"]


async def test_a_connection_without_watches_needs_no_read() -> None:
    rig = Rig()
    rig.upstream.ordered_progress = True
    rig.engine.resumed()
    assert rig.reader.reads == []
    assert rig.core.ordered_progress


async def test_answers_for_sessions_of_a_failed_core_are_ignored() -> None:
    rig = Rig()
    session = Coalescer(CoreLimits()).open_session(FakeOutlet(9), Identity(), 0.0)
    rig.engine.failed = lambda: rig.engine.abandon(session)
    rig.script("create", None)  # type: ignore[arg-type]
    rig.engine.create(session, CreateRequest(b"k"))
    rig.engine.permission(PendingCreate(session, CreateRequest(b"k")), Granted(HEADER))
    rig.engine.revision_read(PendingRead(), HEADER)
    rig.engine.not_authorized(session, CreateRefusal("no"))
    assert rig.engine.stats.failures == 1
    assert rig.upstream.told == []


async def test_a_failed_core_is_replaced_and_its_sessions_end() -> None:
    rig = Rig()
    ended = []
    rig.engine.failed = lambda: ended.append(rig.engine.core)
    check: Any = watch_of(FakeOutlet(9))
    check.key, check.range_end = b"k", b""
    # The answer to the check waits in the inbox when the next effect fails.
    rig.script("create", OpenUpstream(TRUNK), CheckPermission(check), None)  # type: ignore[arg-type]
    rig.engine.create(None, CreateRequest(b"k"))  # type: ignore[arg-type]
    assert rig.engine.stats.failures == 1
    assert isinstance(rig.engine.core, Coalescer)
    assert ended == [rig.engine.core]
    assert rig.upstream.told == [("open", TRUNK), ("close", TRUNK)]
    assert rig.core.names() == ["create"]
    rig.engine.open_session(FakeOutlet(9), Identity())
    assert rig.engine.core.stats.sessions == 1
    # The header is kept, so that refusing a create needs no read from etcd.
    assert rig.engine.core.header is HEADER
