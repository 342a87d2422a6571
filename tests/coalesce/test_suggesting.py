"""Suggestions of covers, and the judgement of one."""

from __future__ import annotations

import pytest

from coalesce.suggesting import RANGES_MIN, Suggestion, costs_more_than_it_saves, suggest
from proto.spans import Span, prefix_end


def below(prefix: bytes, count: int) -> list[Span]:
    return [(prefix + b"node%d" % place, b"") for place in range(count)]


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [
        ([], []),
        (below(b"/s/", RANGES_MIN - 1), []),
        (below(b"/s/", 30), [(b"/s/", 30)]),
        # No prefix of these names anything.
        (below(b"/", 30), []),
        # The longest prefix with nearly all ranges.
        (below(b"/app/locks/", 95) + below(b"/app/x/", 5), [(b"/app/locks/", 95)]),
        # Neither part is nearly all: the common prefix.
        (below(b"/app/a/", 50) + below(b"/app/b/", 50), [(b"/app/", 100)]),
        # The larger one first.
        (below(b"/a/", 25) + below(b"b:c:", 40), [(b"b:c:", 40), (b"/a/", 25)]),
        # Prefixes of their own, and a range that is wider than the prefix.
        ([(b"/s/%d/" % place, prefix_end(b"/s/%d/" % place)) for place in range(40)], [(b"/s/", 40)]),
        ([*below(b"/s/", 30), (b"/s/x", b"\x00")], [(b"/s/", 30)]),
        # The first eight prefixes of a long key.
        (below(b"/s/" + b"x/" * 200, 30), [(b"/s/" + b"x/" * 7, 30)]),
    ],
)
def test_suggested_covers(spans: list[Span], wanted: list[Suggestion]) -> None:
    assert suggest(spans) == wanted


def test_a_cover_is_judged_by_what_no_client_watches() -> None:
    assert not costs_more_than_it_saves(0, 60.0, 1)
    assert costs_more_than_it_saves(1, 60.0, 1)
    assert not costs_more_than_it_saves(10_000, 100.0, 3_000)
    assert costs_more_than_it_saves(100_000, 100.0, 3_000)
