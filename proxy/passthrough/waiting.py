"""Calls that wait for a connection to etcd: in which order they are served, and when each has waited for long enough.

etcd's Go client makes its calls with WaitForReady (client/v3/options.go): without a connection a call waits for one, up
to its deadline. A client of the proxy has a connection all the time, so its calls wait here.

A call of clientv3 is refused before its own deadline. clientv3 then makes it again at its next endpoint, which may be
another proxy that has an etcd; with many calls at a time it is this one again for every second of them. So each waits
for a third of the time it has left, and what its caller sees is as if it had waited for all of it. Other clients do not
repeat calls: theirs wait up to their deadline.

Pure: time is an argument, in seconds of any clock that does not go back.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Final, Generic, TypeVar

NO_CONNECTION: Final = "there is no connection available"
"""The text of UNAVAILABLE for a call that no server has seen. With it, and no other, clientv3 sends a write to its next
endpoint (client/v3/retry.go, isSafeRetryMutableRPC); reads go there with any text."""

REPEATED_SHARE: Final = 1 / 3
"""The share of the time until its deadline for which a call waits that its client repeats, while no etcd can be
reached: some ten tries, of which each second one goes to the other one of two proxies."""

FULL_WAIT_MIN_S: Final = 1.0
"""How often a call that waits for room at an etcd that can be reached is looked at."""

_DEAD_MIN: Final = 64

Call = TypeVar("Call")


def wait_until(
    now: float, deadline: float | None, call_wait_s: float, *, repeated: bool = False, connected: bool = False
) -> float:
    """Return when a call that waits from `now` on is looked at again; `deadline`: its own, None: it has none.

    `repeated`: its client makes it again elsewhere. `connected`: an etcd can be reached, and only has no room for one
    more call. Then only the deadline ends the wait.
    """
    until = float("inf") if deadline is None else deadline
    if connected:
        return min(until, now + max(call_wait_s, FULL_WAIT_MIN_S))
    return min(now + call_wait_s, now + (until - now) * REPEATED_SHARE if repeated else until)


class _Entry(Generic[Call]):
    """One call, and when it has waited for long enough. `call` is None once it is elsewhere."""

    __slots__ = ("call", "number", "until")

    def __init__(self, until: float, number: int, call: Call | None) -> None:
        self.until = until
        self.number = number
        self.call = call

    def __lt__(self, other: _Entry[Call]) -> bool:
        return (self.until, self.number) < (other.until, other.number)


class WaitingCalls(Generic[Call]):
    """The calls that wait. Adding and removing one costs a few comparisons, however many there are."""

    def __init__(self) -> None:
        # In the order in which they came.
        self._entries: OrderedDict[Call, _Entry[Call]] = OrderedDict()
        # A heap of the same, and of some that have left.
        self._by_time: list[_Entry[Call]] = []
        self._number = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, call: Call) -> bool:
        return call in self._entries

    def add(self, call: Call, until: float) -> None:
        """Let a call wait until then. One that waits already keeps its place in the order."""
        previous = self._entries.get(call)
        if previous is not None:
            previous.call = None
        self._number += 1
        entry = self._entries[call] = _Entry(until, self._number, call)
        heapq.heappush(self._by_time, entry)
        self._sweep()

    def remove(self, call: Call) -> bool:
        """Forget a call; False: it does not wait."""
        entry = self._entries.pop(call, None)
        if entry is None:
            return False
        entry.call = None
        self._sweep()
        return True

    def oldest(self) -> Call | None:
        """Return the call that came first; None when there is none."""
        return next(iter(self._entries), None)

    def expired(self, now: float) -> Call | None:
        """Return a call that has waited for long enough, None when there is none. It stays until it is removed."""
        until = self.next_expiry
        return self._by_time[0].call if until is not None and until <= now else None

    @property
    def next_expiry(self) -> float | None:
        """When the next call has waited for long enough; None when none waits."""
        while self._by_time and self._by_time[0].call is None:
            heapq.heappop(self._by_time)
        return self._by_time[0].until if self._by_time else None

    def _sweep(self) -> None:
        """Drop what has left once it is more than what waits."""
        if len(self._by_time) > 2 * len(self._entries) + _DEAD_MIN:
            self._by_time = [entry for entry in self._by_time if entry.call is not None]
            heapq.heapify(self._by_time)
