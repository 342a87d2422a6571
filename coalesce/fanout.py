"""The watches that follow one source, grouped so that a batch costs the core O(1) per variant.

A watch in a group is *in step*: it needs exactly what the source needs next. So nothing is compared per watch: the
batch goes to the whole group, as one cached tuple. A watch that needs nothing before a later revision waits *ahead*, in
a heap, and joins its group when the source reaches that revision; if this happens inside a batch, the watch gets its
own part of the batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from coalesce.batch import Batch, Variants, payload_of_one
from coalesce.effects import Deliver, Effect
from coalesce.session import Place, Watch
from coalesce.stats import Stats


class Group:
    """Watches in step with the same variant."""

    __slots__ = ("_listed", "members", "sent_revision", "variant")

    def __init__(self, variant: int) -> None:
        self.variant = variant
        self.members: dict[Watch, None] = {}
        self._listed: tuple[Watch, ...] | None = ()
        # Revision of the last event sent to the group.
        self.sent_revision = 0

    def add(self, watch: Watch) -> None:
        """Add a watch."""
        self.members[watch] = None
        self._listed = None

    def remove(self, watch: Watch) -> None:
        """Remove a watch."""
        del self.members[watch]
        self._listed = None

    def listed(self) -> tuple[Watch, ...]:
        """Return the watches as a tuple, which is cached until a watch is added or removed."""
        listed = self._listed
        if listed is None:
            listed = self._listed = tuple(self.members)
        return listed


class Ahead:
    """An entry of the heap; after its watch has left, the entry stays and is skipped."""

    __slots__ = ("order", "position", "watch")

    def __init__(self, position: int, order: int, watch: Watch) -> None:
        self.position = position
        # Order of arrival, among equal positions.
        self.order = order
        # None = the watch has left.
        self.watch: Watch | None = watch

    def __lt__(self, other: Ahead) -> bool:
        return (self.position, self.order) < (other.position, other.order)


class Fanout:
    """The groups of one source and the watches ahead of it."""

    __slots__ = ("_ahead", "_ahead_count", "_order", "_stats", "groups", "next_revision")

    def __init__(self, next_revision: int, stats: Stats) -> None:
        # The revision that the watches in step need next, and that the source delivers next.
        self.next_revision = next_revision
        self.groups: dict[int, Group] = {}
        # A heap; entries of watches that left stay until they reach the top or are too many.
        self._ahead: list[Ahead] = []
        self._ahead_count = 0
        self._order = 0
        self._stats = stats

    @property
    def has_watches(self) -> bool:
        """Whether a watch is in step or ahead."""
        return self._ahead_count > 0 or any(group.members for group in self.groups.values())

    def in_step(self) -> Iterator[Watch]:
        """Walk the watches in step; the groups must not change meanwhile."""
        for group in self.groups.values():
            yield from group.members

    def ahead(self) -> list[Watch]:
        """Return the watches ahead, in no particular order."""
        return [entry.watch for entry in self._ahead if entry.watch is not None]

    def add(self, watch: Watch) -> None:
        """Add a watch whose position is next_revision or later."""
        if watch.position <= self.next_revision:
            self._step(watch)
            return
        watch.place = Place.AHEAD
        self._order += 1
        self._ahead_count += 1
        watch.ahead = Ahead(watch.position, self._order, watch)
        heapq.heappush(self._ahead, watch.ahead)
        if len(self._ahead) > 2 * self._ahead_count + 16:
            self._ahead = [entry for entry in self._ahead if entry.watch is not None]
            heapq.heapify(self._ahead)

    def remove(self, watch: Watch) -> None:
        """Remove a watch that is in step or ahead, and record its position."""
        group = watch.group
        if group is None:
            assert watch.ahead is not None, "in step or ahead"
            watch.ahead.watch = None
            watch.ahead = None
            self._ahead_count -= 1
            return
        group.remove(watch)
        watch.group = None
        watch.position = self.next_revision
        watch.sent_revision = max(watch.sent_revision, group.sent_revision)

    def advance(self, next_revision: int) -> None:
        """Skip revisions that are proven to have no events."""
        self.next_revision = next_revision
        if self._ahead:
            self._meet(next_revision)

    def deliver(self, batch: Batch, fragment_bytes: int, has_prev_kv: bool, effects: list[Effect]) -> None:
        """Send a batch to the watches that need it, and advance past it."""
        ahead = self._ahead
        if ahead and ahead[0].position <= batch.first_revision:
            # There are no events between next_revision and the batch, so watches with a position there are in step.
            self._meet(batch.first_revision)
        variants: Variants | None = None
        if len(batch.events) > 1 or len(self.groups) > 1:
            variants = Variants(batch.header, batch.events, fragment_bytes, has_prev_kv)
        stats = self._stats
        for variant, group in self.groups.items():
            count = len(group.members)
            if count:
                # One event for one group is the common case.
                payload = payload_of_one(batch, variant, has_prev_kv) if variants is None else variants.payload(variant)
                if payload is not None:
                    group.sent_revision = payload.last_revision
                    effects.append(Deliver(payload, group._listed or group.listed()))
                    stats.delivered += count
                    stats.delivered_events += count * payload.event_count
        self.next_revision = batch.last_revision + 1
        if ahead:
            if ahead[0].position <= batch.last_revision:
                self._deliver_parts(batch, fragment_bytes, has_prev_kv, effects)
            self._meet(self.next_revision)

    def _deliver_parts(self, batch: Batch, fragment_bytes: int, has_prev_kv: bool, effects: list[Effect]) -> None:
        """Send watches whose position lies inside the batch the part of it from there on."""
        variants: Variants | None = None
        position = 0
        for watch in self._arrived(batch.last_revision):
            if variants is None or watch.position != position:
                position = watch.position
                part = batch.since(position)
                assert part is not None, "the position lies inside the batch"
                variants = Variants(part.header, part.events, fragment_bytes, has_prev_kv)
            payload = variants.payload(watch.variant)
            if payload is not None:
                watch.sent_revision = payload.last_revision
                effects.append(Deliver(payload, (watch,)))
                self._stats.delivered += 1
                self._stats.delivered_events += payload.event_count
            self._step(watch)

    def _meet(self, revision: int) -> None:
        """Put the watches in step whose position is `revision` at most; there are no events before `revision`."""
        for watch in self._arrived(revision):
            self._step(watch)

    def _arrived(self, revision: int) -> Iterator[Watch]:
        """Pop the watches from the heap whose position is `revision` at most, in the order of positions."""
        while self._ahead and self._ahead[0].position <= revision:
            watch = heapq.heappop(self._ahead).watch
            if watch is not None:
                watch.ahead = None
                self._ahead_count -= 1
                yield watch

    def _step(self, watch: Watch) -> None:
        group = self.groups.get(watch.variant)
        if group is None:
            group = self.groups[watch.variant] = Group(watch.variant)
        group.add(watch)
        watch.group = group
        watch.place = Place.IN_STEP
