"""Which covers would save upstream watches, and whether one that exists costs more than it saves.

A suggestion is a prefix that ends at a separator, so that it means something to the operator, and that many watched
ranges have in common. Of prefixes with nearly the same ranges the longest is suggested: it brings the fewest events
that no client watches.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from coalesce.ranges import contains
from proto.spans import Span

# Fewer ranges are not worth a setting.
RANGES_MIN: Final = 20
SUGGESTIONS_MAX: Final = 5
# A longer prefix is suggested instead if it has at least this share of the ranges.
_SHARE: Final = 0.9
# Prefixes of one key that are considered, and the part of a key that is looked at.
_PREFIXES_MAX: Final = 8
_KEY_BYTES_MAX: Final = 256
# What each byte is: "a" of a name, as are all bytes above ASCII, or "/", a separator.
_KINDS: Final = bytes([b"/a"[byte >= 0x80 or chr(byte).isalnum()] for byte in range(256)])
# An upstream watch that a cover saves is worth this many events a second that no client watches.
EVENTS_PER_WATCH_S: Final = 0.1


class Suggestion(NamedTuple):
    """A cover that would save upstream watches."""

    prefix: bytes
    ranges: int
    """Watched ranges below it; one upstream watch would be left of them."""


def suggest(spans: Iterable[Span]) -> list[Suggestion]:
    """Return covers for these ranges, which have an upstream watch each; those that save most come first."""
    counts: dict[bytes, int] = {}
    for key, range_end in spans:
        for prefix in _prefixes(key):
            if contains(prefix, key, range_end):
                counts[prefix] = counts.get(prefix, 0) + 1
    fitting = sorted((prefix for prefix, count in counts.items() if count >= RANGES_MIN), key=len)
    chosen: list[Suggestion] = []
    for prefix in fitting:
        if any(prefix.startswith(each.prefix) or each.prefix.startswith(prefix) for each in chosen):
            continue
        enough = _SHARE * counts[prefix]
        best = max((each for each in fitting if each.startswith(prefix) and counts[each] >= enough), key=len)
        chosen.append(Suggestion(best, counts[best]))
    return sorted(chosen, key=lambda each: -each.ranges)[:SUGGESTIONS_MAX]


def _prefixes(key: bytes) -> list[bytes]:
    """Return the prefixes of a key that end at a separator and name something."""
    key = key[:_KEY_BYTES_MAX]
    kinds = key.translate(_KINDS)
    end = kinds.find(b"a")
    found: list[bytes] = []
    while end >= 0 and len(found) < _PREFIXES_MAX and (end := kinds.find(b"/", end) + 1):
        found.append(key[:end])
    return found


def costs_more_than_it_saves(unwanted_events: int, seconds: float, branches: int) -> bool:
    """Whether a cover brings more events that no client watches than the upstream watches it saves are worth."""
    return seconds > 0 and unwanted_events / seconds > EVENTS_PER_WATCH_S * max(0, branches - 1)
