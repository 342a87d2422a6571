"""A read whose response is interrupted after its head is resent: the client sees one response with one head."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from proto.framing import Status
from proto.http2 import Headers
from proxy.passthrough.answers import trailers_of
from proxy.passthrough.settings import PassthroughSettings
from tests.e2e.raw_client import RawClient
from tests.proxy.passthrough.test_passthrough import passing
from tests.upstream.scripted import ScriptedCall, scripted
from tests.waiting import until_async
from upstream.settings import UpstreamSettings

RANGE = "/etcdserverpb.KV/Range"


def send_headers(call: ScriptedCall, headers: Headers, end_stream: bool) -> None:
    """Send any header list."""
    call.connection.http2.send_headers(call.stream, headers, end_stream)
    call.connection.flush()


def whole(call: ScriptedCall) -> None:
    """Send a complete response."""
    call.send(b"value")
    call.end()


def refused(call: ScriptedCall) -> None:
    """Send a trailers-only response."""
    call.end(Status.RESOURCE_EXHAUSTED, "too much")


def page(call: ScriptedCall) -> None:
    """Answer like a load balancer that has no server left."""
    send_headers(call, [(b":status", b"503"), (b"content-type", b"text/html")], False)
    call.connection.http2.send(call.stream, (b"<html>sorry</html>",), 18, True)
    call.connection.flush()


def bare(call: ScriptedCall) -> None:
    """The same without a body."""
    send_headers(call, [(b":status", b"503"), (b"content-length", b"0")], True)


def broken(call: ScriptedCall) -> None:
    """Break the connection again."""
    call.start()
    call.connection.flush()
    call.connection.server.drop()


def gone(call: ScriptedCall) -> None:
    """Break the connection, and accept no more."""
    call.connection.server.mute = True
    call.connection.server.drop()


@pytest.mark.parametrize(
    ("second", "status", "text", "messages"),
    [
        (whole, Status.OK, "", [b"value"]),
        (refused, Status.RESOURCE_EXHAUSTED, "too much", []),
        (page, Status.UNAVAILABLE, "503", []),
        (bare, Status.UNAVAILABLE, "503", []),
        (broken, Status.UNAVAILABLE, "", []),
        (gone, Status.UNAVAILABLE, "", []),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_interrupted_response_has_one_head(
    second: Callable[[ScriptedCall], None], status: Status, text: str, messages: list[bytes]
) -> None:
    """The result of the second try is sent as trailers (RFC 9113 8.1), never with a second `:status`."""
    async with (
        scripted() as etcd,
        passing(
            etcd.endpoint,
            settings=UpstreamSettings(backoff_max_s=0.02),
            # Only the last one waits for it.
            bounds=PassthroughSettings(call_wait_s=0.3 if second is gone else 20.0),
        ) as running,
    ):
        tries: list[ScriptedCall] = []

        def answer(call: ScriptedCall, _message: bytes) -> None:
            tries.append(call)
            if len(tries) == 1:
                asyncio.get_running_loop().create_task(first(call))
            else:
                second(call)

        async def first(call: ScriptedCall) -> None:
            call.start()
            call.connection.flush()
            await until_async(lambda: stream.headers, "the head at the client")
            if second is gone:
                gone(call)
            else:
                call.connection.server.drop()

        etcd.on_message = answer
        await until_async(running.pool.pick, "a connection")
        async with await RawClient.connect(int(running.address.rpartition(":")[2])) as client:
            stream = client.call(RANGE)
            stream.send(b"", end=True)
            ended = await stream.end()
            assert ended[0] == status, ended
            assert text in ended[1]
            assert (stream.messages, stream.reset) == (messages, None)
            assert stream.headers[":status"] == "200"
            assert ":status" not in stream.trailers
            assert second is gone or len(tries) > 1


def test_trailers_only_head_becomes_trailers() -> None:
    plain = [(b"grpc-status", b"0"), (b"x", b"y")]
    assert trailers_of(plain, 0, "") is plain
    head = [(b":status", b"200"), (b"content-type", b"application/grpc"), *plain]
    assert trailers_of(head, 0, "") == plain
    assert trailers_of([(b":status", b"503")], 14, "x") == [(b"grpc-status", b"14"), (b"grpc-message", b"x")]
