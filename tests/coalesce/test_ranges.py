"""The index of ranges and the choice of covers, compared with linear searches."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from coalesce.ranges import CoverTable, RangeIndex, contains
from proto.spans import FROM_KEY, Span, is_in, prefix_end

ALPHABET = (b"a", b"b", b"\xff")
# All keys of at most three letters: small enough to compare sets of keys.
KEYS = [b"".join(letters) for size in (1, 2, 3) for letters in product(ALPHABET, repeat=size)]


def some_span(rng: Random) -> Span:
    start = rng.choice(KEYS)
    kind = rng.randrange(6)
    if kind < 2:
        return start, b""
    if kind == 2:
        return start, prefix_end(start)
    if kind == 3:
        return rng.choice([(start, FROM_KEY), (FROM_KEY, FROM_KEY)])
    if kind == 4:
        return start, start + b"\x00"
    end = rng.choice(KEYS)
    return (start, end) if start < end else (start, start + b"\xff\xff")


def keys_of(span: Span) -> set[bytes]:
    return {key for key in KEYS if is_in(key, span)}


@pytest.mark.parametrize("seed", range(40))
def test_ranges_found_match_a_linear_search(seed: int) -> None:
    rng = Random(seed)
    index: RangeIndex[Span] = RangeIndex()
    spans: set[Span] = set()
    for _ in range(300):
        span = some_span(rng)
        assert index.get(span) == (span if span in spans else None)
        if span in spans:
            spans.remove(span)
            index.remove(span)
        else:
            spans.add(span)
            index.add(span, span)
        key = rng.choice(KEYS)
        assert sorted(index.find(key)) == sorted(span for span in spans if is_in(key, span))
        assert len(index) == len(spans)
        assert set(index.values()) == spans


@pytest.mark.parametrize("seed", range(40))
def test_the_chosen_cover_is_the_longest_that_contains_the_range(seed: int) -> None:
    rng = Random(seed)
    prefixes = {rng.choice([*KEYS, b""]) for _ in range(rng.randint(0, 6))}
    table = CoverTable(tuple(prefixes))
    for _ in range(100):
        span = some_span(rng)
        fitting = [prefix for prefix in prefixes if contains(prefix, *span)]
        chosen = table.choose(*span)
        assert chosen == max(fitting, key=len, default=None)


@pytest.mark.parametrize("seed", range(10))
def test_a_prefix_contains_a_range_if_it_contains_its_keys(seed: int) -> None:
    rng = Random(seed)
    for _ in range(300):
        prefix, span = rng.choice([*KEYS, b""])[:2], some_span(rng)
        # What is just below the end is what a comparison of short keys would miss.
        end = span[1]
        below = end[:-1] + bytes((end[-1] - 1,)) + b"\xff\xff" if end and end[-1] else end[:-1]
        keys = keys_of(span) | {span[0], below if is_in(below, span) else span[0]}
        if span[1] == FROM_KEY:
            keys.add(b"\xff\xff\xff")
        assert contains(prefix, *span) == all(key.startswith(prefix) for key in keys)


def test_the_cover_of_all_keys_contains_every_range() -> None:
    table = CoverTable((b"", b"/a/"))
    assert table.choose(FROM_KEY, FROM_KEY) == b""
    assert table.choose(b"/a/x", b"") == b"/a/"
    assert table.choose(b"/a/", b"/a0") == b"/a/"
    assert table.choose(b"/a/", b"/a1") == b""
    assert table.choose(b"/a/x", FROM_KEY) == b""
    assert CoverTable().choose(b"/a/", b"") is None
    assert not contains(b"/a/", b"/a", b"")
