"""Covers: one upstream watch of a prefix, for the watches of all ranges below it.

A cover is a trunk whose watches have ranges of their own. The watches of one range are a *branch*. A branch has no
upstream watch: its events are those of the cover that have its keys. It has no position, bookmark or history either,
since these are the cover's: a bookmark moves a hundred thousand branches in one step, and an event costs the branches
whose keys it has, which `RangeIndex` finds. A revision with many keys reaches each branch whole, with its own keys.

A cover does not change whether it asks etcd for prev_kv; it needs no upgrade. There is one cover for watches that want
prev_kv and one for those that do not: the second is only used while the first is not open, and its watches move to the
first as soon as that can serve them (see `moving`).

Etcd checks the permission for the whole prefix, so a cover is never registered with the token of a client: only with
that of the proxy's own user, or with none while auth is off.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from zlib import crc32

from coalesce.batch import Batch
from coalesce.history import History, HistoryBudget, Replayed
from coalesce.limits import CoreLimits
from coalesce.model import Group, Session, Trunk, Watch
from coalesce.ranges import CoverBranch, RangeIndex, TrunkName, span_of
from coalesce.stats import CoverStats
from proto.event_key import event_key
from proto.spans import Span

# Replays of at most so many batches examine all of them; longer ones use the index by key.
SCANNED_BATCHES_MAX = 32
# Chains of the index: a long history has 20,000 small batches, about five for each.
_CHAINS = 4096
# Memory of an entry of the index: two numbers, and the spare room of the arrays.
_ENTRY_BYTES = 13
# The index is at most this part of its history. The entries of the batches held always fit, since an event counts for
# more than 8 * _ENTRY_BYTES; those of evicted batches may not.
_INDEX_SHARE = 8
# Entries that are walked as quickly as one event is examined.
_WALKED_PER_EVENT = 8


class KeyedHistory(History):
    """A history of many keys, with an index for replays of a single key.

    The index is extended when a replay needs it, by a bounded number of events at a time. It holds revisions, not
    batches, so that batches are freed when they are evicted. It is coarse, so that its size does not depend on the
    keys: keys with one hash share a chain of entries, newest first, and a replay filters the batches found. Entries of
    evicted batches stay, until the index would exceed its share: then it is built again.
    """

    __slots__ = ("_before", "_heads", "_indexed_through", "_lasts_of_entries")

    def __init__(self, ledger: HistoryBudget, floor: int, has_prev_kv: bool) -> None:
        super().__init__(ledger, floor, has_prev_kv)
        # By entry, the last revision of its batch, and the next older entry of its chain; -1: the chain ends.
        self._lasts_of_entries = array("q")
        self._before = array("i")
        # By chain, its newest entry; empty before the first.
        self._heads = array("i")
        # Last revision of the newest batch in the index.
        self._indexed_through = 0

    @property
    def index_bytes(self) -> int:
        """Memory of the index, in addition to `bytes`: at most an eighth of that. (It has another 16 KiB.)"""
        return _ENTRY_BYTES * len(self._before)

    @property
    def index_bytes_max(self) -> int:
        """The bound of `index_bytes`."""
        return self.bytes // _INDEX_SHARE

    def drop(self, floor: int) -> None:
        """Evict everything and continue at `floor`."""
        super().drop(floor)
        self._clear()

    def discard(self) -> None:
        """Let the budget evict everything: the source has ended."""
        super().discard()
        self._clear()

    def evict_oldest(self) -> None:
        """Evict the oldest batch, and raise the floor above it."""
        super().evict_oldest()
        if self.index_bytes > self.index_bytes_max:
            self._clear()

    def replay_key(self, position: int, variant: int, limits: CoreLimits, key: bytes) -> Replayed:
        """Return what `replay` returns for the range of this key alone.

        The result may have neither a payload nor progress: the index has to be extended further, in another turn.
        """
        if self.count_since(position) <= SCANNED_BATCHES_MAX:
            return self.replay(position, variant, limits, (key, b""))
        looked = self._extend(limits.replay_events_max)
        if self._indexed_through < self.newest.last_revision:
            return Replayed(None, position, looked)
        lasts = self._find(key, position)
        looked += len(lasts) // _WALKED_PER_EVENT
        replayed = self._replay(self.batches_at(lasts), position, variant, limits, (key, b""))
        return replayed._replace(looked=replayed.looked + looked)

    def _find(self, key: bytes, position: int) -> list[int]:
        """Return the last revisions of the batches since `position` that may have this key, oldest first."""
        found = []
        entry = self._heads[_chain_of(key)]
        while entry >= 0 and self._lasts_of_entries[entry] >= position:
            found.append(self._lasts_of_entries[entry])
            entry = self._before[entry]
        found.reverse()
        return found

    def _extend(self, events_max: int) -> int:
        """Extend the index by at most so many events, but at least by one batch; return their number."""
        if not self._heads:
            self._heads = array("i", [-1]) * _CHAINS
        looked = 0
        for batch in self.since(self._indexed_through + 1):
            if looked and looked + len(batch.events) > events_max:
                break
            for chain in {_chain_of(event_key(event.encoded)) for event in batch.events}:
                self._before.append(self._heads[chain])
                self._heads[chain] = len(self._lasts_of_entries)
                self._lasts_of_entries.append(batch.last_revision)
            looked += len(batch.events)
            self._indexed_through = batch.last_revision
            # Cached results may have waited for this.
            self.version += 1
        if self.index_bytes > self.index_bytes_max:
            self._clear()
        return looked

    def _clear(self) -> None:
        self._heads, self._before, self._lasts_of_entries = array("i"), array("i"), array("q")
        self._indexed_through = 0


def _chain_of(key: bytes) -> int:
    return crc32(key) % _CHAINS


class Cover(Trunk):
    """The upstream watch of a prefix, its history, and the watches of all ranges below it."""

    __slots__ = ("awaited", "index", "keyed", "prefix", "prev_kv", "retired", "stats")

    is_cover = True

    def __init__(self, prefix: bytes, history: KeyedHistory, stats: CoverStats, now: float) -> None:
        super().__init__(*span_of(prefix), history, now)
        self.prefix = prefix
        # The same object as `history`.
        self.keyed = history
        self.prev_kv = history.has_prev_kv
        self.stats = stats
        # The branches; each has a watch.
        self.index: RangeIndex[CoverBranch[Group]] = RangeIndex()
        # Its watches are to move to trunks of their own.
        self.retired = False
        # Watches of other trunks are to move to it.
        self.awaited = False

    @property
    def name(self) -> TrunkName:
        """What identifies it among the trunks."""
        return cover_name(self.prefix, self.prev_kv)

    @property
    def is_used(self) -> bool:
        """Whether watches or creates need it."""
        return bool(self.watches or self.joining or self.awaited)

    def join(self, watch: Watch, span: Span) -> None:
        """Add a watch of a range that it contains."""
        super().join(watch, span)
        branch = self.index.get(span)
        if branch is None:
            branch = CoverBranch(*span)
            self.index.add(span, branch)
        branch.watches += 1
        watch.branch = branch

    def quit(self, watch: Watch) -> None:
        """Remove a watch."""
        super().quit(watch)
        branch = watch.branch
        assert branch is not None, "each watch of a cover has a branch"
        branch.watches -= 1
        if not branch.watches:
            self.index.remove(branch.span)

    def groups_of(self, watch: Watch) -> dict[object, Group]:
        """Return the groups of which one is that of this watch while it is in step."""
        assert watch.branch is not None, "each watch of a cover has a branch"
        return watch.branch.groups

    def replay(self, watch: Watch, limits: CoreLimits) -> Replayed:
        """Join the events that a watch has missed into one response, see `History.replay`."""
        branch = watch.branch
        assert branch is not None, "each watch of a cover has a branch"
        if branch.range_end:
            return self.history.replay(watch.next_revision, watch.variant, limits, branch.span)
        return self.keyed.replay_key(watch.next_revision, watch.variant, limits, branch.key)

    def branches_of(self, batch: Batch) -> Iterable[CoverBranch[Group]]:
        """Return the branches that have keys of a batch."""
        return {branch: None for event in batch.events for branch in self.index.find(event_key(event.encoded))}

    def sessions(self) -> Iterator[Session]:
        """None: a client's token is never used for a cover."""
        yield from ()


def cover_name(prefix: bytes, prev_kv: bool) -> TrunkName:
    """Return the name of a cover among the trunks."""
    return (*span_of(prefix), b"prev_kv" if prev_kv else b"")
