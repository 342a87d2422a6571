"""The span index compared with a linear search."""

from __future__ import annotations

from random import Random

import pytest

from upstream.store.index import FROM_KEY
from upstream.store.spans import Span, SpanIndex


def contains(span: Span, key: bytes) -> bool:
    start, range_end = span
    if not range_end:
        return key == start
    return key >= start and (range_end == FROM_KEY or key < range_end)


def some_key(rng: Random) -> bytes:
    return bytes(rng.choice(b"abc") for _ in range(rng.randint(1, 3)))


def some_span(rng: Random) -> Span:
    start = some_key(rng)
    kind = rng.random()
    if kind < 0.3:
        return start, b""
    if kind < 0.4:
        return start, FROM_KEY
    end = some_key(rng)
    return (start, end) if start < end else (start, start + b"\xff")


@pytest.mark.parametrize("seed", range(50))
def test_results_match_a_linear_search(seed: int) -> None:
    rng = Random(seed)
    index: SpanIndex[Span] = SpanIndex()
    spans: set[Span] = set()
    for _ in range(300):
        span = some_span(rng)
        if span in spans:
            spans.remove(span)
            index.remove(span)
        elif rng.random() < 0.6:
            spans.add(span)
            index.add(span, span)
        if rng.random() < 0.5:
            key = some_key(rng)
            assert sorted(index.around(key)) == sorted(span for span in spans if contains(span, key))
        assert len(index) == len(spans)
        assert index.get(span) == (span if span in spans else None)
