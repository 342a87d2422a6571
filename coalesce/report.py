"""Reports for operators, in addition to the counters: trunks, and sessions that are behind.

The functions only read, and their walks are bounded: they run on the event loop that delivers events.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest
from itertools import islice

from coalesce.core import Coalescer
from coalesce.model import Session, Trunk


@dataclass(slots=True, frozen=True)
class TrunkReport:
    """The current state of one trunk. Revisions are inclusive; bytes are memory."""

    key: bytes
    range_end: bytes
    watches: int
    backfills: int
    next_revision: int
    events: int
    history_bytes: int
    history_batches: int
    history_floor: int
    opening: bool


@dataclass(slots=True, frozen=True)
class SessionReport:
    """The current state of one session that is behind."""

    outlet: object
    watches: int
    lagging: int
    behind_s: float
    behind_revisions: int
    stalled: bool


def trunks(core: Coalescer, at_most: int, looked_at: int = 10_000) -> list[TrunkReport]:
    """Return the trunks with the most watches, `at_most` of them, out of the first `looked_at`."""
    opened = islice(core._state.trunks.values(), looked_at)
    return [_trunk(trunk) for trunk in nlargest(at_most, opened, key=lambda trunk: len(trunk.watches))]


def _trunk(trunk: Trunk) -> TrunkReport:
    return TrunkReport(
        key=trunk.key,
        range_end=trunk.range_end,
        watches=len(trunk.watches),
        backfills=len(trunk.backfills),
        next_revision=trunk.next_revision,
        events=trunk.events,
        history_bytes=trunk.history.bytes,
        history_batches=len(trunk.history),
        history_floor=trunk.history.floor,
        opening=trunk.opening,
    )


def slowest(core: Coalescer, now: float, at_most: int) -> list[SessionReport]:
    """Return the sessions that have been behind longest, at most `at_most` of them, the longest first."""
    state = core._state
    return [_session(session, now) for session in islice(state.lagging_sessions, at_most)]


def _session(session: Session, now: float) -> SessionReport:
    since = session.lagging_since
    return SessionReport(
        outlet=session.outlet,
        watches=len(session.watches),
        lagging=len(session.lagging),
        behind_s=0.0 if since is None else max(0.0, now - since),
        behind_revisions=_distance(session, 100),
        stalled=session.stalled,
    )


def _distance(session: Session, looked_at: int) -> int:
    """Return by how many revisions the furthest of the session's first `looked_at` lagging watches is behind."""
    return max(
        (watch.trunk.next_revision - watch.next_revision for watch in islice(session.lagging, looked_at)), default=0
    )


def lag(core: Coalescer, now: float, looked_at: int = 1000) -> tuple[float, int]:
    """Return for how long some session has been behind (seconds), and by how many revisions at most.

    The revisions are those of the `looked_at` sessions that have been behind longest. (0, 0): no session is behind.
    """
    state = core._state
    sessions = list(islice(state.lagging_sessions, looked_at))
    if not sessions:
        return 0.0, 0
    since = sessions[0].lagging_since
    furthest = max(_distance(session, 10) for session in sessions)
    return (0.0 if since is None else max(0.0, now - since)), max(0, furthest)
