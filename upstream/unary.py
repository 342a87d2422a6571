"""Calls with one message each way on a given connection: the proxy's own (version, reads, permission checks)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from proto.framing import FramingError, MessageReader, Status, encode_timeout, frame
from proto.http2 import Headers
from upstream.connection import ClientConnection, UpstreamCall
from upstream.errors import CallFailed
from upstream.heads import request_headers

Metadata = Sequence[tuple[bytes, bytes]]

HAS_LEADER: Final = (b"hasleader", b"true")
"""Metadata that makes etcd refuse a call at once while it has no leader."""

GRACE_S: Final = 0.25
"""How much longer than the deadline sent to the server the proxy waits for the answer."""


class NotProcessed(CallFailed):
    """The server has not processed the call: it can be sent again.

    `rotated`: because the server was closing the connection, for a reason unrelated to the call.
    """

    def __init__(self, status: int, text: str, rotated: bool) -> None:
        super().__init__(status, text)
        self.rotated = rotated


Answer = tuple[bytes, Headers]
"""The answer's message and trailers."""


class UnaryCall:
    """The handler of one call. Made by `start_unary`."""

    __slots__ = ("_callback", "_messages", "_unframer", "call")

    def __init__(self, callback: Callable[[Answer | CallFailed], None], message_bytes_max: int) -> None:
        self.call: UpstreamCall | None = None
        self._callback: Callable[[Answer | CallFailed], None] | None = callback
        self._unframer = MessageReader(message_bytes_max)
        self._messages: list[bytes] = []

    def on_headers(self, headers: Headers) -> None:
        pass

    def on_data(self, data: bytes, flow_size: int) -> None:
        if self.call is None:
            return
        self.call.consumed(flow_size)
        if self.call.http_status != 200:
            return
        try:
            self._messages += self._unframer.feed(data)
        except FramingError as error:
            self.call.reset()
            self._finish(CallFailed(error.code, error.text))

    def on_drained(self) -> None:
        pass

    def on_end(self, status: int, message: str, trailers: Headers) -> None:
        if status != Status.OK:
            if self.call is not None and self.call.unprocessed:
                self._finish(NotProcessed(status, message, self.call.rotated))
            else:
                self._finish(CallFailed(status, message))
        elif len(self._messages) != 1 or self._unframer.pending:
            self._finish(CallFailed(Status.INTERNAL, "the server did not answer with one message"))
        else:
            self._finish((self._messages[0], trailers))

    def give_up(self) -> None:
        """End the call if it is open; `callback` is not called."""
        self._callback = None
        # The call refers to its handler: break the cycle, so that no garbage collection is needed.
        call, self.call = self.call, None
        if call is not None:
            call.reset()

    def _finish(self, outcome: Answer | CallFailed) -> None:
        callback = self._callback
        self.give_up()
        if callback is not None:
            callback(outcome)


def start_unary(
    connection: ClientConnection,
    path: str,
    message: bytes,
    metadata: Metadata,
    timeout_s: float | None,
    message_bytes_max: int,
    callback: Callable[[Answer | CallFailed], None],
) -> UnaryCall:
    """Send a call; `callback` is called once with the outcome, after this returns. `timeout_s` is only sent to the
    server.

    Raises NotSent when the connection takes no calls.
    """
    timeout = None if timeout_s is None else encode_timeout(timeout_s)
    unary = UnaryCall(callback, message_bytes_max)
    headers = request_headers(connection, path.encode("ascii"), metadata, timeout)
    unary.call = call = connection.request(headers, unary)
    framed = frame(message)
    call.write((framed,), len(framed), end=True)
    # A read of "now" must be sent before what the client sends after its create.
    connection.flush_now()
    return unary


def settle(future: asyncio.Future[Answer], outcome: Answer | CallFailed) -> None:
    """Set the outcome of a call as a future's result, unless the future is done."""
    if future.done():
        return
    if isinstance(outcome, CallFailed):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


async def call_unary(
    connection: ClientConnection,
    path: str,
    message: bytes,
    metadata: Metadata = (),
    timeout_s: float | None = None,
    message_bytes_max: int = 64 << 20,
) -> Answer:
    """Call `path` (such as `/etcdserverpb.KV/Range`) and return the answer's message and trailers.

    Raises CallFailed with the status of the answer, DEADLINE_EXCEEDED after `timeout_s` seconds; NotProcessed when
    it can safely be sent again; NotSent when the connection takes no calls.
    """
    done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
    callback = partial(settle, done)
    unary = start_unary(connection, path, message, metadata, timeout_s, message_bytes_max, callback)
    try:
        async with asyncio.timeout(None if timeout_s is None else timeout_s + GRACE_S):
            return await done
    except TimeoutError:
        raise CallFailed(Status.DEADLINE_EXCEEDED, f"no answer in {timeout_s:g} s") from None
    finally:
        unary.give_up()
