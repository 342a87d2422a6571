"""A linearizability checker for histories of writes and linearizable reads of one etcd.

Each answer of etcd carries the store's revision at which it was executed, so the order of execution need not be
searched: it is the order of revisions, and within one revision its write comes before the reads. A history is
linearizable in that order if it respects real time, that is, if no operation has a lower revision than one that had
ended before it began (a write: a lower or equal one), and if each read returned what the writes up to its revision
left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation that was answered: its times at the client, its revision, and what it wrote or read."""

    began: float
    ended: float
    revision: int
    writes: bool
    key: bytes = b""
    value: bytes | None = None
    """None: the key does not exist, or values are not compared."""
    client: str = ""


@dataclass
class History:
    """The operations of all clients, and the true content of the store."""

    operations: list[Operation] = field(default_factory=list)
    truth: Mapping[bytes, list[tuple[int, bytes]]] | None = None
    """By key, each write's revision and value, in order, also those of clients that got no answer. None: only the order
    is checked."""

    def add(self, operation: Operation) -> None:
        """Add an operation."""
        self.operations.append(operation)


def violations(history: History) -> list[str]:
    """Return what is not linearizable; [] if the history is."""
    found = _against_time(history.operations)
    if history.truth is not None:
        found += [_untrue(one) for one in history.operations if not one.writes and not _is_true(one, history.truth)]
    return found


def _against_time(operations: list[Operation]) -> list[str]:
    found = []
    by_end = sorted(operations, key=lambda one: one.ended)
    newest: Operation | None = None
    place = 0
    for one in sorted(operations, key=lambda one: one.began):
        while place < len(by_end) and by_end[place].ended < one.began:
            if newest is None or by_end[place].revision > newest.revision:
                newest = by_end[place]
            place += 1
        if newest is not None and one.revision < newest.revision + one.writes:
            kind = "write" if one.writes else "read"
            found.append(
                f"{one.client} {kind} of {one.key!r} from {one.began:.6f} to {one.ended:.6f} has revision "
                f"{one.revision} although revision {newest.revision} was reached at {newest.ended:.6f}"
            )
    return found


def _is_true(read: Operation, truth: Mapping[bytes, list[tuple[int, bytes]]]) -> bool:
    value: bytes | None = None
    for revision, written in truth.get(read.key, ()):
        if revision > read.revision:
            break
        value = written
    return read.value == value


def _untrue(read: Operation) -> str:
    return f"{read.client} read of {read.key!r} at revision {read.revision} returned {read.value!r}"
