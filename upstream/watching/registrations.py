"""All registrations of a watch client, and those of them that are to be examined next.

After a break, a hundred thousand watches register again. This takes several steps, between which the event loop serves
others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from upstream.watching.stream import OpenedWatch, Registration

REGISTERED_MAX: Final = 1000
"""Maximum watches that register in one step: 6 us of CPU for each, with its message."""


class Registrations:
    """In opening order; found by the id() of the listener's object, which need not be hashable."""

    def __init__(self) -> None:
        self._all: dict[int, Registration] = {}
        self._coming: deque[Registration] = deque()

    def __len__(self) -> int:
        return len(self._all)

    def get(self, watch: OpenedWatch) -> Registration | None:
        """Return the registration of a watch; None when it is not open (any more)."""
        return self._all.get(id(watch))

    def add(self, watch: OpenedWatch) -> Registration:
        """Add a watch that is not open yet."""
        registration = self._all[id(watch)] = Registration(watch)
        return registration

    def remove(self, registration: Registration) -> None:
        """Remove a watch that has ended."""
        registration.closed = True
        self._all.pop(id(registration.watch), None)

    @property
    def are_coming(self) -> bool:
        """Whether some are still to be examined."""
        return bool(self._coming)

    def look_at(self, registrations: Iterable[Registration] | None = None) -> None:
        """Examine these next, after those that are coming already; None: all, from the first one on."""
        if registrations is None:
            self._coming = deque(self._all.values())
        else:
            self._coming.extend(registrations)

    def look_at_none(self) -> None:
        """Examine no registration any more."""
        self._coming.clear()

    def take(self) -> Iterator[Registration]:
        """Take the next ones to be examined, and yield those that are open and without a stream when it is their turn.

        One that is to be examined twice may have a stream the second time.
        """
        coming = self._coming
        for _ in range(min(len(coming), REGISTERED_MAX)):
            registration = coming.popleft()
            if registration.stream is None and not registration.closed:
                yield registration
