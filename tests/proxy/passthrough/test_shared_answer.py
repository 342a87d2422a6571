"""Shared answers of servers that are not a healthy etcd: each call gets what it would get alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from proxy.passthrough.shared_reads import RANGE
from tests.etcd.server import HOST
from tests.proxy.passthrough.test_passthrough import Running, passing
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
