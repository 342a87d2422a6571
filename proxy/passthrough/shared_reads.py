"""Range calls of clients: identical ones in flight share one call at etcd.

`sharing` decides which calls share a read; this module carries it out. A call that shares with no other is an ordinary
pass-through call from the moment its request is complete. Calls that share are answered by a `SharedAnswer`.

Calls are identical if their request bytes and their metadata are equal, except what does not change the answer: the
deadline, the user-agent, the authority that the client connected to. So the token is equal too. A call without a token
reaches etcd like every other one without, whether auth is on or not: etcd gives all of them the same answer, and gives
it after each of them arrived. So nothing has to be known about auth here.

While no etcd is connected, calls wait one by one (`holding`), each with its own deadline, and share when they go.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final

from proto.http2 import Stream
from proxy.listening.calls import CallRefusal, ConnectionHandle, Handler, Headers, deadline_exceeded
from proxy.passthrough.relay import Passthrough, Relay
from proxy.passthrough.shared_answer import PORTION_BYTES, TURN_BYTES, SharedAnswer
from proxy.passthrough.sharing import ExpireCall, ReadsInFlight, SharedRead
from upstream.connection import ClientConnection
from upstream.expiry import ExpiryTimer
from upstream.pool import Pool

RANGE: Final = b"/etcdserverpb.KV/Range"

OWN_FIELDS: Final = frozenset((b":authority", b":scheme", b"grpc-timeout", b"user-agent"))
"""Fields of a request head that may differ between calls that share an answer."""

REQUEST_WAIT_S: Final = 0.5
"""How long the request of a call may take to arrive; after that the call goes alone, so that etcd applies its deadline.
Clients send the request with the head, or right after it; of a thousand at once some are handled in a later turn."""

TURN_CALLS_MAX: Final = 200
"""Calls that are ended or sent alone in one turn of the event loop: about ten milliseconds."""


class SharedReads:
    """The handler factory for Range calls, and the observer of their relays."""

    def __init__(self, passthrough: Passthrough, pool: Pool) -> None:
        self._passthrough = passthrough
        self._stats = passthrough.stats
        self._pool = pool
        self._sharing: ReadsInFlight[Relay] = ReadsInFlight()
        # The answers of the reads that several calls share, until these have arrived; and the reads by answer.
        self._answers: dict[SharedRead[Relay], SharedAnswer] = {}
        self._reads: dict[SharedAnswer, SharedRead[Relay]] = {}
        # Calls whose request is not complete, oldest first, and whether a timer watches them.
        self._incomplete: dict[Relay, None] = {}
        self._watched = False
        # Bytes counted for each call that waits for a read.
        self._waiting_bytes: dict[Relay, int] = {}
        # Answers with bytes to pass on, in rotation, and whether their next turn is scheduled.
        self._passing: deque[SharedAnswer] = deque()
        self._turn_scheduled = False
        self._timer = ExpiryTimer(self._expire)

    def __call__(
        self, connection: ConnectionHandle, stream: Stream, headers: Headers, end_stream: bool
    ) -> Handler | None:
        """Handle a new request stream. Raises CallRefusal as Passthrough does."""
        if end_stream or not self._passthrough.settings.share_reads:
            return self._passthrough(connection, stream, headers, end_stream)
        self._stats.calls += 1
        self._stats.range_calls += 1
        relay = self._passthrough.relay(connection, stream, headers)
        relay.observer = self
        relay.collects_request = True
        self._incomplete[relay] = None
        if not self._watched:
            self._watched = True
            asyncio.get_running_loop().call_later(REQUEST_WAIT_S, self._watch_incomplete)
        return relay

    # The observer of relays that began alone, and of those that wait.

    def received(self, relay: Relay) -> None:
        """Send or share a call whose request is complete; send it alone if it is too large to be kept."""
        relay.collects_request = False
        del self._incomplete[relay]
        body = relay.body
        if body is None or len(body) > self._passthrough.settings.resend_bytes_max:
            self._send_separately(relay)
            return
        key: Hashable = body
        read = self._sharing.newest(key)
        if read is not None:
            key, read = self._find(body, relay, read)
        if read is not None:
            if not self._wait(relay, read):
                self._send_separately(relay)
        elif not self._begin_alone(key, relay, self._pool.pick()):
            self._hold(relay)

    def begin(self, relay: Relay, upstream: ClientConnection) -> bool:
        """Send or share a call that waited for a connection. False: `upstream` cannot take it."""
        body = relay.body
        if body is None:
            # Its response has begun, or its request is too large.
            return relay.start(upstream)
        key, read = self._find(body, relay, self._sharing.newest(body))
        if read is None:
            return self._begin_alone(key, relay, upstream)
        if self._wait(relay, read):
            return True
        relay.observer = None
        return relay.start(upstream)

    def head_received(self, relay: Relay) -> None:
        """Let the next read begin: etcd has read its state, and the client of this call may read slowly."""
        relay.observer = None
        read, relay.read = relay.read, None
        if read is not None:
            following = self._sharing.settle(read)
            if following is not None:
                self._begin(following)

    def held(self, relay: Relay) -> None:
        """Let no other call wait for this one."""
        self._settle_alone(relay)

    def over(self, relay: Relay) -> None:
        """Forget a call that is over, wherever it is."""
        self._incomplete.pop(relay, None)
        if relay.read is not None:
            self._settle_alone(relay)
            return
        self._discharge(relay)
        shared = self._sharing.shared(relay)
        following = self._sharing.leave(relay)
        if shared is not None:
            answer = self._answers[shared]
            answer.leave(relay)
        if following is not None:
            self._begin(following)

    # What a `SharedAnswer` reports.

    def reserve(self, size: int) -> bool:
        """Count `size` bytes of shared answers or waiting requests; False if they would exceed the limit."""
        stats = self._stats
        if stats.shared_reads_bytes + size > self._passthrough.settings.shared_reads_bytes_max:
            return False
        stats.shared_reads_bytes += size
        return True

    def schedule(self, answer: SharedAnswer) -> None:
        """Let an answer pass on bytes in the next turns of the event loop."""
        self._passing.append(answer)
        if not self._turn_scheduled:
            self._turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def release(self, size: int, saved: int) -> None:
        """Stop counting bytes. `saved`: bytes that were passed on and that etcd did not have to send."""
        self._stats.shared_reads_bytes -= size
        self._stats.range_bytes_saved += saved

    def answer_began(self, answer: SharedAnswer) -> None:
        """Let no call of this answer be late any more."""
        read = self._reads.get(answer)
        if read is not None:
            self._sharing.answer(read)

    def answer_settled(self, answer: SharedAnswer) -> None:
        """Begin the next read."""
        read = self._reads.pop(answer, None)
        if read is not None:
            del self._answers[read]
            self._settle(read)

    def answer_unsent(self, calls: Sequence[Relay]) -> None:
        """Let each call wait for a connection."""
        for relay in calls:
            self._hold(relay)

    def answer_too_large(self, calls: Sequence[Relay]) -> None:
        """Send each call alone, a bounded number in each turn."""
        for relay in calls[:TURN_CALLS_MAX]:
            if not relay.done:
                self._stats.range_calls_not_shared += 1
                self._send_separately(relay)
        if len(calls) > TURN_CALLS_MAX:
            asyncio.get_running_loop().call_soon(self.answer_too_large, calls[TURN_CALLS_MAX:])

    # Internal.

    def _find(
        self, body: bytes, relay: Relay, read: SharedRead[Relay] | None
    ) -> tuple[Hashable, SharedRead[Relay] | None]:
        """Return the key of a call, and the read that it has to wait for; `read`: the one with the same request.

        The request alone is the key of nearly all calls, because comparing heads takes longer. Only a call that differs
        from those in flight in its head has both as its key.
        """
        if read is None:
            return body, None
        head = _head_of(relay)
        if head == _head_of(next(iter(read.calls))):
            return body, read
        key = (body, *head)
        return key, self._sharing.newest(key)

    def _begin_alone(self, key: Hashable, relay: Relay, upstream: ClientConnection | None) -> bool:
        if upstream is None:
            return False
        relay.read = self._sharing.begin(key, relay)
        if not relay.start(upstream):
            self._settle_alone(relay)
            return False
        self._stats.range_calls_upstream += 1
        return True

    def _wait(self, relay: Relay, read: SharedRead[Relay]) -> bool:
        """Let a call wait for the next read; False: it goes alone, because of the limit of bytes."""
        size = relay.keep()
        if not self.reserve(size):
            self._stats.range_calls_not_shared += 1
            return False
        self._waiting_bytes[relay] = size
        self._sharing.wait(read, relay, self._passthrough.now(), relay.deadline)
        self._timer.set(self._sharing.next_expiry)
        return True

    def _discharge(self, relay: Relay) -> None:
        self._stats.shared_reads_bytes -= self._waiting_bytes.pop(relay, 0)

    def _settle(self, read: SharedRead[Relay]) -> None:
        following = self._sharing.settle(read)
        if following is not None:
            self._begin(following)

    def _settle_alone(self, relay: Relay) -> None:
        read, relay.read = relay.read, None
        if read is not None:
            self._settle(read)

    def _begin(self, read: SharedRead[Relay]) -> None:
        """Send the read of calls that waited, or let them wait for a connection."""
        calls = list(read.calls)
        for relay in calls:
            self._discharge(relay)
        upstream = self._pool.pick()
        if upstream is not None and self._send(read, calls, upstream):
            self._stats.range_calls_upstream += 1
            return
        following = self._sharing.settle(read)
        for relay in calls:
            self._hold(relay)
        if following is not None:
            self._begin(following)

    def _send(self, read: SharedRead[Relay], calls: list[Relay], upstream: ClientConnection) -> bool:
        if len(calls) == 1:
            calls[0].read = read
            if calls[0].start(upstream):
                return True
            calls[0].read = None
            return False
        answer = SharedAnswer(self, calls)
        self._answers[read], self._reads[answer] = answer, read
        if answer.start(upstream):
            return True
        del self._answers[read], self._reads[answer]
        return False

    def _send_separately(self, relay: Relay) -> None:
        """Send a call without sharing, or let it wait for a connection like any other."""
        relay.observer = None
        relay.collects_request = False
        self._stats.range_calls_upstream += 1
        try:
            self._passthrough.begin(relay)
        except CallRefusal as refusal:
            relay.refuse(refusal)

    def _hold(self, relay: Relay) -> None:
        """Let a call wait for a connection."""
        if relay.done:
            return
        try:
            self._passthrough.held.hold(relay)
        except CallRefusal as refusal:
            relay.refuse(refusal)

    def _turn(self) -> None:
        """Let answers pass on bytes, one portion of each after the other, up to a bound for all of them."""
        self._turn_scheduled = False
        passing, left = self._passing, TURN_BYTES
        while passing and left > 0:
            left -= passing.popleft().take_turn(min(left, PORTION_BYTES))
        if passing and not self._turn_scheduled:
            self._turn_scheduled = True
            asyncio.get_running_loop().call_soon(self._turn)

    def _watch_incomplete(self) -> None:
        """Send calls alone whose requests are not complete after a while."""
        loop = asyncio.get_running_loop()
        due = loop.time() - REQUEST_WAIT_S
        late = [relay for relay in self._incomplete if relay.came_at <= due]
        for relay in late[:TURN_CALLS_MAX]:
            del self._incomplete[relay]
            self._send_separately(relay)
        self._watched = bool(self._incomplete)
        if self._watched:
            loop.call_later(0.0 if len(late) > TURN_CALLS_MAX else REQUEST_WAIT_S, self._watch_incomplete)

    def _expire(self) -> None:
        """End calls whose deadline is over, and begin reads of calls that have waited too long for another one."""
        now = self._passthrough.now()
        for _ in range(TURN_CALLS_MAX):
            due = self._sharing.expire(now)
            if due is None:
                break
            if isinstance(due, ExpireCall):
                due.call.refuse(deadline_exceeded())
            else:
                self._begin(due.read)
        self._timer.set(self._sharing.next_expiry)


def _head_of(relay: Relay) -> list[tuple[bytes, bytes]]:
    """Return what the heads of calls that share an answer have in common."""
    return [field for field in relay.headers if field[0] not in OWN_FIELDS]
