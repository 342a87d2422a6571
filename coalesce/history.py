"""The window of recent revisions that a source can replay.

A place in it is a revision, looked up each time: nobody holds an index or an iterator, so anything may be evicted at
any time. It evicts whole batches from its old end, and `floor` says from which revision on it is complete; who needs
an older one asks etcd by a backfill.

The ledger is what all histories share: it knows the order in which batches came, over all of them, and so evicts the
oldest of all when the total or the age is exceeded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from typing import NamedTuple, cast

from coalesce.batch import FRAGMENT, Batch, Payload, Variants, filtered, revisions_of
from coalesce.limits import CoreLimits
from coalesce.stats import Stats
from proto.scan import Event

_revision_of = attrgetter("revision")

# What stands in an evicted place; never read.
_GONE = cast(Batch, None)


class Replayed(NamedTuple):
    """What `History.replay` joined."""

    payload: Payload | None
    """None: the filters leave nothing."""

    following: int | None
    """The next revision to be replayed; None: this was all there is."""

    looked: int
    """Events that were looked at, whatever the filters made of them: the work that was done."""


class Guard(NamedTuple):
    """What a history calls before it evicts events that watches are held back for."""

    first_revision: int
    """Batches that end below are not guarded."""

    release: Callable[[int], None]
    """Called once, with the last revision of the batch that goes. It may set another guard, or drop the history."""


class History:
    """Batches of one source, complete from `floor` to the source's position."""

    __slots__ = (
        "_batches",
        "_gone",
        "_lasts",
        "_ledger",
        "bytes",
        "floor",
        "guard",
        "has_prev_kv",
        "last_revision",
        "version",
    )

    def __init__(self, ledger: HistoryBudget, floor: int, has_prev_kv: bool) -> None:
        self._ledger = ledger
        self._batches: list[Batch] = []
        # Last revisions of the same places, to look up by.
        self._lasts: list[int] = []
        # Evicted places at the front of both lists, cut off now and then.
        self._gone = 0
        # The first revision that can be replayed. Quiet revisions count: it starts where the source started.
        self.floor = floor
        # None = no watch is held back.
        self.guard: Guard | None = None
        # Of the newest event ever appended; 0 before the first.
        self.last_revision = 0
        # Memory of what it holds.
        self.bytes = 0
        # Some event may carry a prev_kv.
        self.has_prev_kv = has_prev_kv
        # Changes with every append and evict: what was made of an older version may be stale.
        self.version = 0

    def __len__(self) -> int:
        return len(self._batches) - self._gone

    def batches(self) -> list[Batch]:
        """Return what it holds, oldest first; for checks and tests."""
        return self._batches[self._gone :]

    @property
    def newest(self) -> Batch:
        """The newest batch it holds; there must be one."""
        return self._batches[-1]

    def append(self, batch: Batch, now: float) -> None:
        """Add the newest batch, then evict down to the bounds of one history and of all."""
        batches = self._batches
        batches.append(batch)
        self.last_revision = last_revision = batch.last_revision
        self._lasts.append(last_revision)
        memory_bytes = batch.memory_bytes
        self.bytes += memory_bytes
        self.version += 1
        ledger = self._ledger
        batch.kept = kept = LedgerEntry(now, self)
        ledger.entries.append(kept)
        ledger.held += 1
        stats = ledger.stats
        stats.history_bytes += memory_bytes
        stats.history_batches = ledger.held
        limits = ledger.limits
        if (
            self.bytes > limits.history_bytes_max
            or len(batches) - self._gone > limits.history_revisions_max
            or stats.history_bytes > limits.history_bytes_total_max
        ):
            ledger.hold_bounds(self)

    def evict_oldest(self) -> None:
        """Drop the oldest batch; the floor rises behind it."""
        batch = self._batches[self._gone]
        if self.guard is not None and batch.last_revision >= self.guard.first_revision:
            guard, self.guard = self.guard, None
            guard.release(batch.last_revision)
            if batch.kept is None:
                # The source has ended meanwhile.
                return
        # Let go at once, though the place stays for a while: batches can be large.
        self._batches[self._gone] = _GONE
        self._gone += 1
        self.floor = batch.last_revision + 1
        self.bytes -= batch.memory_bytes
        self.version += 1
        self._ledger.evicted(batch)
        if self._gone > 32 and self._gone * 2 > len(self._batches):
            del self._batches[: self._gone]
            del self._lasts[: self._gone]
            self._gone = 0

    def evict_below(self, revision: int) -> None:
        """Drop the batches that nobody who needs `revision` wants."""
        while len(self) and self._lasts[self._gone] < revision:
            self.evict_oldest()

    def evict_to(self, bytes_max: int) -> None:
        """Drop the oldest batches until at most `bytes_max` bytes are held."""
        while self.bytes > bytes_max and len(self):
            self.evict_oldest()

    def drop(self, floor: int) -> None:
        """Forget everything; what comes begins at `floor`."""
        self.guard = None
        while len(self):
            self.evict_oldest()
        self.floor = floor
        self.last_revision = 0

    def replay(self, position: int, variant: int, limits: CoreLimits) -> Replayed:
        """Join what a watch of `variant` at `position` has missed into one response.

        Whole revisions, at least one; more up to replay_bytes_max (with fragment fragment_run_bytes_max) of what the
        filters let through, and up to replay_events_max of what is looked at. Needs position >= floor.
        """
        place = bisect_left(self._lasts, position, self._gone)
        chosen: list[Event] = []
        size = looked = 0
        bytes_max = limits.fragment_run_bytes_max if variant & FRAGMENT else limits.replay_bytes_max
        events_max = limits.replay_events_max
        for batch in islice(self._batches, place, None):
            events = batch.events
            count = len(events)
            if batch.first_revision >= position and size + batch.size <= bytes_max and looked + count <= events_max:
                passed = filtered(events, variant)
                chosen.extend(passed)
                looked += count
                size += batch.size if len(passed) == count else sum(len(event.encoded) for event in passed)
                continue
            if batch.first_revision < position:
                events = events[bisect_left(events, position, key=_revision_of) :]
            for first, end, _ in revisions_of(events):
                revision = events[first:end]
                passed = filtered(revision, variant)
                more = sum(len(event.encoded) for event in passed)
                enough = looked + len(revision) > events_max or bool(chosen and size + more > bytes_max)
                if looked and enough:
                    following = revision[0].revision
                    return Replayed(self._payload(chosen, variant, limits), following, looked)
                chosen.extend(passed)
                looked += len(revision)
                size += more
        return Replayed(self._payload(chosen, variant, limits), None, looked)

    def _payload(self, events: list[Event], variant: int, limits: CoreLimits) -> Payload | None:
        if not events:
            return None
        header = self._batches[-1].header
        return Variants(header, events, limits.fragment_bytes, self.has_prev_kv).payload(variant)


class LedgerEntry:
    """A batch's entry in the ledger. It does not hold the batch, which is let go of as soon as it is evicted."""

    __slots__ = ("at", "history")

    def __init__(self, at: float, history: History) -> None:
        # When it came, in seconds.
        self.at = at
        # Where it is held; None = evicted.
        self.history: History | None = history


class HistoryBudget:
    """All batches of all histories in the order in which they came."""

    __slots__ = ("entries", "held", "limits", "stats")

    def __init__(self, limits: CoreLimits, stats: Stats) -> None:
        self.limits = limits
        self.stats = stats
        # Oldest first; those that their histories have evicted by themselves stay until they come up or are too many.
        self.entries: deque[LedgerEntry] = deque()
        # Entries not evicted.
        self.held = 0

    def hold_bounds(self, history: History) -> None:
        """Evict what is too much, in one history or in all."""
        limits = self.limits
        evicted_at = self.stats.evicted_at
        while history.bytes > limits.history_bytes_max:
            evicted_at["history_bytes_max"] += 1
            history.evict_oldest()
        while len(history) > limits.history_revisions_max:
            evicted_at["history_revisions_max"] += 1
            history.evict_oldest()
        while self.stats.history_bytes > limits.history_bytes_total_max:
            evicted_at["history_bytes_total_max"] += self._evict_first()

    def evicted(self, batch: Batch) -> None:
        """Count a batch out, and let go of it."""
        kept = batch.kept
        assert isinstance(kept, LedgerEntry), "a history holds it"
        batch.kept = None
        kept.history = None
        self.held -= 1
        self.stats.history_bytes -= batch.memory_bytes
        self.stats.history_batches = self.held
        if len(self.entries) > 2 * self.held + 64:
            self.entries = deque(entry for entry in self.entries if entry.history is not None)

    def expire(self, now: float) -> None:
        """Evict what is older than history_age_s."""
        while self.entries and self.entries[0].at + self.limits.history_age_s <= now:
            self.stats.evicted_at["history_age_s"] += self._evict_first()

    def next_deadline(self) -> float | None:
        """Return when the oldest batch is too old. A little late, so that one ring of the timer serves many."""
        if not self.entries:
            return None
        return self.entries[0].at + self.limits.history_age_s * 1.0625

    def _evict_first(self) -> bool:
        entry = self.entries.popleft()
        if entry.history is None:
            return False
        # The oldest of all is the oldest of its own history.
        entry.history.evict_oldest()
        return True
