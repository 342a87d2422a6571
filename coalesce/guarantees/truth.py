"""The real changes of the store, which the guarantee checkers compare watches with.

Indexed by revision and by key, and cut to ranges and filters once each, so that checking a thousand watches of the same
few ranges costs one list comparison per watch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

PUT = 0
DELETE = 1


class PreviousValue(NamedTuple):
    """The value a key had before a change (prev_kv)."""

    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


class Change(NamedTuple):
    """One event as a client decodes it.

    A DELETE carries the key and `mod_revision` only, as on the wire; the other numbers are 0 and the value empty.
    A tuple, so that comparing two histories runs at C speed.
    """

    kind: int
    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int
    prev: PreviousValue | None = None


@dataclass(slots=True)
class _View:
    """The truth as one kind of watch should receive it: its range, its filters, its prev_kv."""

    changes: list[Change]
    revisions: list[int]


class WatchedRange(NamedTuple):
    """The range [key, range_end) and options that a watch requested: its filters, and whether with prev_kv."""

    key: bytes
    range_end: bytes = b""
    no_put: bool = False
    no_delete: bool = False
    prev_kv: bool = False


class Truth:
    """Every change of the store, and every revision it was compacted at.

    `changes` are ordered by revision, and within a revision in the order of the operations. If a change has no `prev`
    and an earlier change of its key is known, the previous value is taken from that one.
    """

    def __init__(self, changes: Iterable[Change], compact_revisions: Iterable[int] = ()) -> None:
        self.compact_revisions: list[int] = list(compact_revisions)
        self.changes: list[Change] = []
        self._by_identity: dict[tuple[int, bytes], Change] = {}
        self._positions: dict[bytes, list[int]] = {}
        self._prev_unknown: set[tuple[int, bytes]] = set()
        self._views: dict[WatchedRange, _View] = {}
        latest: dict[bytes, Change] = {}
        revision = 0
        for change in changes:
            if change.mod_revision < revision:
                raise ValueError(f"the truth goes back from revision {revision} to {change.mod_revision}")
            revision = change.mod_revision
            self._add(change, latest.get(change.key))
            latest[change.key] = change
        self._keys: list[bytes] = sorted(self._positions)

    def _add(self, change: Change, before: Change | None) -> None:
        if change.prev is None:
            if before is not None and before.kind == PUT:
                change = change._replace(prev=PreviousValue(*before[2:7]))
            elif change.kind == DELETE or change.version > 1:
                self._prev_unknown.add((change.mod_revision, change.key))
        self._by_identity[change.mod_revision, change.key] = change
        self._positions.setdefault(change.key, []).append(len(self.changes))
        self.changes.append(change)

    @property
    def compact_revision(self) -> int:
        """The highest revision the store was compacted at, 0 if it never was."""
        return max(self.compact_revisions, default=0)

    def find(self, revision: int, key: bytes) -> Change | None:
        """Return the change of `key` at `revision`, if the store made one."""
        return self._by_identity.get((revision, key))

    def prev_known(self, change: Change) -> bool:
        """Return whether the value before this change is known (recordings may start in the middle)."""
        return (change.mod_revision, change.key) not in self._prev_unknown

    def expected(self, asked: WatchedRange, first: int, last: int) -> list[Change]:
        """Return the changes that a watch must receive with revisions from `first` to `last`, both inclusive."""
        return _cut(self._view(asked), first, last)

    def _view(self, asked: WatchedRange) -> _View:
        view = self._views.get(asked)
        if view is None:
            keys = self._keys_of(asked.key, asked.range_end)
            changes = [self.changes[place] for place in sorted(place for key in keys for place in self._positions[key])]
            if asked.no_put or asked.no_delete:
                refused = PUT if asked.no_put else DELETE
                both = asked.no_put and asked.no_delete
                changes = [] if both else [change for change in changes if change.kind != refused]
            if not asked.prev_kv:
                changes = [change._replace(prev=None) for change in changes]
            view = self._views[asked] = _View(changes, [change.mod_revision for change in changes])
        return view

    def _keys_of(self, key: bytes, range_end: bytes) -> Sequence[bytes]:
        if not range_end:
            return [key or b"\0"] if (key or b"\0") in self._positions else []
        first = bisect_left(self._keys, key)
        return self._keys[first:] if range_end == b"\0" else self._keys[first : bisect_left(self._keys, range_end)]


def _cut(view: _View, first: int, last: int) -> list[Change]:
    return view.changes[bisect_left(view.revisions, first) : bisect_right(view.revisions, last)]


def in_range(key: bytes, first: bytes, range_end: bytes) -> bool:
    """Return whether `key` lies in an etcd range: an empty range_end is the one key, `\\0` all keys from `first` on."""
    if not range_end:
        return key == (first or b"\0")
    return key >= first and (range_end == b"\0" or key < range_end)
