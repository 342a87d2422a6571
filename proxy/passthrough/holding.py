"""Holding calls until a connection to etcd is available; calls that have waited too long are refused.

`proxy/passthrough/waiting.py` decides their order and for how long each waits. One timer serves all calls, set to the
earliest expiry; the pool reports connections that come up, so nothing is polled. The work of many calls at once is
spread over turns of the event loop.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

from proto.framing import Status
from proxy import logs
from proxy.listening.calls import CallRefusal, deadline_exceeded
from proxy.passthrough.settings import PassthroughSettings, PassthroughStats
from proxy.passthrough.waiting import NO_CONNECTION, WaitingCalls, check_again, wait_until
from upstream.connection import ClientConnection
from upstream.expiry import ExpiryTimer
from upstream.heads import IN_A_LOOP
from upstream.pool import Pool

TURN_CALLS_MAX = 200
"""Waiting calls that are sent or refused in one turn of the event loop: about ten milliseconds."""

PROBLEM_LOG_INTERVAL_S = 10.0
"""Minimum time between two log messages about refused calls; each has their number."""

log = logs.logger("calls")


class HeldCall(Protocol):
    """A call that waits."""

    repeated: bool
    """Its client retries it, at another endpoint first, if it is refused as not sent. Valid after `wait`."""
    deadline: float | None
    """The client's deadline, in loop time; None: it has none. Valid after `wait`."""
    waiting_bytes: int
    """Its bytes counted while it waits."""

    def wait(self) -> int:
        """Prepare to wait; return the bytes kept meanwhile."""

    def begin(self, upstream: ClientConnection) -> bool:
        """Start the call. False: the connection cannot take it."""

    def refuse(self, refusal: CallRefusal) -> None:
        """End the call with a refusal."""


class HeldCalls:
    """The calls that wait for a connection to etcd."""

    def __init__(self, pool: Pool, settings: PassthroughSettings, stats: PassthroughStats) -> None:
        self.settings = settings
        self._stats = stats
        self._pool = pool
        self._calls: WaitingCalls[HeldCall] = WaitingCalls()
        self._timer = ExpiryTimer(self._expire)
        # A continuation is scheduled for the next turn.
        self._serving = False
        self._problems = _ProblemLog()
        pool.when_available(self.serve)

    def __len__(self) -> int:
        return len(self._calls)

    def hold(self, call: HeldCall) -> None:
        """Let a call wait for a connection. Raises CallRefusal at a limit, and in a loop of proxies."""
        now, settings = _now(), self.settings
        if (refusal := self._loop()) is not None:
            raise refusal
        if len(self._calls) >= settings.waiting_max:
            raise self._refusal("too many calls wait for an etcd", "waiting_max")
        if not settings.call_wait_s and not self._pool.connected:
            raise self._refusal(self._problem, "call_wait_s")
        size = call.wait()
        # The pool may report an etcd as connected whose connection has just been lost, so `_expire` asks it again.
        self._calls.add(call, wait_until(now, call.deadline, settings.call_wait_s, repeated=call.repeated))
        try:
            self.grow(call, size)
        except CallRefusal:
            self.leave(call)
            raise
        self._timer.set(self._calls.next_expiry)

    def grow(self, call: HeldCall, size: int) -> None:
        """Count `size` more bytes of a waiting call. Raises CallRefusal at the limit."""
        call.waiting_bytes += size
        self._stats.waiting_bytes += size
        if self._stats.waiting_bytes > self.settings.waiting_bytes_max:
            raise self._refusal("too many bytes of calls wait for an etcd", "waiting_bytes_max")

    def leave(self, call: HeldCall) -> None:
        """Remove a call, if it waits."""
        if self._calls.remove(call):
            self._stats.waiting_bytes -= call.waiting_bytes
            call.waiting_bytes = 0

    def serve(self) -> None:
        """Start waiting calls, oldest first, as far as connections accept them."""
        for _ in range(TURN_CALLS_MAX):
            call = self._calls.oldest()
            if call is None:
                return
            if self._is_late(call):
                continue
            upstream = self._pool.pick()
            if upstream is None and (refusal := self._loop()) is not None:
                call.refuse(refusal)
                continue
            if upstream is None or not call.begin(upstream):
                return
            self.leave(call)
        if not self._serving:
            self._serving = True
            asyncio.get_running_loop().call_soon(self._serve_more)

    def _serve_more(self) -> None:
        self._serving = False
        self.serve()

    def _is_late(self, call: HeldCall) -> bool:
        """End a call whose deadline is over; return whether it was. A write its client has given up is not sent."""
        if call.deadline is None or call.deadline > _now():
            return False
        call.refuse(deadline_exceeded())
        return True

    @property
    def _problem(self) -> str:
        down = self._pool.down
        return f"no etcd can be reached: {down}" if down is not None else "not connected to etcd yet"

    def _loop(self) -> CallRefusal | None:
        """Return the refusal of a call if all endpoints lead back to this proxy: waiting would not help."""
        if (loop := self._pool.loop) is None:
            return None
        return in_a_loop(self._stats, f"calls lead back to this proxy, {IN_A_LOOP} {loop.where}: check --endpoints")

    def _refusal(self, problem: str, limit: str) -> CallRefusal:
        """Count and log the refusal of a call that no server has seen, and return it."""
        self._stats.unavailable += 1
        self._stats.refused_at[limit] += 1
        self._problems.add(problem, _now())
        return CallRefusal(200, Status.UNAVAILABLE, NO_CONNECTION, problem)

    def _expire(self) -> None:
        """Refuse calls that have waited too long, unless etcd can be reached and they wait for a free stream."""
        now, connected, wait_s = _now(), self._pool.connected, self.settings.call_wait_s
        for _ in range(TURN_CALLS_MAX):
            call = self._calls.expired(now)
            if call is None:
                break
            if self._is_late(call):
                continue
            if connected:
                self._calls.add(call, check_again(now, call.deadline, wait_s, repeated=call.repeated))
            else:
                call.refuse(self._refusal(self._problem, "call_wait_s"))
        self._timer.set(self._calls.next_expiry)


def in_a_loop(stats: PassthroughStats, text: str) -> CallRefusal:
    """Count the refusal of a call in a loop of proxies, and return it."""
    stats.refused_at["hops_max"] += 1
    return CallRefusal(200, Status.FAILED_PRECONDITION, f"watchmux: {text}")


def _now() -> float:
    return asyncio.get_running_loop().time()


class _ProblemLog:
    """Logs why calls are refused: the first at once, further ones at intervals with their number."""

    def __init__(self) -> None:
        self._calls = 0
        self._not_before = 0.0

    def add(self, problem: str, now: float) -> None:
        """Count one refused call, and log if due."""
        self._calls += 1
        if now >= self._not_before:
            log.warning("calls were refused: no etcd could be reached in time", calls=self._calls, problem=problem)
            self._calls, self._not_before = 0, now + PROBLEM_LOG_INTERVAL_S
