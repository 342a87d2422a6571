"""The proxy's own calls that any endpoint may answer: sent to one, and to the next if the answer is late or a failure.

The first good answer wins, and the other attempts are cancelled. So a member that hangs delays such a call by little
more than `HEDGE_AFTER_S`. `attempts.py` decides which endpoint is next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple, Protocol

from proto.framing import Status
from upstream.attempts import Attempts
from upstream.connection import ClientConnection, NotSent
from upstream.errors import CallFailed
from upstream.expiry import ExpiryTimer
from upstream.unary import GRACE_S, Answer, Metadata, NotProcessed, UnaryCall, start_unary

HEDGE_AFTER_S: Final = 0.1
"""The minimum time after which a call is sent to one more endpoint. A read takes etcd about a millisecond."""

HEDGE_AFTER_S_MAX: Final = 1.0
"""The maximum: where answers usually take long, a second call would only add to the load."""

_USUAL_TIMES: Final = 4
"""A call is late after this many times the usual response time."""

_SMOOTHING: Final = 1 / 8
"""The weight of one answer in the usual response time (RFC 6298 uses the same)."""

OutcomeCallback = Callable[[Answer | CallFailed], None]


class Request(NamedTuple):
    """The call to send."""

    path: str
    message: bytes
    metadata: Metadata
    # The largest answer accepted, in bytes.
    message_bytes_max: int


class Hedging:
    """How long answers usually take, and which calls are late because of it: one timer for all calls."""

    def __init__(self) -> None:
        # How long an answer usually takes, in seconds.
        self.usual_s = 0.0
        # Attempts made because another one was late.
        self.hedged = 0
        # Calls that wait for an answer: a few, or as many as there are permission checks in flight.
        self._waiting: dict[HedgedCall, None] = {}
        self._timer = ExpiryTimer(self._expire)

    @property
    def late_after_s(self) -> float:
        """The seconds after which a call is sent to one more endpoint."""
        return min(max(HEDGE_AFTER_S, _USUAL_TIMES * self.usual_s), HEDGE_AFTER_S_MAX)

    def wait(self, call: HedgedCall) -> None:
        """Call `late` of a call at `due`, unless it ends before."""
        self._waiting[call] = None
        self._timer.set(call.due)

    def forget(self, call: HedgedCall) -> None:
        """Remove a call that has ended."""
        self._waiting.pop(call, None)

    def _expire(self) -> None:
        now = asyncio.get_running_loop().time()
        for call in [call for call in self._waiting if call.due <= now]:
            if call in self._waiting:
                del self._waiting[call]
                call.late()
        self._timer.set(min((call.due for call in self._waiting), default=None))


class Endpoints(Protocol):
    """The endpoints that calls can be sent to: the pool."""

    def own_endpoints(self) -> list[str]:
        """Return the names of the endpoints, in the order of attempts."""

    def pick_at(self, endpoint: str) -> ClientConnection | None:
        """Return a connection to this endpoint that takes a call; None when there is none now."""

    def answered(self, connection: ClientConnection, status: int, text: str) -> bool:
        """Report the status of an answer other than OK."""

    def start_later(self, call: HedgedCall) -> None:
        """Start a call as soon as an endpoint takes it."""


class HedgedCall:
    """One call and its attempts. If an endpoint is connected, `start` sends the call before it returns."""

    def __init__(
        self, endpoints: Endpoints, hedging: Hedging, request: Request, deadline: float, callback: OutcomeCallback
    ) -> None:
        """`callback` is called once with the outcome: the answer, or CallFailed with the status that an endpoint
        returned, UNAVAILABLE "no leader" only if every endpoint returned it, DEADLINE_EXCEEDED at `deadline` (loop
        time).
        """
        self.deadline = deadline
        self._loop = asyncio.get_running_loop()
        self._endpoints = endpoints
        self._hedging = hedging
        self._request = request
        self._began = self._loop.time()
        self._callback: OutcomeCallback | None = callback
        self._attempts = Attempts(())
        # A server has processed an attempt.
        self._processed = False
        self._calls: dict[str, UnaryCall] = {}
        # When an answer is late, or the call has failed: loop time.
        self.due = 0.0

    def start(self) -> None:
        """Start, or start again while no server has processed the call."""
        if self._callback is not None:
            self._attempts = Attempts(self._endpoints.own_endpoints())
            self._send_next()

    def cancel(self) -> None:
        """Cancel the call; `callback` is not called."""
        self._callback = None
        self._hedging.forget(self)
        for call in self._calls.values():
            call.give_up()
        self._calls.clear()

    def finish(self, outcome: Answer | CallFailed) -> None:
        """End the call with this outcome."""
        callback = self._callback
        self.cancel()
        if callback is not None:
            callback(outcome)

    def _send_next(self) -> None:
        """Send the call to the next endpoint that takes it."""
        now = self._loop.time()
        while (name := self._attempts.next()) is not None:
            if self._send(name, self._endpoints.pick_at(name), max(self.deadline - now, 0.001)):
                break
            self._attempts.failed(name, Status.UNAVAILABLE, "the endpoint takes no calls now")
        if not self._calls:
            # Not from inside `start`, and not at once: the call would be retried in a tight loop.
            if self._processed:
                failure = CallFailed(Status.UNAVAILABLE, "no other endpoint takes calls now")
                self._loop.call_soon(self.finish, failure)
            else:
                self._endpoints.start_later(self)
            return
        self.due = self.deadline + GRACE_S
        if self._attempts.left:
            self.due = min(self.due, now + self._hedging.late_after_s)
        self._hedging.wait(self)

    def _send(self, name: str, connection: ClientConnection | None, left_s: float) -> bool:
        if connection is None:
            return False
        path, message, metadata, message_bytes_max = self._request
        callback = partial(self._answered, name, connection)
        try:
            self._calls[name] = start_unary(connection, path, message, metadata, left_s, message_bytes_max, callback)
        except NotSent:
            return False
        return True

    def late(self) -> None:
        """Ask one more endpoint, since an answer is late, or fail, since the deadline has passed."""
        if self._loop.time() >= self.deadline + GRACE_S:
            text = f"no answer in {self.deadline - self._began:.3g} s"
            self.finish(CallFailed(Status.DEADLINE_EXCEEDED, text))
            return
        self._hedging.hedged += 1
        self._send_next()

    def _answered(self, name: str, connection: ClientConnection, outcome: Answer | CallFailed) -> None:
        self._calls.pop(name, None)
        if not isinstance(outcome, CallFailed):
            hedging = self._hedging
            hedging.usual_s += _SMOOTHING * (self._loop.time() - self._began - hedging.usual_s)
            self.finish(outcome)
            return
        self._endpoints.answered(connection, outcome.status, outcome.text)
        if isinstance(outcome, NotProcessed) and (outcome.rotated or self._attempts.is_only_try):
            # The connection was closing, and the endpoint may have another one; or the only endpoint had no place for
            # the call.
            self._attempts.give_back(name)
        else:
            self._processed = True
            failure = self._attempts.failed(name, outcome.status, outcome.text)
            if failure is not None:
                self.finish(CallFailed(failure.status, failure.text))
                return
        self._send_next()
