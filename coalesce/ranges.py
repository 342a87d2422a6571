"""The ranges below a cover, found by the key of an event.

A cover has up to hundreds of thousands of ranges: most are single keys, some are prefixes, few are anything else. So
single keys are in a dict, prefixes in a dict that is searched once for each length in use, and all others in a
`SpanIndex`. Nothing walks over the ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Generic, TypeAlias, TypeVar

from proto.spans import FROM_KEY, Span, SpanIndex, prefix_end, prefix_of

T = TypeVar("T")

TrunkName: TypeAlias = tuple[bytes, ...]
"""What identifies a trunk: its range; that of a cover has a further item."""


class CoverBranch(Generic[T]):
    """The watches of one range below a cover. It has no position and no history: these are the cover's."""

    __slots__ = ("groups", "key", "range_end", "watches")

    def __init__(self, key: bytes, range_end: bytes) -> None:
        self.key = key
        self.range_end = range_end
        # Number of its watches, in any place.
        self.watches = 0
        # The groups of those in step, by their keys; no group is empty.
        self.groups: dict[object, T] = {}

    @property
    def span(self) -> Span:
        """Its range, as on the wire."""
        return self.key, self.range_end


class RangeIndex(Generic[T]):
    """A map from ranges to values that finds the values of all ranges that contain a key."""

    __slots__ = ("_lengths", "_others", "_prefixes", "keys")

    def __init__(self) -> None:
        # The values of single keys.
        self.keys: dict[bytes, T] = {}
        self._prefixes: dict[bytes, T] = {}
        # How many prefixes have each length.
        self._lengths: dict[int, int] = {}
        self._others: SpanIndex[T] = SpanIndex()

    def __len__(self) -> int:
        return len(self.keys) + len(self._prefixes) + len(self._others)

    def values(self) -> Iterator[T]:
        """Walk all values."""
        yield from self.keys.values()
        yield from self._prefixes.values()
        yield from self._others.values()

    def get(self, span: Span) -> T | None:
        """Return the value of exactly this range."""
        if not span[1]:
            return self.keys.get(span[0])
        prefix = prefix_of(*span)
        return self._others.get(span) if prefix is None else self._prefixes.get(prefix)

    def add(self, span: Span, value: T) -> None:
        """Add a range that is not present."""
        prefix = prefix_of(*span)
        if not span[1]:
            self.keys[span[0]] = value
        elif prefix is None:
            self._others.add(span, value)
        else:
            self._prefixes[prefix] = value
            self._lengths[len(prefix)] = self._lengths.get(len(prefix), 0) + 1

    def remove(self, span: Span) -> None:
        """Remove a range that is present."""
        prefix = prefix_of(*span)
        if not span[1]:
            del self.keys[span[0]]
        elif prefix is None:
            self._others.remove(span)
        else:
            del self._prefixes[prefix]
            self._lengths[len(prefix)] -= 1
            if not self._lengths[len(prefix)]:
                del self._lengths[len(prefix)]

    def find(self, key: bytes) -> list[T]:
        """Return the values of all ranges that contain the key."""
        alone = self.keys.get(key)
        found = [] if alone is None else [alone]
        for length in self._lengths:
            value = self._prefixes.get(key[:length]) if length <= len(key) else None
            if value is not None:
                found.append(value)
        if len(self._others):
            found += self._others.around(key)
        return found


class CoverTable:
    """The configured covers: prefixes below which all ranges share one upstream watch."""

    def __init__(self, prefixes: Iterable[bytes] = ()) -> None:
        self.prefixes = frozenset(prefixes)
        # Those that etcd has refused, each with the time when it is tried again.
        self.suspended: dict[bytes, float] = {}
        # Longest first.
        self._lengths = sorted({len(prefix) for prefix in self.prefixes}, reverse=True)

    def choose(self, key: bytes, range_end: bytes, now: float = 0.0) -> bytes | None:
        """Return the longest prefix that contains a range, of those that are not suspended; None if there is none."""
        for length in self._lengths:
            prefix = key[:length]
            configured = prefix in self.prefixes and self.suspended.get(prefix, now) <= now
            if configured and contains(prefix, key, range_end):
                return prefix
        return None


def contains(prefix: bytes, key: bytes, range_end: bytes) -> bool:
    """Whether all keys of a range have this prefix."""
    if not key.startswith(prefix):
        return False
    end = prefix_end(prefix)
    return end == FROM_KEY or not range_end or (range_end != FROM_KEY and range_end <= end)


def span_of(prefix: bytes) -> Span:
    """Return the range of all keys with a prefix, as on the wire."""
    return prefix or FROM_KEY, prefix_end(prefix)
