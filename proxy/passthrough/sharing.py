"""Identical reads in flight share one call at etcd: which call is answered by which read, and when a read begins.

The first call begins a read at once. Calls that arrive while it is in flight wait, and the next read answers all of
them. So each call is answered by a read that began after the call arrived: its answer reflects a state at least as new
as the call, a linearizable read stays linearizable, and a serializable one is as new as it would have been. Nothing is
kept after a read: this is not a cache.

Calls wait for the newest read of their key only, and not for ever: if that read hangs (its etcd is cut off), the calls
behind it get a read of their own after `PATIENCE_S`; those behind that one wait twice as long, and so on. So a read
that takes ten seconds is repeated a few times, not for each client, and a member that hangs delays the others briefly.

Pure: time is an argument, in seconds of any monotonic clock. What the caller has to do is returned: a read to begin,
calls whose deadline is over.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, NamedTuple, TypeVar

from proxy.passthrough.waiting import WaitingCalls

PATIENCE_S: Final = 1.0
"""How long calls wait for one read before them: far above the duration of a healthy one, even of 100 MB."""

Call = TypeVar("Call", bound=Hashable)


class SharedRead(Generic[Call]):
    """One call at etcd, and the calls that it answers. All of them arrived before it began."""

    __slots__ = ("calls", "hanging", "key", "queue", "settled")

    def __init__(self, key: Hashable, calls: dict[Call, None], hanging: int = 0) -> None:
        self.key = key
        self.calls = calls
        # Reads before it that hung.
        self.hanging = hanging
        # The calls that wait for it; None as long as none does.
        self.queue: dict[Call, None] | None = None
        # It is over, or its state is read: calls that arrive from now on need not wait for it.
        self.settled = False


class ExpireCall(NamedTuple, Generic[Call]):
    """End this call: its deadline is over."""

    call: Call


class BeginRead(NamedTuple, Generic[Call]):
    """Begin this read."""

    read: SharedRead[Call]


class ReadsInFlight(Generic[Call]):
    """All reads in flight that are not settled, and the calls that wait for the next ones."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        self._patience_s = patience_s
        # The newest read of each key, while it is not settled.
        self._newest: dict[Hashable, SharedRead[Call]] = {}
        # The read of each call that shares, and the read that each waiting call waits for. A call that began a read
        # alone is not listed: etcd knows its deadline, and the read ends with it.
        self._shares: dict[Call, SharedRead[Call]] = {}
        self._waits: dict[Call, SharedRead[Call]] = {}
        self._deadlines: WaitingCalls[Call] = WaitingCalls()
        self._patience: WaitingCalls[SharedRead[Call]] = WaitingCalls()

    def __len__(self) -> int:
        return len(self._newest)

    def __contains__(self, call: Call) -> bool:
        return call in self._waits or call in self._shares

    def newest(self, key: Hashable) -> SharedRead[Call] | None:
        """Return the read that a call with this key has to wait for; None: the call begins one."""
        return self._newest.get(key)

    def shared(self, call: Call) -> SharedRead[Call] | None:
        """Return the read that answers this call and others; None if there is none."""
        return self._shares.get(call)

    def begin(self, key: Hashable, call: Call) -> SharedRead[Call]:
        """Return the read to begin for a call alone; no read of its key is in flight."""
        read = self._newest[key] = SharedRead(key, {call: None})
        return read

    def wait(self, read: SharedRead[Call], call: Call, now: float, deadline: float | None = None) -> None:
        """Let a call wait for the newest read of its key, until its deadline at the latest."""
        if read.queue is None:
            read.queue = {}
            self._patience.add(read, now + self._patience_s * 2**read.hanging)
        read.queue[call] = None
        self._waits[call] = read
        if deadline is not None:
            self._deadlines.add(call, deadline)

    def settle(self, read: SharedRead[Call]) -> SharedRead[Call] | None:
        """Note that a read is over, or that etcd has read its state: forget its calls. Return the read to begin next.

        Does nothing for a read that is settled already.
        """
        if read.settled:
            return None
        read.settled = True
        if self._shares:
            for call in read.calls:
                if self._shares.pop(call, None) is not None:
                    self._deadlines.remove(call)
        if self._newest.get(read.key) is not read:
            return None
        if read.queue is not None:
            return self._begin_queued(read, 0)
        del self._newest[read.key]
        return None

    def answer(self, read: SharedRead[Call]) -> None:
        """Note that the answer of a read begins to arrive: no call of it is late any more."""
        for call in read.calls:
            self._deadlines.remove(call)

    def leave(self, call: Call) -> SharedRead[Call] | None:
        """Remove a call that needs no answer any more. Return the read to begin next, if its read ends with it."""
        read = self._waits.get(call)
        if read is not None:
            self._forget(call)
            assert read.queue is not None
            del read.queue[call]
            if not read.queue:
                read.queue = None
                self._patience.remove(read)
            return None
        read = self._shares.get(call)
        if read is None:
            return None
        self._forget(call)
        del read.calls[call]
        return None if read.calls else self.settle(read)

    @property
    def next_expiry(self) -> float | None:
        """When `expire` is due; None: never."""
        due = [each for each in (self._deadlines.next_expiry, self._patience.next_expiry) if each is not None]
        return min(due, default=None)

    def expire(self, now: float) -> ExpireCall[Call] | BeginRead[Call] | None:
        """Return one thing that is due, None if there is none. A late call is removed by `leave`."""
        call = self._deadlines.expired(now)
        if call is not None:
            self._deadlines.remove(call)
            return ExpireCall(call)
        read = self._patience.expired(now)
        return None if read is None else BeginRead(self._begin_queued(read, read.hanging + 1))

    def _begin_queued(self, before: SharedRead[Call], hanging: int) -> SharedRead[Call]:
        calls, before.queue = before.queue, None
        assert calls
        self._patience.remove(before)
        read = self._newest[before.key] = SharedRead(before.key, calls, hanging)
        for call in calls:
            del self._waits[call]
            if len(calls) > 1:
                self._shares[call] = read
            else:
                self._deadlines.remove(call)
        return read

    def _forget(self, call: Call) -> None:
        self._waits.pop(call, None)
        self._shares.pop(call, None)
        self._deadlines.remove(call)

    def check(self) -> None:
        """Verify the invariants; tests call this after each step."""
        queues = 0
        for key, read in self._newest.items():
            assert read.key == key
            assert not read.settled, "calls would wait for a read that is settled"
            assert read.queue is None or read.queue, "an empty queue"
            assert (read.queue is not None) == (read in self._patience), "calls wait without an end"
            for call in read.queue or ():
                assert self._waits[call] is read
                queues += 1
        assert queues == len(self._waits), "a call waits for a read that is not the newest"
        assert all(call in read.calls and not read.settled for call, read in self._shares.items())
        assert not self._waits.keys() & self._shares.keys()
        assert len(self._patience) == sum(read.queue is not None for read in self._newest.values())
