"""The answer of one read at etcd, passed on to all calls that share it, each at the pace of its client.

Towards etcd, a shared answer is the client of an ordinary relay, which does the rest: it resends the read, translates
it, reports a lost connection. What the relay would send to its client is kept here once, and each call has a position
in it. Bytes are passed on while later ones still arrive. A call whose client does not read keeps its position only.

The size of the answer is known before its first byte is passed on, by the prefix of the gRPC message. Memory for all of
it is reserved then, so no client slows down etcd's side; if there is not enough, each call is sent alone instead.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

from proto.framing import PREFIX_BYTES
from proto.http2 import ErrorCode, Stream
from proxy import logs
from proxy.listening.calls import ConnectionHandle, Headers
from proxy.passthrough.relay import Relay
from upstream.connection import ClientConnection

PORTION_BYTES: Final = 256 * 1024
"""Bytes of an answer that one call is given at a time."""

TURN_BYTES: Final = 1024 * 1024
"""Bytes that all answers together pass on in one turn of the event loop: about a millisecond of writing."""

CALL_BYTES_MIN: Final = 8 * 1024
"""What one call counts for at least in that."""

log = logs.logger("calls")

Report = Callable[[Sequence[Relay]], None]


class AnswerOwner(Protocol):
    """What starts answers and counts their bytes."""

    def reserve(self, size: int) -> bool:
        """Count `size` bytes; False, counting nothing, if there is no room for them."""

    def schedule(self, answer: SharedAnswer) -> None:
        """Call `take_turn` of the answer in the next turn of the event loop in which there is room for it."""

    def release(self, size: int, saved: int) -> None:
        """Stop counting bytes. `saved`: bytes that were passed on and that etcd did not have to send."""

    def answer_began(self, answer: SharedAnswer) -> None:
        """The calls are answered from now on, and not sent in another way."""

    def answer_settled(self, answer: SharedAnswer) -> None:
        """The answer is passed on as far as clients take it now, or will not come. May be called again."""

    def answer_unsent(self, calls: Sequence[Relay]) -> None:
        """The read of these calls cannot be sent: no connection takes it."""

    def answer_too_large(self, calls: Sequence[Relay]) -> None:
        """There is no room for the answer of these calls; nothing of it was passed on."""


class AnswerCursor:
    """One call that is being answered: the handler of its client's stream, and its position in the answer."""

    __slots__ = ("answer", "connection", "position", "started", "stream")

    def __init__(self, answer: SharedAnswer, relay: Relay) -> None:
        self.answer = answer
        # Only listeners make calls that share.
        self.connection = cast("ConnectionHandle", relay.connection)
        self.stream = relay.stream
        # The number of pieces passed on.
        self.position = 0
        # The head was passed on.
        self.started = False

    def data(self, data: bytes, flow_size: int, end_stream: bool) -> None:
        """Ignore data after the end of the request."""
        del data, end_stream
        self.connection.h2.consumed(self.stream, flow_size)

    def trailers(self, headers: Headers) -> None:
        """Ignore them after the end of the request."""

    def drained(self) -> None:
        """Continue: the client has read what it was given."""
        self.answer.drained(self)

    def closed(self, code: int | None) -> None:
        """Leave: the client has cancelled the call or disconnected."""
        del code
        self.answer.drop(self)


class SharedAnswer:
    """The answer for two calls or more. For its relay it is the client: connection, HTTP/2 side and observer."""

    def __init__(self, owner: AnswerOwner, calls: Sequence[Relay]) -> None:
        self._owner = owner
        # The calls until the first bytes are passed on; from then on their cursors.
        self._calls = dict.fromkeys(calls)
        self._cursors: dict[AnswerCursor, None] = {}
        self._relay: Relay | None = None
        self._head: Headers | None = None
        self._pieces: list[bytes] = []
        # Bytes received, bytes counted for it as soon as its size is known, and bytes passed on.
        self._size = 0
        self._reserved = 0
        self._passed = 0
        # Everything has arrived; the trailers are None if it ended without.
        self._complete = False
        self._trailers: Headers | None = None
        self._began = False
        # The relay is done.
        self._over = False
        # There is no room for it, or no connection for its read: its calls go on without it.
        self._dissolving = False
        # Cursors to which more can be passed on, and those that have all that has arrived.
        self._ready: deque[AnswerCursor] = deque()
        self._up_to_date: deque[AnswerCursor] = deque()
        self._turn_scheduled = False

    @property
    def h2(self) -> SharedAnswer:
        """The side to which the relay sends."""
        return self

    def start(self, upstream: ClientConnection) -> bool:
        """Send the read; False: the connection cannot take it."""
        relay = next(iter(self._calls)).copy_for(self)
        self._relay = relay
        relay.observer = self
        if relay.start(upstream):
            return True
        relay.observer = None
        relay.closed(None)
        return False

    # What the relay sends: a `ResponseSide`.

    def send_headers(self, stream: Stream, headers: Headers, end_stream: bool = False) -> None:
        """Keep the head or the trailers."""
        del stream
        if end_stream:
            self._trailers = headers
            self._finish()
        else:
            # Passed on with the first bytes: until then the read may have to be sent again.
            self._head = headers

    def send(self, stream: Stream, pieces: Sequence[bytes], size: int, end_stream: bool = False) -> bool:
        """Keep a part of the body; the client of the relay is never blocked."""
        del stream
        if size and not self._dissolving:
            self._pieces += pieces
            self._size += size
            self._make_room()
        if end_stream:
            self._finish()
        return True

    def reset(self, stream: Stream, code: ErrorCode) -> None:
        """Reset each call's stream: the answer broke off."""
        del stream
        if not self._began:
            self._begin()
        for cursor in tuple(self._cursors):
            self._reset(cursor, code)

    def consumed(self, stream: Stream | None, size: int) -> None:
        """Do nothing: each call's relay credits its client."""

    def credit_stream(self, stream: Stream, size: int) -> None:
        """Do nothing: each call's relay credits its client."""

    def schedule_flush(self) -> None:
        """Do nothing: what has arrived is passed on in turns."""

    # What the relay reports: a `RelayObserver`.

    def received(self, relay: Relay) -> None:
        """Do nothing: the request is complete from the start."""

    def begin(self, relay: Relay, upstream: ClientConnection) -> bool:
        """Send the read again."""
        return relay.start(upstream)

    def head_received(self, relay: Relay) -> None:
        """Do nothing: the next read begins when this answer is passed on to all clients that read.

        An earlier one would only compete with it: more calls share the next read if it begins later.
        """

    def held(self, relay: Relay) -> None:
        """Give each call its own place among the calls that wait for a connection, with its own deadline."""
        del relay
        self._dissolve_soon(self._owner.answer_unsent)

    def over(self, relay: Relay) -> None:
        """Note that nothing more arrives."""
        del relay
        self._over = True

    # The calls.

    def leave(self, call: Relay) -> None:
        """Remove a call that is over before anything was passed on; cancel the read if no call is left."""
        self._calls.pop(call, None)
        if not self._calls:
            self._close()

    def drained(self, cursor: AnswerCursor) -> None:
        """Continue with a call whose client has read what it was given."""
        if cursor in self._cursors:
            self._ready.append(cursor)
            self._schedule()

    def drop(self, cursor: AnswerCursor) -> None:
        """Remove a call that is over; cancel the read if no call is left."""
        self._cursors.pop(cursor, None)
        if not self._cursors:
            self._close()

    def _close(self) -> None:
        """Cancel the read unless it is over, and release the answer."""
        relay, self._relay = self._relay, None
        if relay is not None and not relay.done:
            relay.closed(None)
        self._owner.answer_settled(self)
        self._owner.release(self._reserved, max(0, self._passed - self._size))
        self._reserved = self._passed = 0
        self._pieces = []
        self._ready.clear()
        self._up_to_date.clear()

    def _make_room(self) -> None:
        """Count the answer's bytes as soon as its size is known, and pass on what has arrived."""
        if self._size < PREFIX_BYTES:
            return
        wanted = self._size
        if not self._reserved:
            first = self._pieces[0]
            prefix = first if len(first) >= PREFIX_BYTES else b"".join(self._pieces)
            wanted = max(wanted, PREFIX_BYTES + int.from_bytes(prefix[1:PREFIX_BYTES], "big"))
        if wanted > self._reserved:
            if self._owner.reserve(wanted - self._reserved):
                self._reserved = wanted
            elif not self._began:
                self._dissolve_soon(self._owner.answer_too_large)
                return
            else:
                # A second message in a unary call: not an etcd's.
                for cursor in tuple(self._cursors):
                    self._reset(cursor, ErrorCode.INTERNAL_ERROR)
                return
        self._schedule()

    def _finish(self) -> None:
        self._complete = True
        self._schedule()

    def _dissolve_soon(self, report: Report) -> None:
        # Not now: the relay is at work.
        self._dissolving = True
        asyncio.get_running_loop().call_soon(self._dissolve, report)

    def _dissolve(self, report: Report) -> None:
        """Cancel the read, and let the calls go on without it."""
        calls = list(self._calls)
        self._calls.clear()
        self._close()
        report(calls)

    def _begin(self) -> None:
        """Replace the calls by cursors: from now on they get this answer."""
        self._began = True
        self._owner.answer_began(self)
        for call in self._calls:
            if call.done:
                continue
            call.stream.owner = cursor = AnswerCursor(self, call)
            self._cursors[cursor] = None
            # It needs its request no more.
            call.observer = None
            call.closed(None)
        self._calls.clear()
        self._up_to_date.extend(self._cursors)
        if not self._cursors:
            self._close()

    def _schedule(self) -> None:
        if not self._turn_scheduled and not self._dissolving:
            self._turn_scheduled = True
            self._owner.schedule(self)

    def take_turn(self, size: int) -> int:
        """Pass on about `size` bytes, to one call after another; return how many."""
        self._turn_scheduled = False
        if self._dissolving:
            return 0
        if not self._began:
            self._begin()
        ready = self._ready
        ready.extend(self._up_to_date)
        self._up_to_date.clear()
        left = size
        while ready and left > 0:
            cursor = ready.popleft()
            if cursor not in self._cursors:
                continue
            try:
                left -= max(CALL_BYTES_MIN, self._pass_on(cursor))
            except Exception:
                # A failure of one call must not stop the others.
                log.exception("passing on a shared answer failed; resetting the stream")
                self._reset(cursor, ErrorCode.INTERNAL_ERROR)
        if ready:
            self._schedule()
        elif self._over:
            self._owner.answer_settled(self)
        return size - left

    def _pass_on(self, cursor: AnswerCursor) -> int:
        """Give one call its next portion; return the bytes."""
        connection, stream, pieces = cursor.connection, cursor.stream, self._pieces
        if not cursor.started and self._head is not None:
            cursor.started = True
            connection.h2.send_headers(stream, self._head)
        first = last = cursor.position
        size = 0
        while last < len(pieces) and size < PORTION_BYTES:
            size += len(pieces[last])
            last += 1
        if size:
            cursor.position = last
            self._passed += size
            connection.bulky = connection.bulky or size > CALL_BYTES_MIN
            connection.h2.send(stream, pieces[first:last], size)
        connection.schedule_flush()
        if last == len(pieces) and self._complete:
            self._end(cursor)
        elif not stream.blocked:
            (self._ready if last < len(pieces) else self._up_to_date).append(cursor)
        return size

    def _end(self, cursor: AnswerCursor) -> None:
        h2, stream = cursor.connection.h2, cursor.stream
        if not stream.ending:
            if self._trailers is None:
                h2.send(stream, (), 0, True)
            else:
                h2.send_headers(stream, self._trailers, True)
        if not stream.blocked:
            stream.owner = None
            self.drop(cursor)

    def _reset(self, cursor: AnswerCursor, code: ErrorCode) -> None:
        cursor.stream.owner = None
        cursor.connection.h2.reset(cursor.stream, code)
        cursor.connection.schedule_flush()
        self.drop(cursor)
