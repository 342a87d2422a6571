"""Deadlines of many subjects: a heap with lazy deletion.

Each subject stores its deadline in `timer_at`; a heap entry is valid only while the two agree. So moving or stopping a
timer costs one assignment.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar


class TimerSubject(Protocol):
    """A subject that a timer can be set for."""

    timer_at: float | None


Subject = TypeVar("Subject", bound=TimerSubject)


class Timers(Generic[Subject]):
    """Deadlines of subjects of one kind, at most one per subject."""

    __slots__ = ("_active", "_entries", "_order")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, Subject]] = []
        self._order = 0
        self._active = 0

    def __len__(self) -> int:
        return self._active

    def start(self, subject: Subject, at: float) -> None:
        """Set or move a subject's deadline, in seconds."""
        if subject.timer_at is None:
            self._active += 1
        subject.timer_at = at
        self._order += 1
        heapq.heappush(self._entries, (at, self._order, subject))
        self._tidy()

    def stop(self, subject: Subject) -> None:
        """Clear a subject's deadline, if it has one."""
        if subject.timer_at is not None:
            subject.timer_at = None
            self._active -= 1
            self._tidy()

    def next_deadline(self) -> float | None:
        """Return the earliest deadline, or None."""
        entries = self._entries
        while entries and entries[0][2].timer_at != entries[0][0]:
            heapq.heappop(entries)
        return entries[0][0] if entries else None

    def due(self, now: float) -> Iterator[Subject]:
        """Yield and stop the subjects that are due. One that is restarted for a later time is not yielded twice."""
        while (at := self.next_deadline()) is not None and at <= now:
            subject = heapq.heappop(self._entries)[2]
            self.stop(subject)
            yield subject

    def _tidy(self) -> None:
        """Remove invalid entries when there are too many: they keep their subjects alive."""
        if len(self._entries) > 2 * self._active + 64:
            # After moves back and forth the same deadline may be listed twice; the newer entry is enough.
            kept = {id(entry[2]): entry for entry in self._entries if entry[2].timer_at == entry[0]}
            self._entries = list(kept.values())
            heapq.heapify(self._entries)
