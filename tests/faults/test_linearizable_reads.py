"""Shared reads are linearizable: recorded histories of many clients, several proxies, and an etcd with faults."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from proxy import logs
from proxy.passthrough.relay import Relay
from proxy.passthrough.shared_reads import SharedReads
from proxy.passthrough.sharing import SharedRead
from proxy.server import Proxy
from tests.e2e.running import direct, proxy_for
from tests.e2e.test_shared_reads import answer_of, read, rig_of
from tests.etcd.cluster import Cluster, cluster
from tests.etcd.server import EtcdServer
from tests.faults.recorded import Recorder, truth_of
from tests.faults.relay import Way, relay_to
from tests.linearizability import History, Operation, violations
from tests.waiting import until_async

OPERATIONS = 100_000
HANDLED = "grpc_server_handled_total"

log = logs.logger("test")


def _read(began: float, ended: float, revision: int, value: bytes | None = b"v") -> Operation:
    return Operation(began, ended, revision, False, b"k", value)


def _write(began: float, ended: float, revision: int) -> Operation:
    return Operation(began, ended, revision, True, b"k", b"v")


@pytest.mark.parametrize(
    ("operations", "wrong"),
    [
        ([_write(0, 1, 5), _read(2, 3, 5)], 0),
        # An operation that overlaps another one may come before it.
        ([_write(0, 2, 5), _read(1, 3, 4, None)], 0),
        ([_write(0, 1, 5), _read(2, 3, 4, None)], 1),
        ([_write(0, 1, 5), _write(2, 3, 5)], 1),
        ([_read(0, 1, 7), _read(2, 3, 6), _read(4, 5, 7)], 1),
        # The values of a revision are those that were written up to it.
        ([_read(0, 1, 5, None)], 1),
        ([_read(0, 1, 4, None)], 0),
        ([_read(0, 1, 9, b"w")], 0),
        ([_read(0, 1, 8, b"w")], 1),
    ],
)
def test_the_checker(operations: list[Operation], wrong: int) -> None:
    assert len(violations(History(operations, {b"k": [(5, b"v"), (9, b"w")]}))) == wrong


async def _recorded(etcd: EtcdServer, operations: int, delay_s: float) -> tuple[History, int]:
    """Record the history of two proxies, to one of which etcd's answers are late; return it and the reads saved."""
    async with AsyncExitStack() as stack:
        relay = await stack.enter_async_context(relay_to(etcd.client_port))
        relay.delay(Way.BACK, delay_s)
        ends = (relay.endpoint, etcd.endpoint)
        proxies = [await stack.enter_async_context(proxy_for(endpoint)) for endpoint in ends]
        recorder = await stack.enter_async_context(Recorder([proxy.port for proxy in proxies], 40))
        await recorder.more(operations)
    recorder.history.truth = await truth_of(etcd.endpoint)
    stats = [proxy.passthrough.stats for proxy in proxies]
    return recorder.history, sum(one.range_calls - one.range_calls_upstream for one in stats)


async def test_shared_reads_are_linearizable(etcd: EtcdServer) -> None:
    history, saved = await _recorded(etcd, 3_000, 0.003)
    assert saved > 500
    assert violations(history) == []


def _join(self: SharedReads, relay: Relay, read: SharedRead[Relay]) -> bool:
    """Let a call be answered by the read in flight, which began before the call arrived: the deliberate bug."""
    relay.keep()
    self._answers[read]._calls[relay] = read.calls[relay] = None
    self._sharing._shares[relay] = read
    return True


def _handled(etcd: EtcdServer) -> float:
    return sum(value for name, value in etcd.metrics().items() if name.startswith(HANDLED) and '"Range"' in name)


@pytest.mark.parametrize("wrong", [False, True])
async def test_a_read_that_began_too_early_is_found(
    etcd: EtcdServer, monkeypatch: pytest.MonkeyPatch, wrong: bool
) -> None:
    """A write is acknowledged while the answer of a shared read is on its way; then another read arrives."""
    history = History()
    async with rig_of(etcd) as rig, direct(etcd) as store:
        handled = _handled(etcd)
        rig.pause()
        calls = [read(rig.client) for _ in range(3)]
        await rig.arrived(3)
        # etcd does not count a call that it gets together with its cancellation.
        await until_async(lambda: _handled(etcd) > handled, "etcd to execute the first read")
        calls[0].cancel()
        await until_async(lambda: _handled(etcd) >= handled + 2, "etcd to execute the shared read")
        if wrong:
            monkeypatch.setattr(SharedReads, "_wait", _join)
        began = time.perf_counter()
        revision = await store.put(b"k", b"v")
        history.add(Operation(began, time.perf_counter(), revision, True, b"k", b"v"))
        began = time.perf_counter()
        late = read(rig.client)
        await rig.arrived(4)
        rig.relay.mend()
        answer = await answer_of(late)
        history.add(Operation(began, time.perf_counter(), answer.header.revision, False, b"k"))
    assert bool(violations(history)) is wrong


async def _with_faults(members: Cluster, recorder: Recorder, proxies: list[Proxy]) -> None:
    """Let one fault follow the other until there are enough operations."""
    part = OPERATIONS // 20
    while recorder.count < OPERATIONS:
        leader = await members.leader()
        follower = next(member for member in members.members if member is not leader)
        members.make_late(follower, 0.2)
        await recorder.more(part)
        members.mend()
        members.cut_off(follower)
        await recorder.more(part)
        members.mend()
        members.cut_off(leader)
        await recorder.more(part)
        members.mend()
        await members.leader()
        follower.hold_still()
        await recorder.more(part)
        follower.go_on()
        await asyncio.to_thread(follower.kill)
        await recorder.more(part)
        await asyncio.to_thread(follower.start)
        leader = await members.leader()
        await asyncio.to_thread(leader.stop)
        await recorder.more(part // 2)
        await asyncio.to_thread(leader.start)
        await members.leader()
        await recorder.more(part)
    for proxy in proxies:
        await until_async(lambda proxy=proxy: proxy.pool.connected, "a connection")  # type: ignore[misc]


@pytest.mark.long
@pytest.mark.timeout(900)
async def test_100000_operations_with_faults() -> None:
    """A slow member, one that is cut off, one that hangs, and restarts, in turn; three proxies in front of all."""
    async with cluster() as members, AsyncExitStack() as stack:
        proxies = [await stack.enter_async_context(proxy_for(members.endpoints)) for _ in range(3)]
        async with Recorder([proxy.port for proxy in proxies], 96) as recorder:
            await _with_faults(members, recorder, proxies)
        recorder.history.truth = await truth_of((await members.leader()).endpoint)
        stats = [proxy.passthrough.stats for proxy in proxies]
        calls, upstream = sum(one.range_calls for one in stats), sum(one.range_calls_upstream for one in stats)
        found = violations(recorder.history)
        log.info("recorded", operations=recorder.count, failed=recorder.failed, reads=calls, at_etcd=upstream)
        assert recorder.count >= OPERATIONS
        assert upstream < calls / 2
        assert found == []
