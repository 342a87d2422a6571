"""
Calls with one message each way, on a given connection.

For the few calls of our own (version, reads, permission checks). They are not on a hot path; each costs one future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from proto.framing import FramingError, Status, Unframer, encode_timeout, frame
from proto.http2 import Headers
from upstream.connection import ClientConnection, UpstreamCall
from upstream.errors import CallFailed
from upstream.heads import request_headers

Metadata = Sequence[tuple[bytes, bytes]]

HAS_LEADER: Final = (b"hasleader", b"true")
"""Metadata that makes etcd refuse a call at once when it has no leader."""

# How much longer than the deadline that the server was told we wait for its answer.
_GRACE_S: Final = 0.25


class NotProcessed(CallFailed):
    """
    The server has not looked at the call: it can be sent again.

    `rotated`: because it was ending the connection, which it does for reasons of its own.
    """

    def __init__(self, status: int, text: str, rotated: bool) -> None:
        super().__init__(status, text)
        self.rotated = rotated


class _UnaryCall:
    """The handler of one call."""

    def __init__(self, message_bytes_max: int) -> None:
        self.call: UpstreamCall | None = None
        self.done: asyncio.Future[tuple[bytes, Headers]] = asyncio.get_running_loop().create_future()
        self._unframer = Unframer(message_bytes_max)
        self._messages: list[bytes] = []

    def on_headers(self, headers: Headers) -> None:
        pass

    def on_data(self, data: bytes, flow_size: int) -> None:
        assert self.call is not None
        self.call.consumed(flow_size)
        if self.call.http_status != 200:
            return
        try:
            self._messages += self._unframer.feed(data)
        except FramingError as error:
            self.call.reset()
            self._fail(CallFailed(error.code, error.text))

    def on_drained(self) -> None:
        pass

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        assert self.call is not None
        if status != Status.OK:
            if self.call.unprocessed:
                self._fail(NotProcessed(status, message, self.call.rotated))
            else:
                self._fail(CallFailed(status, message))
        elif len(self._messages) != 1 or self._unframer.pending:
            self._fail(CallFailed(Status.INTERNAL, "the server did not answer with one message"))
        elif not self.done.done():
            self.done.set_result((self._messages[0], trailers))

    def _fail(self, error: CallFailed) -> None:
        if not self.done.done():
            self.done.set_exception(error)


async def call_unary(
    connection: ClientConnection,
    path: str,
    message: bytes,
    metadata: Metadata = (),
    timeout_s: float | None = None,
    message_bytes_max: int = 64 << 20,
) -> tuple[bytes, Headers]:
    """
    Call `path` (such as `/etcdserverpb.KV/Range`) and return the answer's message and trailers.

    Raises CallFailed with the status of the answer, DEADLINE_EXCEEDED after `timeout_s` seconds; NotProcessed when
    it can safely be sent again; NotSent when the connection takes no calls.
    """
    timeout = None if timeout_s is None else encode_timeout(timeout_s)
    unary = _UnaryCall(message_bytes_max)
    headers = request_headers(connection, path.encode("ascii"), metadata, timeout)
    unary.call = call = connection.request(headers, unary)
    framed = frame(message)
    call.write((framed,), len(framed), end=True)
    try:
        async with asyncio.timeout(None if timeout_s is None else timeout_s + _GRACE_S):
            return await unary.done
    except TimeoutError:
        raise CallFailed(Status.DEADLINE_EXCEEDED, f"no answer in {timeout_s:g} s") from None
    finally:
        call.reset()
        # The call holds its handler: the two would wait for a garbage collection.
        unary.call = None
