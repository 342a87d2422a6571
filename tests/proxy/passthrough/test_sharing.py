"""Which calls share a read: tables, and a model of clients and etcd with a linearizability checker."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from proxy.passthrough.sharing import PATIENCE_S, BeginRead, ExpireCall, ReadsInFlight, SharedRead
from tests.linearizability import History, Operation, violations


def arrive(
    sharing: ReadsInFlight[str], call: str, now: float = 0.0, deadline: float | None = None
) -> SharedRead[str] | None:
    """Let a call arrive; return the read that it begins."""
    read = sharing.newest("k")
    if read is None:
        return sharing.begin("k", call)
    sharing.wait(read, call, now, deadline)
    sharing.check()
    return None


def begun(sharing: ReadsInFlight[str], call: str) -> SharedRead[str]:
    """Let a call arrive that begins a read."""
    read = arrive(sharing, call)
    assert read is not None
    return read


def calls(read: SharedRead[str] | None) -> list[str]:
    """The calls that a read answers."""
    return [] if read is None else list(read.calls)


def test_calls_in_flight_share_the_next_read() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    assert arrive(sharing, "b") is None
    assert arrive(sharing, "c") is None
    second = sharing.settle(first)
    assert calls(second) == ["b", "c"]
    assert second is not None
    assert arrive(sharing, "d") is None
    assert calls(sharing.settle(second)) == ["d"]


def test_nothing_is_kept_after_a_read() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    assert sharing.settle(first) is None
    assert sharing.settle(first) is None
    assert len(sharing) == 0
    assert calls(begun(sharing, "b")) == ["b"]


def test_a_call_that_leaves_is_not_answered() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    for call in "bcd":
        arrive(sharing, call)
    assert sharing.leave("b") is None
    second = sharing.settle(first)
    assert calls(second) == ["c", "d"]
    assert arrive(sharing, "e") is None
    assert sharing.leave("c") is None
    # The last one leaves: its read is cancelled, and the next one begins.
    assert calls(sharing.leave("d")) == ["e"]
    sharing.check()


def test_a_queue_that_becomes_empty_begins_no_read() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    arrive(sharing, "b")
    assert sharing.leave("b") is None
    assert sharing.settle(first) is None
    assert len(sharing) == 0
    assert sharing.next_expiry is None


def test_calls_do_not_wait_forever_for_a_read_that_hangs() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    arrive(sharing, "b", now=10.0)
    arrive(sharing, "c", now=10.5)
    assert sharing.next_expiry == 10 + PATIENCE_S
    assert sharing.expire(10 + PATIENCE_S / 2) is None
    due = sharing.expire(10 + PATIENCE_S)
    assert isinstance(due, BeginRead)
    assert calls(due.read) == ["b", "c"]
    # Each read that hangs doubles the time: few reads of a state that takes long to read.
    arrive(sharing, "d", now=20.0)
    assert sharing.next_expiry == 20 + 2 * PATIENCE_S
    assert sharing.settle(first) is None, "an older read does not begin the next one"
    assert calls(sharing.settle(due.read)) == ["d"]
    sharing.check()


def test_each_call_has_its_own_deadline() -> None:
    sharing: ReadsInFlight[str] = ReadsInFlight()
    first = begun(sharing, "a")
    arrive(sharing, "b", deadline=0.3)
    arrive(sharing, "c", deadline=0.2)
    arrive(sharing, "d")
    assert sharing.next_expiry == 0.2
    assert sharing.expire(0.2) == ExpireCall("c")
    sharing.leave("c")
    second = sharing.settle(first)
    assert calls(second) == ["b", "d"]
    assert sharing.next_expiry == 0.3, "also while its read is in flight"
    assert second is not None
    sharing.answer(second)
    assert sharing.next_expiry is None, "but not once its answer arrives"


class _Model:
    """Clients that write and read one key, an etcd that executes reads and writes at random times, and the sharing."""

    def __init__(self, seed: int, sharing: ReadsInFlight[int]) -> None:
        self.random = random.Random(seed)
        self.sharing = sharing
        self.now = 0.0
        self.revision = 0
        self.history = History()
        self.calls: dict[int, float] = {}
        # Reads in flight: the revision each has read, None until it is executed.
        self.reads: dict[SharedRead[int], int | None] = {}
        self.members: dict[SharedRead[int], list[int]] = {}
        self.numbers = 0

    def run(self, steps: int) -> None:
        """Take random steps, then let everything end."""
        actions = (self.arrive, self.arrive, self.write, self.execute, self.execute, self.finish, self.leave, self.wait)
        for _ in range(steps):
            self.now += self.random.random() * 0.1
            self.random.choice(actions)()
            self.sharing.check()
        while self.reads:
            self.execute()
            self.finish()
            self.sharing.check()
        assert not self.calls, "a call without an answer"
        assert len(self.sharing) == 0

    def begin(self, read: SharedRead[int] | None) -> None:
        if read is not None:
            self.reads[read] = None
            self.members[read] = list(read.calls)

    def arrive(self) -> None:
        call, self.numbers = self.numbers, self.numbers + 1
        self.calls[call] = self.now
        read = self.sharing.newest("k")
        if read is None:
            self.begin(self.sharing.begin("k", call))
        else:
            self.sharing.wait(read, call, self.now)

    def write(self) -> None:
        self.revision += 1
        self.history.add(Operation(self.now, self.now, self.revision, writes=True))

    def execute(self) -> None:
        waiting = [read for read, revision in self.reads.items() if revision is None]
        if waiting:
            self.reads[self.random.choice(waiting)] = self.revision

    def finish(self) -> None:
        done = [read for read, revision in self.reads.items() if revision is not None]
        if not done:
            return
        read = self.random.choice(done)
        revision = self.reads.pop(read)
        assert revision is not None
        for call in {*self.members.pop(read), *read.calls}:
            if call in self.calls:
                self.history.add(Operation(self.calls.pop(call), self.now, revision, writes=False))
        self.begin(self.sharing.settle(read))

    def leave(self) -> None:
        if self.calls:
            call = self.random.choice(list(self.calls))
            if call in self.sharing:
                del self.calls[call]
                shared = self.sharing.shared(call)
                following = self.sharing.leave(call)
                if shared is not None and not shared.calls:
                    del self.reads[shared], self.members[shared]
                self.begin(following)

    def wait(self) -> None:
        self.now += self.random.choice((0.1, 2.0))
        while (due := self.sharing.expire(self.now)) is not None:
            assert isinstance(due, BeginRead)
            self.begin(due.read)


def _found(make: Callable[[], ReadsInFlight[int]], seeds: int) -> list[str]:
    found = []
    for seed in range(seeds):
        model = _Model(seed, make())
        model.run(200)
        found += violations(model.history)
    return found


def test_shared_reads_are_linearizable_in_the_model() -> None:
    assert not _found(ReadsInFlight, 150)


class _Earlier(ReadsInFlight[int]):
    """The deliberate bug: a call is answered by the read in flight, which began before the call arrived."""

    def wait(self, read: SharedRead[int], call: int, now: float, deadline: float | None = None) -> None:
        del now, deadline
        read.calls[call] = None
        self._shares[call] = read


class _Forgotten(ReadsInFlight[int]):
    """Calls that wait for a read that is cancelled are forgotten."""

    def leave(self, call: int) -> SharedRead[int] | None:
        super().leave(call)
        return None


class _Impatient(ReadsInFlight[int]):
    """A read that is begun because another one hangs takes the place of none."""

    def expire(self, now: float) -> Any:
        due = super().expire(now)
        return due if due is None or isinstance(due, ExpireCall) else None


def test_an_answer_by_an_earlier_read_is_found() -> None:
    found = _found(_Earlier, 20)
    assert found
    assert "although" in found[0]


@pytest.mark.parametrize("mutant", [_Forgotten, _Impatient])
def test_a_call_without_an_answer_is_found(mutant: type[ReadsInFlight[int]]) -> None:
    with pytest.raises((AssertionError, KeyError)):
        _found(mutant, 50)
