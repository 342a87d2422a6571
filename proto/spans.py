"""Ranges of keys as on the wire, and the index of ranges by the keys they contain: it finds the watchers of a change.

The index holds thousands of ranges; every write searches it, and the creation and end of every watch changes it. So it
is an array of ranges sorted by start, under a tree of the largest ends that is built all at once,
plus a small overlay of ranges added since, which is searched linearly. Once the searches of the overlay have cost as
much as a rebuild, the tree is rebuilt; a burst of creations without writes costs nothing.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable
from typing import Final, Generic, TypeVar

FROM_KEY: Final = b"\x00"
"""As a range_end: every key from `key` on."""

T = TypeVar("T")

Span = tuple[bytes, bytes]
"""(key, range_end) as on the wire: range_end b"" = the key alone, FROM_KEY = without end."""


def prefix_end(prefix: bytes) -> bytes:
    """Return the range_end of all keys with a prefix, as etcd's clients compute it (clientv3's WithPrefix)."""
    head = prefix.rstrip(b"\xff")
    return head[:-1] + bytes((head[-1] + 1,)) if head else FROM_KEY


def prefix_of(key: bytes, range_end: bytes) -> bytes | None:
    """Return the prefix whose keys are exactly those of a range; None if there is none."""
    if key == FROM_KEY and range_end == FROM_KEY:
        # No key is empty, so every key is at or above b"\x00".
        return b""
    return key if range_end and key and prefix_end(key) == range_end else None


def is_in(key: bytes, span: Span) -> bool:
    """Whether a key is in a range."""
    start, range_end = span
    if not range_end:
        return key == start
    return key >= start and (range_end == FROM_KEY or key < range_end)


class SpanIndex(Generic[T]):
    """A map from spans to values that also finds the values of all spans that contain a key."""

    __slots__ = ("_endless", "_fresh", "_placed", "_search_work", "_starts", "_tree", "_values")

    def __init__(self) -> None:
        self._values: dict[Span, T] = {}
        # Spans with an end, sorted, as of the last build of the tree; a search skips those no longer in _values.
        self._placed: list[Span] = []
        self._starts: list[bytes] = []
        # A segment tree over _placed: _tree[i] is the larger of _tree[2i] and _tree[2i+1], the leaves are the ends.
        self._tree: list[bytes] = []
        # Spans with an end that were added since.
        self._fresh: dict[Span, None] = {}
        # Spans without an end, sorted.
        self._endless: list[Span] = []
        # Number of fresh spans compared since the tree was built.
        self._search_work = 0

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> Iterable[T]:
        """All values."""
        return self._values.values()

    def get(self, span: Span) -> T | None:
        """Return the value of exactly this span."""
        return self._values.get(span)

    def add(self, span: Span, value: T) -> None:
        """Add a span that is not present."""
        assert span not in self._values
        self._values[span] = value
        if span[1] == FROM_KEY:
            insort(self._endless, span)
        elif span[1] and not self._is_placed(span):
            self._fresh[span] = None

    def remove(self, span: Span) -> None:
        """Remove a span that is present."""
        del self._values[span]
        if span[1] == FROM_KEY:
            self._endless.remove(span)
        else:
            self._fresh.pop(span, None)
            if len(self._placed) > 2 * len(self._values) + 16:
                self._build()

    def around(self, key: bytes) -> list[T]:
        """Return the values of all spans that contain the key."""
        values = self._values
        found: list[T] = []
        if (alone := values.get((key, b""))) is not None:
            found.append(alone)
        for span in self._endless:
            if span[0] > key:
                break
            found.append(values[span])
        if self._fresh:
            self._search_work += len(self._fresh)
            if self._search_work > len(values):
                self._build()
            else:
                found.extend(values[span] for span in self._fresh if span[0] <= key < span[1])
        if self._placed:
            self._descend(key, found)
        return found

    def _is_placed(self, span: Span) -> bool:
        at = bisect_right(self._placed, span) - 1
        return at >= 0 and self._placed[at] == span

    def _build(self) -> None:
        self._placed = sorted(span for span in self._values if span[1] and span[1] != FROM_KEY)
        self._starts = [span[0] for span in self._placed]
        self._fresh.clear()
        self._search_work = 0
        size = 1
        while size < len(self._placed):
            size *= 2
        tree = [b""] * size + [span[1] for span in self._placed] + [b""] * (size - len(self._placed))
        for node in range(size - 1, 0, -1):
            tree[node] = max(tree[2 * node], tree[2 * node + 1])
        self._tree = tree

    def _descend(self, key: bytes, found: list[T]) -> None:
        """Collect the placed spans that start at or before the key and end after it."""
        before = bisect_right(self._starts, key)
        if not before:
            return
        tree, size = self._tree, len(self._tree) // 2
        # (node, first leaf below it, leaves below it)
        stack = [(1, 0, size)]
        while stack:
            node, first, leaves = stack.pop()
            if first >= before or tree[node] <= key:
                continue
            if leaves == 1:
                if (value := self._values.get(self._placed[first])) is not None:
                    found.append(value)
                continue
            half = leaves // 2
            stack.append((2 * node + 1, first + half, half))
            stack.append((2 * node, first, half))
