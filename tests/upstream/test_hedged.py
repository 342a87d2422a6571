"""The proxy's own calls that any endpoint may answer, at scripted servers: one that hangs delays them little."""

from __future__ import annotations

import asyncio

import pytest

from proto import etcd_errors
from proto.framing import Status
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.upstream.test_pool import ECHO, pooled, up
from tests.waiting import until_async
from upstream.errors import CallFailed
from upstream.pool import Pool


def silent(etcd: ScriptedEtcd) -> list[ScriptedCall]:
    """Have a server answer no call; return the calls that it gets."""
    calls: list[ScriptedCall] = []
    etcd.on_message = lambda call, _: calls.append(call)
    return calls


async def test_a_late_answer_is_asked_for_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    # On a busy machine the calls take longer than the default.
    monkeypatch.setattr("upstream.answer_due.TRY_AGAIN_S", 60.0)
    async with scripted() as one, scripted() as other, pooled(one.endpoint, other.endpoint) as pool:
        await up(pool, 2)
        kept = silent(one)
        hanging = pool.pick_at(one.endpoint)
        assert hanging is not None
        while not kept:
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        loop = asyncio.get_running_loop()
        await until_async(lambda: hanging.answer_due.is_overdue(loop.time()), "it to owe an answer")
        answered = len(other.calls)
        # The call that lost was given up: its endpoint is last in turn for a while.
        for _ in range(3):
            assert (await pool.unary(ECHO, b"x"))[0] == b"x"
        assert len(kept) == 1
        assert len(other.calls) == answered + 3
        await until_async(lambda: all(call.ended == "CANCEL" for call in kept), "the call that lost to be cancelled")


async def test_endpoint_that_owes_an_answer_is_avoided() -> None:
    async with scripted() as one, scripted() as other, pooled(one.endpoint, other.endpoint) as pool:
        await up(pool, 2)
        silent(one)
        connections = {name: pool.pick_at(name) for name in pool.own_endpoints()}
        slow = connections[one.endpoint]
        assert slow is not None
        asking = pool.ask("/test/Slow", b"x", (), 10.0, lambda _: None)
        while not slow.open_calls:
            asking = pool.ask("/test/Slow", b"x", (), 10.0, lambda _: None)
            await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        await until_async(lambda: slow.answer_due.is_overdue(loop.time()), "it to owe an answer")
        assert [pool.pick() for _ in range(4)] == [connections[other.endpoint]] * 4
        assert pool.own_endpoints()[-1] == one.endpoint
        asking.cancel()


async def test_when_all_owe_answers_calls_go_round_them() -> None:
    async with scripted() as one, scripted() as other, pooled(one.endpoint, other.endpoint) as pool:
        await up(pool, 2)
        silent(one)
        silent(other)
        loop = asyncio.get_running_loop()
        calls = [pool.ask("/test/Slow", b"x", (), 10.0, lambda _: None) for _ in range(2)]
        connections = [pool.pick_at(name) for name in pool.own_endpoints()]
        await until_async(
            lambda: all(each is not None and each.answer_due.is_overdue(loop.time()) for each in connections),
            "both to owe an answer",
        )
        assert len({pool.pick() for _ in range(4)}) == 2
        for call in calls:
            call.cancel()


@pytest.mark.parametrize("count", [1, 3])
async def test_without_a_leader_at_each_endpoint_it_fails(count: int) -> None:
    async with scripted() as one, scripted() as two, scripted() as three:
        etcds = [one, two, three]
        for etcd in etcds[:count]:
            etcd.on_message = lambda call, _: call.end(Status.UNAVAILABLE, etcd_errors.NO_LEADER)
        async with pooled(*(etcd.endpoint for etcd in etcds)) as pool:
            await up(pool, 3)
            if count < 3:
                assert (await pool.unary(ECHO, b"x", has_leader=True))[0] == b"x"
                return
            with pytest.raises(CallFailed) as failed:
                await pool.unary(ECHO, b"x", has_leader=True)
            assert failed.value.text == etcd_errors.NO_LEADER
            assert [len(etcd.calls) for etcd in etcds] == [1, 1, 1]


async def test_other_calls_do_not_change_where_one_is_tried() -> None:
    """A member without a leader, and other calls going round-robin: each call reaches a member with a leader."""
    async with scripted() as cut, scripted() as good, scripted() as fine:
        cut.on_message = lambda call, _: call.end(Status.UNAVAILABLE, etcd_errors.NO_LEADER)
        async with pooled(cut.endpoint, good.endpoint, fine.endpoint) as pool:
            await up(pool, 3)

            async def go_round(pool: Pool) -> None:
                while True:
                    pool.pick()
                    pool.own_endpoints()
                    await asyncio.sleep(0)

            others = [asyncio.create_task(go_round(pool)) for _ in range(3)]
            answers = await asyncio.gather(*(pool.unary(ECHO, b"x", has_leader=True) for _ in range(200)))
            assert [answer for answer, _ in answers] == [b"x"] * 200
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)


async def test_no_answer_at_all_is_a_deadline() -> None:
    async with scripted() as one, scripted() as other, pooled(one.endpoint, other.endpoint) as pool:
        await up(pool, 2)
        kept, kept_there = silent(one), silent(other)
        with pytest.raises(CallFailed) as failed:
            await pool.unary(ECHO, b"x", timeout_s=0.3)
        assert failed.value.status == Status.DEADLINE_EXCEEDED
        await until_async(
            lambda: [call.ended for call in (*kept, *kept_there)] == ["CANCEL"] * 2, "both to be cancelled"
        )
