"""Reports for operators, in addition to the counters: trunks, covers, and sessions that are behind.

The functions only read, and their walks are bounded: they run on the event loop that delivers events.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest
from itertools import chain, islice

from coalesce.core import Coalescer
from coalesce.cover import Cover, cover_name
from coalesce.model import Session, Trunk
from coalesce.state import CoreState
from coalesce.stats import CoverStats
from coalesce.suggesting import Suggestion, costs_more_than_it_saves, suggest


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


@dataclass(slots=True, frozen=True)
class CoverReport:
    """The current state of one configured cover."""

    prefix: bytes
    branches: int
    watches: int
    upstream_watches: int
    events: int
    bytes: int
    unwanted_events: int
    unwanted_bytes: int
    refused: int
    problem: str
    costs_more: bool
    """It costs more than it saves, since it was first used."""


def covers(core: Coalescer, now: float) -> list[CoverReport]:
    """Return the configured covers, in order."""
    state = core._state
    return [_cover(state, prefix, now) for prefix in sorted(state.covers.prefixes)]


def _cover(state: CoreState, prefix: bytes, now: float) -> CoverReport:
    stats = state.stats.covers.get(prefix) or CoverStats(now)
    opened = [state.trunks.get(cover_name(prefix, prev_kv)) for prev_kv in (False, True)]
    trunks = [trunk for trunk in opened if isinstance(trunk, Cover)]
    branches = sum(len(trunk.index) for trunk in trunks)
    return CoverReport(
        prefix=prefix,
        branches=branches,
        watches=sum(len(trunk.watches) for trunk in trunks),
        upstream_watches=len(trunks),
        events=stats.events,
        bytes=stats.bytes,
        unwanted_events=stats.unwanted_events,
        unwanted_bytes=stats.unwanted_bytes,
        refused=stats.refused,
        problem=stats.problem,
        costs_more=bool(trunks) and costs_more_than_it_saves(stats.unwanted_events, now - stats.since, branches),
    )


def suggested_covers(core: Coalescer, looked_at: int = 1_000) -> list[Suggestion]:
    """Return covers that would save upstream watches, judged by the first `looked_at` trunks."""
    opened = islice(core._state.trunks.values(), looked_at)
    return suggest((trunk.key, trunk.range_end) for trunk in opened if not trunk.is_cover)


def slowest(core: Coalescer, now: float, at_most: int) -> list[SessionReport]:
    """Return the sessions that have been behind longest, at most `at_most` of them, the longest first."""
    state = core._state
    return [of_session(session, now) for session in islice(state.lagging_sessions, at_most)]


def of_session(session: Session, now: float) -> SessionReport:
    """Return the state of a session, behind or not; of its lagging watches the first hundred are examined."""
    since = session.lagging_since
    return SessionReport(
        outlet=session.outlet,
        watches=len(session.watches),
        lagging=len(session.lagging) + sum(len(group.members) for group in session.groups_behind),
        behind_s=0.0 if since is None else max(0.0, now - since),
        behind_revisions=_distance(session, 100),
        stalled=session.stalled,
    )


def _distance(session: Session, looked_at: int) -> int:
    """Return by how many revisions the furthest of the session's first `looked_at` lagging watches is behind."""
    firsts = (next(iter(group.members)) for group in session.groups_behind)
    examined = islice(chain(session.lagging, firsts), looked_at)
    return max((watch.trunk.next_revision - watch.next_revision for watch in examined), default=0)


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
