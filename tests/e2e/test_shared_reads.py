"""Identical Range calls in flight share a call at etcd; each client gets what it would get alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from proto.framing import Status
from proto.pb import rpc_pb2
from proxy.passthrough.settings import MIB, PassthroughSettings
from proxy.passthrough.shared_answer import PORTION_BYTES, TURN_BYTES, SharedAnswer
from proxy.passthrough.shared_reads import SharedReads
from proxy.server import Proxy
from tests.e2e.raw_client import RawClient, RawStream
from tests.e2e.running import direct, proxy_for
from tests.e2e.scenario import run
from tests.e2e.test_auth import token_of, with_users
from tests.etcd.server import EtcdServer
from tests.faults.relay import Relay, Way, relay_to
from tests.waiting import until_async

RANGE = "/etcdserverpb.KV/Range"
NS = b"ns/"
BIG = 20
"""Values of a megabyte in the large answer."""


@dataclass
class Rig:
    """A proxy in front of an etcd whose answers can be paused, and a client."""

    proxy: Proxy
    relay: Relay
    client: RawClient

    @property
    def upstream(self) -> int:
        """Range calls made at etcd."""
        return self.proxy.passthrough.stats.range_calls_upstream

    async def arrived(self, count: int) -> None:
        """Wait until so many calls have arrived at the proxy."""
        stats = self.proxy.passthrough.stats
        await until_async(lambda: stats.range_calls >= count, "the calls to arrive")

    def pause(self) -> None:
        """Let no answer of etcd through."""
        self.relay.pause(Way.BACK)


@asynccontextmanager
async def rig_of(etcd: EtcdServer, window: int = 2**31 - 1, **settings: Any) -> AsyncIterator[Rig]:
    """Yield a rig."""
    async with (
        relay_to(etcd.client_port) as relay,
        proxy_for(relay.endpoint, **settings) as proxy,
        await RawClient.connect(proxy.port, window) as client,
    ):
        await until_async(proxy.pool.pick, "a connection")
        reads = proxy.listener.routes[RANGE.encode()]
        assert isinstance(reads, SharedReads)
        # A read that a busy machine delays does not count as hanging, which would begin another one.
        reads._sharing._patience_s = 3600
        yield Rig(proxy, relay, client)
        stats = proxy.passthrough.stats
        await client.close()
        await until_async(lambda: not (stats.shared_reads_bytes or stats.resend_bytes), "nothing to be kept")
        kept = (reads._answers, reads._reads, reads._incomplete, reads._waiting_bytes, reads._passing, reads._sharing)
        assert not any(len(each) for each in kept), kept


def read(client: RawClient, key: bytes = b"k", metadata: Sequence[tuple[str, str]] = (), **extra: Any) -> RawStream:
    """Send a Range request."""
    call = client.call(RANGE, metadata)
    call.send(rpc_pb2.RangeRequest(key=key, **extra).SerializeToString(), end=True)
    return call


async def answer_of(call: RawStream) -> rpc_pb2.RangeResponse:
    """Wait for a good answer."""
    status, text = await call.end()
    assert status == Status.OK, (status, text, call.reset)
    assert len(call.messages) == 1
    return rpc_pb2.RangeResponse.FromString(call.messages[0])


async def test_identical_reads_in_flight_take_two_calls(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig, direct(etcd) as store:
        await store.put(b"k", b"v")
        rig.pause()
        calls = [read(rig.client, metadata=[("grpc-timeout", f"{10 + number}S")]) for number in range(20)]
        await rig.arrived(20)
        rig.relay.mend()
        for call in calls:
            answer = await answer_of(call)
            assert answer.kvs[0].value == b"v"
            assert call.headers[":status"] == "200"
            assert call.headers["content-type"] == "application/grpc"
        assert rig.upstream == 2
        assert rig.proxy.passthrough.stats.range_bytes_saved > 0


async def test_a_read_sees_a_write_that_preceded_it(etcd: EtcdServer) -> None:
    """A put is acknowledged while a read is in flight that etcd has executed already."""
    async with rig_of(etcd) as rig, direct(etcd) as store:
        await store.put(b"k", b"old")
        rig.pause()
        held = rig.relay
        early = read(rig.client)
        await rig.arrived(1)
        await until_async(lambda: any(link._held[Way.BACK] for link in held.links), "etcd's answer")
        await store.put(b"k", b"new")
        late = [read(rig.client) for _ in range(3)]
        await rig.arrived(4)
        held.mend()
        assert (await answer_of(early)).kvs[0].value == b"old"
        for call in late:
            assert (await answer_of(call)).kvs[0].value == b"new"
        assert rig.upstream == 2


@pytest.mark.parametrize(
    ("metadata", "extra"),
    [
        ([("token", "made.up")], {}),
        ([("hasleader", "true")], {}),
        ([("grpc-accept-encoding", "gzip")], {}),
        ([], {"serializable": True}),
        ([], {"limit": 1}),
        ([], {"key": b"other"}),
    ],
)
async def test_different_reads_do_not_share(
    etcd: EtcdServer, metadata: list[tuple[str, str]], extra: dict[str, Any]
) -> None:
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read(rig.client), read(rig.client, **{"metadata": metadata, **extra})]
        calls += [read(rig.client, **{"metadata": metadata, **extra}) for _ in range(2)]
        await rig.arrived(4)
        assert rig.upstream == 2
        rig.relay.mend()
        for call in calls:
            await call.end()
        assert rig.upstream == 3


async def test_each_token_is_answered_by_its_own_reads() -> None:
    with EtcdServer() as etcd:
        with_users(etcd)
        async with rig_of(etcd) as rig:
            tokens = [await token_of(rig.client, user) for user in ("u1", "u3")]
            rig.pause()
            calls = [read(rig.client, b"a/k", [("token", token)]) for token in tokens for _ in range(3)]
            calls += [read(rig.client, b"a/k") for _ in range(3)]
            await rig.arrived(9)
            assert rig.upstream == 3
            rig.relay.mend()
            statuses = [(await call.end())[0] for call in calls]
            assert statuses == [Status.OK] * 3 + [Status.PERMISSION_DENIED] * 3 + [Status.INVALID_ARGUMENT] * 3
            assert [call.text for call in calls[3:5]] == ["etcdserver: permission denied"] * 2
            assert rig.upstream == 6


async def test_clients_that_leave_do_not_end_the_others_read(etcd: EtcdServer) -> None:
    """The client whose call began the read, one whose call waits, and all but one of those that share."""
    async with rig_of(etcd) as rig, await RawClient.connect(rig.proxy.port) as other:
        rig.pause()
        owner = read(rig.client)
        await rig.arrived(1)
        waiting = [read(other), *(read(rig.client) for _ in range(3))]
        await rig.arrived(5)
        owner.cancel()
        # The read of the four that waited begins at once.
        await until_async(lambda: rig.upstream == 2, "the next read")
        await other.close()
        waiting[1].cancel()
        waiting[2].cancel()
        rig.relay.mend()
        await answer_of(waiting[3])
        assert rig.upstream == 2


async def test_a_read_without_clients_is_cancelled(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read(rig.client) for _ in range(4)]
        await rig.arrived(4)
        calls[0].cancel()
        await until_async(lambda: rig.upstream == 2, "the shared read")
        connection = rig.proxy.pool.pick()
        assert connection is not None
        for call in calls[1:]:
            call.cancel()
        await until_async(lambda: not connection.open_calls, "the read to be cancelled")


async def test_each_client_has_its_own_deadline(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig:
        rig.pause()
        first = read(rig.client)
        await rig.arrived(1)
        short = read(rig.client, metadata=[("grpc-timeout", "100m")])
        long = read(rig.client, metadata=[("grpc-timeout", "20S")])
        assert await short.end() == (Status.DEADLINE_EXCEEDED, "context deadline exceeded")
        first.cancel()
        await until_async(lambda: rig.upstream == 2, "the next read")
        rig.relay.mend()
        await answer_of(long)


async def test_a_read_that_hangs_delays_the_others_briefly(etcd: EtcdServer) -> None:
    """One member does not answer: the calls behind its read are answered by another one."""
    async with relay_to(etcd.client_port) as relay, proxy_for(f"{relay.endpoint},{etcd.endpoint}") as proxy:
        await until_async(lambda: all(state.connected for state in proxy.pool.states()), "both connections")
        async with await RawClient.connect(proxy.port) as client:
            relay.pause(Way.BACK)
            stats = proxy.passthrough.stats
            calls = [read(client)]
            await until_async(lambda: stats.range_calls_upstream >= 1, "a read")
            connection = proxy.pool.pick()
            assert connection is not None
            if connection.endpoint.text == relay.endpoint:
                calls.append(read(client))
            calls += [read(client) for _ in range(4)]
            for call in calls[-4:]:
                await answer_of(call)
            relay.mend()
            for call in calls:
                await answer_of(call)


async def test_a_lost_read_is_sent_again(etcd: EtcdServer) -> None:
    """The connection breaks before the answer: the calls wait for the next one, each by itself, and share again."""
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read(rig.client) for _ in range(10)]
        await rig.arrived(10)
        calls[0].cancel()
        await until_async(lambda: rig.upstream == 2, "the shared read")
        rig.relay.cut()
        await until_async(lambda: rig.proxy.passthrough.waiting == 9, "the calls to wait for a connection")
        rig.relay.mend()
        for call in calls[1:]:
            await answer_of(call)
        assert rig.upstream <= 4


async def test_calls_wait_for_etcd_each_with_its_deadline(etcd: EtcdServer) -> None:
    async with rig_of(etcd, passthrough=PassthroughSettings(call_wait_s=30)) as rig:
        rig.relay.cut()
        await until_async(lambda: not rig.proxy.pool.connected, "the connection to break")
        short = read(rig.client, metadata=[("grpc-timeout", "200m")])
        others = [read(rig.client) for _ in range(5)]
        status, _ = await short.end()
        assert status in (Status.UNAVAILABLE, Status.DEADLINE_EXCEEDED)
        rig.relay.mend()
        for call in others:
            await answer_of(call)
        assert rig.upstream == 2


async def large(etcd: EtcdServer) -> None:
    """Write the large answer's keys."""
    async with direct(etcd) as store:
        for number in range(BIG):
            await store.put(b"big/%03d" % number, bytes([number]) * MIB)


def read_large(client: RawClient, *, taking: bool = True) -> RawStream:
    """Read the large answer."""
    call = client.call(RANGE)
    call.taking = taking
    call.send(rpc_pb2.RangeRequest(key=b"big/", range_end=b"big0").SerializeToString(), end=True)
    return call


async def test_a_slow_client_delays_no_other(etcd: EtcdServer) -> None:
    """Its windows stay closed in the middle of 20 MB; the others get all of it, and it does too, later."""
    await large(etcd)
    async with rig_of(etcd) as rig, await RawClient.connect(rig.proxy.port, 100_000) as slow:
        rig.pause()
        first = read_large(rig.client)
        await rig.arrived(1)
        lagging = read_large(slow, taking=False)
        others = [read_large(rig.client) for _ in range(2)]
        await rig.arrived(4)
        rig.relay.mend()
        for call in (first, *others):
            assert len((await answer_of(call)).kvs) == BIG
        stats = rig.proxy.passthrough.stats
        assert not lagging.over
        assert stats.shared_reads_bytes > BIG * MIB, "kept once, for the slow client"
        assert stats.shared_reads_bytes < 1.1 * BIG * MIB
        lagging.take()
        assert len((await answer_of(lagging)).kvs) == BIG
        assert rig.upstream == 2


async def test_reads_beyond_the_limit_of_bytes_go_alone(etcd: EtcdServer) -> None:
    await large(etcd)
    settings = PassthroughSettings(shared_reads_bytes_max=10 * MIB)
    async with rig_of(etcd, passthrough=settings) as rig:
        rig.pause()
        calls = [read_large(rig.client) for _ in range(4)]
        await rig.arrived(4)
        rig.relay.mend()
        for call in calls:
            assert len((await answer_of(call)).kvs) == BIG
        assert rig.proxy.passthrough.stats.range_calls_not_shared == 3
        assert rig.upstream == 5
        # Nor does a request wait that is larger than the limit.
        rig.proxy.passthrough.configure(PassthroughSettings(shared_reads_bytes_max=100))
        before = rig.upstream
        for call in [read(rig.client) for _ in range(3)]:
            await answer_of(call)
        assert rig.upstream == before + 3


async def test_a_break_inside_the_answer_resets_each_call(etcd: EtcdServer) -> None:
    """Part of the answer was passed on: each stream is reset, as that of a call that goes alone."""
    await large(etcd)
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read_large(rig.client) for _ in range(4)]
        await rig.arrived(4)
        calls[0].cancel()
        await until_async(lambda: rig.upstream == 2, "the shared read")
        back = rig.relay.faults[Way.BACK]
        back.paused, back.bytes_left = False, BIG * MIB // 2
        rig.relay.flow()
        for call in calls[1:]:
            await call.end()
            assert call.reset == 2, "INTERNAL_ERROR"
        rig.relay.mend()


async def test_an_answer_flows_while_it_arrives(etcd: EtcdServer) -> None:
    """Half of it has arrived, and both clients have all but a little of that."""
    await large(etcd)
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read_large(rig.client) for _ in range(3)]
        for call in calls:
            call.taking = False
        await rig.arrived(3)
        calls[0].cancel()
        await until_async(lambda: rig.upstream == 2, "the shared read")
        start = rig.relay.passed[Way.BACK]
        rig.relay.mend()
        await until_async(lambda: rig.relay.passed[Way.BACK] > start + BIG * MIB // 2, "half of the answer")
        rig.pause()
        await until_async(lambda: all(call.held > BIG * MIB // 2 - 2 * MIB for call in calls[1:]), "half of it")
        rig.relay.mend()
        for call in calls[1:]:
            assert len((await answer_of(call)).kvs) == BIG


def test_answers_together_are_passed_on_in_bounded_turns(etcd: EtcdServer) -> None:
    """Twelve answers of a megabyte to three calls each; what is passed on in one turn does not grow with them."""
    turns: list[int] = []
    turn, take_turn = SharedReads._turn, SharedAnswer.take_turn

    def counted(self: SharedReads) -> None:
        turns.append(0)
        turn(self)

    def counting(self: SharedAnswer, size: int) -> int:
        passed = take_turn(self, size)
        turns[-1] += passed
        return passed

    async def scenario() -> None:
        async with rig_of(etcd) as rig, direct(etcd) as store:
            for number in range(12):
                await store.put(b"k%d" % number, bytes(MIB))
            rig.pause()
            calls = [read(rig.client, b"k%d" % number) for number in range(12) for _ in range(4)]
            await rig.arrived(48)
            rig.relay.mend()
            for call in calls:
                await answer_of(call)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedReads, "_turn", counted)
        patch.setattr(SharedAnswer, "take_turn", counting)
        run(scenario())
    assert sum(turns) > 30 * MIB
    assert max(turns) <= TURN_BYTES + PORTION_BYTES


async def test_reads_in_a_namespace_share_their_translation(etcd: EtcdServer) -> None:
    async with rig_of(etcd, namespace=NS) as rig, direct(etcd) as store:
        await store.put(NS + b"k", b"v")
        rig.pause()
        calls = [read(rig.client) for _ in range(6)]
        await rig.arrived(6)
        rig.relay.mend()
        for call in calls:
            answer = await answer_of(call)
            assert [(kv.key, kv.value) for kv in answer.kvs] == [(b"k", b"v")]
        assert rig.upstream == 2
        for number in range(BIG):
            await store.put(NS + b"big/%03d" % number, bytes([number]) * MIB)
        rig.pause()
        calls = [read_large(rig.client) for _ in range(4)]
        await rig.arrived(10)
        rig.relay.mend()
        for call in calls:
            answer = await answer_of(call)
            assert [kv.key for kv in answer.kvs] == [b"big/%03d" % number for number in range(BIG)]
        assert rig.upstream == 4


async def test_a_request_that_arrives_slowly_goes_alone(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig:
        call = rig.client.call(RANGE)
        await until_async(lambda: rig.upstream == 1, "the call to begin without its request")
        call.send(rpc_pb2.RangeRequest(key=b"k").SerializeToString(), end=True)
        await answer_of(call)


async def test_a_request_that_waits_for_the_busy_proxy_shares(etcd: EtcdServer) -> None:
    """Its head was handled in one turn of the loop, and its message in a much later one."""
    async with rig_of(etcd) as rig:
        rig.pause()
        first = read(rig.client)
        await rig.arrived(1)
        late = rig.client.call(RANGE)
        await rig.arrived(2)
        busy_until = time.monotonic() + 0.1
        while time.monotonic() < busy_until:
            pass
        other = read(rig.client)
        await rig.arrived(3)
        late.send(rpc_pb2.RangeRequest(key=b"k").SerializeToString(), end=True)
        await until_async(lambda: rig.proxy.passthrough.stats.shared_reads_bytes > 250, "both to wait")
        rig.relay.mend()
        for call in (first, late, other):
            await answer_of(call)
        assert rig.upstream == 2


async def test_sharing_can_be_disabled_at_any_time(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig:
        rig.pause()
        shared = [read(rig.client) for _ in range(3)]
        await rig.arrived(3)
        rig.proxy.passthrough.configure(PassthroughSettings(share_reads=False))
        calls = rig.proxy.passthrough.stats.calls
        alone = [read(rig.client) for _ in range(3)]
        await until_async(lambda: rig.proxy.passthrough.stats.calls == calls + 3, "the calls")
        rig.relay.mend()
        for call in (*shared, *alone):
            await answer_of(call)
        assert (rig.proxy.passthrough.stats.range_calls, rig.upstream) == (3, 2)


async def test_shared_reads_complete_in_a_drain(etcd: EtcdServer) -> None:
    async with rig_of(etcd) as rig:
        rig.pause()
        calls = [read(rig.client) for _ in range(5)]
        await rig.arrived(5)
        draining = asyncio.create_task(rig.proxy.drain(20))
        await until_async(lambda: rig.client.goaways, "GOAWAY")
        rig.relay.mend()
        for call in calls:
            await answer_of(call)
        assert await draining
