"""The lists of groups: the watches of a group as a tuple, which is kept for its further events.

All lists that are kept are bounded together. The event loop stands still while Python's garbage collector examines the
objects made since its last collection, and with them each reference in a new list: with a list for each of 3,000 groups
of 3,500 watches, one collection took 126 ms. To list a watch takes 10 ns, its event at least 170.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from coalesce.model import Group, GroupWatches, Watch

LISTED_MIN: Final = 32
"""Watches of a group whose list is kept: for so many, ordering them by connection is worth it as well."""

LISTED_WATCHES_MAX: Final = 100_000
"""Maximum watches in all lists that are kept, but a single list may be longer. The collector examines so many in 5 ms,
and the shell's order of them in a few more."""


class GroupLists:
    """The lists that are kept: those made last."""

    __slots__ = ("sizes", "watches")

    def __init__(self) -> None:
        # The groups with a list, and the watches in it, the oldest list first. A group that has changed since, and so
        # has no list, counts for as long as it is here.
        self.sizes: dict[Group, int] = {}
        # The sum of `sizes`.
        self.watches = 0

    def of(self, group: Group) -> Sequence[Watch]:
        """Return the watches of a group; the list is kept if the group is large."""
        if group.listed is not None:
            return group.listed
        size = len(group.members)
        if size < LISTED_MIN:
            return tuple(group.members)
        group.listed = listed = GroupWatches(group.members)
        sizes = self.sizes
        self.watches += size - sizes.pop(group, 0)
        sizes[group] = size
        while self.watches > LISTED_WATCHES_MAX and len(sizes) > 1:
            oldest = next(iter(sizes))
            self.watches -= sizes.pop(oldest)
            oldest.listed = None
        return listed

    def forget(self, group: Group) -> None:
        """Drop a group that has no watch any more: it would keep its session in memory."""
        self.watches -= self.sizes.pop(group, 0)
