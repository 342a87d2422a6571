"""Shared answers of servers that are not a healthy etcd: each call gets what it would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from proto.framing import frame
from proxy.passthrough.shared_reads import RANGE
from tests.e2e.raw_client import RawStream
from tests.etcd.server import HOST
from tests.proxy.passthrough.test_passthrough import Running, passing
from tests.proxy.passthrough.test_passthrough_unseen import client_of
from tests.upstream.scripted import ScriptedCall, ScriptedEtcd, scripted
from tests.waiting import until_async

CALLS = 5
DETAILS = b"\x08\x05\x12\x04gone\xff\x00"


class Held(grpc.GenericRpcHandler):
    """A server whose Range calls wait until they are released, and then do what a function does."""

    def __init__(self, then: Callable[[Any], bytes]) -> None:
        self.arrived = 0
        self.cancelled = 0
        self.released = asyncio.Event()
        self._then = then

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        assert handler_call_details.method == RANGE.decode()
        return grpc.unary_unary_rpc_method_handler(self._serve)

    async def _serve(self, request: bytes, context: Any) -> bytes:
        assert request == b"a read"
        self.arrived += 1
        try:
            await self.released.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        answer = self._then(context)
        if isinstance(answer, bytes):
            return answer
        await answer
        raise AssertionError("the call was aborted")


@asynccontextmanager
async def held(then: Callable[[Any], Any]) -> AsyncIterator[tuple[Running, Held, list[Any]]]:
    """Yield a proxy in front of a server, and calls in flight there: one alone, and the others shared."""
    server, handler = grpc.aio.server(), Held(then)
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    async with passing(f"{HOST}:{port}") as running:
        await until_async(running.pool.pick, "a connection")
        calls: list[Any] = [running.call(RANGE.decode())(b"a read", timeout=20) for _ in range(CALLS)]
        stats = running.passthrough.stats
        await until_async(lambda: stats.range_calls == CALLS and handler.arrived == 1, "the calls")
        yield running, handler, calls
        assert stats.shared_reads_bytes == stats.resend_bytes == 0
    await server.stop(None)


async def test_metadata_of_the_answer_reach_each_call() -> None:
    def answer(context: Any) -> bytes:
        context.set_trailing_metadata((("after", "1"), ("binary-bin", b"\x00\xff")))
        return b"an answer"

    async with held(answer) as (_, handler, calls):
        handler.released.set()
        for call in calls:
            assert await call == b"an answer"
            assert dict(await call.trailing_metadata()) == {"after": "1", "binary-bin": b"\x00\xff"}
        assert handler.arrived == 2


async def test_a_failure_with_its_details_reaches_each_call() -> None:
    """Trailers only, as etcd's refusals are."""

    def answer(context: Any) -> Any:
        context.set_trailing_metadata((("grpc-status-details-bin", DETAILS),))
        return context.abort(grpc.StatusCode.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted")

    async with held(answer) as (_, handler, calls):
        handler.released.set()
        for call in calls:
            with pytest.raises(grpc.aio.AioRpcError, match="required revision has been compacted") as failure:
                await call
            assert failure.value.code() is grpc.StatusCode.OUT_OF_RANGE
            assert ("grpc-status-details-bin", DETAILS) in tuple(failure.value.trailing_metadata())
        assert handler.arrived == 2


async def test_a_read_is_cancelled_at_the_server_with_its_last_call() -> None:
    async with held(lambda _: b"an answer") as (_, handler, calls):
        calls[0].cancel()
        await until_async(lambda: handler.arrived == 2, "the shared read")
        for call in calls[1:-1]:
            call.cancel()
        await until_async(lambda: handler.cancelled == 1, "the first read to be cancelled")
        calls[-1].cancel()
        await until_async(lambda: handler.cancelled == 2, "the shared read to be cancelled")


@asynccontextmanager
async def scripted_calls() -> AsyncIterator[tuple[Running, ScriptedEtcd, list[RawStream], ScriptedCall]]:
    """Yield a proxy in front of a scripted etcd, calls that share a read, and that read, which is not answered yet."""
    async with scripted() as etcd, passing(etcd.endpoint) as running, await client_of(running) as client:
        etcd.on_message = lambda *_: None
        calls = []
        for _ in range(CALLS):
            call = client.call(RANGE.decode())
            call.send(b"a read", end=True)
            calls.append(call)
        stats = running.passthrough.stats
        await until_async(lambda: stats.range_calls == CALLS and etcd.calls, "the calls")
        etcd.answer(etcd.calls[0], b"first")
        assert (await calls[0].next(), await calls[0].end()) == (b"first", (0, ""))
        await until_async(lambda: len(etcd.calls) == 2, "the shared read")
        yield running, etcd, calls[1:], etcd.calls[1]
        assert stats.shared_reads_bytes == stats.resend_bytes == 0


@pytest.mark.parametrize("sent", [0, 3, 1000])
async def test_a_shared_read_goes_on_after_goaway(sent: int) -> None:
    """A server that is stopped in good order finishes the calls it has begun (RFC 9113 6.8)."""
    message = b"an answer" * 1000
    async with scripted_calls() as (_, etcd, calls, shared):
        answer = frame(message)
        shared.send_raw(answer[:sent])
        shared.connection.go_away(shared.stream.id)
        await until_async(lambda: len(etcd.connections) == 2, "another connection")
        shared.send_raw(answer[sent:])
        shared.end()
        for call in calls:
            assert (await call.next(), await call.end()) == (message, (0, ""))
        assert len(etcd.calls) == 2


async def test_a_shared_read_that_goaway_excludes_is_sent_again() -> None:
    async with scripted_calls() as (_, etcd, calls, shared):
        etcd.on_message = etcd.answer
        shared.connection.go_away(0)
        for call in calls:
            assert (await call.next(), await call.end()) == (b"a read", (0, ""))
        # They wait for a connection one by one, then one begins a read and the others share the next one.
        assert len(etcd.calls) == 4
