"""Histories: the windows of recent revisions that sources can replay.

A position in a history is a revision, looked up each time; no index or iterator is kept, so batches may be evicted at
any time. A history evicts whole batches from its old end; it is complete from the revision `floor` on. Watches that
need an older revision get it from etcd by a backfill.

All histories share one HistoryBudget: it holds the order of all batches, and evicts the oldest of all when the total
size or the age is exceeded. It also evicts what the histories of ended sources hold. Each step evicts a bounded number.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Final, NamedTuple, cast

from coalesce.batch import FRAGMENT, NO_DELETE, NO_PUT, Batch, Payload, Variants, filtered, revisions_of
from coalesce.limits import CoreLimits
from coalesce.stats import Stats
from proto.event_key import event_key
from proto.scan import Event
from proto.spans import Span, is_in

EVICTED_MAX: Final = 2_000
"""Maximum batches that are evicted in one step because of their age or the end of their source: 1 us for each."""

# While entries of evicted batches are removed from the budget: so many are examined after so many further evictions.
_EXAMINED_ENTRIES: Final = 1024
_EXAMINED_AFTER: Final = 256

_revision_of = attrgetter("revision")

# Placeholder of an evicted batch; never read.
_GONE = cast(Batch, None)


class Replayed(NamedTuple):
    """The result of `History.replay`."""

    payload: Payload | None
    """None: the filters drop all events."""

    following: int | None
    """The next revision to be replayed; None: the end of the history is reached."""

    looked: int
    """Events examined, including those that the filters drop: the work done."""


class EvictionHook(NamedTuple):
    """A callback before a history evicts events that held-back watches still need."""

    first_revision: int
    """It is not called for batches that end below this revision."""

    on_eviction: Callable[[int], None]
    """Called once, with the last revision of the batch to be evicted. It may set another hook, or drop the history."""


class History:
    """Batches of one source, complete from `floor` to the source's position."""

    __slots__ = (
        "_batches",
        "_budget",
        "_gone",
        "_lasts",
        "bytes",
        "eviction_hook",
        "floor",
        "has_prev_kv",
        "last_revision",
        "version",
    )

    def __init__(self, ledger: HistoryBudget, floor: int, has_prev_kv: bool) -> None:
        self._budget = ledger
        self._batches: list[Batch] = []
        # Last revisions of the same batches, for lookups.
        self._lasts: list[int] = []
        # Number of evicted entries at the front of both lists, removed occasionally.
        self._gone = 0
        # The first revision that can be replayed. It starts at the source's start, even without events there.
        self.floor = floor
        # None = no watch is held back.
        self.eviction_hook: EvictionHook | None = None
        # Revision of the newest event ever appended; 0 before the first.
        self.last_revision = 0
        # Memory of its batches.
        self.bytes = 0
        # Some event may carry a prev_kv.
        self.has_prev_kv = has_prev_kv
        # Changes with every append and eviction: results computed from an older version may be stale.
        self.version = 0

    def __len__(self) -> int:
        return len(self._batches) - self._gone

    def batches(self) -> list[Batch]:
        """Return its batches, oldest first; for checks and tests."""
        return self._batches[self._gone :]

    def since(self, position: int) -> list[Batch]:
        """Return the batches that end at `position` or later."""
        return self._batches[bisect_left(self._lasts, position, self._gone) :]

    def count_since(self, position: int) -> int:
        """Return the number of batches that end at `position` or later."""
        return len(self._batches) - bisect_left(self._lasts, position, self._gone)

    def batches_at(self, lasts: Iterable[int]) -> Iterator[Batch]:
        """Walk the batches with these last revisions, without those that were evicted."""
        for last in lasts:
            place = bisect_left(self._lasts, last, self._gone)
            if place < len(self._lasts) and self._lasts[place] == last:
                yield self._batches[place]

    @property
    def newest(self) -> Batch:
        """The newest batch; there must be one."""
        return self._batches[-1]

    def append(self, batch: Batch, now: float) -> None:
        """Add the newest batch, then evict until this history and all together are within their bounds."""
        batches = self._batches
        batches.append(batch)
        self.last_revision = last_revision = batch.last_revision
        self._lasts.append(last_revision)
        memory_bytes = batch.memory_bytes
        self.bytes += memory_bytes
        self.version += 1
        ledger = self._budget
        batch.history = self
        batch.arrived_at = now
        ledger.entries.append(batch)
        stats = ledger.stats
        stats.history_bytes += memory_bytes
        stats.history_batches += 1
        limits = ledger.limits
        if (
            self.bytes > limits.history_bytes_max
            or len(batches) - self._gone > limits.history_revisions_max
            or stats.history_bytes > limits.history_bytes_total_max
        ):
            ledger.hold_bounds(self)

    def evict_oldest(self) -> None:
        """Evict the oldest batch, and raise the floor above it."""
        batch = self._batches[self._gone]
        if self.eviction_hook is not None and batch.last_revision >= self.eviction_hook.first_revision:
            hook, self.eviction_hook = self.eviction_hook, None
            hook.on_eviction(batch.last_revision)
            if batch.history is None:
                # The source has ended meanwhile.
                return
        # Drop the batch at once, though its list entry stays for a while: batches can be large.
        self._batches[self._gone] = _GONE
        self._gone += 1
        self.floor = batch.last_revision + 1
        self.bytes -= batch.memory_bytes
        self.version += 1
        self._budget.evicted(batch)
        if self._gone > 32 and self._gone * 2 > len(self._batches):
            del self._batches[: self._gone]
            del self._lasts[: self._gone]
            self._gone = 0

    def evict_below(self, revision: int) -> None:
        """Evict the batches that end below `revision`."""
        while len(self) and self._lasts[self._gone] < revision:
            self.evict_oldest()

    def evict_to(self, bytes_max: int) -> None:
        """Evict the oldest batches until at most `bytes_max` bytes are held."""
        while self.bytes > bytes_max and len(self):
            self.evict_oldest()

    def drop(self, floor: int) -> None:
        """Evict everything and continue at `floor`."""
        self.eviction_hook = None
        while len(self):
            self.evict_oldest()
        self.floor = floor
        self.last_revision = 0

    def discard(self) -> None:
        """Let the budget evict everything, in steps: the source has ended."""
        self.eviction_hook = None
        if len(self):
            self._budget.discarded.append(self)

    def replay(self, position: int, variant: int, limits: CoreLimits, span: Span | None = None) -> Replayed:
        """Join the events that a watch of `variant` at `position` has missed into one response.

        Whole revisions, at least one; more up to replay_bytes_max (with fragment: fragment_run_bytes_max) of events
        that pass the filters, and up to replay_events_max of events examined. Requires position >= floor. `span`: only
        events of keys in this range pass; None = all.
        """
        return self._replay(self.since(position), position, variant, limits, span)

    def _replay(
        self, batches: Iterable[Batch], position: int, variant: int, limits: CoreLimits, span: Span | None
    ) -> Replayed:
        chosen: list[Event] = []
        size = looked = 0
        bytes_max = limits.fragment_run_bytes_max if variant & FRAGMENT else limits.replay_bytes_max
        events_max = limits.replay_events_max
        unfiltered = span is None and not variant & (NO_PUT | NO_DELETE)
        for batch in batches:
            events = batch.events
            count = len(events)
            if batch.first_revision >= position and size + batch.size <= bytes_max and looked + count <= events_max:
                looked += count
                if unfiltered:
                    chosen += events
                    size += batch.size
                    continue
                passed = _passing(events, variant, span)
                chosen += passed
                size += batch.size if len(passed) == count else sum(len(event.encoded) for event in passed)
                continue
            if batch.first_revision < position:
                events = events[bisect_left(events, position, key=_revision_of) :]
            for first, end, _ in revisions_of(events):
                revision = events[first:end]
                passed = _passing(revision, variant, span)
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


def _passing(events: Sequence[Event], variant: int, span: Span | None) -> Sequence[Event]:
    """Return the events that pass the variant's filters, of keys in `span` if it is not None."""
    if span is not None:
        events = [event for event in events if is_in(event_key(event.encoded), span)]
    return filtered(events, variant)


class HistoryBudget:
    """All batches of all histories, in the order of their arrival."""

    def __init__(self, limits: CoreLimits, stats: Stats) -> None:
        self.limits = limits
        self.stats = stats
        # Oldest first; those that their histories have evicted stay, without events, until they are the oldest or are
        # too many.
        self.entries: deque[Batch] = deque()
        # While there are too many: the older entries, without those. Empty if `entries` is.
        self._kept: deque[Batch] = deque()
        # Evictions since entries were last examined.
        self._evictions = 0
        # Histories of ended sources that still hold batches.
        self.discarded: deque[History] = deque()
        # The last step has evicted as many as it may.
        self._goes_on = False

    def hold_bounds(self, history: History) -> None:
        """Evict batches until one history and all of them together are within their bounds."""
        limits = self.limits
        evicted_at = self.stats.evicted_at
        while history.bytes > limits.history_bytes_max:
            evicted_at["history_bytes_max"] += 1
            history.evict_oldest()
        while len(history) > limits.history_revisions_max:
            evicted_at["history_revisions_max"] += 1
            history.evict_oldest()
        while self.stats.history_bytes > limits.history_bytes_total_max:
            evicted_at["history_bytes_total_max"] += 1
            self._evict_first()

    def evicted(self, batch: Batch) -> None:
        """Remove an evicted batch from the counts."""
        batch.history = None
        # Its events are freed at once.
        batch.events = ()
        self.stats.history_bytes -= batch.memory_bytes
        self.stats.history_batches -= 1
        kept, entries = self._kept, self.entries
        while kept and kept[0].history is None:
            kept.popleft()
        if not kept:
            while entries and entries[0].history is None:
                entries.popleft()
        if kept or len(entries) > 2 * self.stats.history_batches + 64:
            self._evictions += 1
            if self._evictions >= _EXAMINED_AFTER:
                self._evictions = 0
                self._examine_entries()

    def _examine_entries(self) -> None:
        """Remove entries of evicted batches, a part at a time."""
        kept, entries = self._kept, self.entries
        part = [entries.popleft() for _ in range(min(_EXAMINED_ENTRIES, len(entries)))]
        kept.extend([entry for entry in part if entry.history is not None])
        if not entries:
            self.entries, self._kept = kept, entries

    def expire(self, now: float) -> None:
        """Evict batches of ended sources, and those that are older than history_age_s."""
        left = EVICTED_MAX
        while self.discarded and left > 0:
            history = self.discarded[0]
            for _ in range(min(left, len(history))):
                history.evict_oldest()
                left -= 1
            if not len(history):
                self.discarded.popleft()
        while left > 0 and self.entries and self._oldest.arrived_at + self.limits.history_age_s <= now:
            self.stats.evicted_at["history_age_s"] += 1
            self._evict_first()
            left -= 1
        self._goes_on = left <= 0

    def next_deadline(self) -> float | None:
        """Return when to evict: because of age a little late, so that one timer serves many, but at once to go on."""
        if not self.entries:
            return None
        if self.discarded:
            return self._oldest.arrived_at
        return self._oldest.arrived_at + self.limits.history_age_s * (1.0 if self._goes_on else 1.0625)

    @property
    def _oldest(self) -> Batch:
        return (self._kept or self.entries)[0]

    def _evict_first(self) -> None:
        # The oldest of all is the oldest of its own history.
        history = self._oldest.history
        assert isinstance(history, History), "evicted batches are not the oldest"
        history.evict_oldest()
