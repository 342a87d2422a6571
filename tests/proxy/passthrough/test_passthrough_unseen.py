"""Pass-through in front of scripted servers: what is changed on the way, and which calls are resent."""

from __future__ import annotations

import gzip
from collections.abc import Callable

import pytest

from proto.etcd_errors import LEARNER, NO_LEADER
from proto.framing import frame
from proto.http2 import ErrorCode
from tests.e2e.raw_client import RawClient
from tests.proxy.passthrough.test_passthrough import PUT, Running, passing
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.waiting import until_async
from upstream.heads import FIRST_HOP

RANGE = "/etcdserverpb.KV/Range"
WRITES = (PUT, "/etcdserverpb.Lease/LeaseGrant", "/etcdserverpb.Lock/Lock", "/no.Such/Method")


async def client_of(running: Running) -> RawClient:
    """A client of a pass-through that is connected to all endpoints."""
    await until_async(lambda: all(state.connected for state in running.pool.states()), "the connections")
    return await RawClient.connect(int(running.address.rpartition(":")[2]))


async def test_not_a_byte_is_changed_on_the_way() -> None:
    """Heads in their order, repeated fields, the user agent, compressed messages and trailers, in both directions."""
    asked = b"\1" + frame(gzip.compress(b"question" * 100))[1:]
    answered = b"\1" + frame(gzip.compress(b"answer" * 1000))[1:] + frame(b"plain")
    metadata = [
        ("user-agent", "custom/1.0"),
        ("grpc-encoding", "gzip"),
        ("grpc-accept-encoding", "gzip,snappy"),
        ("x-twice", "1"),
        ("grpc-timeout", "7S"),
        ("x-twice", "2"),
        ("x-mine-bin", "AP8"),
        ("hasleader", "true"),
    ]
    head = [
        (b":status", b"200"),
        (b"content-type", b"application/grpc+proto"),
        (b"grpc-encoding", b"gzip"),
        (b"x-head", b"1"),
        (b"x-head", b"2"),
    ]
    tail = [
        (b"x-tail-bin", b"AQI"),
        (b"grpc-status", b"9"),
        (b"grpc-message", b"n%C3%B6"),
        (b"grpc-status-details-bin", b"CAU"),
        (b"x-tail-bin", b"AP8"),
    ]
    seen: list[tuple[bytes, bytes]] = []
    took: list[bytes] = []

    def take(call: ScriptedCall, data: bytes) -> list[bytes]:
        took.append(data)
        if b"".join(took) == asked:
            http2 = call.connection.http2
            http2.send_headers(call.stream, head)
            http2.send(call.stream, (answered,), len(answered))
            http2.send_headers(call.stream, tail, end_stream=True)
        return []

    def begin(call: ScriptedCall) -> None:
        seen.extend(call.headers)
        call.take = lambda data: take(call, data)  # type: ignore[method-assign]

    async with scripted() as etcd, passing(etcd.endpoint) as running:
        etcd.on_call = begin
        async with await client_of(running) as client:
            call = client.call("/any.Service/Method", metadata)
            heads: list[tuple[str, str]] = []
            got: list[bytes] = []
            call.take_data = got.append  # type: ignore[assignment,method-assign]  # bytes are given
            call.note = heads.extend  # type: ignore[assignment,method-assign]  # a list takes any iterable
            call.send_raw(asked, end=True)
            await call.end()
            assert b"".join(got) == answered
            assert [(name.encode(), value.encode()) for name, value in heads] == head + tail
        sent = [(b":path", b"/any.Service/Method"), (b"content-type", b"application/grpc"), (b"te", b"trailers")]
        sent += [(name.encode(), value.encode()) for name, value in metadata]
        sent.append(FIRST_HOP)
        assert [field for field in seen if field[0] not in (b":method", b":scheme", b":authority")] == sent
        assert b"".join(took) == asked


@pytest.mark.parametrize("status", range(1, 17))
async def test_every_status_is_the_servers_own(status: int) -> None:
    async with scripted() as etcd, scripted() as other, passing(f"{etcd.endpoint},{other.endpoint}") as running:
        for server in (etcd, other):
            server.on_message = lambda call, _: call.end(status, "etcdserver: as it says")
        async with await client_of(running) as client:
            for path in (RANGE, PUT):
                call = client.call(path)
                call.send(b"", end=True)
                assert await call.end() == (status, "etcdserver: as it says")
        assert len(etcd.calls) + len(other.calls) == 2


def refuse(call: ScriptedCall) -> None:
    """Refuse a stream before any processing (RFC 9113 8.7)."""
    call.reset(ErrorCode.REFUSED_STREAM)


def go_away(call: ScriptedCall) -> None:
    """Accept no more streams on this connection, this one included (6.8)."""
    call.connection.go_away(0)


@pytest.mark.parametrize("refusal", [refuse, go_away])
@pytest.mark.parametrize("path", [RANGE, *WRITES])
async def test_unprocessed_call_is_resent(path: str, refusal: Callable[[ScriptedCall], None]) -> None:
    async with scripted() as shy, scripted() as other, passing(f"{shy.endpoint},{other.endpoint}") as running:
        shy.on_call = refusal
        shy.on_message = lambda *_: None
        async with await client_of(running) as client:
            for number in range(4):
                call = client.call(path)
                call.send(b"%d" % number, end=True)
                assert await call.next() == b"%d" % number
                assert await call.end() == (0, "")
        assert running.passthrough.stats.resent == len(shy.calls) > 0
        assert [call.messages for call in other.calls] == [[b"%d" % number] for number in range(4)]


@pytest.mark.parametrize("path", [RANGE, *WRITES])
@pytest.mark.parametrize(("status", "text"), [(14, LEARNER), (9, LEARNER), (14, NO_LEADER)])
async def test_call_refused_by_a_member_not_serving_is_resent(path: str, status: int, text: str) -> None:
    """etcd's interceptors refuse it before any processing (api/v3rpc/interceptor.go)."""
    async with scripted() as idle, scripted() as other, passing(f"{idle.endpoint},{other.endpoint}") as running:
        idle.on_message = lambda call, _: call.end(status, text)
        async with await client_of(running) as client:
            idle.is_learner, idle.leader = text == LEARNER, 0
            for number in range(4):
                call = client.call(path)
                call.send(b"%d" % number, end=True)
                assert await call.next() == b"%d" % number
                assert await call.end() == (0, "")
        assert len(idle.calls) == 1
        assert [call.messages for call in other.calls] == [[b"%d" % number] for number in range(4)]


async def test_call_refused_by_all_members_ends_with_their_status() -> None:
    async with scripted() as one, scripted() as other, passing(f"{one.endpoint},{other.endpoint}") as running:
        one.on_call = other.on_call = refuse
        one.on_message = other.on_message = lambda *_: None
        async with await client_of(running) as client:
            call = client.call(PUT)
            call.send(b"x", end=True)
            await call.end()
            assert call.reset == ErrorCode.REFUSED_STREAM
        assert len(one.calls) + len(other.calls) == 4


def lose(call: ScriptedCall) -> None:
    """Break the connection once the request is complete."""
    assert call.connection.transport is not None
    call.connection.transport.abort()


def give_up(call: ScriptedCall) -> None:
    """Reset the stream with a code that does not show whether the call was processed."""
    call.reset(ErrorCode.INTERNAL_ERROR)


@pytest.mark.parametrize(
    ("path", "end"), [*((path, end) for path in WRITES for end in (lose, give_up)), (RANGE, give_up)]
)
async def test_call_that_may_have_been_processed_is_not_resent(path: str, end: Callable[[ScriptedCall], None]) -> None:
    """An endpoint dies while it may be processing a write; another endpoint would process it a second time."""

    def write(server: ScriptedEtcd) -> None:
        server.on_message = lambda call, _: end(call)

    async with scripted() as one, scripted() as other, passing(f"{one.endpoint},{other.endpoint}") as running:
        write(one)
        write(other)
        async with await client_of(running) as client:
            call = client.call(path)
            call.send(b"x", end=True)
            status, _ = await call.end()
            assert (status, call.reset) == ((14, None) if end is lose else (None, ErrorCode.INTERNAL_ERROR))
        assert len(one.calls) + len(other.calls) == 1
        assert running.passthrough.stats.resent == 0
