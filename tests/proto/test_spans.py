"""Ranges of keys, and the span index compared with a linear search."""

from __future__ import annotations

from random import Random

import pytest

from proto.spans import FROM_KEY, Span, SpanIndex, is_in, prefix_end, prefix_of


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
            assert sorted(index.around(key)) == sorted(span for span in spans if is_in(key, span))
        assert len(index) == len(spans)
        assert index.get(span) == (span if span in spans else None)


@pytest.mark.parametrize(
    ("prefix", "end"),
    [(b"a", b"b"), (b"/a/", b"/a0"), (b"a\xff", b"b"), (b"\xff\xff", FROM_KEY), (b"", FROM_KEY), (b"a\xff\xff", b"b")],
)
def test_the_end_of_a_prefix(prefix: bytes, end: bytes) -> None:
    assert prefix_end(prefix) == end
    keys = [bytes(key) for key in ([0], [96], [97], [97, 255], [97, 255, 255], [97, 255, 255, 1], [98], [255, 255, 3])]
    span = (prefix or b"\x00", end)
    assert [is_in(key, span) for key in keys] == [key.startswith(prefix) for key in keys]
    assert prefix_of(*span) == prefix


@pytest.mark.parametrize("span", [(b"a", b""), (b"a", b"c"), (b"a", FROM_KEY), (b"a", b"a\x00"), (b"\x00", b"b")])
def test_other_ranges_are_not_those_of_a_prefix(span: Span) -> None:
    assert prefix_of(*span) is None
