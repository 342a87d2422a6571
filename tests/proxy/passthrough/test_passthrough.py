"""Pass-through: real gRPC clients, a real gRPC server behind, and a real etcd, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import pytest

from proto.framing import frame
from proto.pb import rpc_pb2, rpc_pb2_grpc
from proxy.listening.http1 import Http1
from proxy.listening.listener import Listener
from proxy.passthrough.answers import MessageBoundary
from proxy.passthrough.relay import Passthrough
from proxy.passthrough.settings import MIB, PassthroughSettings
from proxy.passthrough.shared_reads import RANGE, SharedReads
from tests.e2e.raw_client import RawClient
from tests.e2e.running import proxy_for
from tests.etcd.server import HOST, EtcdServer, free_port
from tests.waiting import LIMIT_S, until_async
from upstream.endpoints import parse_endpoints
from upstream.pool import Pool
from upstream.settings import ConnectionSettings, UpstreamSettings

PUT = "/etcdserverpb.KV/Put"
BIG = 64 * 2**20
UNSENT_MAX = 2 * 2**20
OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass
class Running:
    """A pass-through in front of some endpoints, and a client's channel to it."""

    address: str
    channel: grpc.aio.Channel
    passthrough: Passthrough
    pool: Pool
    http1: Http1
    listener: Listener
    echo: Echo

    @property
    def unsent_bytes(self) -> int:
        """Bytes in the proxy that clients have not read."""
        streams = [stream for connection in self.listener.connections for stream in connection.h2.streams.values()]
        return sum(stream.unsent for stream in streams)

    def call(self, path: str) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        """A unary call of raw bytes."""
        return self.channel.unary_unary(path)


@contextlib.asynccontextmanager
async def passing(
    endpoints: str,
    echo: Echo | None = None,
    settings: UpstreamSettings | None = None,
    bounds: PassthroughSettings | None = None,
) -> AsyncIterator[Running]:
    """Run a listener with pass-through for all paths."""
    parsed = parse_endpoints(endpoints)
    pool = Pool(parsed, None, settings)
    listener = Listener()
    listener.passthrough = passthrough = Passthrough(pool, bounds)
    listener.routes[RANGE] = SharedReads(passthrough, pool)
    listener.http1 = http1 = Http1(lambda: parsed[0])
    pool.start()
    await listener.start(HOST, 0)
    address = f"{HOST}:{listener.port}"
    try:
        async with grpc.aio.insecure_channel(address, options=OPTIONS) as channel:
            yield Running(address, channel, passthrough, pool, http1, listener, echo or Echo())
    finally:
        await listener.stop()
        http1.stop()
        await pool.stop()


class Echo(grpc.GenericRpcHandler):
    """A server that accepts every method: depending on the method's name it answers, fails, streams or waits."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, str | bytes], float | None]] = []
        self.cancelled = asyncio.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        method = str(details.method).rpartition("/")[2]
        if method == "Stream":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        if method == "Flood":
            return grpc.unary_stream_rpc_method_handler(self._flood)
        return grpc.unary_unary_rpc_method_handler(getattr(self, f"_{method.lower()}"))

    def _note(self, method: str, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        metadata = dict(context.invocation_metadata() or ())
        self.seen.append((method, metadata, context.time_remaining()))

    async def _echo(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self._note("echo", context)
        await context.send_initial_metadata((("x-head", "h"), ("x-head-bin", b"\0\1")))
        context.set_trailing_metadata((("x-tail", "t"), ("x-tail-bin", b"\xff")))
        return request

    async def _fail(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        context.set_trailing_metadata((("grpc-status-details-bin", b"\x08\x05details"),))
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, f"nö {request.decode()}")
        return b""

    async def _wait(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        self._note("wait", context)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return request

    async def _stream(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        self._note("stream", context)
        async for request in requests:
            yield request.upper()
        yield b"END"

    async def _flood(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        self._note("flood", context)
        for _ in range(int(request)):
            yield bytes(1 << 20)


@contextlib.asynccontextmanager
async def echo_server() -> AsyncIterator[tuple[Echo, str]]:
    """Run an Echo server of grpc's own."""
    server = grpc.aio.server(options=OPTIONS)
    echo = Echo()
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    try:
        yield echo, f"{HOST}:{port}"
    finally:
        await server.stop(0)


def story(test: Callable[[Running], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test against an Echo server behind a pass-through."""

    def run() -> None:
        async def both() -> None:
            async with echo_server() as (echo, address), passing(address, echo) as running:
                await test(running)

        asyncio.run(both())

    run.__name__ = test.__name__
    run.__doc__ = test.__doc__
    return run


@story
async def test_bytes_metadata_and_trailers_pass_both_ways(running: Running) -> None:
    call = running.call("/any.Service/Echo")(
        b"\0payload", metadata=(("x-mine", "1"), ("x-mine-bin", b"\0\xff"), ("token", "secret")), timeout=5
    )
    assert await call == b"\0payload"
    head = dict(await call.initial_metadata())
    tail = dict(await call.trailing_metadata())
    assert (head["x-head"], head["x-head-bin"]) == ("h", b"\0\1")
    assert (tail["x-tail"], tail["x-tail-bin"]) == ("t", b"\xff")
    _, metadata, remaining = running.echo.seen[0]
    assert (metadata["x-mine"], metadata["x-mine-bin"], metadata["token"]) == ("1", b"\0\xff", "secret")
    assert str(metadata["user-agent"]).startswith("grpc-python")
    assert remaining is not None
    # grpc rounds deadlines up.
    assert 0 < remaining <= 5.1


@story
async def test_compressed_messages_stay_compressed(running: Running) -> None:
    call = running.call("/any.Service/Echo")(b"z" * 10_000, compression=grpc.Compression.Gzip)
    assert await call == b"z" * 10_000
    assert len(running.echo.seen) == 1


@story
async def test_status_text_and_details_pass(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.call("/any.Service/Fail")(b"way")
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "nö way"
    assert dict(caught.value.trailing_metadata())["grpc-status-details-bin"] == b"\x08\x05details"


@story
async def test_deadline_reaches_the_server(running: Running) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await running.call("/any.Service/Wait")(b"", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(running.echo.cancelled.wait(), LIMIT_S)


@story
async def test_cancellation_reaches_the_server(running: Running) -> None:
    call = running.call("/any.Service/Wait")(b"")
    await until_async(lambda: running.echo.seen, "the call to arrive")
    call.cancel()
    await asyncio.wait_for(running.echo.cancelled.wait(), LIMIT_S)


@story
async def test_streams_interleave_and_half_close(running: Running) -> None:
    call: grpc.aio.StreamStreamCall[bytes, bytes] = running.channel.stream_stream("/any.Service/Stream")()
    for word in (b"one", b"two"):
        await call.write(word)
        assert await call.read() == word.upper()
    await call.done_writing()
    assert await call.read() == b"END"
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


@story
async def test_large_messages_pass_under_flow_control(running: Running) -> None:
    message = bytes(8 * 2**20)
    assert await running.call("/any.Service/Echo")(message) == message


@story
async def test_slow_reader_delays_only_itself(running: Running) -> None:
    """Flow control stops its server: at most a few windows wait in the proxy."""
    method: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = running.channel.unary_stream("/any.Service/Flood")
    flood = method(b"%d" % (BIG >> 20))
    assert len(await flood.read()) == 1 << 20  # type: ignore[arg-type]  # EOF is not 1 MiB long
    for _ in range(20):
        assert await running.call("/any.Service/Echo")(b"quick", timeout=5) == b"quick"
        assert running.unsent_bytes <= UNSENT_MAX
    count = 1
    while await flood.read() is not grpc.aio.EOF:
        count += 1
    assert count == BIG >> 20


@pytest.mark.parametrize(("per_connection", "in_all"), [(3, 7), (100, 5)])
async def test_clients_that_do_not_read_delay_no_others(per_connection: int, in_all: int) -> None:
    """Unread answers fill the window of the connection to etcd, which all clients share: they are bounded."""
    window = ConnectionSettings(connection_window_bytes=16 * MIB)
    bounds = PassthroughSettings(unread_bytes_per_connection_max=per_connection * MIB, unread_bytes_max=in_all * MIB)
    async with (
        echo_server() as (echo, address),
        passing(address, echo, UpstreamSettings(connection=window), bounds) as running,
    ):
        port = int(running.address.rpartition(":")[2])
        stats = running.passthrough.stats
        async with (
            await RawClient.connect(port, window=0) as first,
            await RawClient.connect(port, window=0) as second,
        ):
            calls = [client.call("/any.Service/Flood") for client in (first, second) for _ in range(10)]
            for call in calls:
                call.send(b"2", end=True)
            await until_async(lambda: [call.reset for call in calls].count(11) >= 2, "calls to be reset")
            assert await running.call("/any.Service/Echo")(b"quick", timeout=5) == b"quick"
            assert stats.unread >= 2
            assert 0 < stats.unread_bytes <= in_all * MIB
            assert {call.reset for call in calls} == {None, 11}
        await until_async(lambda: stats.unread_bytes == 0, "it to be forgotten with its clients")
        assert stats.resend_bytes == 0


async def test_requests_kept_for_resending_are_bounded() -> None:
    bounds = PassthroughSettings(resend_bytes_max=1000, resend_bytes_total_max=2500)
    async with echo_server() as (echo, address), passing(address, echo, bounds=bounds) as running:
        stats = running.passthrough.stats
        async with await RawClient.connect(int(running.address.rpartition(":")[2])) as client:
            calls = [client.call("/any.Service/Stream") for _ in range(5)]
            for call in calls:
                call.send_raw(frame(bytes(5000))[:900])
            await until_async(lambda: stats.calls == 5, "the calls")
            await until_async(lambda: stats.resend_bytes == 1800, "two of them to be kept")
            for call in calls:
                call.send_raw(frame(bytes(5000))[900:], end=True)
            for call in calls:
                assert await call.end() == (0, "")
            assert stats.resend_bytes == 0


async def test_lost_upstream_ends_its_calls_and_is_reconnected() -> None:
    server = grpc.aio.server()
    echo = Echo()
    server.add_generic_rpc_handlers((echo,))
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    async with passing(f"{HOST}:{port}", echo) as running:
        waiting = running.call("/any.Service/Wait")(b"")
        await until_async(lambda: running.echo.seen, "the call to arrive")
        await server.stop(0)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await waiting
        assert caught.value.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED)
        second = grpc.aio.server()
        second.add_generic_rpc_handlers((echo,))
        second.add_insecure_port(f"{HOST}:{port}")
        await second.start()
        await until_async(lambda: running.pool.pick(), "the pool to connect again")
        assert await running.call("/any.Service/Echo")(b"again", timeout=10) == b"again"
        await second.stop(0)


async def test_calls_continue_at_the_live_endpoint() -> None:
    async with echo_server() as (_, address), passing(f"{HOST}:{free_port()},{address}") as running:
        for _ in range(10):
            assert await running.call("/any.Service/Echo")(b"x", timeout=10) == b"x"


async def test_etcd_decides_on_sizes_and_methods(etcd: EtcdServer) -> None:
    """Requests of any size that etcd refuses get etcd's own error text."""
    async with passing(etcd.endpoint) as running:
        kv = rpc_pb2_grpc.KVStub(running.channel)
        await kv.Put(rpc_pb2.PutRequest(key=b"a", value=bytes(1_400_000)))
        assert len((await kv.Range(rpc_pb2.RangeRequest(key=b"a"))).kvs[0].value) == 1_400_000
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await kv.Put(rpc_pb2.PutRequest(key=b"a", value=bytes(1_600_000)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "etcdserver: request is too large"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.call("/no.Such/Method")(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_the_end_of_each_message_is_known(step: int) -> None:
    stream = b"".join(b"\0" + size.to_bytes(4, "big") + bytes(size) for size in (0, 1, 7, 300))
    ends = {5, 11, 23, len(stream)}
    boundary = MessageBoundary()
    for start in range(0, len(stream), step):
        boundary.feed(stream[start : start + step])
        assert boundary.inside == (min(start + step, len(stream)) not in ends)


async def test_ended_calls_credit_bytes_etcd_has_not_taken(etcd: EtcdServer) -> None:
    """Otherwise a connection's window shrinks with each of them, until nothing more can be sent on it."""
    async with proxy_for(etcd) as proxy, await RawClient.connect(proxy.port) as client:
        await until_async(lambda: client.h2.outbound_flow_control_window > 65_535, "the window")
        (connection,) = proxy.listener.connections
        whole = connection.h2.receive_window
        await until_async(lambda: proxy.pool.pick() is not None, "etcd")
        assert etcd.process is not None
        etcd.process.send_signal(signal.SIGSTOP)
        try:
            for _ in range(3):
                call = client.call("/etcdserverpb.KV/Put")
                call.send_raw(frame(bytes(200_000))[:200_000])
                left = connection.h2.receive_window
                await until_async(lambda left=left: connection.h2.receive_window < left, "the request")  # type: ignore[misc]
                call.cancel()
            await until_async(lambda: not connection.h2.streams, "the end of the calls")
            assert connection.h2.receive_window + connection.h2._unreturned == whole
        finally:
            etcd.process.send_signal(signal.SIGCONT)
