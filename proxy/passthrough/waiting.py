"""Calls that wait for a connection to etcd: their order, and how long each waits.

etcd's Go client makes its calls with WaitForReady (client/v3/options.go): without a connection, a call waits for one
until its deadline. A client of the proxy is always connected to the proxy, so its calls wait here instead.

A call of clientv3 is refused before its deadline. clientv3 then retries it at its next endpoint, which may be another
proxy that is connected to etcd; with many concurrent calls, every second retry comes to the same proxy again. So each
try waits for a third of the time left, and the caller sees the call wait for nearly all of it. Other clients do not
retry calls: theirs wait until their deadline.

Pure: time is an argument, in seconds of any monotonic clock.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Final, Generic, TypeVar

NO_CONNECTION: Final = "there is no connection available"
"""The text of UNAVAILABLE for a call that no server has seen. Only with this text does clientv3 retry a write at its
next endpoint (client/v3/retry.go, isSafeRetryMutableRPC); it retries reads with any text."""

REPEATED_SHARE: Final = 1 / 3
"""The share of the time until its deadline for which a call waits while no etcd can be reached, if its client retries
it: about ten tries, every second of them at the other one of two proxies."""

CHECK_INTERVAL_MIN_S: Final = 0.2
"""Minimum interval for checking again a call that waits although etcd is connected (no stream is free)."""

_DEAD_MIN: Final = 64

Call = TypeVar("Call")


def wait_until(now: float, deadline: float | None, call_wait_s: float, *, repeated: bool = False) -> float:
    """Return until when a call waits without an etcd; `deadline`: the call's, None: it has none.

    `repeated`: its client retries it at another endpoint.
    """
    until = float("inf") if deadline is None else deadline
    return min(now + call_wait_s, now + (until - now) * REPEATED_SHARE if repeated else until)


def check_again(now: float, deadline: float | None, call_wait_s: float, *, repeated: bool = False) -> float:
    """Return when a call whose wait has expired is checked again, because etcd is connected but has no free stream.

    Only the deadline ends this wait. But the connection may be lost meanwhile, and then the call must still be refused
    in time for the next endpoint.
    """
    until = float("inf") if deadline is None else deadline
    return min(until, max(wait_until(now, deadline, call_wait_s, repeated=repeated), now + CHECK_INTERVAL_MIN_S))


class _Entry(Generic[Call]):
    """One call and when its wait expires. `call` is None once it was removed or added again."""

    __slots__ = ("call", "number", "until")

    def __init__(self, until: float, number: int, call: Call | None) -> None:
        self.until = until
        self.number = number
        self.call = call

    def __lt__(self, other: _Entry[Call]) -> bool:
        return (self.until, self.number) < (other.until, other.number)


class WaitingCalls(Generic[Call]):
    """The waiting calls. Adding or removing one takes O(log n) comparisons."""

    def __init__(self) -> None:
        # In the order of arrival.
        self._entries: OrderedDict[Call, _Entry[Call]] = OrderedDict()
        # A heap of the same entries, and of some removed ones.
        self._by_time: list[_Entry[Call]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, call: Call) -> bool:
        return call in self._entries

    def add(self, call: Call, until: float) -> None:
        """Let a call wait until `until`. A call that waits already keeps its place in the order."""
        previous = self._entries.get(call)
        if previous is not None:
            previous.call = None
        self._number += 1
        entry = self._entries[call] = _Entry(until, self._number, call)
        heapq.heappush(self._by_time, entry)
        self._sweep()

    def remove(self, call: Call) -> bool:
        """Remove a call; return False if it does not wait."""
        entry = self._entries.pop(call, None)
        if entry is None:
            return False
        entry.call = None
        self._sweep()
        return True

    def oldest(self) -> Call | None:
        """Return the call that arrived first; None if there is none."""
        return next(iter(self._entries), None)

    def expired(self, now: float) -> Call | None:
        """Return a call whose wait has expired, None if there is none. The call stays until it is removed."""
        until = self.next_expiry
        return self._by_time[0].call if until is not None and until <= now else None

    @property
    def next_expiry(self) -> float | None:
        """The earliest expiry; None if no call waits."""
        while self._by_time and self._by_time[0].call is None:
            heapq.heappop(self._by_time)
        return self._by_time[0].until if self._by_time else None

    def _sweep(self) -> None:
        """Drop removed entries once they outnumber the waiting ones."""
        if len(self._by_time) > 2 * len(self._entries) + _DEAD_MIN:
            self._by_time = [entry for entry in self._by_time if entry.call is not None]
            heapq.heapify(self._by_time)
