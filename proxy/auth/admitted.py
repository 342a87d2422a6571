"""Sessions that were admitted because auth was off, since that was last proven: they are checked once auth is on.

The answer "auth is off" is cached for a moment, so a session may be admitted just after auth was switched on. A
linearizable probe that finds auth off proves it for all sessions admitted before that probe began; the others are kept
here until the next probe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from coalesce.model import Session
    from proxy.auth.model import Range

RANGES_MAX: Final = 10_000
"""Ranges remembered for all sessions together. A session beyond that is disconnected instead of checked."""

AdmittedRanges = dict["Range", None] | None
"""The ranges that a session was admitted for; None: more than are remembered."""


class AdmittedSessions:
    """The sessions, and the ranges that each was admitted for."""

    def __init__(self) -> None:
        # Admitted before the newest probe began, and since.
        self._before: dict[Session, AdmittedRanges] = {}
        self._since: dict[Session, AdmittedRanges] = {}
        self._count = 0

    def add(self, session: Session | None, range_: Range) -> None:
        """Record that a session was admitted for a range without a permission check."""
        if session is None or session.ended:
            return
        ranges = self._since.setdefault(session, {})
        if ranges is None or range_ in ranges:
            return
        if self._count >= RANGES_MAX:
            self._count -= len(ranges)
            self._since[session] = None
            return
        ranges[range_] = None
        self._count += 1

    def forget(self, session: Session) -> None:
        """Remove a session that has ended."""
        for sessions in (self._before, self._since):
            ranges = sessions.pop(session, None)
            self._count -= len(ranges) if ranges else 0

    def probe_began(self) -> None:
        """A probe is being sent: it proves nothing about sessions admitted from now on."""
        for session, ranges in self._since.items():
            known = self._before.get(session, {})
            self._before[session] = None if known is None or ranges is None else known | ranges
        self._since = {}
        self._count = sum(len(ranges) for ranges in self._before.values() if ranges)

    def auth_was_off(self) -> None:
        """The newest probe found auth off."""
        self._before = {}
        self._count = sum(len(ranges) for ranges in self._since.values() if ranges)

    def take(self) -> list[tuple[Session, AdmittedRanges]]:
        """Return all recorded sessions, and forget them."""
        self.probe_began()
        taken = list(self._before.items())
        self._before = {}
        self._count = 0
        return taken
